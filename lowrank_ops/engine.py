"""One thread that runs a model for many requests: rows of different adapters share a forward.

Rows wait in a bounded queue. The thread takes those whose adapters are in the pool, up to a number of rows and of padded
tokens, and runs one forward under ``pool.route``. Embeddings are done after one; completions go on token by token, and new
rows join between two tokens where the model's cache lets rows be put side by side. A second thread reads the adapters of
the other rows meanwhile; the first puts what was read into the pool between two forwards, when none is in use there.

:mod:`lowrank_ops.serve` is the HTTP side of it; this module needs torch and, for the cache, transformers.
"""

from __future__ import annotations

import inspect
import logging
import os
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import Future
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .checkpoint import CONFIG, TENSORS
from .pool import AdapterPool, ReadAdapter

_LOG = logging.getLogger("lowrank_ops")


class UnknownAdapterError(Exception):
    """No adapter of that name is in the served directory."""


class AdapterError(Exception):
    """An adapter is there and cannot be loaded, or has no room in the pool."""


class QueueFullError(Exception):
    """As many rows wait as may."""


class ClosedError(Exception):
    """The engine takes nothing new: it is shutting down."""


class Row:
    """One input of a request.

    Args:
        adapter: a name in the pool or its directory, None for the model alone.
        ids: its tokens, at least one.

    Attributes:
        done: resolves with the result, or with what went wrong.
        cancelled: set by a client that has gone; the row is dropped before the next forward.
    """

    def __init__(self, adapter: str | None, ids: Sequence[int]) -> None:
        self.adapter, self.ids = adapter, list(ids)
        self.done: Future[Any] = Future()
        self.cancelled = False

    def fail(self, error: BaseException) -> None:
        if not self.done.done():
            self.done.set_exception(error)


class Embedding(Row):
    """e = v / |v|, v = the mean of the last hidden states over the row's tokens; ``done`` gives it as a Tensor [hidden]."""


class Completion(Row):
    """Tokens drawn one after the other; ``done`` gives the reason of the end, ``"stop"`` or ``"length"``.

    Args:
        max_tokens: at most so many are drawn.
        temperature: 0 takes the most probable token; else p = softmax(logits / temperature).
        top_p: of these the fewest most probable whose sum reaches it.
        seed: of the row's own generator, so that what else is in the batch changes nothing; None for another every time.
        stop: texts that end the completion and are not part of it.
        decode: token ids -> text.
        on_text: called in the model's thread with each new piece of text.
    """

    def __init__(
        self,
        adapter: str | None,
        ids: Sequence[int],
        *,
        decode: Callable[[list[int]], str],
        on_text: Callable[[str], None],
        max_tokens: int = 16,
        temperature: float = 1.0,
        top_p: float = 1.0,
        seed: int | None = None,
        stop: Sequence[str] = (),
    ) -> None:
        super().__init__(adapter, ids)
        self.max_tokens, self.temperature, self.top_p, self.stop = max_tokens, temperature, top_p, tuple(stop)
        self.generator = torch.Generator()
        self.generator.seed() if seed is None else self.generator.manual_seed(seed)
        self.drawn: list[int] = []
        self._decode, self._on_text = decode, on_text
        self._start = self._read = (
            0  # the tokens decoded again beside new ones, and those whose text is in _held already
        )
        self._held = ""  # text that may be the beginning of a stop

    def choose(self, logits: Tensor) -> int:
        """The next token of logits [vocabulary]."""
        if self.temperature == 0:
            return int(logits.argmax())
        p = (logits.float().cpu() / self.temperature).softmax(-1)
        if self.top_p < 1:
            ordered, order = p.sort(descending=True, stable=True)
            ordered[ordered.cumsum(0) - ordered >= self.top_p] = 0
            p = torch.zeros_like(p).scatter_(0, order, ordered)
        return int(torch.multinomial(p, 1, generator=self.generator))

    def take(self, token: int, ends: frozenset[int]) -> bool:
        """Add a token; whether the completion has ended, which ``done`` then says too."""
        if token in ends:
            return self._end("stop")
        self.drawn.append(token)
        if self._add(last=False):
            return self._end("stop", flush=False)
        if len(self.drawn) >= self.max_tokens:
            return self._end("length")
        return False

    def _end(self, reason: str, flush: bool = True) -> bool:
        if flush and self._add(last=True):
            reason = "stop"
        self.done.set_result(reason)
        return True

    def _add(self, last: bool) -> bool:
        """Pass on what text the tokens give; whether a stop was met.

        A few tokens before the new ones are decoded too, because the text of a token depends on its neighbours; a character
        that is not whole yet decodes to U+FFFD and waits.
        """
        text = self._decode(self.drawn[self._start :])
        if last or not text.endswith("\ufffd"):
            self._held += text[len(self._decode(self.drawn[self._start : self._read])) :]
            self._start, self._read = self._read, len(self.drawn)
        found = [at for at in (self._held.find(stop) for stop in self.stop) if at >= 0]
        keep = 0 if last or found else _overlap(self._held, self.stop)
        send = self._held[: min(found)] if found else self._held[: len(self._held) - keep]
        self._held = "" if found else self._held[len(send) :]
        if send:
            self._on_text(send)
        return bool(found)


def _overlap(text: str, stops: Sequence[str]) -> int:
    """Length of the longest ending of text that begins one of stops."""
    lengths = (n for stop in stops for n in range(1, len(stop)) if text.endswith(stop[:n]))
    return max(lengths, default=0)


_Files = tuple[tuple[int, int, int] | None, ...]


def _files(adapter: Path) -> _Files:
    """What tells the files of an adapter from others in their place."""

    def told(file: Path) -> tuple[int, int, int] | None:
        try:
            found = file.stat()
        except OSError:
            return None
        return found.st_mtime_ns, found.st_size, found.st_ino

    return told(adapter / CONFIG), told(adapter / TENSORS)


@dataclass
class _Arrival:
    """What was read and is to go into the pool, or why it could not be read."""

    files: _Files
    got: ReadAdapter | Exception
    beside: frozenset[str | None] = frozenset()  # the adapters that ran when it had no room beside them


class Engine:
    """A model, its adapters, the thread that runs them and the one that reads adapters.

    Args:
        model: an encoder or a causal model of Hugging Face after ``lo.adapt(model, None)``.
        adapters: the directory whose folders are the adapters, or None for none; read at the first use of each, and again
            where the files have changed, once no completion runs on it.
        causal: whether rows are completions.
        pad: the token id that fills shorter rows.
        ends: token ids that end a completion.
        capacity_bytes: of the pool, beyond which adapters longest unused go to host memory.
        host_bytes: of adapters in host memory; after a forward with more, those longest unused are unloaded, but for what
            the rows under way and those next in line need.
        max_batch: rows in a forward, and those at the head of the queue whose adapters are read ahead.
        max_batch_tokens: rows times the longest of them, in one forward over whole inputs; a single row may have more.
        max_queue: rows that may wait.
        observe: called with ``"batch"`` (rows), ``"adapters"`` (different ones in it) or ``"forward"`` (seconds), and
            the number, after every forward.

    Raises:
        ValueError: a limit below 1 (``host_bytes``: 0), adapters is no directory, the model is not one for a pool, or
            causal and the model keeps no cache that completions can go on from.
    """

    def __init__(
        self,
        model: Any,
        adapters: str | os.PathLike[str] | None,
        *,
        causal: bool,
        pad: int = 0,
        ends: Sequence[int] = (),
        capacity_bytes: int = 2 << 30,
        host_bytes: int = 4 << 30,
        max_batch: int = 32,
        max_batch_tokens: int = 16384,
        max_queue: int = 1024,
        observe: Callable[[str, float], None] = lambda name, value: None,
    ) -> None:
        for limit, value in (
            ("max_batch", max_batch),
            ("max_batch_tokens", max_batch_tokens),
            ("max_queue", max_queue),
        ):
            if value < 1:
                raise ValueError(f"{limit} must be at least 1, got {value}")
        if host_bytes < 0:
            raise ValueError(f"host_bytes must be at least 0, got {host_bytes}")
        self.root = None if adapters is None else Path(adapters).resolve()
        if self.root is not None and not self.root.is_dir():
            raise ValueError(f"adapters must be a directory, got {adapters}")
        self.model: Any = model.eval()
        self.causal, self.pad, self.ends = causal, pad, frozenset(ends)
        self.max_batch, self.max_batch_tokens, self.max_queue = max_batch, max_batch_tokens, max_queue
        self.host_bytes, self.observe = host_bytes, observe
        # Not the pool's own limit, which refuses what is over it: here the files are there to be read again.
        self.pool = AdapterPool(model, capacity_bytes, root=self.root)
        self._turn: Iterator[str] = iter(())  # adapters to look for on disk next
        self._device = next(model.parameters()).device
        self._decoder = _Decoder(model) if causal else None
        # What both threads share, and those that submit: under the lock of _changed.
        self._changed = threading.Condition()
        self._waiting: list[Row] = []
        self._closing = False
        # What the files of adapters were when rows were accepted, and when they were read: by last use, loaded still or not.
        self._seen: dict[str, _Files] = {}
        self._read: OrderedDict[str, _Files] = OrderedDict()
        self._arrived: dict[str, _Arrival] = {}
        self._running = self._begin()
        self._thread = threading.Thread(target=self._run, name="lowrank-ops-engine", daemon=True)
        self._reader = threading.Thread(target=self._read_ahead, name="lowrank-ops-reader", daemon=True)
        self._thread.start()
        self._reader.start()

    # ---- called from any thread ----

    def find(self, name: str) -> Path:
        """The directory of an adapter.

        Raises:
            UnknownAdapterError: there is none, or it lies outside the served directory.
        """
        if self.root is not None and name not in ("", ".", "..") and not set(name) & {"/", "\\", "\0"}:
            try:
                path = (self.root / name).resolve()
                if path.parent == self.root and (path / CONFIG).is_file():
                    return path
            except (OSError, ValueError):  # a name too long for the file system, or that it cannot encode
                pass
        raise UnknownAdapterError(name)

    def names(self) -> list[str]:
        """The adapters in the served directory, sorted."""
        if self.root is None:
            return []
        return sorted(path.parent.name for path in self.root.glob(f"*/{CONFIG}") if self._served(path.parent.name))

    def _served(self, name: str) -> bool:
        try:
            return bool(self.find(name))
        except UnknownAdapterError:
            return False

    def submit(self, rows: Sequence[Row]) -> None:
        """Put rows into the queue, all or none.

        Raises:
            QueueFullError: they would be more than ``max_queue`` with those that wait.
            ClosedError: after :meth:`close`.
            UnknownAdapterError: a name is in no directory.
        """
        seen = {
            name: _files(self.find(name)) for name in dict.fromkeys(row.adapter for row in rows) if name is not None
        }
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
        """Rows that wait, for a forward or for their adapters."""
        return len(self._waiting)

    @property
    def alive(self) -> bool:
        """Whether the threads run and take rows."""
        return self._thread.is_alive() and self._reader.is_alive() and not self._closing

    def close(self, timeout: float | None = None) -> bool:
        """Take nothing new, finish what is there; whether that was done within the time (seconds).

        What is being read for rows that have left is not waited for.
        """
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        self._thread.join(timeout)
        return not self._thread.is_alive()

    # ---- with the lock of _changed ----

    def _begin(self) -> _Generation | None:
        return None if self._decoder is None else _Generation(self, self._decoder)

    def _there(self, name: str | None) -> bool:
        """Whether the pool has an adapter as it was on disk when its last row was accepted."""
        return name is None or (name in self.pool and name in self._read and self._seen.get(name) == self._read[name])

    def _drop(self) -> None:
        """Take rows out of the queue whose clients have left."""
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
        return bool(self._running or self._arrived or any(self._there(row.adapter) for row in self._waiting))

    def _next(self) -> list[Row]:
        """Rows for a forward, in their order, of those whose adapters are there; completions that may not join yet stay."""
        self._drop()
        room = self.max_batch
        if self._running is not None:
            room = room - len(self._running.rows) if self._running.joins else 0
        even = self._decoder is not None and not self._decoder.pads
        rows: list[Row] = []
        longest = 0
        for row in self._waiting:
            if len(rows) >= room:
                break
            if not self._there(row.adapter):
                if row.adapter in self._arrived and self._arrived[row.adapter].beside:
                    break  # until those that run have ended: rows behind it that joined them would put that off
                continue
            if even and rows and len(row.ids) != longest:
                continue
            longest = max(longest, len(row.ids))
            if rows and longest * (len(rows) + 1) > self.max_batch_tokens:
                break
            rows.append(row)
        return rows

    def _missing(self) -> str | None:
        """The adapter to read next: the first that the head of the queue needs."""
        for row in self._waiting[: self.max_batch]:
            if not (row.cancelled or row.adapter in self._arrived or self._there(row.adapter)):
                return row.adapter
        return None

    # ---- the thread that reads adapters ----

    def _read_ahead(self) -> None:
        while True:
            with self._changed:
                while (name := self._missing()) is None:
                    if self._closing and not self._waiting:
                        return
                    self._changed.wait()
            assert self.root is not None
            files = _files(self.root / name)  # as before reading, so that a change meanwhile is one
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
        """Place what has arrived, and run one forward if there are rows for it."""
        running = list(self._running.rows) if self._running else []
        rows: list[Row] = []
        try:
            placed = self._place(frozenset(row.adapter for row in running))
            with self._changed:
                rows = self._next()
            rows = self._take(rows, [row.adapter for row in running])
            with torch.inference_mode():
                if self._running is None:
                    self._embed(rows)
                else:
                    self._running.step(rows)
            # Between rows that come and rows that end nothing moves, and counting thousands of adapters is slow.
            ended = self._running is not None and len(self._running.rows) < len(running)
            self._unload(moved=bool(placed or rows or ended))
        except Exception as error:  # the rows of this forward fail, those after them do not
            with self._changed:
                self._remove(rows)
            for row in [*rows, *running]:
                row.fail(error)
            if self._running is not None:
                self._running = self._begin()

    def _place(self, running: frozenset[str | None]) -> bool:
        """Put what has arrived into the pool, or fail the rows that wait for it; whether there was any.

        What has no room beside the adapters that completions run on waits until some have ended. So does a new version of
        one of these: their cache was made with the old one, and new rows that joined them there would put the change off
        for as long as there are such.
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
                    # In a route those that run keep their places.
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
                # Rows that came after another change wait for that.
                if not known and self._seen.get(name) == files:
                    lost = [row for row in self._waiting if row.adapter == name]
                    self._remove(lost)
                self._changed.notify_all()
            unknown = isinstance(error, UnknownAdapterError)  # rows accepted while the directory was there
            if error is not None and not unknown and files != before:
                # Its text names files of the server, which are not for clients.
                kept = "; the one read before stays" if known else ""
                _LOG.error("adapter %r cannot be loaded: %s%s", name, error, kept)
            for row in lost:
                row.fail(UnknownAdapterError(name) if unknown else AdapterError(name))
        return bool(arrived)

    def _take(self, rows: list[Row], running: Sequence[str | None]) -> list[Row]:
        """Those of rows whose adapters the pool holds together with the running ones; the others wait on, or fail."""
        if not rows:
            return []
        taken: list[Row] = []
        lost: list[Row] = []
        if self._fit([*running, *(row.adapter for row in rows)]):
            taken = rows
        else:
            held = list(running)
            for row in rows:
                if row.adapter in held or self._fit([*held, row.adapter]):
                    held.append(row.adapter)
                    taken.append(row)
                elif running:
                    break  # likewise
                elif not held:
                    lost.append(row)
        with self._changed:
            self._remove([*taken, *lost])
        for row in lost:
            row.fail(AdapterError(row.adapter))
        return [row for row in taken if row.done.set_running_or_notify_cancel()]

    def _unload(self, moved: bool) -> None:
        """Unload what has gone from disk and, if adapters have moved, what host memory has no room for.

        But not what rows under way need, nor those at the head of the queue.
        """
        with self._changed:
            rows = [*(self._running.rows if self._running else ()), *self._waiting[: self.max_batch]]
            by_use = list(self._read)
        needed = {row.adapter for row in rows}
        if moved:
            idle = (name for name in by_use if name in self.pool and name not in needed)
            while self.pool.stats()["host_bytes"] > self.host_bytes and (name := next(idle, None)) is not None:
                self._forget(name)
        # One adapter a forward, since thousands of them may lie on a slow disk.
        if (name := next(self._turn, None)) is None:
            self._turn = iter(by_use)
        elif name not in needed and not self._served(name):
            with self._changed:
                self._read.pop(name, None)
                self._seen.pop(name, None)
            if name in self.pool:
                self._forget(name)

    def _forget(self, name: str) -> None:
        self.pool.unload(name)
        with self._changed:
            self._changed.notify_all()  # for a row that came just before

    def _fit(self, names: Sequence[str | None]) -> bool:
        """Bring adapters onto the device together; whether there is room."""
        try:
            with self.pool.route(names):
                return True
        except MemoryError:
            return False

    def _forward(self, rows: Sequence[Row], **inputs: Any) -> Any:
        began = time.perf_counter()
        with self._changed:
            for name in dict.fromkeys(row.adapter for row in rows):
                if name is not None and name in self._read:
                    self._read.move_to_end(name)
        with self.pool.route([row.adapter for row in rows]):
            out = self.model(**inputs)
        self.observe("forward", time.perf_counter() - began)
        self.observe("batch", len(rows))
        self.observe("adapters", len({row.adapter for row in rows}))
        return out

    def _padded(self, rows: Sequence[Row], left: bool) -> tuple[Tensor, Tensor]:
        """Token ids and attention mask, [rows, longest] each."""
        longest = max(len(row.ids) for row in rows)
        ids = torch.full((len(rows), longest), self.pad)
        mask = torch.zeros(len(rows), longest, dtype=torch.long)
        for i, row in enumerate(rows):
            where = slice(longest - len(row.ids), longest) if left else slice(len(row.ids))
            ids[i, where], mask[i, where] = torch.tensor(row.ids), 1
        return ids.to(self._device), mask.to(self._device)

    def _embed(self, rows: list[Row]) -> None:
        if not rows:
            return
        ids, mask = self._padded(rows, left=False)
        hidden = self._forward(rows, input_ids=ids, attention_mask=mask).last_hidden_state
        weight = mask.unsqueeze(-1).to(hidden.dtype)
        mean = (hidden * weight).sum(1) / weight.sum(1)
        for row, vector in zip(rows, nn.functional.normalize(mean.float(), dim=-1).cpu(), strict=True):
            row.done.set_result(vector)


class _Decoder:
    """A causal model as the installed transformers runs it token by token: all that the engine uses of its interface.

    The argument that takes the cache has changed its name between versions, and a forward with ``**kwargs`` drops what it
    does not know. So a name counts only where forwards have filled the cache that they were given.

    Attributes:
        pads: whether rows of different lengths may be in one forward: only where it takes mask and positions, and padding
            on the left changes nothing. Another model may count positions over the padding or from another number, take
            it into its state, or apply a mask of the whole text to new tokens; it gets neither of the two, and rows of
            one length.

    Raises:
        ValueError: no argument of the model's forward takes a cache.
    """

    CACHE = ("cache", "past_key_values", "cache_params")  # since transformers 5.24; before; before, of a state

    def __init__(self, model: Any) -> None:
        import transformers

        self._model, self._new = model, transformers.DynamicCache
        self._named = inspect.signature(model.forward).parameters
        failed: Exception | None = None
        for name in sorted(self.CACHE, key=lambda name: name not in self._named):
            self._cache = name
            try:
                if self._try():
                    return
            except Exception as error:  # whatever a model raises that knows no such argument
                failed = failed or error
        raise ValueError(
            f"the model must keep a cache that completions go on from; the forward of {type(model).__name__} in "
            f"transformers {transformers.__version__} fills none that is given as {' or '.join(self.CACHE)}"
        ) from failed

    @torch.inference_mode()
    def _try(self) -> bool:
        """Run the model on two tokens and on a third; whether it has filled the cache. Sets ``pads``."""
        device = next(self._model.parameters()).device
        ids, mask = torch.tensor([[0, 0, 2, 3, 4]], device=device), torch.tensor([[0, 0, 1, 1, 1]], device=device)
        positions = torch.tensor([[0, 0, 0, 1, 2]], device=device)
        self.pads = {"attention_mask", "position_ids"} <= set(self._named)
        if self.pads:
            padded = self._model(**self.inputs(ids[:, :4], mask[:, :4], positions[:, :4], self.make_cache())).logits
            alone = self._model(input_ids=ids[:, 2:4]).logits[0, -1].float()
            # Above what rounding does in bfloat16, and below what another position or a state of the padding does.
            change = (padded[0, -1].float() - alone).abs().max()
            self.pads = bool(change <= 0.05 * (alone.max() - alone.min()))
        cache = self.make_cache()
        self._model(**self.inputs(ids[:, 2:4], mask[:, 2:4], positions[:, 2:4], cache))
        self._model(**self.inputs(ids[:, 4:], mask[:, 2:], positions[:, 4:], cache))
        try:
            return bool(cache.get_seq_length() == 3)
        except ValueError:  # it holds states alone, which have no length
            return bool(cache.has_previous_state())

    def make_cache(self) -> Any:
        return self._new(config=self._model.config)

    def inputs(self, ids: Tensor, mask: Tensor, positions: Tensor, cache: Any) -> dict[str, Any]:
        """Of a forward that fills the cache. Ids and positions are [rows, new tokens], mask is [rows, all tokens]."""
        named: dict[str, Any] = {"attention_mask": mask, "position_ids": positions} if self.pads else {}
        # A model that names neither keeps the cache all the same, as the trial showed, and gives more logits.
        named |= {name: value for name, value in (("use_cache", True), ("logits_to_keep", 1)) if name in self._named}
        return {"input_ids": ids, self._cache: cache, **named}

    def joins(self, cache: Any) -> bool:
        """Whether rows may be put beside those of a cache: only where it is plain keys and values."""
        from transformers.cache_utils import DynamicLayer

        return self.pads and all(type(layer) is DynamicLayer for layer in cache.layers)


class _Generation:
    """The completions that run: their cache, one line a row, padded on the left."""

    def __init__(self, engine: Engine, decoder: _Decoder) -> None:
        self.engine, self.decoder = engine, decoder
        self.rows: list[Completion] = []
        self.cache: Any = None
        self.mask = torch.zeros(0, 0, dtype=torch.long)

    def __bool__(self) -> bool:
        return bool(self.rows)

    @property
    def joins(self) -> bool:
        """Whether a new row may be put beside those that run."""
        return not self.rows or self.decoder.joins(self.cache)

    def step(self, new: Sequence[Row]) -> None:
        """One token for every row that runs, and the first one for the new."""
        self._keep([i for i, row in enumerate(self.rows) if not row.cancelled])
        if self.rows:
            last = torch.tensor([[row.drawn[-1]] for row in self.rows], device=self.engine._device)
            self.mask = torch.cat([self.mask, torch.ones_like(self.mask[:, :1])], 1)
            positions = self.mask.sum(1, keepdim=True) - 1
            out = self._forward(self.rows, last, self.mask, positions, self.cache)
            self._keep(self._take(self.rows, out.logits))
        if new:
            rows = [row for row in new if isinstance(row, Completion)]
            ids, mask = self.engine._padded(rows, left=True)
            positions = (mask.cumsum(1) - 1).clamp(min=0)
            cache = self.decoder.make_cache()
            out = self._forward(rows, ids, mask, positions, cache)
            others = _Generation(self.engine, self.decoder)
            others.rows, others.cache, others.mask = rows, cache, mask
            others._keep(self._take(rows, out.logits))
            self._join(others)

    def _forward(self, rows: Sequence[Row], ids: Tensor, mask: Tensor, positions: Tensor, cache: Any) -> Any:
        return self.engine._forward(rows, **self.decoder.inputs(ids, mask, positions, cache))

    def _take(self, rows: Sequence[Completion], logits: Tensor) -> list[int]:
        """Draw from logits [rows, 1, vocabulary]; the indices of the rows that go on."""
        going = []
        for i, row in enumerate(rows):
            try:
                if not row.take(row.choose(logits[i, -1]), self.engine.ends):
                    going.append(i)
            except Exception as error:  # of this row alone
                row.fail(error)
        return going

    def _keep(self, going: list[int]) -> None:
        if len(going) == len(self.rows):
            return
        self.rows = [self.rows[i] for i in going]
        if not self.rows:
            self.cache = None
            return
        index = torch.tensor(going, device=self.mask.device)
        self.cache.reorder_cache(index)  # batch_select_indices leaves out the states of linear attention
        self.mask = self.mask[index]
        padding = self.mask.shape[1] - int(self.mask.sum(1).max())
        if padding and self.joins:
            self.mask = self.mask[:, padding:]
            for layer in self.cache.layers:
                layer.keys, layer.values = layer.keys[:, :, padding:], layer.values[:, :, padding:]

    def _join(self, others: _Generation) -> None:
        if not others.rows:
            return
        if not self.rows:
            self.rows, self.cache, self.mask = others.rows, others.cache, others.mask
            return
        width = max(self.mask.shape[1], others.mask.shape[1])

        def side_by_side(a: Tensor, b: Tensor, after: int) -> Tensor:
            """Along the rows; the first is padded on the left to the width, which is ``after`` dimensions from the end."""
            wide = [nn.functional.pad(t, (0, 0) * after + (width - t.shape[-1 - after], 0)) for t in (a, b)]
            return torch.cat(wide)

        for mine, theirs in zip(self.cache.layers, others.cache.layers, strict=True):
            mine.keys = side_by_side(mine.keys, theirs.keys, 1)
            mine.values = side_by_side(mine.values, theirs.values, 1)
        self.mask = side_by_side(self.mask, others.mask, 0)
        self.rows = [*self.rows, *others.rows]
