"""A thread that runs a model for many requests: rows with different adapters share a forward.

Rows wait in a bounded queue. The thread takes rows whose adapters are in the pool, up to a number of rows and of padded
tokens, and runs one forward under ``pool.route``. An embedding ends after one forward; completions continue token by
token, and new rows join between two tokens if the model's cache can hold rows side by side. Meanwhile a second thread
reads the adapters of other rows; the first puts them into the pool between two forwards, when none is in use there.

:mod:`lowrank_ops.serving.http` is its HTTP side; this module needs torch and, for the cache, transformers.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..adapters.peft_files import CONFIG, TENSORS
from .generation import Decoder, Generation
from .mixtures import names_of
from .pool import AdapterPool, ReadAdapter
from .pooling import Pooling
from .rows import Row, padded

_LOG = logging.getLogger("lowrank_ops")


class UnknownAdapterError(Exception):
    """The served directory has no adapter of that name."""


class AdapterError(Exception):
    """An adapter exists but cannot be loaded or does not fit into the pool."""


class QueueFullError(Exception):
    """The queue holds as many rows as it may."""


class ClosedError(Exception):
    """The engine is shutting down and takes no new rows."""


_Files = tuple[tuple[int, int, int] | None, ...]


def _files(adapter: Path) -> _Files:
    """Fingerprint (mtime, size, inode) of an adapter's files, to notice replacement."""

    def stat(file: Path) -> tuple[int, int, int] | None:
        try:
            found = file.stat()
        except OSError:
            return None
        return found.st_mtime_ns, found.st_size, found.st_ino

    return stat(adapter / CONFIG), stat(adapter / TENSORS)


def is_name(name: str) -> bool:
    """Tell whether the name of an adapter has no path in it."""
    return name not in ("", ".", "..") and not set(name) & {"/", "\\", "\0"}


def _holds_adapter(directory: Path, path: Path) -> bool:
    """Tell whether there is an adapter at a path, and nothing of it outside the directory."""
    try:
        places = [place.resolve() for place in (path, path / CONFIG, path / TENSORS)]
        return places[1].is_file() and all(place.is_relative_to(directory) for place in places)
    except (OSError, ValueError):  # a name too long for the file system, or that it cannot encode
        return False


@dataclass
class _Arrival:
    """An adapter that was read and waits to enter the pool, or the reason why it could not be read."""

    files: _Files
    got: ReadAdapter | Exception
    beside: frozenset[str] = frozenset()  # the adapters that were running when it did not fit in addition to them


class Engine:
    """A model, its adapters, a thread that runs them and a thread that reads adapters.

    Args:
        model: an encoder or a causal model of Hugging Face after ``lo.adapt(model, None)``.
        adapters: the directory whose folders are the adapters, or None; each adapter is read at its first use, and
            again once its files have changed and no completion runs on it.
        source: a directory from which :meth:`add` takes further adapters, or None for none.
        causal: whether rows are completions (otherwise embeddings).
        pooling: makes embeddings of hidden states; default: their mean, of length 1.
        pad: the token id that fills shorter rows.
        ends: token ids that end a completion.
        capacity_bytes: capacity of the pool; beyond it the least recently used adapters move to host memory.
        host_bytes: limit of adapters in host memory; after a forward that exceeds it, the least recently used are
            unloaded, except those that running rows and the next rows in the queue need.
        max_batch: rows in a forward, and rows at the head of the queue whose adapters are read ahead.
        max_batch_tokens: rows times the length of the longest, in a forward over whole inputs; a single row may exceed it.
        max_queue: limit of waiting rows.
        chunk_tokens: tokens of prompts, with padding, that are read between two tokens of running completions.
        prefix_bytes: limit of the keys and values of earlier texts, which are kept for rows of the same adapter that begin
            alike; 0 keeps none.
        observe: called after every forward with ``"batch"`` (rows), ``"adapters"`` (different ones in it) or
            ``"forward"`` (seconds), and the number; after one that failed with ``"failed"`` and 1.

    Raises:
        ValueError: a limit is below 1 (of bytes: 0); adapters is not a directory; the model does not suit a pool;
            or causal is set and the model keeps no cache from which completions can continue.
    """

    def __init__(
        self,
        model: Any,
        adapters: str | os.PathLike[str] | None,
        *,
        source: str | os.PathLike[str] | None = None,
        causal: bool,
        pooling: Pooling | None = None,
        pad: int = 0,
        ends: Sequence[int] = (),
        capacity_bytes: int = 2 << 30,
        host_bytes: int = 4 << 30,
        max_batch: int = 32,
        max_batch_tokens: int = 16384,
        max_queue: int = 1024,
        chunk_tokens: int = 512,
        prefix_bytes: int = 256 << 20,
        observe: Callable[[str, float], None] = lambda name, value: None,
    ) -> None:
        for limit, value in (
            ("max_batch", max_batch),
            ("max_batch_tokens", max_batch_tokens),
            ("max_queue", max_queue),
            ("chunk_tokens", chunk_tokens),
        ):
            if value < 1:
                raise ValueError(f"{limit} must be at least 1, got {value}")
        for limit, value in (("host_bytes", host_bytes), ("prefix_bytes", prefix_bytes)):
            if value < 0:
                raise ValueError(f"{limit} must be at least 0, got {value}")
        self.root = None if adapters is None else Path(adapters).resolve()
        self.source = None if source is None else Path(source).resolve()
        for argument, given in (("adapters", self.root), ("source", self.source)):
            if given is not None and not given.is_dir():
                raise ValueError(f"{argument} must be a directory, got {given}")
        self._added: dict[str, Path] = {}  # folders of source by name
        self.model: Any = model.eval()
        self.causal, self.pad, self.ends = causal, pad, frozenset(ends)
        self.pooling = pooling or Pooling()
        self.max_batch, self.max_batch_tokens, self.max_queue = max_batch, max_batch_tokens, max_queue
        self.host_bytes, self.observe = host_bytes, observe
        # The pool gets no host limit, because it would refuse what exceeds it; here unloaded adapters can be read
        # again.
        self.pool = AdapterPool(model, capacity_bytes)  # find confines paths to the directories
        self._turn: Iterator[str] = iter(())  # adapters to look for on disk next
        self._device = next(model.parameters()).device
        self._decoder = Decoder(model) if causal else None
        self._chunk, self._prefix_bytes = chunk_tokens, prefix_bytes
        # State shared by both threads and by submitting threads; guarded by the lock of _changed.
        self._changed = threading.Condition()
        self._waiting: list[Row] = []
        self._closing = False
        # Fingerprints of adapters when rows were accepted and when they were read, by last use, whether still loaded or
        # not.
        self._seen: dict[str, _Files] = {}
        self._read: OrderedDict[str, _Files] = OrderedDict()
        self._arrived: dict[str, _Arrival] = {}
        self._running = self._begin()
        self._thread = threading.Thread(target=self._run, name="lowrank-ops-engine", daemon=True)
        self._reader = threading.Thread(target=self._read_ahead, name="lowrank-ops-reader", daemon=True)
        self._thread.start()
        self._reader.start()

    # ---- methods for any thread ----

    def find(self, name: str) -> Path:
        """The directory of an adapter.

        Raises:
            UnknownAdapterError: it does not exist, or it or its files lie outside the directory that is served.
        """
        added = self._added.get(name)
        if added is not None and self.source is not None and _holds_adapter(self.source, added):
            return added
        if added is None and self.root is not None and is_name(name):
            path = self.root / name
            if _holds_adapter(self.root, path) and path.resolve().parent == self.root:
                return path.resolve()
        raise UnknownAdapterError(name)

    def names(self) -> list[str]:
        """The adapters in the served directory and those that were added, sorted."""
        found = set() if self.root is None else {path.parent.name for path in self.root.glob(f"*/{CONFIG}")}
        return sorted(name for name in found | set(self._added) if self._is_served(name))

    def add(self, name: str, folder: str, replace: bool = False) -> None:
        """Serve an adapter of ``source`` by a name, until :meth:`remove`; reads it, so that a damaged one is refused.

        Args:
            name: its name in requests.
            folder: its path, absolute or below ``source``.
            replace: take the place of an adapter that was added by this name; its running completions finish on it.

        Raises:
            ValueError: the name has a path in it or is taken; the folder is no adapter inside ``source``.
            Exception: as :meth:`lowrank_ops.serving.pool.AdapterPool.read`, for an adapter that cannot be loaded.
        """
        if not is_name(name):
            raise ValueError("lora_name must be a name, not a path")
        path = None if self.source is None or "\0" in folder else (self.source / folder).resolve()
        if self.source is None or path is None or not _holds_adapter(self.source, path):
            raise ValueError("lora_path must be a folder with an adapter, inside the directory that the server allows")
        if self._is_served(name) and not (replace and name in self._added):
            raise ValueError(f"lora_name {name!r} is taken")
        self.pool.read(path)
        self._added[name] = path

    def remove(self, name: str) -> None:
        """Serve an added adapter no longer; running completions finish on it.

        Raises:
            UnknownAdapterError: none was added by this name.
        """
        if self._added.pop(name, None) is None:
            raise UnknownAdapterError(name)

    def _is_served(self, name: str) -> bool:
        try:
            return bool(self.find(name))
        except UnknownAdapterError:
            return False

    def submit(self, rows: Sequence[Row]) -> None:
        """Put all rows into the queue, or none.

        Raises:
            QueueFullError: with the waiting rows they would exceed ``max_queue``.
            ClosedError: after :meth:`close`.
            UnknownAdapterError: the served directory has no such adapter.
        """
        seen = {name: _files(self.find(name)) for name in names_of([row.mixture for row in rows])}
        with self._changed:
            if self._closing:
                raise ClosedError
            if len(self._waiting) + len(rows) > self.max_queue:
                self._drop()
                if len(self._waiting) + len(rows) > self.max_queue:
                    raise QueueFullError
            self._seen.update(seen)
            self._waiting.extend(rows)
            self._changed.notify_all()

    @property
    def queued(self) -> int:
        """The number of rows that wait for a forward or for their adapters, without rows whose clients have left."""
        return sum(not row.cancelled for row in list(self._waiting))

    @property
    def alive(self) -> bool:
        """Tell whether the threads run and take rows."""
        return self._thread.is_alive() and self._reader.is_alive() and not self._closing

    def close(self, timeout: float | None = None) -> bool:
        """Take no new rows and finish the accepted ones; tell whether that ended within the time (seconds).

        Does not wait for adapters read for rows that have left.
        """
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        self._thread.join(timeout)
        return not self._thread.is_alive()

    # ---- methods that need the lock of _changed ----

    def _begin(self) -> Generation | None:
        if self._decoder is None:
            return None
        from .cache import Prefixes

        return Generation(
            self._forward, self._decoder, self.pad, self.ends, self._device, self._chunk, Prefixes(self._prefix_bytes),
            lambda row: tuple((name, strength, self._read.get(name)) for name, strength in row.mixture),
        )  # fmt: skip

    def _is_current(self, name: str) -> bool:
        """Tell whether the pool has an adapter as it was on disk when its last row was accepted."""
        return name in self.pool and name in self._read and self._seen.get(name) == self._read[name]

    def _missing(self, row: Row) -> list[str]:
        """The adapters of a row that the pool does not have as they are on disk."""
        return [name for name in row.names if not self._is_current(name)]

    def _drop(self) -> None:
        """Remove rows from the queue whose clients have left."""
        left = [row for row in self._waiting if row.cancelled]
        self._remove(left)
        for row in left:
            row.done.cancel()

    def _remove(self, rows: Collection[Row]) -> None:
        if rows:
            gone = set(rows)
            self._waiting = [row for row in self._waiting if row not in gone]
            self._changed.notify_all()

    def _can_run(self) -> bool:
        self._drop()
        return bool(self._running or self._arrived or any(not self._missing(row) for row in self._waiting))

    def _next(self) -> list[Row]:
        """Choose rows for a forward, in order, whose adapters are loaded; completions that may not join yet stay queued."""
        self._drop()
        room = self.max_batch
        if self._running is not None:
            room = room - len(self._running.rows) if self._running.joins else 0
        even = self._decoder is not None and not self._decoder.pads
        whole = self._decoder is not None and not self._decoder.chunks
        rows: list[Row] = []
        longest = 0
        for row in self._waiting:
            if len(rows) >= room:
                break
            if missing := self._missing(row):
                if any(name in self._arrived and self._arrived[name].beside for name in missing):
                    break  # wait for the running rows; if later rows joined them, this one would wait longer
                continue
            if even and rows and len(row.ids) != longest:
                continue
            if whole and rows and (row.echo or rows[0].echo):
                continue  # the logits of several whole prompts may not fit into memory
            longest = max(longest, len(row.ids))
            if rows and longest * (len(rows) + 1) > self.max_batch_tokens:
                break
            rows.append(row)
        return rows

    def _next_to_read(self) -> str | None:
        """The adapter to read next: the first one that the head of the queue needs and the pool lacks."""
        for row in self._waiting[: self.max_batch]:
            for name in () if row.cancelled else self._missing(row):
                if name not in self._arrived:
                    return name
        return None

    # ---- the thread that reads adapters ----

    def _read_ahead(self) -> None:
        while True:
            with self._changed:
                while (name := self._next_to_read()) is None:
                    if self._closing and not self._waiting:
                        return
                    self._changed.wait()
            files = self._files_of(name)  # taken before reading, so that a change during reading is noticed
            with self._changed:
                self._seen[name] = files
            got: ReadAdapter | Exception
            try:
                got = self.pool.read(self.find(name))
            except Exception as error:
                got = error
            with self._changed:
                self._arrived[name] = _Arrival(files, got)
                self._changed.notify_all()

    def _files_of(self, name: str) -> _Files:
        try:
            return _files(self.find(name))
        except UnknownAdapterError:
            return None, None

    # ---- the thread that runs the model ----

    def _run(self) -> None:
        while True:
            with self._changed:
                while not self._can_run():
                    if self._closing and not self._waiting:
                        return
                    self._changed.wait()
            self._round()

    def _round(self) -> None:
        """Place adapters that have arrived, and run one forward if rows are ready."""
        running = list(self._running.rows) if self._running else []
        rows: list[Row] = []
        try:
            placed = self._place(frozenset(names_of([row.mixture for row in running])))
            with self._changed:
                rows = self._next()
            rows = self._take(rows, names_of([row.mixture for row in running]))
            with torch.inference_mode():
                if self._running is None:
                    self._embed(rows)
                else:
                    self._running.step(rows)
            # If no row comes or ends, no adapter moves, and counting thousands of adapters is slow.
            ended = self._running is not None and len(self._running.rows) < len(running)
            self._unload(moved=bool(placed or rows or ended))
        except Exception as error:  # only the rows of this forward fail
            self.observe("failed", 1)
            with self._changed:
                self._remove(rows)
            for row in [*rows, *running]:
                row.fail(error)
            if self._running is not None:
                self._running = self._begin()

    def _place(self, running: frozenset[str]) -> bool:
        """Put arrived adapters into the pool, or fail the rows that wait for them; tell whether any had arrived.

        An adapter that does not fit in addition to those of running completions waits until some have ended. So does a
        new
        version of a running adapter: the cache of running rows was made with the old version, and as long as new rows
        joined them, the replacement would be delayed.
        """
        with self._changed:
            arrived = [
                (name, arrival)
                for name, arrival in self._arrived.items()
                if name not in running and not (arrival.beside and arrival.beside <= running)
            ]
        for name, arrival in arrived:
            files, got = arrival.files, arrival.got
            error = got if isinstance(got, Exception) else None
            if not isinstance(got, Exception):
                try:
                    # A route keeps the running adapters in place.
                    with self.pool.route(list(running)) if running else nullcontext():
                        self.pool.load(name, got)
                except Exception as refused:
                    if running and isinstance(refused, MemoryError):
                        arrival.beside = running
                        continue
                    error = refused
            known = name in self.pool
            lost: list[Row] = []
            with self._changed:
                del self._arrived[name]
                before, self._read[name] = self._read.get(name), files
                self._read.move_to_end(name)
                # Rows that arrived after another replacement wait for it.
                if not known and self._seen.get(name) == files:
                    lost = [row for row in self._waiting if name in row.names]
                    self._remove(lost)
                self._changed.notify_all()
            unknown = isinstance(error, UnknownAdapterError)  # the directory existed when its rows were accepted
            if error is not None and not unknown and files != before:
                # The error's text names files of the server, which clients must not see.
                kept = "; the one read before stays" if known else ""
                _LOG.error("adapter %r cannot be loaded: %s%s", name, error, kept)
            for row in lost:
                row.fail(UnknownAdapterError(name) if unknown else AdapterError(name))
        return bool(arrived)

    def _take(self, rows: list[Row], running: Sequence[str]) -> list[Row]:
        """Take the rows whose adapters fit into the pool with the running ones; the others stay queued, or fail."""
        if not rows:
            return []
        taken: list[Row] = []
        lost: list[Row] = []
        if self._fit([*running, *names_of([row.mixture for row in rows])]):
            taken = rows
        else:
            held = list(running)
            for row in rows:
                if {*row.names} <= {*held} or self._fit([*held, *row.names]):
                    held += row.names
                    taken.append(row)
                elif running:
                    break  # wait for the running rows; if later rows joined them, this one would wait longer
                elif not held:
                    lost.append(row)
        with self._changed:
            self._remove([*taken, *lost])
        for row in lost:
            row.fail(AdapterError(", ".join(row.names)))
        return [row for row in taken if row.done.set_running_or_notify_cancel()]

    def _unload(self, moved: bool) -> None:
        """Unload adapters that are gone from disk and, if adapters have moved, those that exceed the limit of host
        memory.

        Adapters that running rows or the head of the queue need stay.
        """
        with self._changed:
            rows = [*(self._running.rows if self._running else ()), *self._waiting[: self.max_batch]]
            by_use = list(self._read)
        needed = set(names_of([row.mixture for row in rows]))
        if moved:
            idle = (name for name in by_use if name in self.pool and name not in needed)
            while self.pool.stats()["host_bytes"] > self.host_bytes and (name := next(idle, None)) is not None:
                self._forget(name)
        # Check one adapter in each forward, because thousands of them may lie on a slow disk.
        if (name := next(self._turn, None)) is None:
            self._turn = iter(by_use)
        elif name not in needed and not self._is_served(name):
            with self._changed:
                self._read.pop(name, None)
                self._seen.pop(name, None)
            if name in self.pool:
                self._forget(name)

    def _forget(self, name: str) -> None:
        self.pool.unload(name)
        with self._changed:
            self._changed.notify_all()  # a row that has just arrived may wait for it

    def _fit(self, names: Sequence[str]) -> bool:
        """Bring adapters onto the device together; tell whether they fit."""
        try:
            with self.pool.route(names):
                return True
        except MemoryError:
            return False

    def _forward(self, rows: Sequence[Row], **inputs: Any) -> Any:
        began = time.perf_counter()
        with self._changed:
            for name in names_of([row.mixture for row in rows]):
                if name in self._read:
                    self._read.move_to_end(name)
        with self.pool.route([row.adapter for row in rows]):
            out = self.model(**inputs)
        self.observe("forward", time.perf_counter() - began)
        self.observe("batch", len(rows))
        self.observe("adapters", len({name for row in rows for name in row.names or (None,)}))
        return out

    def _embed(self, rows: list[Row]) -> None:
        if not rows:
            return
        ids, mask = padded(rows, self.pad, False, self._device)
        hidden = self._forward(rows, input_ids=ids, attention_mask=mask).last_hidden_state
        for row, vector in zip(rows, self.pooling(hidden, mask).cpu(), strict=True):
            row.done.set_result(vector)
