"""How a whole model is kept in 4 bits, its head and embeddings also in 8: the formats, and the layers that stay dense."""

from __future__ import annotations

import functools
import math
import os
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar

from torch import Tensor, nn

from ..formats import WEIGHTS, Moment, Moments, QuantizedWeight
from ..functional import LowRankUpdate
from .embedding import Embedding, is_embedding
from .experts import ExpertsLinear
from .foreign import is_linear
from .linear import Linear
from .names import named_or_ending
from .rounding import Loss, RoundingPlan, Share, share_out
from .targets import Target, convolutions, find_targets

# How often W less its branch is rounded again.
_TURNS = 3
# With a budget: the ranks that are fitted, as a multiple of an equal share, and at least.
_MORE, _LEAST = 4, 8


def branch_bytes(shape: Sequence[int]) -> int:
    """Bytes of one rank of a branch beside W [N, K] or [E, N, K], in 16 bits."""
    *stack, N, K = shape
    return 2 * (N + K) * (stack[0] if stack else 1)


@dataclass(frozen=True, kw_only=True)
class WeightConfig:
    """What :class:`NF4Config`, :class:`FP4Config` and :class:`MXFP4Config` share; see there."""

    skip: str | Iterable[str] | None = None
    head: str | None = None
    embeddings: str | None = None
    convolutions: str | None = None
    calibration: Moments | str | os.PathLike[str] | None = field(default=None, compare=False, repr=False)
    compensate: int | None = None
    compensate_bytes: int | None = None
    unseen: str = "refuse"

    # The name of the format, and the name under which transformers knows the loader.
    format: ClassVar[str]
    quant_method: ClassVar[str] = "lowrank_ops"
    # Whether a folder with branches belongs to the files that are read.
    has_branch: ClassVar[bool] = False

    def __post_init__(self) -> None:
        for name in ("head", "embeddings", "convolutions"):
            formats = [self.format] if name == "convolutions" else [self.format, "int8"]
            if (value := getattr(self, name)) is not None and value not in formats:
                raise ValueError(f"{name} must be {', '.join(map(repr, formats))} or None, got {value!r}")
        if self.skip is not None and not isinstance(self.skip, str):
            names = list(self.skip) if isinstance(self.skip, Iterable) else [self.skip]
            if not all(isinstance(name, str) for name in names):
                raise TypeError(f"skip must be a list of names, a regular expression or None, got {self.skip!r}")
            object.__setattr__(self, "skip", names)
        if self.unseen not in ("refuse", "plain"):
            raise ValueError(f"unseen must be 'refuse' or 'plain', got {self.unseen!r}")
        for name in ("compensate", "compensate_bytes"):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
                raise ValueError(f"{name} must be an int of at least 1 or None, got {value!r}")
            if value is not None and self.calibration is None:
                raise ValueError(
                    f"{name} needs calibration: what lowrank_ops.calibrate gathered, or the path of its file"
                )
        if self.compensate is not None and self.compensate_bytes is not None:
            raise ValueError("give compensate, a rank for every layer, or compensate_bytes for all layers, not both")
        if not isinstance(self.calibration, Moments | str | os.PathLike | None):
            raise TypeError(f"calibration must be Moments, a path or None, got {type(self.calibration).__name__}")

    def __deepcopy__(self, memo: Any) -> WeightConfig:
        return self  # it is frozen, and the moments of a large model are large

    def options(self) -> dict[str, Any]:
        """The arguments of the format's ``quantize``."""
        common = {known.name for known in fields(WeightConfig)}
        return {own.name: getattr(self, own.name) for own in fields(self) if own.name not in common}

    def quantize(self, weight: Tensor) -> QuantizedWeight:
        """Quantise W [N, K], without looking at data."""
        quantize: Any = WEIGHTS[self.format].quantize
        quantized: QuantizedWeight = quantize(weight, **self.options())
        return quantized

    def plan(self, in_int8: bool = False) -> RoundingPlan:
        """How a weight is rounded without looking at data, in this format or in int8."""
        if in_int8:
            return RoundingPlan("int8", {"block_size": getattr(self, "block_size", 32)})
        return RoundingPlan(self.format, self.options())

    @functools.cached_property
    def moments(self) -> Moments | None:
        """The moments that the calibration gathered; a file is read when they are first asked for."""
        held = self.calibration
        return held if held is None or isinstance(held, Moments) else Moments.load(held)

    def roundings(self, shapes: Mapping[str, Sequence[int]], in_int8: Collection[str] = ()) -> dict[str, RoundingPlan]:
        """How each layer is rounded, by name, from the shapes [N, K] or [E, N, K] of all layers that are.

        With ``compensate_bytes`` each gets a branch of several times its share, which :func:`fit_budget` cuts. Layers in
        int8 are rounded to nearest.

        Raises:
            ValueError: the moments lack a layer, or it saw no token, and ``unseen`` is ``"refuse"``; they are of another
                shape; ``compensate`` is above min(N, K). The message names the layer.
            FileNotFoundError: the file of the calibration is missing.
        """
        moments = self.moments
        if moments is None:
            return {name: self.plan(name in in_int8) for name in shapes}
        rounded = {name: shape for name, shape in shapes.items() if name not in in_int8}
        seen = {name: self._seen(name, moments, shape) for name, shape in rounded.items()}
        self.check_ranks({name: shapes[name] for name, moment in seen.items() if moment is not None})
        rank = self.compensate or 0
        if self.compensate_bytes is not None:
            each = sum(branch_bytes(shapes[name]) for name, moment in seen.items() if moment is not None)
            rank = max(_LEAST, round(_MORE * self.compensate_bytes / max(each, 1)))
        made = {name: self.plan(True) for name in shapes.keys() - rounded.keys()}
        for name, moment in seen.items():
            of_layer = 0 if moment is None else min(rank, *shapes[name][-2:])
            turns = _TURNS if self.compensate is not None else 0
            made[name] = RoundingPlan(self.format, self.options(), moment, of_layer, turns)
        return made

    def check_ranks(self, shapes: Mapping[str, Sequence[int]]) -> None:
        """Raise ValueError, which names the layer, if ``compensate`` is above min(N, K) of one."""
        for name, shape in shapes.items():
            smallest = min(shape[-2:])
            if self.compensate is not None and self.compensate > smallest:
                raise ValueError(
                    f"{name}: compensate must be at most min(N, K) = {smallest} for a layer {list(shape)}, got "
                    f"{self.compensate}"
                )

    def _seen(self, name: str, moments: Moments, shape: Sequence[int]) -> Moment | None:
        moment = moments.get(name)
        if moment is None or not int(moment.count.sum()):
            if self.unseen == "plain":
                return None
            why = "the calibration has no moments of it" if moment is None else "it saw no token in the calibration"
            raise ValueError(f"{name}: {why}; unseen='plain' rounds such layers to nearest")
        if tuple(moment.shape) != tuple(shape):
            raise ValueError(
                f"{name}: its moments are of a weight {list(moment.shape)}, and the weight is {list(shape)}"
            )
        return moment

    def to_dict(self) -> dict[str, Any]:
        """The choices, for transformers, which keeps them in a model's configuration while it loads the model.

        Of a calibration it has the path, if there is one.
        """
        own = {known.name: getattr(self, known.name) for known in fields(self)}
        held = self.calibration
        own["calibration"] = None if held is None or isinstance(held, Moments) else os.fspath(held)
        return {"quant_method": self.quant_method, "format": self.format, **own}

    def bytes_per_weight(self) -> float:
        """Bytes that a weight takes, with its share of the scales."""
        return 0.5 + 1 / 32

    def choose(self, model: nn.Module) -> dict[str, Target]:
        """The linear layers, stacks of experts, convolutions and the embedding of a model, by name, that are quantised.

        Raises:
            ValueError: the model has no linear layer; ``skip`` names none; ``head``, ``embeddings`` or ``convolutions`` is
                wanted and the model has none.
        """
        chosen = dict(find_targets(model, "all-linear").layers)
        names = {module: name for name, module in model.named_modules()}
        find: Any
        if self.embeddings is not None:
            find = getattr(model, "get_input_embeddings", lambda: None)
            if not (is_embedding(table := find()) or isinstance(table, Embedding)):
                raise ValueError(
                    f"embeddings={self.embeddings!r}: the model, a {type(model).__name__}, has no nn.Embedding as its input "
                    "embedding"
                )
            chosen[names[table]] = table
        if self.head is not None:
            find = getattr(model, "get_output_embeddings", lambda: None)
            if not (is_linear(head := find()) or isinstance(head, Linear)):
                raise ValueError(f"head={self.head!r}: the model, a {type(model).__name__}, has no linear output head")
            chosen[names[head]] = head
        if self.convolutions is not None:
            if not (found := convolutions(model)):
                raise ValueError(
                    f"convolutions={self.convolutions!r}: the model, a {type(model).__name__}, has no nn.Conv1d or nn.Conv2d"
                )
            chosen |= found
        return {name: layer for name, layer in chosen.items() if name not in self.skipped(chosen)}

    def in_int8(self, model: nn.Module) -> set[str]:
        """The names of the head and the embedding of a model that are to have int8."""
        finds = {"embeddings": "get_input_embeddings", "head": "get_output_embeddings"}
        found = [getattr(model, find, lambda: None)() for name, find in finds.items() if getattr(self, name) == "int8"]
        return {name for name, module in model.named_modules() if any(module is layer for layer in found)}

    def skipped(self, chosen: Iterable[str]) -> set[str]:
        """The names of the layers that ``skip`` leaves dense."""
        if self.skip is None:
            return set()
        if isinstance(self.skip, str):
            try:
                pattern = re.compile(self.skip)
            except re.error as error:
                raise ValueError(f"skip must be a list or a regular expression, got {self.skip!r}: {error}") from error
            found = {self.skip: {name for name in chosen if pattern.fullmatch(name)}}
        else:
            found = {ending: named_or_ending(chosen, ending) for ending in self.skip}
        if unmatched := [text for text, names in found.items() if not names]:
            known = sorted({name.rpartition(".")[2] for name in chosen})
            raise ValueError(f"skip {unmatched} matches no layer; the layers to quantise end in: {', '.join(known)}")
        return set().union(*found.values())


@dataclass(frozen=True)
class NF4Config(WeightConfig):
    """Quantise a model to NF4 while transformers reads it, tensor by tensor.

    ``AutoModelForCausalLM.from_pretrained(path, quantization_config=lowrank_ops.NF4Config())`` gives the model that
    ``lowrank_ops.adapt(model, None)`` makes of a dense one, to the bit; :func:`lowrank_ops.adapt` puts adapters on it. For
    files that have 4 bits already it only says that lowrank_ops is to read them: they keep their format, and layers that
    are dense there stay dense.

    Args:
        block_size: weights that share one scale, 32, 64, 128, …, 4096.
        double_quant: also quantise the scales to 8 bits.
        skip: layers that stay dense: a list of names, or of endings of names, or a regular expression that must match the
            whole name.
        head: ``"nf4"`` to quantise the output head too, or ``"int8"``, which loses far less in twice the bytes; where it is
            tied to the embeddings, these stay as they are.
        embeddings: ``"nf4"`` or ``"int8"`` to quantise the input embedding too, and a head that is tied to it, which then
            share the bytes. The block size must divide the width of the embedding. transformers with bitsandbytes has
            neither quantised embeddings nor int8, so what ``save_pretrained`` then writes is for lowrank_ops alone, and
            config.json says so.
        convolutions: ``"nf4"`` to quantise the ``nn.Conv1d`` and ``nn.Conv2d`` too, each as a matrix
            [N, C / groups · kernel] that is decoded at every call, rounded to nearest. Only lowrank_ops reads such a
            checkpoint, as for embeddings.
        calibration: what :func:`lowrank_ops.calibrate` gathered of this model, or the path of its file. Layers are then
            rounded so that their outputs, not their weights, change least. Input embeddings, and layers in int8, are
            rounded to nearest.
        compensate: the rank of a frozen branch beside every layer, y = W₄ x + U_b (D_b x) + bias, which minimises
            ‖(W − W₄ − U_b D_b) H^½‖_F for the calibration's H = E[x xᵀ]. It takes 16 bits a number.
        compensate_bytes: in place of ``compensate``: the bytes of all branches together. Ranks go where they lower the
            relative squared error of a layer's outputs most for their bytes; a layer may get none.
        unseen: what happens to a layer of which the calibration knows nothing: ``"refuse"``, or ``"plain"``, which rounds it
            to nearest, without a branch.

    Raises:
        ValueError, TypeError: a value is out of range.
    """

    format = "nf4"
    block_size: int = 64
    double_quant: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        sizes = WEIGHTS[self.format].format.block_sizes
        if self.block_size not in sizes:
            raise ValueError(f"block_size must be one of {', '.join(map(str, sizes))}, got {self.block_size!r}")
        if not isinstance(self.double_quant, bool):
            raise TypeError(f"double_quant must be True or False, got {self.double_quant!r}")

    def bytes_per_weight(self) -> float:
        return 0.5 + ((1 + 4 / 256) if self.double_quant else 4) / self.block_size


@dataclass(frozen=True)
class FP4Config(NF4Config):
    """As :class:`NF4Config`, for FP4, the other format of bitsandbytes; ``head`` is then ``"fp4"`` or ``"int8"``."""

    format = "fp4"


@dataclass(frozen=True)
class MXFP4Config(WeightConfig):
    """As :class:`NF4Config`, for MXFP4, which bitsandbytes cannot read. Every layer's K must be a multiple of 32."""

    format = "mxfp4"


CONFIGS: dict[str, type[WeightConfig]] = {kind.format: kind for kind in (NF4Config, FP4Config, MXFP4Config)}


def fit_budget(layers: Mapping[str, Linear | ExpertsLinear], budget: int) -> None:
    """Cut the branches of layers, in place, to those ranks that gain most for their bytes within a budget of bytes."""
    made = {
        name: (layer, layer.branch, layer.loss)
        for name, layer in layers.items()
        if layer.branch is not None and layer.loss is not None
    }
    shares = {name: Share(loss.gains, branch_bytes(layer.shape)) for name, (layer, _, loss) in made.items()}
    for name, rank in share_out(shares, budget).items():
        layer, branch, loss = made[name]
        gained = sum(loss.gains[:rank])
        layer.loss = Loss(loss.rounding, math.sqrt(max(loss.rounding**2 - gained, 0.0)), loss.gains[:rank])
        down, up = branch.down, branch.up
        assert isinstance(down, Tensor) and isinstance(up, Tensor)
        layer.set_branch(LowRankUpdate(down[..., :rank, :], up[..., :rank]) if rank else None)
