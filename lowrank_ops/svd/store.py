"""Singular vectors on disk, looked up by the content of the weight."""

from __future__ import annotations

import hashlib
import json
import os
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..files import check_path, exclusive, load_json, make_folder, write_tensors, write_text
from ..formats import QuantizedWeight
from .decompose import Triple, Weight, full_svd, is_packed_storage, truncated_svd

INDEX = "index.json"
# The vectors are float32; a flaw is larger than what rounding leaves.
_ROUNDING = 1e-3
_CHUNK = 1 << 20  # number of weights widened to float32 at a time


def is_exact(rank: int, weight: Weight) -> bool:
    """Tell whether the rank calls for the full decomposition: above a quarter of min(N, K).

    For such a rank :func:`truncated_svd` carries at least half of all directions, which costs about as much.
    """
    return 4 * rank > min(weight.shape)


def largest(weight: Weight, rank: int) -> Triple:
    """The largest singular triples U [N, rank], S [rank], Vt [rank, K], by the cheaper of the two algorithms."""
    if is_exact(rank, weight):
        U, S, Vt = full_svd(weight)
        return U[:, :rank].contiguous(), S[:rank].contiguous(), Vt[:rank].contiguous()
    return truncated_svd(weight, rank)


def weight_key(weight: Weight) -> str:
    """sha256 of "N K", a line end, and the float32 bytes of W row by row, as hexadecimal digits.

    Args:
        weight: W [N, K] of a float dtype, or a 4-bit weight such as :class:`NF4Weight`, which is decoded; of a stack
            [E, N, K] the :func:`stack_key` of its matrices.

    A bfloat16 W and the same numbers in float32 have the same key. W is widened in pieces.

    Raises:
        TypeError, ValueError: weight is bitsandbytes' packed 4-bit storage, not a float matrix, or on the meta device.
    """
    if is_packed_storage(weight) or not isinstance(weight, Tensor | QuantizedWeight):
        raise TypeError(
            f"weight must be a Tensor [N, K] or a 4-bit weight such as NF4Weight, got {type(weight).__name__}"
        )
    if len(weight.shape) == 3:
        return stack_key([weight_key(weight[e]) for e in range(weight.shape[0])])
    dense = weight.dequantize(torch.float32) if isinstance(weight, QuantizedWeight) else weight.detach()
    if dense.layout is not torch.strided or dense.is_nested:
        raise TypeError(
            f"weight must be a dense Tensor [N, K], got {'a nested one' if dense.is_nested else dense.layout}"
        )
    if dense.dim() != 2 or not dense.numel() or not dense.is_floating_point() or dense.is_meta:
        where = " on the meta device" if dense.is_meta else ""
        raise ValueError(
            f"weight must be a non-empty float [N, K] with numbers, got {dense.dtype} {list(dense.shape)}{where}"
        )
    N, K = dense.shape
    digest = hashlib.sha256(f"{N} {K}\n".encode())
    for rows in dense.split(max(1, _CHUNK // K)):
        digest.update(rows.float().contiguous().numpy(force=True))
    return digest.hexdigest()


def stack_key(keys: Sequence[str]) -> str:
    """The key of a stack, from the keys of its matrices."""
    return hashlib.sha256("\n".join(keys).encode()).hexdigest()


def _flaw(weight: Weight, U: Tensor, S: Tensor, Vt: Tensor) -> str | None:
    """What tells that U [N, R], S [R], Vt [R, K] are no singular triples of W; all of S, and a sample of the vectors."""
    if not all(bool(torch.isfinite(part).all()) for part in (U, S, Vt)):
        return "a number is NaN or infinite"
    if len(S) == 0:
        return None
    if float(S.min()) < 0 or bool((S[1:] > S[:-1] + _ROUNDING * S[0]).any()):
        return "S does not descend to 0 or above"
    some = sorted({0, len(S) // 2, len(S) - 1})
    left, right = U[:, some].double(), Vt[some].double()
    for name, gram in (("U", left.T @ left), ("Vt", right @ right.T)):
        if not torch.allclose(gram, torch.eye(len(some), dtype=gram.dtype, device=gram.device), rtol=0, atol=_ROUNDING):
            return f"vectors of {name} are not orthonormal"
    dense = weight.dequantize(torch.float32) if isinstance(weight, QuantizedWeight) else weight.detach()
    image = dense.float() @ right.T.float().to(dense.device)
    found = (left.T.to(image) * image.T).sum(1).cpu()
    if bool(((found - S[some]).abs() > _ROUNDING * S[0]).any()):
        return "uᵀ W v is not the singular value"
    return None


class FactorStore:
    """A directory of singular triples: one file ``<weight_key>.safetensors`` for each weight, with U, S, Vt and metadata.

    Args:
        path: the directory. :meth:`save` creates it if missing.

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
        """Open a store to read factors from.

        Raises:
            FileNotFoundError: the directory does not exist. NotADirectoryError: path is a file.
        """
        check_path("factors", path)
        store = cls(path)
        if not store.path.exists():
            raise FileNotFoundError(
                f"factors must be a directory written by lowrank-ops precompute, and {path} does not exist"
            )
        return store

    def check_used(self) -> None:
        """Warn if factors were looked up and none were found."""
        if self._missed and not self._found:
            warnings.warn(
                f"{self.path} has factors of none of the {self._missed} weights that were looked for, or only of a "
                "lower rank; they were computed instead",
                stacklevel=3,
            )

    def file(self, key: str) -> Path:
        return self.path / f"{key}.safetensors"

    def find(self, weight: Weight, rank: int, key: str | None = None) -> Triple | None:
        """U [N, rank], S [rank], Vt [rank, K] of this weight, float32 on its device; None if not stored.

        If the file has more triples, the first ``rank`` are read. ``key``: ``weight_key(weight)`` if already known.

        Raises:
            ValueError: the file is damaged, or does not fit the weight.
        """
        found = self._read(weight, rank, self.file(weight_key(weight) if key is None else key))
        self._found += found is not None
        self._missed += found is None
        return found

    def check(self, weight: Weight) -> None:
        """Raise ValueError if the file of this weight is damaged or does not fit it."""
        self._read(weight, 0, self.file(weight_key(weight)))

    def _read(self, weight: Weight, rank: int, path: Path) -> Triple | None:
        if not path.is_file():
            return None
        N, K = weight.shape
        try:
            with safe_open(path, framework="pt") as file:
                slices = {name: file.get_slice(name) for name in ("U", "S", "Vt")}
                shapes = {name: tuple(part.get_shape()) for name, part in slices.items()}
                dtypes = {str(part.get_dtype()) for part in slices.values()}
                stored = shapes["S"][0] if shapes["S"] else 0
                if shapes != {"U": (N, stored), "S": (stored,), "Vt": (stored, K)}:
                    raise ValueError(f"{path} holds {shapes}, which do not fit a weight {N} x {K}; delete it")
                if dtypes != {"F32"}:
                    raise ValueError(
                        f"{path} holds {', '.join(sorted(dtypes))}, and singular vectors are F32; delete it"
                    )
                if stored < rank:
                    return None
                U, S, Vt = slices["U"][:, :rank], slices["S"][:rank], slices["Vt"][:rank]
        except SafetensorError as error:
            raise ValueError(f"{path} is damaged ({error}); delete it and run precompute again") from error
        if why := _flaw(weight, U, S, Vt):
            raise ValueError(
                f"{path} holds no singular triples of the weight: {why}; delete it and run precompute again"
            )
        device = weight.device
        return U.contiguous().to(device), S.to(device), Vt.to(device)

    def metadata(self, key: str) -> dict[str, str]:
        """The metadata given to :meth:`save` for a key; empty if its file is missing or incomplete."""
        try:
            with safe_open(self.file(key), framework="pt") as file:
                return dict(file.metadata() or {})
        except (OSError, SafetensorError):
            return {}

    def save(self, weight: Weight, factors: Triple, key: str | None = None, **metadata: object) -> str:
        """Store U [N, R], S [R], Vt [R, K] of a weight; return its key. An older file is replaced whole or stays.

        Args:
            weight: the W that was decomposed.
            factors: U, S, Vt.
            key: ``weight_key(weight)`` if already known.
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
        make_folder(self.path)
        write_tensors(
            self.file(key),
            {name: tensor.detach().to("cpu", torch.float32) for name, tensor in tensors.items()},
            {name: str(value) for name, value in metadata.items()},
        )
        return key

    def note(self, layers: Mapping[str, str]) -> None:
        """Add layer -> key to index.json, for people to read; weights are never looked up by name."""
        path = self.path / INDEX
        make_folder(self.path)
        with exclusive(self.path):
            try:
                known = dict(load_json(path.read_text()))
            except (OSError, ValueError, TypeError):
                known = {}
            write_text(path, json.dumps(known | dict(layers), indent=1) + "\n")
