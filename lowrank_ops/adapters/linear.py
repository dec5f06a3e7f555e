"""lowrank_ops.Linear: nn.Linear over a frozen, 4-bit or dense weight, with a trained adapter."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .. import functional, ops
from ..formats import FLOAT_DTYPES, WEIGHTS, Moment, QuantizedWeight
from ..functional import LowRankUpdate
from ..svd.store import FactorStore
from .dora import scaled_linear
from .foreign import check_in_place, is_conv1d, is_linear, known_hooks, weight_of
from .kinds import Adapter, LoRA, described
from .layer import AdaptedLayer, check_adapter, check_unsplit, check_whole  # noqa: F401  (imported from here too)
from .rounding import RoundingPlan, rounding_of
from .route import route_of
from .start import Start, check_start, reads_weight, start

_ON_META = "weight is on the meta device and holds no numbers; load or materialise it first"


class Linear(AdaptedLayer, nn.Linear):
    """y = W x + U_b (D_b x) + bias + s · U C (D drop(x)): W, bias and the branch U_b D_b, which a layer has where a
    calibration fitted it to what rounding W loses, are frozen; the kind decides which of D, U and C are trained.

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
        branch: U_b D_b as a :class:`LowRankUpdate` of scale 1 over the buffers ``branch_down`` and ``branch_up``, or None.
            It is a part of the base.
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
        if dtype not in (None, *FLOAT_DTYPES):
            raise TypeError(f"dtype must be float32, bfloat16, float16 or None, got {dtype}")
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
        quantize: str | RoundingPlan | None = "nf4",
        factors: FactorStore | None = None,
        started: Start | None = None,
        moment: Moment | None = None,
    ) -> Linear:
        """Make a layer over the weight of another layer, which stays unchanged.

        Args:
            linear: an ``nn.Linear``, a transformers ``Conv1D``, a quantised bitsandbytes ``Linear4bit`` (NF4 or FP4)
                whose bytes are kept, or a :class:`Linear` without an adapter, whose weight, branch and bias are shared.
            adapter: the kind of update, or None for none.
            quantize: the format for a dense W, ``"nf4"``, ``"fp4"`` or ``"mxfp4"``; None keeps W (shared with ``linear``,
                not copied).
            factors: singular vectors from ``lowrank-ops precompute``, used if they fit.
            started: the first state of the kind, if already made.
            moment: of the layer's inputs, for starts that look at data.

        Raises:
            TypeError: not a linear layer, or a dtype other than float32, bfloat16 and float16.
            ValueError: the layer has an adapter already; W is on the meta device or not finite; the rank is above
                min(N, K); the kind needs W before it was quantised.
        """
        check_adapter(adapter)
        linear, weight, put_hooks_on = check_linear(linear, None if started else adapter, quantize, moment)
        layer = cls.__new__(cls)
        nn.Module.__init__(layer)
        layer.transposed = linear.transposed if isinstance(linear, Linear) else is_conv1d(linear)
        bias = linear.bias
        if isinstance(bias, Tensor) and not isinstance(linear, Linear):
            bias = bias.detach()  # the other layer's may be trained on
        branch = branch_of(linear)
        made = started or start(adapter, weight, quantize, factors, moment=moment, branch=branch)
        if started is not None and made.weight is weight:
            made.branch = branch
        layer._assemble(made, bias if isinstance(bias, Tensor) else None, adapter, weight)
        put_hooks_on(layer.train(linear.training))
        return layer

    @classmethod
    def from_weight(
        cls,
        weight: QuantizedWeight,
        bias: Tensor | None = None,
        adapter: Adapter | None = None,
        branch: LowRankUpdate | None = None,
    ) -> Linear:
        """Make a layer over a 4-bit weight [N, K], which it keeps; no dense weight is made.

        Args:
            weight: of any format and device. On the meta device the layer is on it too, to be filled by ``load_state_dict``.
            bias: [N], a Parameter, which is kept, or a tensor, which becomes a frozen one; or None.
            adapter: the kind of update, or None for none; on the meta device one that does not read W.
            branch: U_b D_b beside W, dense factors of scale 1, which are kept; or None.

        Raises:
            TypeError: weight is not a 4-bit weight, bias not a tensor, or branch no update with dense factors.
            ValueError: weight is a stack; bias or branch has another shape or device; a rank is above min(N, K); the kind
                changes the base, or reads W and W is on the meta device.
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
        if branch is not None:
            check_branch(branch, weight)
        layer = cls.__new__(cls)
        nn.Module.__init__(layer)
        layer._assemble(start(adapter, weight, None, None, branch=branch), bias, adapter, weight)
        return layer

    def forward(self, x: Tensor) -> Tensor:
        if self.disabled:
            return self._base(x)
        if self.pooled is not None:
            if torch.compiler.is_dynamo_compiling() and not (torch.is_grad_enabled() and x.requires_grad):
                return self.pooled.linear(functional.cast_input(x), self.out_features)
            if (route := route_of(self)) is not None:
                return route.linear(self, x)
        return self._full(x) if self.strength == 1 else self._weaker(x)

    def _full(self, x: Tensor) -> Tensor:
        """The output with the adapter at full strength."""
        # A subclass (parametrize makes one) and a replica of DataParallel keep their parts elsewhere. With gradients or
        # under a transform the parts may be tensors of a graph, which nothing here may keep.
        if self.scales_rows:
            assert self.weight is not None and (update := self._relative_update()) is not None
            scale = None if self.magnitude is None else self.row_scale()
            return scaled_linear(x, self.weight, update, scale, self.full_bias(), self.branch)
        if type(self) is Linear and "_is_replica" not in self.__dict__ and ops.dispatcher_is_idle():
            run = self.prepared()
            if run is not None:
                return run.call_idle(x)
        if (weight := self.weight) is not None:
            return functional.adapted_linear(x, weight, self._relative_update(), self.bias, branch=self.branch)
        assert self.up is not None and self.down is not None
        return functional.svd_linear(x, self.up, self._replacing_core(), self.down, self.bias)

    def prepared(self) -> functional.PreparedLinear | None:
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
            branch = self._buffers["branch_up"]  # set together with branch_down
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
            and kept[8] is branch
        ):
            run: functional.PreparedLinear = kept[9]
            return run
        if self.weight is None:
            return None
        run = functional.prepare(self.weight, self.bias, self._relative_update(), branch=self.branch)
        self._call = weight, down, up, bias, core, index, adapter, rate, branch, run
        return run

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> Linear:
        self.__dict__.pop("_call", None)  # it would keep the old memory alive
        super()._apply(fn, recurse)
        self._renew_norms()
        return self

    def _weaker(self, x: Tensor) -> Tensor:
        """y₀ + w (y - y₀): at strength w between the output y₀ without the adapter and y with it."""
        if (update := self._weaker_update()) is not None:
            assert self.weight is not None
            return functional.adapted_linear(x, self.weight, update, self.bias, branch=self.branch)
        return self._full(x) if self.adapter is None else torch.lerp(self._base(x), self._full(x), self.strength)

    def _base(self, x: Tensor) -> Tensor:
        """The original W x + bias, with the branch; U diag(S) Vᵀ x + bias in the replace form."""
        if (weight := self.weight) is not None:
            return functional.adapted_linear(x, weight, self.base_update, self.bias, branch=self.branch)
        core = self.make_core(self.core_offset)
        assert core is not None and self.up is not None and self.down is not None
        return functional.svd_linear(x, self.up, core, self.down, self.bias)


def check_linear(
    linear: nn.Module, adapter: Adapter | None, quantize: str | RoundingPlan | None, moment: Moment | None = None
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
        check_start(adapter, weight, quantize, moment)
    return linear, weight, put_hooks_on


def branch_of(layer: object) -> LowRankUpdate | None:
    """The branch of a layer; None of one that is not ours."""
    return layer.branch if isinstance(layer, AdaptedLayer) else None


def check_branch(branch: Any, weight: QuantizedWeight) -> None:
    """Raise unless it can stand beside a 4-bit weight [N, K] or [E, N, K]."""
    if not isinstance(branch, LowRankUpdate) or not (isinstance(branch.down, Tensor) and isinstance(branch.up, Tensor)):
        raise TypeError(f"branch must be a LowRankUpdate with dense factors or None, got {branch!r}")
    if branch.core is not None or branch.dropout or branch.scale != 1 or branch.base is not None:
        raise ValueError("branch must have no core, no dropout, no base and scale 1; multiply its up by the rest")
    if tuple(branch.shape) != tuple(weight.shape) or branch.up.device != weight.device:
        raise ValueError(
            f"branch must be {list(weight.shape)} on {weight.device}, got {list(branch.shape)} on {branch.up.device}"
        )
    if branch.rank > min(branch.shape[-2:]):
        raise ValueError(f"branch must have a rank of at most min(N, K) = {min(branch.shape[-2:])}, got {branch.rank}")


def check_finite(weight: Tensor) -> None:
    """Raise ValueError if a number is NaN or infinite."""
    if not all(torch.isfinite(t) for t in torch.aminmax(weight)):
        raise ValueError("weight must be finite, got NaN or infinity in it")


def check_weight(weight: QuantizedWeight | Tensor, quantize: str | RoundingPlan | None) -> QuantizedWeight | Tensor:
    rounding = rounding_of(quantize)
    if isinstance(weight, QuantizedWeight):
        return weight
    weight = weight.detach()
    if rounding is not None:
        WEIGHTS[rounding.format].check_dense(weight)
        return weight
    if weight.dtype not in FLOAT_DTYPES:
        raise TypeError(f"weight must be float32, bfloat16 or float16, got {weight.dtype}")
    if weight.device.type == "meta":
        raise ValueError(_ON_META)
    check_finite(weight)
    return weight
