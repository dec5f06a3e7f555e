"""Write files so that a reader finds the old one or the new one, whole, whatever ends the process or the machine.

Every file that the package writes for a user goes through here. A file is written beside its place, flushed to the disk, and
renamed; the folder is flushed too. Only what is in memory is lost.
"""

from __future__ import annotations

import glob
import os
import re
import secrets
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

try:
    import fcntl
except ImportError:  # Windows, where writers do not wait for each other
    fcntl = None  # type: ignore[assignment]

_SCRATCH = re.compile(r"\..+\.[0-9a-f]{8}\.new")


@contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a new path to write to, of the same name; at the end the file is flushed and renamed to ``path``.

    A device or a pipe at ``path`` is written to directly.

    Raises:
        OSError: the disk is full, the folder is read-only, or the like; ``path`` is as it was.
    """
    path = Path(path)
    if path.exists() and not path.is_file():
        yield path
        return
    try:
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


def _failed(path: Path, error: Exception) -> OSError:
    why = f"{path} was not written and is as it was before: {getattr(error, 'strerror', None) or error}"
    number = getattr(error, "errno", None)
    return OSError(why) if number is None else OSError(number, why)
