"""Singular vectors on disk, filed by the content of the weight they were made from."""

from __future__ import annotations

import hashlib
import json
import os
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..formats import QuantizedWeight
from .decompose import Triple, Weight, full_svd, is_packed_storage, truncated_svd

INDEX = "index.json"
_CHUNK = 1 << 20  # weights that are widened to float32 at a time


def is_exact(rank: int, weight: Weight) -> bool:
    """Whether a rank is large enough for the whole decomposition: above a quarter of min(N, K).

    :func:`truncated_svd` then carries half of all directions and more, which costs about as much.
    """
    return 4 * rank > min(weight.shape)


def largest(weight: Weight, rank: int) -> Triple:
    """U [N, rank], S [rank], Vt [rank, K], the largest singular triples of a weight, by the route that suits the rank."""
    if is_exact(rank, weight):
        U, S, Vt = full_svd(weight)
        return U[:, :rank].contiguous(), S[:rank].contiguous(), Vt[:rank].contiguous()
    return truncated_svd(weight, rank)


def weight_key(weight: Weight) -> str:
    """sha256 of "N K", a line end, and the float32 bytes of W row by row, as hexadecimal digits.

    Args:
        weight: W [N, K] of a float dtype, or a 4-bit weight such as :class:`NF4Weight`, whose decoded numbers count.

    A bfloat16 W and the same numbers in float32 have one key. W is widened in pieces.

    Raises:
        TypeError, ValueError: weight is packed 4-bit storage of bitsandbytes, no float matrix, or on the meta device.
    """
    if is_packed_storage(weight) or not isinstance(weight, Tensor | QuantizedWeight):
        raise TypeError(
            f"weight must be a Tensor [N, K] or a 4-bit weight such as NF4Weight, got {type(weight).__name__}"
        )
    dense = weight.dequantize(torch.float32) if isinstance(weight, QuantizedWeight) else weight.detach()
    if dense.dim() != 2 or not dense.numel() or not dense.is_floating_point() or dense.is_meta:
        where = " on the meta device" if dense.is_meta else ""
        raise ValueError(
            f"weight must be a non-empty float [N, K] with numbers, got {dense.dtype} {list(dense.shape)}{where}"
        )
    N, K = dense.shape
    digest = hashlib.sha256(f"{N} {K}\n".encode())
    for rows in dense.split(max(1, _CHUNK // K)):
        digest.update(rows.float().cpu().contiguous().numpy())
    return digest.hexdigest()


class FactorStore:
    """A directory of singular triples: one file ``<weight_key>.safetensors`` a weight, with U, S, Vt and how they came.

    Args:
        path: the directory. :meth:`save` makes it where it is missing.

    Raises:
        NotADirectoryError: path is a file.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        if self.path.exists() and not self.path.is_dir():
            raise NotADirectoryError(f"factors are kept in a directory, and {self.path} is a file")
        self._found = self._missed = 0

    @classmethod
    def existing(cls, path: str | os.PathLike[str]) -> FactorStore:
        """The store that factors are to be taken from.

        Raises:
            FileNotFoundError: there is no such directory. NotADirectoryError: path is a file.
        """
        store = cls(path)
        if not store.path.exists():
            raise FileNotFoundError(
                f"factors must be a directory that lowrank-ops precompute wrote, and {path} is not there"
            )
        return store

    def check_used(self) -> None:
        """Warn where factors were looked for and those of no weight were there."""
        if self._missed and not self._found:
            warnings.warn(
                f"{self.path} has factors of none of the {self._missed} weights that were looked for, or only of a "
                "lower rank; they were computed instead",
                stacklevel=3,
            )

    def file(self, key: str) -> Path:
        return self.path / f"{key}.safetensors"

    def find(self, weight: Weight, rank: int, key: str | None = None) -> Triple | None:
        """U [N, rank], S [rank], Vt [rank, K] of this very weight, float32 on its device; None where there are none.

        Of a file with more triples the first ``rank`` are read. ``key``: ``weight_key(weight)`` where it is known already.

        Raises:
            ValueError: the file is damaged, or does not fit the weight.
        """
        found = self._read(weight, rank, self.file(weight_key(weight) if key is None else key))
        self._found += found is not None
        self._missed += found is None
        return found

    def _read(self, weight: Weight, rank: int, path: Path) -> Triple | None:
        if not path.is_file():
            return None
        N, K = weight.shape
        try:
            with safe_open(path, framework="pt") as file:
                slices = {name: file.get_slice(name) for name in ("U", "S", "Vt")}
                shapes = {name: tuple(part.get_shape()) for name, part in slices.items()}
                stored = shapes["S"][0] if shapes["S"] else 0
                if shapes != {"U": (N, stored), "S": (stored,), "Vt": (stored, K)}:
                    raise ValueError(f"{path} holds {shapes}, which do not fit a weight {N} x {K}; delete it")
                if stored < rank:
                    return None
                U, S, Vt = slices["U"][:, :rank], slices["S"][:rank], slices["Vt"][:rank]
        except SafetensorError as error:
            raise ValueError(f"{path} is damaged ({error}); delete it and run precompute again") from error
        device = weight.device
        return U.contiguous().to(device), S.to(device), Vt.to(device)

    def metadata(self, key: str) -> dict[str, str]:
        """What :meth:`save` was told about a key; empty where there is no whole file."""
        try:
            with safe_open(self.file(key), framework="pt") as file:
                return dict(file.metadata() or {})
        except (OSError, SafetensorError):
            return {}

    def save(self, weight: Weight, factors: Triple, key: str | None = None, **metadata: object) -> str:
        """File U [N, R], S [R], Vt [R, K] of a weight; its key. An older file is replaced by a whole new one or stays.

        Args:
            weight: the W that was decomposed.
            factors: U, S, Vt.
            key: ``weight_key(weight)`` where it is known already.
            metadata: written into the file as text.

        Raises:
            ValueError: the shapes do not fit.
        """
        U, S, Vt = factors
        N, K = weight.shape
        if U.dim() != 2 or U.shape != (N, len(S)) or Vt.shape != (len(S), K):
            raise ValueError(
                f"factors must be U [{N}, R], S [R], Vt [R, {K}] for a weight {N} x {K}, got {list(U.shape)}, "
                f"{list(S.shape)}, {list(Vt.shape)}"
            )
        key = weight_key(weight) if key is None else key
        tensors = {"U": U, "S": S, "Vt": Vt}
        with _whole(self.file(key)) as scratch:
            save_file(
                {name: tensor.detach().to("cpu", torch.float32).contiguous() for name, tensor in tensors.items()},
                scratch,
                metadata={name: str(value) for name, value in metadata.items()},
            )
        return key

    def note(self, layers: Mapping[str, str]) -> None:
        """Add layer -> key to index.json, which is for people; nothing looks a weight up by its name."""
        path = self.path / INDEX
        try:
            known = dict(json.loads(path.read_text()))
        except (OSError, ValueError, TypeError):
            known = {}
        with _whole(path) as scratch:
            scratch.write_text(json.dumps(known | dict(layers), indent=1) + "\n")


@contextmanager
def _whole(path: Path) -> Iterator[Path]:
    """A path to write to, which takes the name once it is whole and is removed otherwise."""
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(f".{path.name}.{os.getpid()}.new")
    try:
        yield scratch
        scratch.replace(path)
    finally:
        scratch.unlink(missing_ok=True)
