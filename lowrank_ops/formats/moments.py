"""Moments of the inputs of linear layers: what rounding, branches and starts that look at data read."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..files import check_path, load_json, write_tensors
from .base import QuantizedWeight

_MARK, _VERSION = "lowrank_ops_moments", 1
# The tensors of a moment.
_PARTS = ("second", "mean", "count", "fingerprint", "gradient")
# Numbers of W that a fingerprint keeps, spread over each matrix by the golden ratio, so that no one column has many of them.
_SAMPLES = 64
_GOLDEN = (math.sqrt(5) - 1) / 2
# The squared relative distance of two fingerprints is about 0.01 if one is of the rounded weight, and about 2 if the weights
# have nothing in common.
_FAR = 0.25


def fingerprint(weight: Tensor | QuantizedWeight) -> Tensor:
    """64 numbers of W [N, K], float32 on the CPU; of a stack [E, N, K] 64 of each matrix."""
    if len(weight.shape) == 3:
        return torch.stack([fingerprint(weight[e]) for e in range(weight.shape[0])])
    if isinstance(weight, QuantizedWeight):
        weight = weight.dequantize(torch.float32)
    N, K = weight.shape[-2:]
    steps = torch.arange(1, _SAMPLES + 1, dtype=torch.float64, device="cpu")
    at = ((steps * _GOLDEN).frac() * (N * K)).long().to(weight.device)
    return weight.detach()[at // K, at % K].float().cpu()


@dataclass(frozen=True)
class Moment:
    """E[x xᵀ] and E[x] over the tokens x [K] that a linear layer y = W x saw; of experts, over each expert's own tokens.

    Attributes:
        second: E[x xᵀ], float32 [K, K], or [E, K, K] of a stack of experts; zero for an expert that saw no token. Layers
            with one input share the tensor.
        mean: E[x], float32 [K] or [E, K].
        count: the number of tokens, int64, a scalar or [E].
        shape: of W, (N, K) or (E, N, K).
        fingerprint: some numbers of the W that was beside it, which tell another model's weight.
        gradient: the mean of dL/dW over batches, float32 with the shape of W, or None if nobody asked for it.
    """

    second: Tensor
    mean: Tensor
    count: Tensor
    shape: tuple[int, ...]
    fingerprint: Tensor
    gradient: Tensor | None = None

    @classmethod
    def of(cls, x: Tensor, weight: Tensor | QuantizedWeight) -> Moment:
        """The moments of the rows of x [T, K] for a weight [N, K].

        Numerics: summed in float64, rounded once to float32.

        Raises:
            ValueError: x has another width or no row.
        """
        K = weight.shape[-1]
        if x.dim() != 2 or x.shape[1] != K or not len(x) or len(weight.shape) != 2:
            raise ValueError(
                f"x must be [T, {K}], T > 0, for a weight [N, {K}], got {list(x.shape)} and {list(weight.shape)}"
            )
        x = x.detach().double()
        second, count = (x.T @ x / len(x)).float(), torch.tensor(len(x), device="cpu")
        return cls(second, x.mean(0).float(), count, tuple(weight.shape), fingerprint(weight))

    def check(self, weight: Tensor | QuantizedWeight, name: str) -> None:
        """Raise ValueError, which names the layer, unless the moments are sound and were gathered beside this weight.

        A weight of 4 bits or of a short training is the same weight here. Of a stack, an expert may have seen no token as
        long as another one saw some: see :meth:`shrunk`.

        Args:
            weight: W [N, K] or [E, N, K], dense or of 4 bits.
            name: of the layer, for the message.
        """
        if not int(self.count.sum()):
            raise ValueError(f"{name} saw no token of the calibration text; its moments are unknown")
        self._check_beside(weight, name)

    def check_expert(self, weight: Tensor | QuantizedWeight, name: str, expert: int) -> None:
        """The same for one expert of a stack, W [N, K], which may have seen no token."""
        self[expert]._check_beside(weight, name)

    def _check_beside(self, weight: Tensor | QuantizedWeight, name: str) -> None:
        if tuple(weight.shape) != tuple(self.shape):
            raise ValueError(
                f"{name}: its moments are of a weight {list(self.shape)}, and the weight is {list(weight.shape)}"
            )
        *stack, _, K = self.shape
        for what, tensor, shape in (("second", self.second, [*stack, K, K]), ("mean", self.mean, [*stack, K])):
            if list(tensor.shape) != shape or tensor.dtype != torch.float32:
                raise ValueError(
                    f"{name}: {what} must be float32 {shape}, got {str(tensor.dtype).removeprefix('torch.')} "
                    f"{list(tensor.shape)}"
                )
        if list(self.fingerprint.shape) != [*stack, _SAMPLES] or not self.fingerprint.is_floating_point():
            raise ValueError(
                f"{name}: fingerprint must be {_SAMPLES} floats of each matrix, got {list(self.fingerprint.shape)}"
            )
        if list(self.count.shape) != stack or bool((self.count < 0).any()):
            raise ValueError(f"{name}: count must be {stack} numbers that are not negative, got {self.count}")
        self._check_positive(name)
        own = fingerprint(weight)
        if bool(((own - self.fingerprint).square().sum(-1) > _FAR * own.square().sum(-1)).any()):
            raise ValueError(f"{name}: its moments were gathered beside another weight; calibrate this model")

    def _check_positive(self, name: str) -> None:
        for what, tensor in (("second", self.second), ("mean", self.mean)):
            if not bool(torch.isfinite(tensor).all()):
                raise ValueError(f"{name}: {what} must be finite, got NaN or infinity in it")
        for second in self.second.reshape(-1, *self.second.shape[-2:]):  # one expert at a time
            diagonal = second.diagonal()
            if bool((diagonal < 0).any()):
                raise ValueError(
                    f"{name}: second must be positive semi-definite, got {float(diagonal.min()):.3g} on its diagonal"
                )
            if not torch.allclose(second, second.T, rtol=1e-4, atol=1e-6 * float(diagonal.max())):
                raise ValueError(f"{name}: second must be symmetric, and it is not")
            # By Cauchy and Schwarz no element is larger; the mean of squares of tiny inputs may be 0 in float32.
            root = (diagonal + torch.finfo(torch.float32).tiny).sqrt() * 1.001
            if bool((second.abs() > root.outer(root)).any()):
                raise ValueError(f"{name}: second must be positive semi-definite, and an element is too large for that")

    def shrunk(self, strength: float | None = None) -> Moment:
        """H_e ← (T_e H_e + τ H) / (T_e + τ), H the mean over the tokens of all experts: for experts that saw few tokens.

        The mean moves alike; the counts stay. Of a matrix, the same moments.

        Args:
            strength: τ, in tokens; default K / 4. With 0 only experts without a token change.
        """
        if len(self.shape) == 2:
            return self
        tau = self.shape[-1] / 4 if strength is None else strength
        if not tau >= 0:
            raise ValueError(f"strength must be at least 0 tokens, got {strength}")
        tokens = self.count.double()
        share = (tokens / tokens.sum()).float().to(self.second.device)
        own = torch.where(tokens > 0, tokens / (tokens + tau).clamp(min=1e-9), 0.0).float().to(self.second.device)

        def shrink(parts: Tensor) -> Tensor:
            pool = torch.tensordot(share, parts, 1)
            return torch.stack([part.lerp(pool, 1 - w) for part, w in zip(parts, own, strict=True)])

        return replace(self, second=shrink(self.second), mean=shrink(self.mean))

    def __getitem__(self, expert: int) -> Moment:
        """Expert ``expert`` of a stack, over the same memory."""
        if len(self.shape) == 2:
            raise TypeError(f"only moments of a stack [E, N, K] can be indexed, and these are of {list(self.shape)}")
        parts: dict[str, Any] = {
            name: getattr(self, name)[expert] for name in ("second", "mean", "count", "fingerprint")
        }
        gradient = None if self.gradient is None else self.gradient[expert]
        return Moment(**parts, shape=self.shape[1:], gradient=gradient)


class Moments(Mapping[str, Moment]):
    """The moments of the layers of a model, by the layer's name; made by :func:`lowrank_ops.calibrate` or :meth:`load`."""

    def __init__(self, moments: Mapping[str, Moment]) -> None:
        self._moments = dict(moments)
        for name, moment in self._moments.items():
            if not isinstance(moment, Moment):
                raise TypeError(f"moments[{name!r}] must be a Moment, got {type(moment).__name__}")

    def __getitem__(self, name: str) -> Moment:
        return self._moments[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._moments)

    def __len__(self) -> int:
        return len(self._moments)

    def __repr__(self) -> str:
        return f"Moments of {len(self)} layers, {self.nbytes / 1e6:.1f} MB"

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors; shared ones count once."""
        tensors = [t for m in self.values() for t in (m.second, m.mean, m.count, m.gradient) if t is not None]
        return sum({id(t): t.nbytes for t in tensors}.values())

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a safetensors file; it appears under its name when it is whole. A tensor that layers share is written once.

        Raises:
            OSError: the file cannot be written; one that was there stays as it was.
        """
        keys: dict[int, str] = {}
        tensors: dict[str, Tensor] = {}
        layers: dict[str, Any] = {}
        for name, moment in self.items():
            layers[name] = {"shape": list(moment.shape)}
            for part in _PARTS:
                if (tensor := getattr(moment, part)) is not None:
                    key = keys.setdefault(id(tensor), f"{name}.{part}")
                    layers[name][part], tensors[key] = key, tensor
        # One entry of metadata, because files keep several in no order, and equal moments make equal files.
        write_tensors(path, tensors, {_MARK: json.dumps({"version": _VERSION, "layers": layers})})

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Moments:
        """Read what :meth:`save` wrote, or every such file of a folder; the system reads a tensor when it is first used.

        Raises:
            FileNotFoundError: path does not exist, or is a folder without such files.
            ValueError: a file is damaged or holds no moments.
        """
        check_path("moments", path)
        path = Path(path)
        files = sorted(path.glob("*.safetensors")) if path.is_dir() else [path]
        if not files or not files[0].is_file():
            raise FileNotFoundError(f"moments must be a file that Moments.save wrote or a folder of some, got {path}")
        moments: dict[str, Moment] = {}
        for file in files:
            moments |= _read(file)
        return cls(moments)


def _read(path: Path) -> dict[str, Moment]:
    try:
        with safe_open(path, framework="pt") as file:
            known = load_json((file.metadata() or {}).get(_MARK, "{}"))
            held = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118  (not a dictionary)
    except (SafetensorError, KeyError, ValueError) as error:
        raise ValueError(f"{path} is damaged: {error!r}") from error
    if not isinstance(known, dict) or known.get("version") != _VERSION:
        raise ValueError(f"{path} holds no moments: Moments.save of this version did not write it")
    try:
        return {
            name: Moment(shape=tuple(layer["shape"]), **{part: held[layer[part]] for part in _PARTS if part in layer})
            for name, layer in known["layers"].items()
        }
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is damaged: {error!r}") from error
