"""PEFT's LoRA through our kernels: :class:`LoraConfig` is a ``peft.LoraConfig`` whose layers run in one op.

    y = W x + bias + Σ_a s_a · B_a (A_a drop(x))        over the active adapters a

Files, names of parameters and all that is not a layer's forward are PEFT's. What one op cannot do goes PEFT's own way, over
the same weights: :func:`lowrank_ops.explain` says which way a layer goes, and why.

All of PEFT that is not public stands in this file.
"""

from __future__ import annotations

import dataclasses
import functools
import sys
import warnings
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn

from .. import functional
from ..adapters.dora import RowNorms, scale_of, scaled_linear
from ..adapters.foreign import has_hooks, is_4bit, weight_of
from ..adapters.frozen import FrozenLinear, is_plain_linear
from ..adapters.kinds import LoRA
from ..adapters.linear import Linear as _Base
from ..adapters.linear import branch_of
from ..adapters.start import Start
from ..formats import FLOAT_DTYPES, QuantizedWeight
from ..functional import LowRankUpdate

_NEEDS = "lowrank_ops.peft needs peft >= 0.19"
try:
    import peft

    _layers, _tuners = (import_module(f"peft.tuners.{name}") for name in ("lora.layer", "tuners_utils"))
    _PeftConfig: Any = peft.LoraConfig
    _PeftLinear: Any = _layers.Linear
    _Variant: Any = _layers.LoraVariant
    _TunerLayer: Any = _tuners.BaseTunerLayer
    _Tuner: Any = _tuners.BaseTuner
    _to_merge = _tuners.check_adapters_to_merge
except (ImportError, AttributeError) as error:
    raise ImportError(f"{_NEEDS}: pip install 'lowrank-ops[peft]' ({error})") from error

# What this file overrides or calls, by the class that has it.
_USED = {
    _PeftConfig: ("_register_custom_module", "from_peft_type"),
    _PeftLinear: (
        "forward", "_mixed_batch_forward", "_check_forward_args", "update_layer", "resolve_lora_variant", "get_delta_weight",
        "merge", "unmerge", "merged", "active_adapters", "disable_adapters", "set_adapter", "get_base_layer",
    ),
    _Variant: ("init", "merge_safe", "forward"),
}  # fmt: skip
_GONE = [f"{owner.__name__}.{name}" for owner, names in _USED.items() for name in names if not hasattr(owner, name)]
if _GONE:
    raise ImportError(f"{_NEEDS} and peft {peft.__version__} lacks {', '.join(_GONE)}, which it builds on")

# Starts that put something else in the place of W, for which they need its numbers.
_CHANGES_BASE = ("pissa", "corda", "olora", "loftq", "lora_ga")
_DORA = "DoraLinearVariant"  # the only variant that is not left to PEFT
_PLAIN_TENSORS = (nn.Parameter, Tensor)


class LoraConfig(_PeftConfig):
    """A ``peft.LoraConfig`` in every field, for ``get_peft_model``, ``add_adapter``, TRL's ``peft_config=``.

    Its layers run in one op over a :class:`lowrank_ops.Linear` (of ``lowrank_ops.adapt(model, None)``, say), over an
    ``nn.Linear``, and over a bitsandbytes ``Linear4bit``, whose bytes they read where they are. Over any other layer stands
    PEFT's own.

    ``PeftModel.from_pretrained(model, path, config=lo.peft.LoraConfig.from_pretrained(path))`` loads a saved adapter into
    such layers. The saved directory says nothing of them: plain PEFT loads it too.

    Raises, when layers are made:
        ValueError: ``modules_to_save`` or ``trainable_token_indices`` name a frozen layer; a 4-bit weight and a start that
            replaces W (``init_lora_weights`` PiSSA, CorDA, OLoRA, LoftQ, LoRA-GA) or
            KaSA; a layer that has an adapter of :func:`lowrank_ops.adapt`; ``use_qalora``, which only GPTQ layers have.
    """

    # PEFT looks here for what from_pretrained may be given beside the file.
    __annotations__ = _PeftConfig.__annotations__

    def __post_init__(self) -> None:
        super().__post_init__()
        self._register_custom_module({nn.Linear: _layer})

    def _register_custom_module(self, mapping: dict[type[nn.Module], Any]) -> None:
        # The first class that fits is taken, and a caller's are narrower than nn.Linear.
        super()._register_custom_module(mapping)
        self._custom_modules: Any = {**mapping, **self._custom_modules}

    @classmethod
    def from_peft_type(cls, **kwargs: Any) -> LoraConfig:
        kind = kwargs.pop("peft_type", "LORA")  # PEFT would make a config of its own class of it
        if getattr(kind, "value", kind) != "LORA":
            raise ValueError(
                f"lowrank_ops.peft.LoraConfig is of peft_type LORA, got {kind}; LoRA-XS, SVF and SVFT pass by PEFT, see "
                "lowrank_ops.load_adapter"
            )
        known = {field.name for field in dataclasses.fields(cls)}
        if unknown := sorted(set(kwargs) - known):
            warnings.warn(f"peft {peft.__version__} does not know {', '.join(unknown)} of the file", stacklevel=3)
        return cls(**{name: value for name, value in kwargs.items() if name in known})


def _layer(target: nn.Module, adapter_name: str, **kwargs: Any) -> nn.Module | None:
    """The layer that PEFT puts over ``target``; None leaves the choice to PEFT."""
    base = target.get_base_layer() if isinstance(target, _TunerLayer) else target
    _check_trained(adapter_name)
    if kwargs.get("parameter_name") is not None:
        return None
    if isinstance(base, _Base):
        if base.adapter is not None:
            raise ValueError(
                f"the layer has an adapter of lowrank_ops already, {base.adapter}; give PEFT a model of "
                "lowrank_ops.adapt(model, None), or merge first"
            )
        return Linear(target, adapter_name, **kwargs)
    if is_4bit(base):
        return _linear4bit()(target, adapter_name, **kwargs)
    plain = type(base).forward in (nn.Linear.forward, FrozenLinear.forward) and type(base.weight) in _PLAIN_TENSORS
    return Linear(target, adapter_name, **kwargs) if plain else None


_checked: tuple[Any, Any] = (None, None)  # weakly: the last tuner and configuration, of one check for all its layers


def _check_trained(adapter_name: str) -> None:
    """Raise where PEFT would train a copy of a layer whose weight cannot be trained; it passes 4-bit ones over silently.

    PEFT wraps such modules after it has made all layers, without asking. The model is with the tuner that makes one now.
    """
    global _checked
    frame = sys._getframe(1)
    while frame is not None and not isinstance(tuner := frame.f_locals.get("self"), _Tuner):
        frame = frame.f_back  # type: ignore[assignment]
    config = None if frame is None else tuner.peft_config.get(adapter_name)
    tokens = getattr(config, "trainable_token_indices", None)
    asked = {
        "modules_to_save": list(getattr(config, "modules_to_save", None) or ()),
        "trainable_token_indices": list(tokens) if isinstance(tokens, dict) else [],
    }
    if not any(asked.values()) or all(
        a is not None and a() is b for a, b in zip(_checked, (tuner, config), strict=True)
    ):
        return
    for name, module in tuner.model.named_modules(remove_duplicate=False):
        for option, endings in asked.items():
            if not any(name.endswith(ending) for ending in endings):  # as PEFT matches
                continue
            inside = (
                f"{name}.{n}".rstrip(".") for n, m in module.named_modules() if isinstance(m, _Base) or is_4bit(m)
            )
            if (frozen := next(inside, None)) is not None:
                raise ValueError(
                    f"{option} names {name!r}, and the weight of {frozen!r} is frozen here and cannot be trained; leave the "
                    "layer out of the targets of lowrank_ops.adapt, so that it stays an nn.Linear"
                )
    _checked = weakref.ref(tuner), weakref.ref(config)


_PeftLayer: Any = object  # which _Fused stands before


class _Fused(_PeftLayer):
    """What both classes of layers share."""

    _norms: RowNorms | None = None

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        names = kwargs.get("adapter_names")
        only_names = not args and all(value is None for name, value in kwargs.items() if name != "adapter_names")
        if not only_names or x.dtype not in FLOAT_DTYPES or self._hindrance(names, x) is not None:
            return super().forward(x, *args, **kwargs)
        inner = self._cast(x)
        if names is None:
            active = self._active()
            weight, update, bias = self._weight(), self._update(active), self._bias(active)
            branch = branch_of(self.base_layer)
            if update is not None and any(name in self.lora_variant for name in active):
                y = scaled_linear(inner, weight, update, self._scale(active[0], update), bias, branch)
            else:
                y = functional.adapted_linear(inner, weight, update, bias, branch=branch)
        else:
            self._check_forward_args(x, adapter_names=names)
            y = self._routed(inner, names)
        return y if inner is x else y.to(x.dtype)

    def _cast(self, x: Tensor) -> Tensor:
        return x

    def _routed(self, x: Tensor, names: Sequence[str]) -> Tensor:
        """A row of the batch, its adapter; ``__base__`` and adapters that this layer lacks are none."""
        used = [name for name in dict.fromkeys(names) if name in self.lora_A]
        slots = [used.index(name) if name in used else -1 for name in names]
        rows = x.reshape(-1, x.shape[-1])
        each = torch.tensor(slots, device=x.device).repeat_interleave(len(rows) // max(len(names), 1))
        updates = [self._update([name]) for name in used]
        branch = branch_of(self.base_layer)
        y = functional.routed_linear(rows, self._weight(), updates, each, self.base_layer.bias, branch=branch)
        return y.view(*x.shape[:-1], y.shape[-1])

    def _active(self) -> list[str]:
        return [name for name in self.active_adapters if name in self.lora_A]

    def _update(self, names: list[str]) -> LowRankUpdate | None:
        """Σ s_a · B_a A_a as one update of the summed rank."""
        if not names:
            return None
        downs, ups = ([factors[name].weight for name in names] for factors in (self.lora_A, self.lora_B))
        scales = [self.scaling[name] for name in names]
        dropout = _rate(self.lora_dropout[names[0]])  # of several it is 0
        if len(names) == 1 and not isinstance(scales[0], Tensor):
            return LowRankUpdate(downs[0], ups[0], None, float(scales[0]), dropout=dropout)
        ups = [up * scale for up, scale in zip(ups, scales, strict=True)]
        return LowRankUpdate(torch.cat(downs), torch.cat(ups, 1), dropout=dropout)

    def _bias(self, names: list[str]) -> Tensor | None:
        bias = self.base_layer.bias
        for name in names:
            if (added := self.lora_B[name].bias) is not None:
                added = self.scaling[name] * added
                bias = added if bias is None else bias + added
        return bias

    def _scale(self, name: str, update: LowRankUpdate) -> Tensor:
        """g = m / ‖W + s · B A‖ by rows, of a DoRA."""
        if self._norms is None:
            self._norms = RowNorms()
        norms = self._norms.of(self._weight(), update, keep=not self.training)
        return scale_of(self.lora_magnitude_vector[name].weight, norms)

    def _hindrance(self, names: Sequence[str] | None = None, x: Tensor | None = None) -> str | None:
        """Why one op cannot do it, or None."""
        base = self.base_layer
        if self.disable_adapters or self.merged:
            return "its adapters are switched off or merged"
        if isinstance(base, _TunerLayer) or has_hooks(base):
            return "its base layer is another layer of PEFT or has hooks, which have to be called"
        if isinstance(base, _Base) and (base.pooled or base.disabled):
            return "its base layer is routed by a pool or switched off"
        weight = self._weight()
        if weight is None:
            return "its 4-bit weight is not in a format of ours"
        if isinstance(weight, Tensor) and not (
            type(weight) in _PLAIN_TENSORS and weight.dtype in FLOAT_DTYPES and weight.is_contiguous()
            and not weight.requires_grad
        ):  # fmt: skip
            return "its weight is trained, not contiguous, or of a class or dtype that the kernels lack"
        used = self._active() if names is None else [name for name in dict.fromkeys(names) if name in self.lora_A]
        for name in used:
            variant = self.lora_variant.get(name)
            if variant is not None and (_named(variant) != _DORA or len(used) > 1 or names is not None):
                return f"adapter {name!r} is not plain LoRA ({_named(self.lora_variant[name])})"
            down, up, drop = self.lora_A[name], self.lora_B[name], self.lora_dropout[name]
            if not (_is_plain(down) and _is_plain(up)):
                return (
                    f"lora_A or lora_B of adapter {name!r} have hooks, or are of a class or dtype that the kernels lack"
                )
            if type(drop) not in (nn.Identity, nn.Dropout) or _rate(drop) >= 1:
                return f"the dropout of adapter {name!r} is a {type(drop).__name__} or drops everything"
            if (len(used) > 1 or names is not None) and _rate(drop) > 0:
                return "several adapters with dropout each draw a mask of their own"
            if names is not None and up.bias is not None:
                return f"adapter {name!r} has a bias (lora_bias), which a routed batch has not"
        if names is not None and torch.is_grad_enabled():
            asked = [x, self.base_layer.bias, *(f[name].weight for f in (self.lora_A, self.lora_B) for name in used)]
            if any(tensor is not None and tensor.requires_grad for tensor in asked):
                return "a routed batch has no gradients, and some are asked for"
        return None

    def _weight(self) -> Any:
        """W as the op takes it; None if it has no such form, and PEFT's path then serves the layer."""
        return None

    def set_adapter(self, adapter_names: str | list[str], *args: Any, **kwargs: Any) -> None:
        names = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"adapter_names must be distinct, got {', '.join(map(repr, twice))} more than once")
        super().set_adapter(adapter_names, *args, **kwargs)

    def update_layer(self, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        config = kwargs.get("config")
        if getattr(config, "use_qalora", kwargs.get("use_qalora", False)):
            raise ValueError("use_qalora is for GPTQ layers; a layer here would ignore it")
        if getattr(config, "use_dora", kwargs.get("use_dora", False)) and branch_of(self.base_layer) is not None:
            raise ValueError(
                "PEFT starts a DoRA from W alone, and the layer has a branch beside its 4-bit W; take "
                "lowrank_ops.adapt(model, lowrank_ops.LoRA(dora=True))"
            )
        _check_trained(adapter_name)
        super().update_layer(adapter_name, *args, **kwargs)

    def stands_for(self) -> tuple[_Base, str]:
        """For :func:`lowrank_ops.explain`: a layer that runs what this one runs in our kernels, and a note."""
        hindrance = self._hindrance()
        active = [] if hindrance else self._active()
        weight = self._weight()
        if not isinstance(weight, Tensor | QuantizedWeight):
            raise TypeError(f"the layer runs by PEFT alone: {hindrance}")
        weight = weight.detach() if isinstance(weight, Tensor) else weight
        update = self._update(active)
        made = _Base.__new__(_Base)
        nn.Module.__init__(made)
        down, up = (None, None) if update is None else (update.down.detach(), update.up.detach())
        adapter = None if update is None else LoRA(update.rank, update.rank)
        made._assemble(Start(weight, down, up, branch=branch_of(self.base_layer)), None, adapter, weight)
        if not hindrance and any(name in self.lora_variant for name in active):
            return made, f"in one op with its active adapter, {active[0]}, and its rows scaled after it (DoRA)"
        if hindrance:
            return made, f"PEFT's own path runs its adapters, around this: {hindrance}"
        return made, f"in one op with its active adapters: {', '.join(active) or 'none'}"


class Linear(_Fused, _PeftLinear):
    """PEFT's layer over a :class:`lowrank_ops.Linear` without an adapter, or over an ``nn.Linear``.

    Merging into a 4-bit weight quantises W + ΔW again, in the same format, as PEFT does over bitsandbytes: what is smaller
    than a step of the format is lost. The bytes from before are kept, and ``unmerge`` puts them back as they were.
    """

    _unmerged: tuple[Any, Any] | None = None
    _reads_weight = False

    # Ours is [N, K] whatever stood there, and nn.Linear is too.
    fan_in_fan_out = property(lambda self: False, lambda self, value: None)

    def _weight(self) -> Tensor | QuantizedWeight:
        weight: Tensor | QuantizedWeight = self.base_layer.weight
        return weight

    @property
    def _packed(self) -> bool:
        return not isinstance(self._base().weight, Tensor)

    def _base(self) -> Any:
        base = self.base_layer
        while isinstance(base, _TunerLayer):
            base = base.base_layer
        return base

    def get_base_layer(self) -> nn.Module:
        base = self._base()
        return _decoded(base) if self._reads_weight and self._packed else base

    @contextmanager
    def _reading(self) -> Iterator[None]:
        """Within it the base layer has W in numbers, to read: for parts of PEFT that compute with it."""
        before, self._reads_weight = self._reads_weight, True
        try:
            yield
        finally:
            self._reads_weight = before

    def update_layer(self, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        config = kwargs.get("config")
        init = getattr(config, "init_lora_weights", kwargs.get("init_lora_weights"))
        if not self._packed:
            super().update_layer(adapter_name, *args, **kwargs)
            return
        changes = isinstance(init, str) and init.lower().startswith(_CHANGES_BASE)
        if changes or getattr(config, "kasa_config", None) is not None:
            what = f"init_lora_weights={init!r}" if changes else "kasa_config"
            raise ValueError(
                f"{what} puts another W in the place of W and needs it before it was quantised; give PEFT the dense "
                "model, or take lowrank_ops.adapt(model, lowrank_ops.LoRA(init=…)), which quantises what is left"
            )
        with self._reading():
            super().update_layer(adapter_name, *args, **kwargs)

    def resolve_lora_variant(self, **kwargs: Any) -> Any:
        variant = super().resolve_lora_variant(**kwargs)
        return variant if variant is None or not self._packed else _OverPacked(variant)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        if not self._packed:
            super().merge(safe_merge, adapter_names)
            return
        base = self._base()
        for name in _to_merge(self, adapter_names):
            if name not in self.lora_A:
                continue
            before = base.weight, None if base.bias is None else base.bias.detach().clone()
            with torch.no_grad():
                weight = before[0].dequantize(torch.float32)
                if (variant := self.lora_variant.get(name)) is not None:
                    merged = variant.merge_safe(self, name, weight)
                else:
                    merged = weight + self.get_delta_weight(name)
                bias, added = before[1], self.lora_B[name].bias
                if added is not None and bias is None:
                    raise RuntimeError(
                        f"the bias of adapter {name!r} (lora_bias) cannot be merged: the base layer has none"
                    )
                if added is not None:
                    bias = bias + self.scaling[name] * added
                # Quantising refuses NaN and infinity, safe_merge or not.
                packed = _quantized_as(before[0], merged.float())
                warnings.warn(
                    "the adapter is merged into a 4-bit weight, which is quantised again and rounds it; for a dense merged "
                    "model save the adapter, load it with lowrank_ops.load_adapter and call lowrank_ops.merge",
                    stacklevel=2,
                )
                base.weight = packed
                if added is not None:
                    base.bias.copy_(bias)
            if not self.merged_adapters:
                self._unmerged = before
            self.merged_adapters.append(name)

    def unmerge(self) -> None:
        if self._unmerged is None or not self.merged:
            super().unmerge()
            return
        base, (weight, bias) = self._base(), self._unmerged
        base.weight = weight.to(base.weight.device)
        if bias is not None:
            with torch.no_grad():
                base.bias.copy_(bias)
        self._unmerged = None
        while self.merged_adapters:
            self._caches.pop(f"{self.merged_adapters.pop()}-weight_norm", None)


@functools.cache
def _linear4bit() -> Any:
    """The class Linear4bit of this module, made where bitsandbytes is at hand: PEFT's module imports it."""
    Peft4bit: Any = import_module("peft.tuners.lora.bnb").Linear4bit  # noqa: N806

    class Linear4bit(_Fused, Peft4bit):
        """PEFT's layer over a bitsandbytes ``Linear4bit``, whose bytes the op reads; merging is PEFT's."""

        _taken: tuple[Any, ...] | None = None

        def _weight(self) -> QuantizedWeight | None:
            weight: Any = getattr(self.base_layer, "weight", None)
            state = getattr(weight, "quant_state", None)
            if not is_4bit(self.base_layer) or state is None:
                return None
            # Merging and moving replace the weight of the layer, and bitsandbytes may repack it in place.
            at = 0 if torch.compiler.is_compiling() else weight.data_ptr()
            taken = self._taken
            if taken is None or taken[0] is not weight or taken[1] is not state or (at and taken[2] != at):
                try:
                    taken = weight, state, at, weight_of(self.base_layer)
                except ValueError:  # tables that are not the standard ones
                    taken = weight, state, at, None
                self._taken = taken
            return taken[3]

        def _cast(self, x: Tensor) -> Tensor:
            # As bitsandbytes does; where none was chosen it computes in the dtype of x.
            return x.to(self.base_layer.compute_dtype) if self.base_layer.compute_type_is_set else x

        def update_layer(self, adapter_name: str, *args: Any, **kwargs: Any) -> None:
            super().update_layer(adapter_name, *args, **kwargs)
            self._weight()  # where compilation cannot look into it

        def resolve_lora_variant(self, **kwargs: Any) -> Any:
            variant, config = super().resolve_lora_variant(**kwargs), kwargs.get("config")
            fields = () if variant is not None or config is None else dataclasses.fields(config)
            if ignored := [f.name for f in fields if f.metadata.get("is_lora_variant") and getattr(config, f.name)]:
                raise ValueError(f"PEFT has no {', '.join(ignored)} over bitsandbytes' Linear4bit and would ignore it")
            return variant

        def __getstate__(self) -> dict[str, Any]:
            return {**vars(self), "_taken": None}  # a copy has a weight of its own

    Linear4bit.__qualname__ = "Linear4bit"
    return Linear4bit


def __getattr__(name: str) -> Any:
    if name == "Linear4bit":
        return _linear4bit()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


class _OverPacked(_Variant):
    """A variant of LoRA whose base layer, where it looks at it, has its weight in numbers."""

    def __init__(self, variant: Any) -> None:
        self.variant = variant

    def __getattr__(self, name: str) -> Any:
        if name == "variant":  # while it is copied
            raise AttributeError(name)
        return getattr(self.variant, name)

    def init(self, module: Linear, *args: Any, **kwargs: Any) -> None:
        with module._reading():
            self.variant.init(module, *args, **kwargs)

    def merge_safe(self, module: Linear, *args: Any, **kwargs: Any) -> Any:
        with module._reading():
            return self.variant.merge_safe(module, *args, **kwargs)

    def forward(self, module: Linear, *args: Any, **kwargs: Any) -> Any:
        with module._reading():
            return self.variant.forward(module, *args, **kwargs)


def _decoded(layer: nn.Module) -> nn.Linear:
    weight: Any = layer.weight
    made = nn.Linear(layer.in_features, layer.out_features, bias=False, device="meta")  # type: ignore[arg-type]
    made.weight = nn.Parameter(weight.dequantize(), requires_grad=False)
    made.bias = layer.bias  # type: ignore[assignment]
    return made


def _quantized_as(before: QuantizedWeight, weight: Tensor) -> QuantizedWeight:
    """In the same format, with the same options."""
    options = {} if before.format.exponents else {"block_size": before.block_size, "double_quant": before.double_quant}
    made: QuantizedWeight = type(before).quantize(weight, **options)
    made.dtype = before.dtype
    return made


def _named(variant: Any) -> str:
    return type(variant.variant if isinstance(variant, _OverPacked) else variant).__name__


def _rate(drop: nn.Module) -> float:
    """At which it drops now."""
    return float(drop.p) if isinstance(drop, nn.Dropout) and drop.training else 0.0


def _is_plain(layer: nn.Module) -> bool:
    weight = layer.weight
    return (
        is_plain_linear(layer)
        and type(weight) in _PLAIN_TENSORS
        and weight.dtype in FLOAT_DTYPES
        and not has_hooks(layer)
    )
