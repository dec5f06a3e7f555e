"""The two files of an adapter, replaced as one and read as one.

The metadata of the tensors has the digest of the configuration that they were saved with. A writer first puts the new
configuration beside the old one, then renames the tensors, then the configuration. The rename of the tensors is the moment
from which the adapter is the new one: until the configuration has its name too, readers find it by the digest.
"""

from __future__ import annotations

import hashlib
import json
import time
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..files import exclusive, make_folder, move, write_new, write_tensors
from .peft_files import CONFIG, TENSORS, Contents, checked_config, parse_json, read_tensors, read_text

_DIGEST = "lowrank_ops_config"  # the metadata that has the digest of adapter_config.json
_TRIES, _PAUSE = 200, 0.005


def write_files(directory: Path, tensors: dict[str, Tensor], config: dict[str, Any], metadata: dict[str, str]) -> None:
    """Write PEFT's two files. A reader finds the old adapter or the new one, and so does the next start after a kill.

    Of two writers at once the second waits for the first.

    Raises:
        OSError: the disk is full, the directory is read-only, or the like; the adapter in it is as it was.
    """
    text = json.dumps(config, indent=2, sort_keys=True) + "\n"
    digest = _digest(text)
    make_folder(directory)
    with exclusive(directory):
        settle(directory)
        try:
            if _text(directory / CONFIG) != text:
                write_new(_waiting(directory, digest), text)
            write_tensors(directory / TENSORS, tensors, metadata | {_DIGEST: digest})
        finally:
            settle(directory)


def settle(directory: Path) -> None:
    """Complete a replacement whose tensors have their place, undo any other one; within ``exclusive(directory)``."""
    if waiting := list(directory.glob(f".{CONFIG}.*.waiting")):
        current = _waiting(directory, _digest_of_tensors(directory / TENSORS))
        for path in waiting:
            if path == current:
                move(path, directory / CONFIG)
            else:
                path.unlink(missing_ok=True)


def read_files(directory: Path) -> tuple[dict[str, Any], Contents, dict[str, Any]]:
    """The checked configuration and tensors of an adapter, both of one version; layer name -> its record.

    A configuration that was edited after it was saved counts, as long as nobody replaces the files meanwhile.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a file is damaged or of a foreign kind.
        OSError: the files were replaced again each time that they had been read.
    """
    for _ in range(_TRIES):
        before = _stamps(directory)
        try:
            text = read_text(directory / CONFIG)
            config = checked_config(parse_json(text, directory / CONFIG), str(directory / CONFIG))
            contents, records = read_tensors(directory / TENSORS)
        except ValueError:
            if _stamps(directory) == before:
                raise
            continue
        digest = contents.metadata.get(_DIGEST)
        if digest == _digest(text):
            return config, contents, records
        path = _waiting(directory, digest)
        waiting = None if digest is None else _text(path)
        if waiting is not None and _digest(waiting) == digest:
            return checked_config(parse_json(waiting, path), str(path)), contents, records
        if _stamps(directory) == before:
            return config, contents, records
        time.sleep(_PAUSE)
    raise OSError(f"{directory} was replaced again each of the {_TRIES} times that it was read")


def _waiting(directory: Path, digest: str | None) -> Path:
    return directory / f".{CONFIG}.{hashlib.sha256(str(digest).encode()).hexdigest()[:16]}.waiting"


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _text(path: Path) -> str | None:
    """The text of a file in the directory itself, if there is one."""
    try:
        return None if path.is_symlink() else read_text(path)
    except (OSError, ValueError):
        return None


def _digest_of_tensors(path: Path) -> str | None:
    try:
        with safe_open(path, framework="pt") as file:
            return (file.metadata() or {}).get(_DIGEST)
    except (OSError, SafetensorError):
        return None


def _stamps(directory: Path) -> list[tuple[int, int, int] | None]:
    stamps: list[tuple[int, int, int] | None] = []
    for name in (CONFIG, TENSORS):
        try:
            found = (directory / name).stat()
            stamps.append((found.st_mtime_ns, found.st_size, found.st_ino))
        except OSError:
            stamps.append(None)
    return stamps
