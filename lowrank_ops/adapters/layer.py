"""What layers over frozen weights with adapters have in common."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Self

import torch
from torch import Tensor, nn

from .. import cores
from ..cores import Core
from ..formats import QuantizedWeight, check_format
from ..functional import LowRankUpdate
from .dora import RowNorms, is_at_hand, scale_of
from .kinds import SVFT, Adapter, LoRA, LoRAXS, described, same_meaning
from .rounding import Base, Loss
from .route import Place, check_unpooled
from .split import Split, refuse_state
from .start import (
    RECORD,
    Source,
    Start,
    changes_base,
    entry_of,
    read_entry,
    start,
)


class _Refusal:
    """What raises where torch's parallel styles ask for its truth."""

    def __bool__(self) -> bool:
        raise TypeError(
            "torch's ColwiseParallel and RowwiseParallel split dense layers only; use lowrank_ops.parallelize(model, "
            "mesh, plan), or the styles of lowrank_ops.integrations.tensor_parallel"
        )


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
    branch_down: Tensor | None
    branch_up: Tensor | None
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
    # w of lowrank_ops.set_strength.
    strength = 1.0
    # What was lost when W was rounded, if it was measured here.
    loss: Loss | None = None
    _entry_names = QuantizedWeight._entry_names  # see _fqn_modifiers
    # Tells transformers not to initialise the layer with random numbers.
    _is_hf_initialized = True
    # torch's parallel styles ask whether this is true before they touch a layer.
    _distribute_module_applied = _Refusal()

    def _assemble(
        self, started: Start, bias: Tensor | None, adapter: Adapter | None, weight: QuantizedWeight | Tensor
    ) -> None:
        self.out_features, self.in_features = weight.shape[-2:]
        self.weight = _freeze(started.weight)
        self._dtype = weight.dtype
        if bias is not None and not isinstance(bias, nn.Parameter):
            bias = nn.Parameter(bias, requires_grad=False)
        self.register_parameter("bias", bias)
        self.loss = started.loss
        self.set_branch(started.branch)
        self._install(adapter, started)

    def set_branch(self, branch: LowRankUpdate | None) -> None:
        """Put a frozen U_b D_b beside W, or none, without a check of its shape; its scale must be 1."""
        for name in ("down", "up"):
            factor = None if branch is None else getattr(branch, name)
            self.register_buffer(f"branch_{name}", None if factor is None else factor.detach().contiguous())
        self.__dict__.pop("_call", None)

    @property
    def branch(self) -> LowRankUpdate | None:
        """U_b D_b, a frozen part of the base: what it gives back of the rounding of W; None for W alone."""
        down, up = self._buffers.get("branch_down"), self._buffers.get("branch_up")
        return None if down is None or up is None else LowRankUpdate(down, up)

    @property
    def base(self) -> Base:
        """W and its branch. The layer must not have the replace form."""
        assert self.weight is not None
        return Base(self.weight if isinstance(self.weight, QuantizedWeight) else self.weight.detach(), self.branch)

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
            self._norms.measure(self.weight, self.branch)

    def _set_dropout(self) -> None:
        """Keep the adapter's dropout as a module, which libraries find and switch off; the op itself drops elements."""
        rate = self.adapter.dropout if isinstance(self.adapter, LoRA) else 0.0
        self.register_module("dropout", nn.Dropout(rate) if rate else None)

    def train(self, mode: bool = True) -> Self:
        self._norms.forget()  # parts may have been written in ways that leave no trace
        return super().train(mode)

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        if hasattr(param, "full_tensor"):  # a DTensor
            bool(self._distribute_module_applied)
        super().register_parameter(name, param)

    def set_adapter(self, adapter: Adapter | None) -> None:
        """Give the layer a fresh adapter of a kind, or none; W and its branch stay unchanged.

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
        started = start(adapter, self.base.weight, None, None, branch=self.branch)
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
        return scale_of(self.magnitude, norms.of(weight, update, not self.training, self.branch))

    def full_bias(self) -> Tensor | None:
        """bias + s · b, of a layer with ``lora_bias``; otherwise bias."""
        if self.up_bias is None or self.adapter is None:
            return self.bias
        added = self.adapter.scale * self.up_bias
        return added if self.bias is None else self.bias + added

    def merged_bias(self) -> Tensor | None:
        """The bias that the layer applies: bias + w s · b, of a layer with ``lora_bias``; otherwise bias."""
        full = self.full_bias()
        if self.strength == 1 or self.up_bias is None or full is None:
            return full
        return torch.lerp(torch.zeros_like(full) if self.bias is None else self.bias.float(), full, self.strength)

    def _weaker_update(self) -> LowRankUpdate | None:
        """The update at the layer's strength, where it is all that the adapter adds to the original W; else None."""
        if self.weight is None or self.scales_rows or self.base_down is not None:
            return None
        update = self._relative_update()
        return None if update is None else replace(update, scale=self.strength * update.scale)

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
        for name in ("magnitude", "up_bias"):  # they are not part of every kind
            self._parameters.setdefault(name, None)
        for name in ("branch_down", "branch_up"):
            self._buffers.setdefault(name, None)
        self._renew_norms()

    def _replacing_core(self) -> Core:
        assert self.core is not None and self.core_offset is not None
        values = self.core if self.split is None else self.split.shared(None, None, self.core)[2]
        core = self.make_core(values + self.core_offset)
        assert core is not None
        return core

    def merged_weight(self, dtype: torch.dtype | None = None) -> Tensor:
        """W' = W + U_b D_b + s · U C D, the [N, K] that the layer applies (without dropout); U C Vᵀ in the replace form.

        With a DoRA it is g ⊙ (W + U_b D_b + s · U D) by rows. A ``lora_bias`` is no part of it. At a strength w it is
        W₀ + w (W' - W₀), W₀ the weight before the adapter (:func:`lowrank_ops.set_strength`).

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
                merged = self.base.dense()
                if update is not None:
                    merged = merged + update.delta()
                if self.magnitude is not None:
                    merged = merged * self.row_scale().unsqueeze(-1)
            if self.strength != 1:
                merged = torch.lerp(self._original(), merged, self.strength)
            # The weight of a dense layer is not to be shared.
            return merged.to(dtype or self.dtype, copy=isinstance(weight, Tensor))

    def _original(self) -> Tensor:
        """The weight before the layer had its adapter, with the branch, float32."""
        if self.weight is None:
            core = self.make_core(self.core_offset)
            assert core is not None and self.up is not None and self.down is not None
            return LowRankUpdate(self.down, self.up, core).delta()
        base, taken = self.base.dense(), self.base_update
        return base if taken is None else base + taken.delta()

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
        if (branch := self.branch) is not None:
            text += f", branch={branch.rank}"
        if self.adapter is not None:
            count = math.prod(self.shape[:-2]) * self.adapter.num_parameters(self.out_features, self.in_features)
            text += f", parameters={count:,}"
        return text if self.start_error is None else f"{text}, start_error={self.start_error:.2g}"

    def _fqn_modifiers(self) -> dict[str, str]:
        if self.split is not None:
            refuse_state(self)  # torch asks before it makes a distributed state, an optimizer's too
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
        self._make_room(state_dict, prefix)
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

    def _make_room(self, state_dict: Mapping[str, Any], prefix: str) -> None:
        """Make the branch as a state dict has it, where ranks may differ by layer.

        A state with another W and no branch takes the branch away. One with the same W, such as a trainer's file of the
        weights, lacks it: it stays, and ``strict`` tells.
        """
        down, up = (state_dict.get(f"{prefix}branch_{name}") for name in ("down", "up"))
        if isinstance(down, Tensor) and isinstance(up, Tensor):
            *stack, N, K = self.shape
            R = up.shape[-1]
            if tuple(down.shape) == (*stack, R, K) and tuple(up.shape) == (*stack, N, R):  # else torch tells the shapes
                empty_down, empty_up = (torch.empty(f.shape, dtype=f.dtype, device=self.device) for f in (down, up))
                self.set_branch(LowRankUpdate(empty_down, empty_up))
        elif down is None and up is None and self.branch is not None and self._differs(state_dict, prefix):
            self.set_branch(None)

    def _differs(self, state_dict: Mapping[str, Any], prefix: str) -> bool:
        """Tell whether a state dict has another W than the layer, by its entries; one of shards counts as the same."""
        weight = self.weight
        if not isinstance(weight, QuantizedWeight) or not is_at_hand(weight):
            return False
        for key, own in weight._entries(prefix + "weight").items():
            theirs = state_dict.get(key)
            if isinstance(theirs, Tensor) and not (own.shape == theirs.shape and torch.equal(own.cpu(), theirs.cpu())):
                return True
        return False

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


def _freeze(weight: QuantizedWeight | Tensor | None) -> QuantizedWeight | nn.Parameter | None:
    if weight is None or isinstance(weight, QuantizedWeight):
        return weight
    return nn.Parameter(weight, requires_grad=False)


def check_whole(layer: AdaptedLayer) -> None:
    """Raise if FSDP has left this process only a part of the trained parameters, or accelerate has offloaded them."""
    *stack, R, _ = (0, 0) if layer.down is None else layer.down.shape
    groups = getattr(layer, "groups", 1)  # of a convolution
    shapes = {"down": (*stack, R, layer.in_features), "up": (*stack, layer.out_features, R // groups)}
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
