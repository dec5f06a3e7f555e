"""lowrank_ops.Linear: nn.Linear over a frozen, 4-bit or dense weight, with a trained adapter."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, Self

import torch
from torch import Tensor, nn

from .. import cores, functional, ops
from ..cores import Core
from ..formats import FLOAT_DTYPES, WEIGHTS, QuantizedWeight, check_format, check_quantize
from ..functional import LowRankUpdate
from ..svd.store import FactorStore
from .dora import RowNorms, is_at_hand, scale_of, scaled_linear
from .foreign import check_in_place, is_conv1d, is_linear, known_hooks, weight_of
from .kinds import SVFT, Adapter, LoRA, LoRAXS, described, same_meaning
from .route import Place, check_unpooled, route_of
from .split import Split
from .start import (
    RECORD,
    Source,
    Start,
    changes_base,
    check_start,
    entry_of,
    read_entry,
    reads_weight,
    start,
)

_ON_META = "weight is on the meta device and holds no numbers; load or materialise it first"


class AdaptedLayer(nn.Module):
    """What every layer over a frozen weight with an adapter is: its parts, its state dict and its merged weight.

    A weight of shape [..., N, K] is one matrix or a stack of them; every part then has the same leading dimensions.
    """

    down: nn.Parameter | QuantizedWeight | None
    up: nn.Parameter | QuantizedWeight | None
    core: nn.Parameter | None
    core_index: Tensor | None
    core_offset: Tensor | None
    base_down: Tensor | None
    base_up: Tensor | None
    bias: nn.Parameter | None
    magnitude: nn.Parameter | None
    up_bias: nn.Parameter | None
    dropout: nn.Dropout | None
    weight: QuantizedWeight | nn.Parameter | None
    in_features: int
    out_features: int
    # A pool sets it; layers outside pools need not look for routes.
    pooled: Place | None = None
    # Set where processes share the layer.
    split: Split | None = None
    # True if it replaces a Conv1D of transformers; merging then makes a Conv1D.
    transposed = False
    # True if a row of the output has a scale or a bias of the adapter (DoRA, lora_bias).
    scales_rows = False
    # True within lowrank_ops.disabled: the layer runs as it did before it had an adapter.
    disabled = False
    _entry_names = QuantizedWeight._entry_names  # see _fqn_modifiers
    # Tells transformers not to initialise the layer with random numbers.
    _is_hf_initialized = True

    def _assemble(
        self, started: Start, bias: Tensor | None, adapter: Adapter | None, weight: QuantizedWeight | Tensor
    ) -> None:
        self.out_features, self.in_features = weight.shape[-2:]
        self.weight = _freeze(started.weight)
        self._dtype = weight.dtype
        if bias is not None and not isinstance(bias, nn.Parameter):
            bias = nn.Parameter(bias, requires_grad=False)
        self.register_parameter("bias", bias)
        self._install(adapter, started)

    def _install(self, adapter: Adapter | None, started: Start) -> None:
        """Take everything of a start except its weight."""
        self.adapter, self.source, self.start_error = adapter, started.source, started.error
        trained = isinstance(adapter, LoRA)
        for name, factor in (("down", started.down), ("up", started.up)):
            for store in (self._parameters, self._modules):
                store.pop(name, None)
            if isinstance(factor, QuantizedWeight):
                setattr(self, name, factor)
            else:
                self.register_parameter(name, None if factor is None else nn.Parameter(factor, requires_grad=trained))
        core = started.core
        self.register_parameter("core", None if core is None else nn.Parameter(core.values))
        self.register_buffer("core_index", None if core is None else core.index)
        self.register_buffer("core_offset", started.offset)
        for name, factor in zip(("base_down", "base_up"), started.shift or (None, None), strict=True):
            self.register_buffer(name, factor)
        for name, rows in (("magnitude", started.magnitude), ("up_bias", started.up_bias)):
            self.register_parameter(name, None if rows is None else nn.Parameter(rows))
        self.scales_rows = isinstance(adapter, LoRA) and (adapter.dora or adapter.lora_bias)
        if self.scales_rows and started.magnitude is None and started.up_bias is None:
            raise ValueError(f"{described(adapter)}: dora and lora_bias are for linear layers alone")
        self._renew_norms()
        self._set_dropout()

    def _renew_norms(self) -> None:
        """Measure the rows of W again, for a DoRA."""
        self._norms = RowNorms()
        if self._parameters.get("magnitude") is not None and self.weight is not None and is_at_hand(self.weight):
            self._norms.measure(self.weight)

    def _set_dropout(self) -> None:
        """Keep the adapter's dropout as a module, which libraries find and switch off; the op itself drops elements."""
        rate = self.adapter.dropout if isinstance(self.adapter, LoRA) else 0.0
        self.register_module("dropout", nn.Dropout(rate) if rate else None)

    def train(self, mode: bool = True) -> Self:
        self._norms.forget()  # parts may have been written in ways that leave no trace
        return super().train(mode)

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        if hasattr(param, "full_tensor"):  # a DTensor
            raise TypeError(
                "torch's ColwiseParallel and RowwiseParallel split dense layers only; use lowrank_ops.parallelize(model, "
                "mesh, plan), or the styles of lowrank_ops.integrations.tensor_parallel"
            )
        super().register_parameter(name, param)

    def set_adapter(self, adapter: Adapter | None) -> None:
        """Give the layer a fresh adapter of a kind, or none; W stays unchanged.

        Raises:
            ValueError: the kind changes the base; W was given up; the kind needs minor vectors and W is quantised; or a
                pool routes the layer.
        """
        check_adapter(adapter)
        if adapter is not None:
            check_unpooled(self)
        check_unsplit(self)
        if self.weight is None:
            raise ValueError("the layer has the replace form and no weight to set another adapter over")
        if self.base_down is not None:
            raise ValueError(f"{self.adapter} changed the base of the layer; make a new layer from the original weight")
        if changes_base(adapter):
            raise ValueError(f"{adapter} changes the base, and W stays here; use Linear.from_linear or adapt")
        weight = self.weight if isinstance(self.weight, QuantizedWeight) else self.weight.detach()
        started = start(adapter, weight, None, None)
        if started.weight is None:
            raise ValueError(f"{adapter} gives W up; use Linear.from_linear or adapt")
        self._install(adapter, started)

    def trained(self) -> list[nn.Parameter]:
        """The Parameters that the adapter's kind trains."""
        parts = (self.down, self.up, self.core, self.magnitude, self.up_bias)
        return [p for p in parts if isinstance(p, nn.Parameter) and self._is_trained(p)]

    def _is_trained(self, parameter: nn.Parameter) -> bool:
        return parameter is self.core or isinstance(self.adapter, LoRA)

    def make_core(self, values: Tensor | None) -> Core | None:
        """C of the layer's pattern with given values."""
        if values is None or self.adapter is None:
            return None
        if self.core_index is not None:
            assert self.down is not None
            return cores.Sparse.from_index(self.core_index, values, self.down.shape[-2])
        if isinstance(self.adapter, LoRAXS):
            return cores.Dense(values)
        if isinstance(self.adapter, SVFT):
            assert self.down is not None
            return cores.Banded(values, self.down.shape[-2])
        return cores.Diagonal(values)

    @property
    def update(self) -> LowRankUpdate | None:
        """The adapter's update, as :func:`lowrank_ops.functional.adapted_linear` takes it, with dropout only in training.

        In the replace form it is what training added to U diag(S) Vᵀ. For a kind that changes the base, the update is
        relative to the changed base, and its ``base`` is :attr:`base_update`.

        Raises:
            ValueError: the layer has a DoRA or a ``lora_bias``, which are more than a low-rank update of W.
        """
        if self.scales_rows:
            raise ValueError(
                f"{described(self.adapter)} is no low-rank update of W alone: it scales W's rows or adds to the bias; "
                "merged_weight gives what the layer applies"
            )
        update = self._relative_update()
        return update if update is None or self.base_down is None else replace(update, base=self.base_update)

    def _relative_update(self) -> LowRankUpdate | None:
        """The update without its ``base``, which forward does not read."""
        adapter, down, up, core = self.adapter, self.down, self.up, self.core
        if adapter is None or down is None or up is None:
            return None
        if self.split is not None:
            down, up, core = self.split.shared(down, up, core)
        return LowRankUpdate(down, up, self.make_core(core), adapter.scale, dropout=self._rate())

    def row_scale(self) -> Tensor:
        """g = m / ‖W + s · U D‖ by rows, float32 [N], of a layer with a DoRA; it has a gradient to m alone."""
        update, weight = self._relative_update(), self.weight
        assert update is not None and weight is not None and self.magnitude is not None
        # A replica of DataParallel shares this layer's, which is of another device.
        norms = RowNorms() if "_is_replica" in self.__dict__ else self._norms
        return scale_of(self.magnitude, norms.of(weight, update, keep=not self.training))

    def full_bias(self) -> Tensor | None:
        """bias + s · b, of a layer with ``lora_bias``; otherwise bias."""
        if self.up_bias is None or self.adapter is None:
            return self.bias
        added = self.adapter.scale * self.up_bias
        return added if self.bias is None else self.bias + added

    @property
    def base_update(self) -> LowRankUpdate | None:
        """s · U₀ D₀, which was subtracted from the original weight; None for kinds that keep the base."""
        if self.base_down is None or self.base_up is None or self.adapter is None:
            return None
        return LowRankUpdate(self.base_down, self.base_up, None, self.adapter.scale)

    def _rate(self) -> float:
        """The dropout rate of the adapter's input."""
        dropout: Any = self._modules.get("dropout") if self.training else None
        return dropout.p if dropout is not None and dropout.training else 0.0

    def __getstate__(self) -> dict[str, Any]:
        # A copy has other addresses, and no pool.
        return {name: value for name, value in self.__dict__.items() if name not in ("_call", "pooled")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        vars(self).pop("disabled", None)  # a copy is outside any context
        if "dropout" not in self._modules:  # a pickle made before this module existed
            self._set_dropout()
        for name in ("magnitude", "up_bias"):  # likewise
            self._parameters.setdefault(name, None)
        self._renew_norms()

    def _replacing_core(self) -> Core:
        assert self.core is not None and self.core_offset is not None
        values = self.core if self.split is None else self.split.shared(None, None, self.core)[2]
        core = self.make_core(values + self.core_offset)
        assert core is not None
        return core

    def merged_weight(self, dtype: torch.dtype | None = None) -> Tensor:
        """W' = W + s · U C D, the [N, K] that the layer applies (without dropout); U C Vᵀ in the replace form.

        With a DoRA it is g ⊙ (W + s · U D) by rows. A ``lora_bias`` is no part of it.

        Args:
            dtype: of the result; default: the dtype of the weight before it was quantised.

        Numerics: decoded, added and multiplied in float32, rounded once to ``dtype``.
        """
        with torch.no_grad():
            update, weight = self._relative_update(), self.weight
            if weight is None:
                assert self.up is not None and self.down is not None
                merged = LowRankUpdate(self.down, self.up, self._replacing_core()).delta()
            else:
                merged = (
                    weight.dequantize(torch.float32) if isinstance(weight, QuantizedWeight) else weight.float().clone()
                )
                if update is not None:
                    merged += update.delta()
                if self.magnitude is not None:
                    merged *= self.row_scale().unsqueeze(-1)
            return merged.to(dtype or self.dtype)

    @property
    def shape(self) -> tuple[int, ...]:
        """(N, K); of a stack of experts (E, N, K)."""
        return self.out_features, self.in_features

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the weight before it was quantised or given up."""
        return self._dtype if self.weight is None else self.weight.dtype

    @property
    def device(self) -> torch.device:
        """The device of the weight, or of the factors in the replace form."""
        holder = self.weight if self.weight is not None else self.down
        assert holder is not None
        return holder.device

    def reset_parameters(self) -> None:
        raise TypeError(
            f"a lowrank_ops.{type(self).__name__} has a frozen weight, which cannot be drawn again; set_adapter gives a "
            "fresh adapter"
        )

    def extra_repr(self) -> str:
        weight = self.weight
        kind = str(getattr(weight, "dtype", None)).removeprefix("torch.")
        if isinstance(weight, QuantizedWeight):
            kind = weight.format.name
        text = (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"weight={kind}, adapter={self.adapter}"
        )
        if self.adapter is not None:
            count = math.prod(self.shape[:-2]) * self.adapter.num_parameters(self.out_features, self.in_features)
            text += f", parameters={count:,}"
        return text if self.start_error is None else f"{text}, start_error={self.start_error:.2g}"

    def _fqn_modifiers(self) -> dict[str, str]:
        # MXFP4's entries stand beside the matrix's name: see QuantizedWeight._fqn_modifiers.
        held = {name: m for name, m in self._modules.items() if isinstance(m, QuantizedWeight)}
        return {name + end: "_entry_names" for name, m in held.items() for end in m._suffixes() if end.startswith("_")}

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.adapter is not None:  # tensors alone do not tell the kind
            destination[prefix + RECORD] = entry_of(self.adapter, self.source)

    def _load_from_state_dict(
        self,
        state_dict: Mapping[str, Any],
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        try:
            source = self._checked_source(state_dict, prefix)
            if isinstance(self.weight, Tensor):
                check_format(state_dict, prefix + "weight", None)
        except ValueError as error:
            if str(error) not in error_msgs:  # one sentence for all layers
                error_msgs.append(str(error))
            return
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        unexpected_keys[:] = [key for key in unexpected_keys if key != prefix + RECORD]
        self.source = source
        for name, matrix in self._modules.items():
            if isinstance(matrix, QuantizedWeight):
                matrix._load_entries(
                    state_dict, prefix + name, local_metadata, missing_keys, unexpected_keys, error_msgs
                )
        self._renew_norms()

    def _checked_source(self, state_dict: Mapping[str, Any], prefix: str) -> Source | None:
        """The source of a state dict's frozen factors; raise if its adapter is of another kind, rank or scale.

        Tensors of another kind may have the same names and shapes, and strict=False ignores missing and surplus tensors.
        """
        mine, record = self.adapter, state_dict.get(prefix + RECORD)
        if record is None:  # an older state
            if prefix + "base_down" in state_dict and self.base_down is None:
                raise ValueError(f"checkpoint: a LoRA over a base of its own, model: {described(mine)}")
            return self.source
        theirs, source = read_entry(prefix, record)
        # A layer without an adapter may take a base, but not a base that the adapter changed.
        if not (not changes_base(theirs) if mine is None else same_meaning(mine, theirs)):
            raise ValueError(f"checkpoint: {described(theirs)}, model: {described(mine)}")
        return self.source if mine is None else source


class Linear(AdaptedLayer, nn.Linear):
    """y = W x + bias + s · U C (D drop(x)): W and bias are frozen; the kind decides which of D, U and C are trained.

    It replaces ``nn.Linear`` wherever a layer is called, and is found wherever code looks for linear layers; reading the
    numbers of a 4-bit ``weight`` raises. Its ``state_dict`` stores ``weight`` and ``bias`` as a quantised
    bitsandbytes layer does (or as ``nn.Linear`` does with ``quantize=None``), the tensors of the kind, and the kind
    itself under ``adapter``, as JSON. A state of another kind, rank or scale is refused, with ``strict=False`` too.

    Args:
        in_features, out_features: K and N.
        bias: whether the layer has a bias.
        adapter: the kind of update, or None for none; a layer smaller than the default rank needs a lower one.
        quantize: the format of W: ``"nf4"`` or ``"fp4"`` (block size 64, double quantisation), ``"mxfp4"`` (K a multiple
            of 32), or None, which keeps W dense.
        device, dtype: of W and bias. Trained parameters are always float32.

    Attributes:
        weight: :class:`NF4Weight`, :class:`FP4Weight`, :class:`MXFP4Weight` or a frozen Parameter [N, K]; None in the
            replace form, where U C Vᵀ is the weight.
        bias: frozen Parameter [N], or None.
        adapter: the kind, or None.
        down, up: D [R, K] and U [N, R], or None: trained Parameters (LoRA), or frozen Parameters or 4-bit weights.
        core: trained Parameter, the values of C, which start at 0, or None; ``core_index`` is the pattern of a sparse
            core, ``core_offset`` the term added to the values in the replace form.
        dropout: the dropout module of the adapter's input, or None; ``p`` is its rate in training.
        magnitude, up_bias: m [N] of a DoRA and b [N] of a ``lora_bias``, trained Parameters, or None.
        base_down, base_up: D₀, U₀ of a kind whose base is W − s · U₀ D₀ (PiSSA, MiLoRA, LoftQ), or None.
        source: the weight from which frozen factors or a changed base were made, or None.
        start_error: ‖W' − W‖ / ‖W‖ at the start for kinds that may not start as W, otherwise None.

    Raises:
        ValueError, TypeError: the rank is above min(N, K), ``quantize`` is unknown, or a size is below 1.
    """

    bias: nn.Parameter | None  # type: ignore[assignment]
    weight: QuantizedWeight | nn.Parameter | None  # type: ignore[assignment]

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        adapter: Adapter | None = LoRA(),  # noqa: B008  (frozen)
        quantize: str | None = "nf4",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        check_adapter(adapter)
        if in_features < 1 or out_features < 1:
            raise ValueError(f"in_features and out_features must be at least 1, got {in_features} and {out_features}")
        dense = nn.Linear(in_features, out_features, bias, device, dtype)
        nn.Module.__init__(self)
        started = start(adapter, check_weight(dense.weight, quantize), quantize, None)
        self._assemble(started, None if dense.bias is None else dense.bias.detach(), adapter, dense.weight)

    @classmethod
    def from_linear(
        cls,
        linear: nn.Module,
        adapter: Adapter | None = None,
        quantize: str | None = "nf4",
        factors: FactorStore | None = None,
        started: Start | None = None,
    ) -> Linear:
        """Make a layer over the weight of another layer, which stays unchanged.

        Args:
            linear: an ``nn.Linear``, a transformers ``Conv1D``, a quantised bitsandbytes ``Linear4bit`` (NF4 or FP4)
                whose bytes are kept, or a :class:`Linear` without an adapter, whose weight and bias are shared.
            adapter: the kind of update, or None for none.
            quantize: the format for a dense W, ``"nf4"``, ``"fp4"`` or ``"mxfp4"``; None keeps W (shared with ``linear``,
                not copied).
            factors: singular vectors from ``lowrank-ops precompute``, used if they fit.
            started: the first state of the kind, if already made.

        Raises:
            TypeError: not a linear layer, or a dtype other than float32, bfloat16 and float16.
            ValueError: the layer has an adapter already; W is on the meta device or not finite; the rank is above
                min(N, K); the kind needs W before it was quantised.
        """
        check_adapter(adapter)
        linear, weight, put_hooks_on = check_linear(linear, None if started else adapter, quantize)
        layer = cls.__new__(cls)
        nn.Module.__init__(layer)
        layer.transposed = linear.transposed if isinstance(linear, Linear) else is_conv1d(linear)
        bias = linear.bias
        if isinstance(bias, Tensor) and not isinstance(linear, Linear):
            bias = bias.detach()  # the other layer's may be trained on
        made = started or start(adapter, weight, quantize, factors)
        layer._assemble(made, bias if isinstance(bias, Tensor) else None, adapter, weight)
        put_hooks_on(layer.train(linear.training))
        return layer

    @classmethod
    def from_weight(cls, weight: QuantizedWeight, bias: Tensor | None = None, adapter: Adapter | None = None) -> Linear:
        """Make a layer over a 4-bit weight [N, K], which it keeps; no dense weight is made.

        Args:
            weight: of any format and device. On the meta device the layer is on it too, to be filled by ``load_state_dict``.
            bias: [N], a Parameter, which is kept, or a tensor, which becomes a frozen one; or None.
            adapter: the kind of update, or None for none; on the meta device one that does not read W.

        Raises:
            TypeError: weight is not a 4-bit weight, or bias not a tensor.
            ValueError: weight is a stack; bias has another shape or device; the rank is above min(N, K); the kind changes
                the base, or reads W and W is on the meta device.
        """
        check_adapter(adapter)
        if not isinstance(weight, QuantizedWeight):
            raise TypeError(
                f"weight must be an NF4Weight, FP4Weight or MXFP4Weight, got {type(weight).__name__}; a layer with a dense "
                "weight is made by Linear.from_linear"
            )
        if len(weight.shape) != 2:
            raise ValueError(f"weight must be [N, K], got {list(weight.shape)}")
        if bias is not None and not isinstance(bias, Tensor):
            raise TypeError(f"bias must be a Tensor or None, got {type(bias).__name__}")
        if bias is not None and (bias.shape != weight.shape[:1] or bias.device != weight.device):
            raise ValueError(
                f"bias must be [{weight.shape[0]}] on {weight.device}, got {list(bias.shape)} on {bias.device}"
            )
        if weight.device.type == "meta" and reads_weight(adapter):
            raise ValueError(f"{adapter} reads W, which is on the meta device and holds no numbers; load it first")
        layer = cls.__new__(cls)
        nn.Module.__init__(layer)
        layer._assemble(start(adapter, weight, None, None), bias, adapter, weight)
        return layer

    def forward(self, x: Tensor) -> Tensor:
        if self.disabled:
            return self._base(x)
        if self.pooled is not None:
            if torch.compiler.is_dynamo_compiling() and not (torch.is_grad_enabled() and x.requires_grad):
                return self.pooled.linear(functional.cast_input(x), self.out_features)
            if (route := route_of(self)) is not None:
                return route.linear(self, x)
        # A subclass (parametrize makes one) and a replica of DataParallel keep their parts elsewhere. With gradients or
        # under a transform the parts may be tensors of a graph, which nothing here may keep.
        if self.scales_rows:
            assert self.weight is not None and (update := self._relative_update()) is not None
            scale = None if self.magnitude is None else self.row_scale()
            return scaled_linear(x, self.weight, update, scale, self.full_bias())
        if type(self) is Linear and "_is_replica" not in self.__dict__ and ops.dispatcher_is_idle():
            run = self._prepared()
            if run is not None:
                return run.call_idle(x)
        if (weight := self.weight) is not None:
            return functional.adapted_linear(x, weight, self._relative_update(), self.bias)
        assert self.up is not None and self.down is not None
        return functional.svd_linear(x, self.up, self._replacing_core(), self.down, self.bias)

    def _prepared(self) -> functional.PreparedLinear | None:
        """The prepared call over the layer's parts, renewed when a part was replaced.

        None in the replace form, and where a part is an attribute, as torch's pruning and weight_norm make it.
        """
        parameters, modules = self._parameters, self._modules
        try:
            # Written out: this runs at every call, and a loop would take a microsecond of it.
            weight = modules["weight"] if "weight" in modules else parameters["weight"]
            down = modules["down"] if "down" in modules else parameters["down"]
            up = modules["up"] if "up" in modules else parameters["up"]
            bias, core, index = parameters["bias"], parameters["core"], self._buffers["core_index"]
        except KeyError:
            return None
        rate, adapter = self._rate() if self.training else 0.0, self.adapter
        kept = self.__dict__.get("_call")
        if (
            kept is not None
            and kept[0] is weight
            and kept[1] is down
            and kept[2] is up
            and kept[3] is bias
            and kept[4] is core
            and kept[5] is index
            and kept[6] is adapter
            and kept[7] == rate
        ):
            run: functional.PreparedLinear = kept[8]
            return run
        if self.weight is None:
            return None
        run = functional.prepare(self.weight, self.bias, self._relative_update())
        self._call = weight, down, up, bias, core, index, adapter, rate, run
        return run

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> Linear:
        self.__dict__.pop("_call", None)  # it would keep the old memory alive
        super()._apply(fn, recurse)
        self._renew_norms()
        return self

    def _base(self, x: Tensor) -> Tensor:
        """The original W x + bias; U diag(S) Vᵀ x + bias in the replace form."""
        if (weight := self.weight) is not None:
            return functional.adapted_linear(x, weight, self.base_update, self.bias)
        core = self.make_core(self.core_offset)
        assert core is not None and self.up is not None and self.down is not None
        return functional.svd_linear(x, self.up, core, self.down, self.bias)


def _freeze(weight: QuantizedWeight | Tensor | None) -> QuantizedWeight | nn.Parameter | None:
    if weight is None or isinstance(weight, QuantizedWeight):
        return weight
    return nn.Parameter(weight, requires_grad=False)


def check_linear(
    linear: nn.Module, adapter: Adapter | None, quantize: str | None
) -> tuple[nn.Module, QuantizedWeight | Tensor, Callable[[nn.Module], None]]:
    """A layer without its hooks, its W and how to hook a replacement; raise what :meth:`Linear.from_linear` raises for a W
    of finite numbers."""
    if isinstance(linear, Linear) and linear.adapter is not None:
        raise ValueError(f"linear has the adapter {described(linear.adapter)} already")
    if not is_linear(linear) and not isinstance(linear, Linear):
        raise TypeError(
            "linear must be an nn.Linear (not a subclass with a forward of its own), Conv1D or bitsandbytes "
            f"Linear4bit, got {type(linear).__name__}"
        )
    if hasattr(linear.weight, "full_tensor"):  # a DTensor
        raise ValueError(
            "weight is a DTensor, split over processes; adapt the model while it is whole, then split it with "
            "lowrank_ops.parallelize, or with lowrank_ops.make_shardable and fully_shard"
        )
    if isinstance(linear, Linear):
        check_unsplit(linear)
    if (unhooked := known_hooks(linear)) is None:
        raise ValueError("linear has hooks, or a forward of its own set on it, which would be lost; remove them first")
    held = linear.weight
    linear, put_hooks_on = unhooked
    weight = weight_of(linear)
    if weight.device.type == "meta":
        raise ValueError(_ON_META)
    weight = check_weight(weight, quantize)
    if adapter is not None and quantize is None:
        check_in_place(held)
    if adapter is not None:
        check_start(adapter, weight, quantize)
    return linear, weight, put_hooks_on


def check_finite(weight: Tensor) -> None:
    """Raise ValueError if a number is NaN or infinite."""
    if not all(torch.isfinite(t) for t in torch.aminmax(weight)):
        raise ValueError("weight must be finite, got NaN or infinity in it")


def check_weight(weight: QuantizedWeight | Tensor, quantize: str | None) -> QuantizedWeight | Tensor:
    check_quantize(quantize)
    if isinstance(weight, QuantizedWeight):
        return weight
    weight = weight.detach()
    if quantize is not None:
        WEIGHTS[quantize].check_dense(weight)
        return weight
    if weight.dtype not in FLOAT_DTYPES:
        raise TypeError(f"weight must be float32, bfloat16 or float16, got {weight.dtype}")
    if weight.device.type == "meta":
        raise ValueError(_ON_META)
    check_finite(weight)
    return weight


def check_whole(layer: AdaptedLayer) -> None:
    """Raise if FSDP has left this process only a part of the trained parameters, or accelerate has offloaded them."""
    *stack, R, _ = (0, 0) if layer.down is None else layer.down.shape
    shapes = {"down": (*stack, R, layer.in_features), "up": (*stack, layer.out_features, R)}
    shapes |= dict.fromkeys(("magnitude", "up_bias"), (layer.out_features,))
    for name in ("down", "up", "core", "magnitude", "up_bias"):
        parameter = getattr(layer, name)
        sharded = hasattr(parameter, "full_tensor")  # a DTensor
        if sharded or (name in shapes and parameter is not None and tuple(parameter.shape) != shapes[name]):
            raise ValueError(
                f"{name} is sharded over processes; gather it first, with unshard() on every FSDPModule of the model or "
                "inside FullyShardedDataParallel.summon_full_params"
            )
        if parameter is not None and parameter.device.type == "meta":
            raise ValueError(
                f"{name} is on the meta device; load it first, or take the hooks of an offloaded model off with "
                "accelerate.hooks.remove_hook_from_submodules(model)"
            )


def check_unsplit(layer: AdaptedLayer) -> None:
    """Raise if this process has only a part of the layer, by tensor parallelism."""
    if layer.split is not None:
        raise ValueError(
            "the layer is split over processes by lowrank_ops.parallelize; do this before parallelize, or save the adapter "
            "and load it in one process"
        )


def check_adapter(adapter: Adapter | None) -> None:
    if adapter is not None and not isinstance(adapter, Adapter):
        raise TypeError(f"adapter must be a LoRA, LoRAXS, SVF, SVFT or None, got {adapter!r}")
