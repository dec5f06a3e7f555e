"""How a whole model is kept in 4 bits: the format, and the layers that stay dense."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

from torch import Tensor, nn

from ..formats import WEIGHTS, QuantizedWeight
from .embedding import Embedding, is_embedding
from .foreign import is_linear
from .linear import Linear
from .names import named_or_ending
from .targets import Target, find_targets


@dataclass(frozen=True, kw_only=True)
class WeightConfig:
    """What :class:`NF4Config`, :class:`FP4Config` and :class:`MXFP4Config` share; see there."""

    skip: str | Iterable[str] | None = None
    head: str | None = None
    embeddings: str | None = None

    # The name of the format, and the name under which transformers knows the loader.
    format: ClassVar[str]
    quant_method: ClassVar[str] = "lowrank_ops"

    def __post_init__(self) -> None:
        for name in ("head", "embeddings"):
            if (value := getattr(self, name)) not in (None, self.format):
                raise ValueError(f"{name} must be {self.format!r} or None, got {value!r}")
        if self.skip is not None and not isinstance(self.skip, str):
            names = list(self.skip) if isinstance(self.skip, Iterable) else [self.skip]
            if not all(isinstance(name, str) for name in names):
                raise TypeError(f"skip must be a list of names, a regular expression or None, got {self.skip!r}")
            object.__setattr__(self, "skip", names)

    def quantize(self, weight: Tensor) -> QuantizedWeight:
        """Quantise W [N, K]."""
        options = {name: value for name, value in asdict(self).items() if name not in ("skip", "head", "embeddings")}
        quantize: Any = WEIGHTS[self.format].quantize
        quantized: QuantizedWeight = quantize(weight, **options)
        return quantized

    def to_dict(self) -> dict[str, Any]:
        """The choices, for transformers, which keeps them in a model's configuration while it loads the model."""
        return {"quant_method": self.quant_method, "format": self.format, **asdict(self)}

    def bytes_per_weight(self) -> float:
        """Bytes that a weight takes, with its share of the scales."""
        return 0.5 + 1 / 32

    def choose(self, model: nn.Module) -> dict[str, Target]:
        """The linear layers, stacks of experts and the embedding of a model, by name, that are to have 4 bits.

        Raises:
            ValueError: the model has no linear layer; ``skip`` names none; ``head`` or ``embeddings`` is wanted and the
                model has none.
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
        return {name: layer for name, layer in chosen.items() if name not in self._skipped(chosen)}

    def _skipped(self, chosen: Iterable[str]) -> set[str]:
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
        head: ``"nf4"`` to quantise the output head too; where it is tied to the embeddings, these stay as they are.
        embeddings: ``"nf4"`` to quantise the input embedding too, and a head that is tied to it, which then share the bytes.
            The block size must divide the width of the embedding. transformers with bitsandbytes has no 4-bit embeddings,
            so what ``save_pretrained`` then writes is for lowrank_ops alone, and config.json says so.

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
    """As :class:`NF4Config`, for FP4, the other format of bitsandbytes; ``head`` is then ``"fp4"``."""

    format = "fp4"


@dataclass(frozen=True)
class MXFP4Config(WeightConfig):
    """As :class:`NF4Config`, for MXFP4, which bitsandbytes cannot read. Every layer's K must be a multiple of 32."""

    format = "mxfp4"


CONFIGS: dict[str, type[WeightConfig]] = {kind.format: kind for kind in (NF4Config, FP4Config, MXFP4Config)}
