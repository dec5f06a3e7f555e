"""Write files so that a reader finds the old one or the new one, whole, whatever ends the process or the machine.

Every file that the package writes for a user goes through here. A file is written beside its place, flushed to the disk, and
renamed; the folder is flushed too. Only what is in memory is lost.
"""

from __future__ import annotations

import errno
import glob
import json
import os
import re
import secrets
import shutil
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

try:
    import fcntl
except ImportError:  # Windows, where writers do not wait for each other
    fcntl = None  # type: ignore[assignment]

_SCRATCH = re.compile(r"\..+\.[0-9a-f]{8}\.new")


def check_path(name: str, path: object) -> None:
    """Raise TypeError unless it names a file or a folder."""
    if not isinstance(path, str | os.PathLike):
        raise TypeError(f"{name} must be a path, got {type(path).__name__}")


@contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a new path to write to, of the same name; at the end the file is flushed and renamed to ``path``.

    A device or a pipe at ``path`` is written to directly.

    Raises:
        OSError: the disk is full, the folder is read-only, or the like; ``path`` is as it was.
    """
    path = Path(path)
    try:
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        if path.exists() and not path.is_file():
            yield path
            return
        with scratch_folder(path) as folder:
            scratch = folder / path.name
            yield scratch
            flush(scratch)
            os.replace(scratch, path)
            flush(path.parent)
    except (OSError, SafetensorError) as error:
        raise _failed(path, error) from error


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write a text in UTF-8 as :func:`replacing` does."""
    with replacing(path) as scratch:
        scratch.write_bytes(text.encode())


def write_new(path: Path, text: str) -> None:
    """Write a text in UTF-8 to a file that nobody reads before this returns, and flush it."""
    try:
        path.unlink(missing_ok=True)
        path.write_bytes(text.encode())
        flush(path)
        flush(path.parent)
    except OSError as error:
        raise _failed(path, error) from error


def write_tensors(
    path: str | os.PathLike[str], tensors: Mapping[str, Tensor], metadata: dict[str, str] | None = None
) -> None:
    """Write a safetensors file as :func:`replacing` does."""
    with replacing(path) as scratch:
        save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, scratch, metadata=metadata)


def copy_file(source: Path, path: Path) -> None:
    """Copy a file with its times and rights as :func:`replacing` writes one."""
    with replacing(path) as scratch:
        shutil.copy2(source, scratch)


def move(source: Path, path: Path) -> None:
    """Rename a file that is on the disk already, and flush both folders."""
    os.replace(source, path)
    for folder in {source.parent, path.parent}:
        flush(folder)


def make_folder(path: Path) -> None:
    """Make a folder and its parents, on the disk."""
    if not path.is_dir():
        if path.parent != path:
            make_folder(path.parent)
        path.mkdir(exist_ok=True)
        flush(path.parent)


def remove_scratch(folder: Path, name: str | None = None) -> None:
    """Remove the scratch folders that killed processes left in a folder: of all files, or of the file ``name``."""
    for left in folder.glob(f".{'*' if name is None else glob.escape(name)}.*.new"):
        if _SCRATCH.fullmatch(left.name) and left.is_dir():
            with suppress(FileNotFoundError), exclusive(left, wait=False) as free:
                if free:
                    shutil.rmtree(left, ignore_errors=True)


@contextmanager
def scratch_folder(path: Path) -> Iterator[Path]:
    """Yield a new folder beside ``path``. It is removed at the end; the next call removes what killed processes left."""
    make_folder(path.parent)
    remove_scratch(path.parent, path.name)
    while True:
        scratch = path.with_name(f".{path.name}.{secrets.token_hex(4)}.new")
        scratch.mkdir()
        try:
            with exclusive(scratch):
                if not scratch.exists():  # another process removed it before it was locked
                    continue
                yield scratch
                return
        finally:
            shutil.rmtree(scratch, ignore_errors=True)


@contextmanager
def exclusive(folder: Path, wait: bool = True) -> Iterator[bool | None]:
    """Within it no other process and no other thread is in here for the same folder, which exists.

    Args:
        wait: for another one to end.

    Yields True; False without waiting if another one is here; None on a file system without locks, which lets all in.
    """
    if fcntl is None:
        yield None
        return
    held = os.open(folder, os.O_RDONLY)
    free: bool | None = True
    try:
        try:
            fcntl.flock(held, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            free = False
        except OSError:
            free = None
        yield free
    finally:
        os.close(held)


def flush(path: Path) -> None:
    """Wait until a file or the names in a folder are on the disk."""
    held = os.open(path, os.O_RDONLY)
    try:
        os.fsync(held)
    except OSError:
        if not path.is_dir():  # some file systems cannot flush a folder
            raise
    finally:
        os.close(held)


def flush_all(folder: Path) -> None:
    """Flush a folder with all that is in it."""
    for path in sorted(folder.rglob("*"), reverse=True):
        if not path.is_symlink():
            flush(path)
    flush(folder)


def inside(folder: Path, name: object, where: Path) -> Path:
    """The file of a name that another file gives, in the folder.

    Raises:
        ValueError: the name is not one of a file in the folder, or leads out of it.
    """
    if not isinstance(name, str) or name in ("", ".", "..") or set(name) & {"/", "\\", "\0"}:
        raise ValueError(f"{where} names {name!r}, which must be the name of a file beside it")
    return folder / name


def load_json(text: str | bytes, **options: Any) -> Any:
    """``json.loads`` of what others wrote: every fault in it is a ValueError.

    Raises:
        ValueError: it is no JSON, or nested too deeply.
    """
    try:
        return json.loads(text, **options)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def load_row(line: str | bytes) -> dict[str, Any]:
    """The JSON object of one line of a JSONL file.

    Raises:
        ValueError: the line is none; or an object has a name twice; or a text holds half of a character, which JSON can
            write and no tokenizer can read. The message begins with a verb, to follow the row's number.
    """
    twice: list[str] = []

    def table(items: list[tuple[str, Any]]) -> dict[str, Any]:
        made = dict(items)
        if len(made) < len(items):
            twice.append(Counter(name for name, _ in items).most_common(1)[0][0])
        return made

    try:
        row = load_json(line, object_pairs_hook=table)
    except ValueError as error:
        raise ValueError(f"is not JSON: {error}") from error
    if twice:
        raise ValueError(f"has {twice[0]!r} twice in one object")
    if not isinstance(row, dict):
        raise ValueError(f"must be a JSON object, got {type(row).__name__}")
    try:
        json.dumps(row, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        half = error.object[error.start]
        raise ValueError(f"holds half of a character, {half!r}; characters above \\uffff are written as two") from error
    return row


def _failed(path: Path, error: Exception) -> OSError:
    why = f"{path} was not written and is as it was before: {getattr(error, 'strerror', None) or error}"
    number = getattr(error, "errno", None)
    return OSError(why) if number is None else OSError(number, why)
