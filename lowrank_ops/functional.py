"""Checked calls of the ops: shapes, dtypes and devices are checked here and nowhere below."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import KW_ONLY, dataclass
from numbers import Real
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torch.nn import Parameter

from . import _checks, ops
from ._checks import cast_input, check_slots  # noqa: F401  (imported from here too)
from .cores import Core
from .formats import FLOAT_DTYPES, QuantizedWeight
from .kernels.operands import Branch, Matrix
from .ops import _cpu, _plan, arena


@dataclass(frozen=True)
class LowRankUpdate:
    """ΔW = s · U C D, the update of a frozen W; with a leading E in every tensor, one update for each expert of a stack.

    Args:
        down: D [R, K], or [E, R, K], float32, bfloat16 or float16, or a frozen 4-bit weight. PEFT's ``lora_A.weight``; Bᵀ
            where papers write A Bᵀ.
        up: U [N, R], or [E, N, R], of the same types. PEFT's ``lora_B.weight``; A where papers write A Bᵀ.
        core: C of size R, one of :mod:`lowrank_ops.cores`; None is the identity.
        scale: s.
        dropout: probability to drop an element of the update's input; kept elements are divided by 1 - dropout.
        base: ΔW₀, if ΔW is added to W = W₀ − ΔW₀ (PiSSA, MiLoRA, LoftQ), so that W₀ changes by ΔW − ΔW₀.
            Only :func:`lowrank_ops.combine` and :func:`lowrank_ops.convert` read it.

    Raises:
        TypeError, ValueError: a factor is not a float matrix, the ranks or the numbers of experts differ, dropout is
            outside [0, 1), or base is not an update of the same shape.
    """

    down: Tensor | QuantizedWeight
    up: Tensor | QuantizedWeight
    core: Core | None = None
    scale: float = 1.0
    _: KW_ONLY
    dropout: float = 0.0
    base: LowRankUpdate | None = None

    def __post_init__(self) -> None:
        stack = "E, " if getattr(self.down, "ndim", 2) == 3 else ""
        _checks.check_matrix("down", self.down, f"[{stack}R, K]")
        _checks.check_matrix("up", self.up, f"[{stack}N, R]")
        if self.down.shape[:-2] != self.up.shape[:-2] or self.down.shape[-2] != self.up.shape[-1]:
            raise ValueError(
                f"down [{stack}R, K] and up [{stack}N, R] must agree in {stack}R, got {list(self.down.shape)} and "
                f"{list(self.up.shape)}"
            )
        if self.core is not None:
            _checks.check_core(self.core, self.rank, self.experts)
        for name, factor in (("down", self.down), ("up", self.up)):
            if isinstance(factor, Tensor) and not factor.is_floating_point():
                raise TypeError(f"{name} must be float32, bfloat16 or float16, got {factor.dtype}")
        if isinstance(self.scale, Tensor):
            raise TypeError("scale must be a number, got a Tensor, which would receive no gradient")
        if not isinstance(self.scale, Real):
            raise TypeError(f"scale must be a number, got {type(self.scale).__name__}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must be in [0, 1), got {self.dropout}")
        if self.base is not None:
            if not isinstance(self.base, LowRankUpdate):
                raise TypeError(f"base must be a LowRankUpdate or None, got {type(self.base).__name__}")
            if self.base.shape != self.shape:
                raise ValueError(f"base must be {list(self.shape)} as the update is, got {list(self.base.shape)}")

    @property
    def shape(self) -> tuple[int, ...]:
        """(N, K), or (E, N, K)."""
        return *self.up.shape[:-1], int(self.down.shape[-1])

    @property
    def rank(self) -> int:
        """R."""
        return int(self.down.shape[-2])

    @property
    def experts(self) -> int:
        """E of updates for a stack, else 0."""
        return int(self.down.shape[0]) if self.down.ndim == 3 else 0

    def delta(self) -> Tensor:
        """ΔW = s · U C D [N, K] or [E, N, K] in float32 (float64 if a factor is), differentiable."""
        down, up = (f.dequantize(torch.float32) if isinstance(f, QuantizedWeight) else f for f in (self.down, self.up))
        dtype = torch.promote_types(torch.promote_types(down.dtype, up.dtype), torch.float32)
        down, up = down.to(dtype), up.to(dtype)
        if self.core is not None:
            up = up @ self.core.dense().to(dtype)
        return self.scale * (up @ down)


def adapted_linear(
    x: Tensor,
    weight: Tensor | QuantizedWeight,
    update: LowRankUpdate | None = None,
    bias: Tensor | None = None,
    *,
    branch: LowRankUpdate | None = None,
) -> Tensor:
    """y = W x + U_b (D_b x) + bias + s · U C (D drop(x)), for every row of x, in one op.

    Args:
        x: [..., K], float32, bfloat16 or float16. Under autocast it is cast to autocast's dtype first.
        weight: W [N, K], frozen: a 4-bit weight such as :class:`NF4Weight`, or a dense contiguous tensor of one of the
            three dtypes.
        update: the low-rank part; its tensors may differ in dtype from x, and their gradients have their own dtype.
        bias: [N].
        branch: U_b D_b, frozen, a part of the base such as what 4 bits leave of W: dense factors, without core and
            dropout, of scale 1.

    Returns:
        y [..., N] in the dtype of x. Gradients flow to x, down, up, the values of the core and bias.

    Raises:
        TypeError: an argument is not a tensor, or has a dtype that the kernels lack.
        ValueError: a shape or a device does not fit; W or the branch is not contiguous or requires a gradient.

    Numerics: 4-bit weights decode exactly. A 16-bit product rounds w to 16 bits once; for few tokens on a CPU with
    AVX-512 BF16 it rounds the level instead and scales the sums. Sums are in float32, and y is rounded once (twice with
    many tokens on a GPU, where the update passes through memory in the dtype of x). Backward keeps h = D drop(x) in
    float32, R numbers a token, if ``up`` or the core is trained, and x only if ``down`` is. The dropout mask comes from
    one integer drawn from torch's generator and is recomputed in backward.

    Source: LoRA, arXiv 2106.09685, equation 3; with a core SVFT, arXiv 2405.19597.
    """
    x, dtypes = _checks.take_x(x)
    arguments, scale, dropout = _linear_operands(x, dtypes, weight, update, bias)
    _checks.check_x(x, weight.shape[1], f"a weight {weight.shape[0]} x {weight.shape[1]}")
    seed = torch.randint(2**63 - 1, (1,), dtype=torch.int64, device=x.device) if dropout > 0 else None
    beside = _take_branch(branch, weight, x, dtypes)
    y, _ = ops.call("adapted_linear", _checks.flatten_rows(x), *arguments, scale, dropout, seed, beside)
    return _checks.unflatten_rows(x, y)


def prepare(
    weight: Tensor | QuantizedWeight,
    bias: Tensor | None = None,
    update: LowRankUpdate | None = None,
    *,
    branch: LowRankUpdate | None = None,
) -> PreparedLinear:
    """run = prepare(weight, bias, update); y = run(x) = W x + U_b (D_b x) + bias + s · U C (D drop(x)).

    Like :func:`adapted_linear`, for layers that are called often: operands are checked and their kernel is chosen once,
    and a call without gradients checks only x. Operands may change: their values are read at each call, and an operand
    that was moved, cast or replaced inside its module is checked again.

    Args:
        weight, bias, update, branch: as in :func:`adapted_linear`.

    Returns:
        A callable that takes x [..., K] and returns y [..., N] in the dtype of x.

    Raises:
        TypeError, ValueError: as :func:`adapted_linear`; operands are checked here, x at each call.
    """
    return PreparedLinear(weight, bias, update, branch)


class PreparedLinear:
    """y = W x + U_b (D_b x) + bias + s · U C (D drop(x)) over fixed operands; made by :func:`prepare`."""

    __slots__ = ("weight", "bias", "update", "branch", "_bound")

    def __init__(
        self,
        weight: Tensor | QuantizedWeight,
        bias: Tensor | None,
        update: LowRankUpdate | None,
        branch: LowRankUpdate | None = None,
    ) -> None:
        self.weight, self.bias, self.update, self.branch = weight, bias, update, branch
        # Bound at the first call that can use it: here the operands may be tensors of a trace, which have no address.
        self._bound: _Bound | None = None
        _checks.check_matrix("weight", weight, "[N, K]")
        held = weight.operand().data if isinstance(weight, QuantizedWeight) else weight
        _linear_operands(held, _checks.allowed_dtypes(), weight, update, bias)
        _take_branch(branch, weight, held, _checks.allowed_dtypes())

    def __reduce__(self) -> tuple[Any, ...]:
        return PreparedLinear, (self.weight, self.bias, self.update, self.branch)

    def __call__(self, x: Tensor) -> Tensor:
        if ops.dispatcher_is_idle():
            return self.call_idle(x)
        return adapted_linear(x, self.weight, self.update, self.bias, branch=self.branch)

    def call_idle(self, x: Tensor) -> Tensor:
        """The same, for a caller that knows the dispatcher to be idle (:func:`lowrank_ops.ops.dispatcher_is_idle`)."""
        if (type(x) is Tensor or type(x) is Parameter) and not x.is_nested:
            bound = self._bound
            if bound is None or not bound.holds():
                bound = self._bound = _bind(self.weight, self.bias, self.update, self.branch)
            if bound.run is not None and (y := bound.multiply(x)) is not None:
                return y
        return adapted_linear(x, self.weight, self.update, self.bias, branch=self.branch)

    def route_idle(
        self, x: Tensor, memory: Tensor, table: Tensor, slots: Tensor, capacity: int, strengths: Tensor | None
    ) -> Tensor:
        """:func:`routed` over the weight, bias and branch, without an update; x may be [..., K]. As :meth:`call_idle`.

        Args:
            memory, table, slots, capacity, strengths: as of :func:`routed`; int32 slots and float32 strengths, contiguous.
        """
        if (type(x) is Tensor or type(x) is Parameter) and not x.is_nested:
            bound = self._bound
            if bound is None or not bound.holds():
                bound = self._bound = _bind(self.weight, self.bias, self.update, self.branch)
            if bound.run is not None and (y := bound.multiply(x, (memory, table, slots, strengths))) is not None:
                return y
        rows = x.reshape(-1, x.shape[-1])
        options: Any = {"branch": self.branch, "strengths": strengths}
        y = routed(rows, self.weight, memory, table, slots, self.bias, capacity, **options)
        return y.view(*x.shape[:-1], y.shape[-1])


class _Bound(NamedTuple):
    """Checked operands, and their addresses when they were checked."""

    N: int
    K: int
    device: torch.device
    device_type: str
    arguments: tuple[Any, ...]  # arguments of the op after x
    run: Callable[..., Tensor] | None  # the CPU kernel; None if no call may skip the checks
    # For 4-bit weights: buffers, name, tensor, address, dtype.
    packed: list[tuple[dict[str, Any], str, Tensor, int, torch.dtype]]
    # Dense tensors and their addresses. An alias keeps the memory alive, so that no other tensor can take the address.
    dense: list[tuple[Tensor, Tensor, int, int, torch.dtype]]
    plans: dict[Any, _plan.Plan | None]

    def holds(self) -> bool:
        """Tell whether every operand is still at its address."""
        for buffers, name, tensor, address, dtype in self.packed:
            if buffers[name] is not tensor or tensor.data_ptr() != address or tensor.dtype is not dtype:
                return False
        for tensor, _, address, numel, dtype in self.dense:
            if (
                tensor.data_ptr() != address
                or tensor.numel() != numel
                or tensor.dtype is not dtype
                or not tensor.is_contiguous()
            ):
                return False
        return True

    def multiply(self, x: Tensor, updates: _cpu.Updates | None = None) -> Tensor | None:
        """y for a contiguous x of the right shape and device, with the updates of an arena; None if the checked path must
        handle the call."""
        shape = x.shape
        if not shape or shape[-1] != self.K or x.device != self.device or x.layout is not torch.strided:
            return None
        if not x.is_contiguous() or x.is_neg():
            return None
        if torch.is_autocast_enabled(self.device_type):
            return None
        matrix = len(shape) == 2
        M = shape[0] if matrix else shape.numel() // self.K
        dtype = x.dtype
        plan = self.plans.get((M, dtype, _plan.forced(), _cpu.isa())) or self.plan(M, dtype)
        if plan is None:
            return None
        if not matrix:
            x = x.view(M, self.K)
        if plan.implementation == "cpp":
            assert self.run is not None
            y = self.run(x, M, plan.form, updates)
        elif updates is not None:
            return None
        else:
            y = ops.KERNELS["adapted_linear"](x, *self.arguments, plan=plan)[0]
        return y if matrix else y.view(*shape[:-1], self.N)

    def plan(self, M: int, dtype: torch.dtype) -> _plan.Plan | None:
        """The plan for M tokens of a dtype, cached for the next call; None if every call must take the checked path."""
        if not M or dtype not in FLOAT_DTYPES or _plan.forced() == "reference":
            return None
        if len(self.plans) >= 1000:
            self.plans.clear()
        x = torch.empty(M, 0, dtype=dtype, device=self.device)
        plan = self.plans[M, dtype, _plan.forced(), _cpu.isa()] = _plan.choose_linear(x, self.arguments[0], self.K)
        return plan


def _bind(
    weight: Tensor | QuantizedWeight, bias: Tensor | None, update: LowRankUpdate | None, branch: LowRankUpdate | None
) -> _Bound:
    """Check the operands and record their addresses."""
    _checks.check_matrix("weight", weight, "[N, K]")
    N, K = weight.shape
    held = weight.operand().data if isinstance(weight, QuantizedWeight) else weight
    arguments, scale, dropout = _linear_operands(held, _checks.allowed_dtypes(), weight, update, bias)
    beside = _take_branch(branch, weight, held, _checks.allowed_dtypes())
    matrices = [weight] if update is None else [weight, update.down, update.up]
    packed = [
        (m._buffers, name, t) for m in matrices if isinstance(m, QuantizedWeight) for name, t in m.named_buffers()
    ]
    factors = () if branch is None else (branch.down, branch.up)
    dense = [t for t in (*matrices, bias, *factors) if isinstance(t, Tensor)]
    if update is not None and update.core is not None:
        dense += [t for t in (update.core.values, update.core.index) if t is not None]
    plain = all(type(t) is Tensor or type(t) is Parameter for t in (*dense, *(t for _, _, t in packed)))
    # What is kept elsewhere is brought for one call only.
    here = not any(isinstance(m, QuantizedWeight) and m.keeper is not None for m in matrices)
    usable = plain and here and not dropout and held.device.type in ("cpu", "cuda")
    # If an operand had to be copied, later writes to the operand would not reach the copy.
    usable = usable and all(t.is_contiguous() and not t.is_neg() and t.dtype is not torch.float64 for t in dense)
    return _Bound(
        N,
        K,
        held.device,
        held.device.type,
        (*arguments, scale, 0.0, None, beside) if usable else (),
        _cpu.bind_adapted_linear(K, scale, beside, *arguments) if usable else None,
        [(buffers, name, t, t.data_ptr(), t.dtype) for buffers, name, t in packed] if plain else [],
        [(t, t.detach(), t.data_ptr(), t.numel(), t.dtype) for t in dense] if plain else [],
        {},
    )


def _linear_operands(
    x: Tensor,
    dtypes: tuple[torch.dtype, ...],
    weight: Tensor | QuantizedWeight,
    update: LowRankUpdate | None,
    bias: Tensor | None,
    of: str = "[N, K]",
) -> tuple[tuple[Any, ...], float, float]:
    """Check the operands of adapted_linear, or of experts_linear if ``of`` is "[E, N, K]", from weight to bias, scale and
    dropout, and that they are on the device of x."""
    if update is not None and not isinstance(update, LowRankUpdate):
        raise TypeError(f"update must be a LowRankUpdate or None, got {type(update).__name__}")
    _checks.check_matrix("weight", weight, of)
    *stack, N, K = weight.shape
    rank, down, up, core, scale, dropout = 0, None, None, None, 1.0, 0.0
    if update is not None:
        rank, core, scale, dropout = update.rank, update.core, float(update.scale), float(update.dropout)
        down = _take_factor("update.down", update.down, (*stack, rank, K), weight, x, dtypes)
        up = _take_factor("update.up", update.up, (*stack, N, rank), weight, x, dtypes)
    arguments = (
        _checks.take_matrix("weight", weight, x, dtypes, frozen=True), N, rank, down, up,
        _checks.take_core("update.core", core, x, dtypes), _checks.take_bias(bias, (*stack, N), x, dtypes),
    )  # fmt: skip
    return arguments, scale, dropout


def _take_branch(
    branch: Any, weight: Tensor | QuantizedWeight, x: Tensor, dtypes: tuple[torch.dtype, ...]
) -> Branch | None:
    """Check a frozen branch beside W, and give its factors as the ops take them."""
    if branch is None:
        return None
    if not isinstance(branch, LowRankUpdate):
        raise TypeError(f"branch must be a LowRankUpdate or None, got {type(branch).__name__}")
    if branch.core is not None or branch.dropout or branch.scale != 1:
        raise ValueError("branch must have no core, no dropout and scale 1; multiply its up by the rest")
    *stack, N, K = weight.shape
    taken: list[Tensor] = []
    shapes = ((*stack, branch.rank, K), (*stack, N, branch.rank))
    for name, factor, shape in zip(("branch.down", "branch.up"), (branch.down, branch.up), shapes, strict=True):
        if not isinstance(factor, Tensor):
            raise TypeError(f"{name} must be a dense Tensor, got {type(factor).__name__}")
        matrix = _take_factor(name, factor, shape, weight, x, dtypes, frozen=True)
        taken.append(matrix.data)
    return Branch(*taken)


def _take_factor(
    name: str, factor: Tensor | QuantizedWeight, shape: tuple[int, ...], weight: Tensor | QuantizedWeight, x: Tensor,
    dtypes: tuple[torch.dtype, ...], frozen: bool = False,
) -> Matrix:  # fmt: skip
    """Check a factor of an update or a branch beside W, and give it as the ops take it."""
    if tuple(factor.shape) != shape:
        sizes = " x ".join(map(str, weight.shape))
        raise ValueError(f"{name} must be {list(shape)} for a weight {sizes}, got {list(factor.shape)}")
    return cast(Matrix, _checks.take_matrix(name, factor, x, dtypes, frozen))


def experts_linear(
    x: Tensor,
    weight: Tensor | QuantizedWeight,
    offsets: Tensor,
    update: LowRankUpdate | None = None,
    bias: Tensor | None = None,
    *,
    branch: LowRankUpdate | None = None,
) -> Tensor:
    """y[p] = W_e x[p] + U_be (D_be x[p]) + b_e + s · U_e C_e (D_e drop(x[p])), offsets[e] <= p < offsets[e + 1].

    Args:
        x: [P, K], the rows of expert 0, then those of expert 1, and so on; float32, bfloat16 or float16. Under autocast it
            is cast to autocast's dtype first.
        weight: W [E, N, K], frozen: a stack in 4 bits such as ``NF4Weight.quantize(stack)``, or a dense contiguous tensor.
        offsets: int32 [E + 1] on the device of x, rising from 0: expert e has the rows from offsets[e] to
            offsets[e + 1]. Rows from offsets[E] on belong to no expert, and their y is 0.
        update: the low-rank part of every expert: down [E, R, K], up [E, N, R], values of the core with a leading E.
        bias: b [E, N], frozen.
        branch: as in :func:`adapted_linear`, of every expert: down [E, R, K], up [E, N, R].

    Returns:
        y [P, N] in the dtype of x. Gradients flow to x, down, up and the values of the core; those of an expert without
        rows are 0.

    Raises:
        TypeError: an argument is not a tensor, or has a dtype that the kernels lack.
        ValueError: a shape or a device does not fit; W is not contiguous; W or the bias requires a gradient. On a CPU
            also: the offsets do not begin with 0, fall, or exceed the rows. On a GPU that check would make the host wait;
            there offsets are cut to the rows of x.

    Numerics: as :func:`adapted_linear`, for each expert. On a CPU each expert decodes its W in registers or tile by tile
    as the number of its own rows calls for, and a row's result does not depend on the rows of other experts. Backward
    keeps h[p] = D_e drop(x[p]) in float32 if ``up`` or the core is trained, and x only if ``down`` is.
    """
    x, dtypes = _checks.take_x(x)
    (w, *rest), scale, dropout = _linear_operands(x, dtypes, weight, update, bias, "[E, N, K]")
    E, N, K = weight.shape
    _checks.check_x(x, K, f"a weight {E} x {N} x {K}")
    if x.dim() != 2:
        raise ValueError(f"x must be [P, K={K}], got {list(x.shape)}")
    _checks.check_offsets(offsets, E, x)
    seed = torch.randint(2**63 - 1, (1,), dtype=torch.int64, device=x.device) if dropout > 0 else None
    beside = _take_branch(branch, weight, x, dtypes)
    y, _ = ops.call("experts_linear", x, w, offsets, *rest, scale, dropout, seed, beside)
    return cast(Tensor, y)


def svd_linear(
    x: Tensor, u: Tensor | QuantizedWeight, core: Core, vt: Tensor | QuantizedWeight, bias: Tensor | None = None
) -> Tensor:
    """y = U C (Vᵀ x) + bias, for every row of x, in one op: a linear map in the singular basis of a weight.

    With C = diag(S) Z the weight is U diag(S) Z Vᵀ; it is never built.

    Args:
        x: [..., K], float32, bfloat16 or float16. Under autocast it is cast to autocast's dtype first.
        u: U [N, R], frozen: a 4-bit weight such as :class:`NF4Weight`, or a dense contiguous tensor.
        core: C of size R, one of :mod:`lowrank_ops.cores`.
        vt: Vᵀ [R, K], frozen as u is.
        bias: [N].

    Returns:
        y [..., N] in the dtype of x. Gradients flow to x, the values of the core and bias.

    Raises:
        TypeError, ValueError: as :func:`adapted_linear`.

    Numerics: h = Vᵀ x is summed in float32 and rounded to the dtype of x, in which backward keeps it (R numbers a
    token; x is not kept). C h is summed in float32, and rounded to bfloat16 where the second product is in bfloat16. y
    is rounded once.

    Source: SVF, arXiv 2501.06252; SVFT, arXiv 2405.19597, equation 1.
    """
    x, dtypes = _checks.take_x(x)
    _checks.check_matrix("u", u, "[N, R]")
    _checks.check_matrix("vt", vt, "[R, K]")
    (N, R), K = u.shape, vt.shape[1]
    if vt.shape[0] != R:
        raise ValueError(f"u [N, R] and vt [R, K] must agree in R, got {list(u.shape)} and {list(vt.shape)}")
    _checks.check_core(core, R)
    _checks.check_x(x, K, f"vt {R} x {K}")
    y, _ = ops.call(
        "svd_linear", _checks.flatten_rows(x), _checks.take_matrix("u", u, x, dtypes, frozen=True),
        _checks.take_core("core", core, x, dtypes), _checks.take_matrix("vt", vt, x, dtypes, frozen=True), N, R,
        _checks.take_bias(bias, (N,), x, dtypes),
    )  # fmt: skip
    return _checks.unflatten_rows(x, y)


_NO_GRADIENT = "routed_linear has no gradient; call it under torch.no_grad() or torch.inference_mode()"


def routed_linear(
    x: Tensor,
    weight: Tensor | QuantizedWeight,
    updates: Sequence[LowRankUpdate | None],
    slots: Tensor,
    bias: Tensor | None = None,
    offsets: Tensor | None = None,
    *,
    branch: LowRankUpdate | None = None,
    strengths: Tensor | None = None,
) -> Tensor:
    """y[t] = W x[t] + U_b (D_b x[t]) + bias + s_a · U_a C_a (D_a x[t]), a = slots[t]: each row of x has its own update.

    With strengths a row has several: y[t] = W x[t] + U_b (D_b x[t]) + bias + Σ_j strengths[t, j] s_a · U_a C_a (D_a x[t]),
    a = slots[t, j], summed in the order of j.

    With offsets rows are sorted by expert, as for :func:`experts_linear`, and W, the bias, D, U and C are those of the
    row's expert.

    Args:
        x: [M, K], float32, bfloat16 or float16.
        weight: W [N, K], frozen: a 4-bit weight such as :class:`NF4Weight`, or a dense contiguous tensor. With offsets a
            stack [E, N, K] of either.
        updates: what the slots hold. Ranks, cores and dtypes may differ, and nothing is padded; factors that are the
            same tensor are shared. None means no update. Dropout is not applied. With offsets stacks of E.
        slots: integers [M], or [M, S] with strengths, in [-1, len(updates)), on the device of x; -1 means no update.
        bias: [N]; with offsets [E, N].
        offsets: None, or int32 [E + 1] as for :func:`experts_linear`.
        branch: as in :func:`adapted_linear`, of every row; with offsets as in :func:`experts_linear`.
        strengths: float [M, S], finite, on the device of x; None for 1 and slots [M].

    Returns:
        y [M, N] in the dtype of x. There are no gradients, because this op is for serving.

    Raises:
        TypeError, ValueError: as :func:`adapted_linear` and :func:`experts_linear`; a slot is out of range; a tensor
            requires a gradient while gradients are on.

    Numerics: as :func:`adapted_linear`; D x and C D x are in float32. A row's result does not depend on the slots of
    other rows, and with one update at strength 1 it has the same bits with and without strengths.

    Every call copies the updates side by side; :class:`lowrank_ops.AdapterPool` keeps them so.
    """
    x, dtypes = _checks.take_x(x)
    _checks.check_matrix("weight", weight, "[N, K]" if offsets is None else "[E, N, K]")
    *stack, N, K = weight.shape
    sizes = " x ".join(map(str, weight.shape))
    _checks.check_x(x, K, f"a weight {sizes}")
    if x.dim() != 2:
        raise ValueError(f"x must be [M, K={K}], got {list(x.shape)}")
    checked: list[arena.Update | None] = []
    for i, update in enumerate(updates):
        if update is None:
            checked.append(None)
            continue
        if not isinstance(update, LowRankUpdate):
            raise TypeError(f"updates[{i}] must be a LowRankUpdate or None, got {type(update).__name__}")
        factors: list[Matrix] = []
        shapes = ((*stack, update.rank, K), (*stack, N, update.rank))
        for name, factor, shape in zip(("down", "up"), (update.down, update.up), shapes, strict=True):
            matrix = _take_factor(f"updates[{i}].{name}", factor, shape, weight, x, FLOAT_DTYPES)
            factors.append(matrix._replace(data=matrix.data.detach()))
        core = _checks.take_core(f"updates[{i}].core", update.core, x, FLOAT_DTYPES)
        core = None if core is None else core._replace(values=core.values.detach())
        checked.append((update.rank, factors[0], factors[1], core, float(update.scale)))
    check_slots(slots, len(x), len(updates), x.device, strengths)
    parts = [weight, strengths]
    for update in updates:
        if update is not None:
            parts += [update.down, update.up, None if update.core is None else update.core.values]
    if torch.is_grad_enabled() and any(isinstance(part, Tensor) and part.requires_grad for part in parts):
        raise ValueError(_NO_GRADIENT)
    memory, table = arena.build(checked, x.device, *stack)
    capacity = max((u[0] for u in checked if u is not None), default=1)
    return routed(x, weight, memory, table, slots, bias, capacity, offsets, branch=branch, strengths=strengths)


def routed(
    x: Tensor,
    weight: Tensor | QuantizedWeight,
    memory: Tensor,
    table: Tensor,
    slots: Tensor,
    bias: Tensor | None,
    capacity: int = 512,
    offsets: Tensor | None = None,
    *,
    branch: LowRankUpdate | None = None,
    strengths: Tensor | None = None,
) -> Tensor:
    """:func:`routed_linear` over an arena and its table (:mod:`lowrank_ops.ops.arena`), whose rows are not checked.

    Args:
        x: [M, K].
        slots, strengths: as in :func:`routed_linear`; a captured graph reads both again.
        capacity: at least the largest rank in the table; on a GPU the workspace of D x has this many columns, and rows
            of a slot with a larger rank become NaN.
        offsets, branch: as in :func:`routed_linear`; the slots of the table then hold stacks of E.
    """
    x, dtypes = _checks.take_x(x)
    if torch.is_grad_enabled() and (x.requires_grad or (bias is not None and bias.requires_grad)):
        raise ValueError(_NO_GRADIENT)
    *stack, N, _ = weight.shape
    if offsets is not None:
        _checks.check_offsets(offsets, stack[0], x)
    slots, strengths = slots.to(torch.int32).contiguous(), None if strengths is None else strengths.float().contiguous()
    y: Tensor = ops.call(
        "routed_linear", x, _checks.take_matrix("weight", weight, x, dtypes), N,
        _checks.take_bias(bias, (*stack, N), x, dtypes), memory, table, slots, capacity, offsets,
        _take_branch(branch, weight, x, dtypes), strengths,
    )  # fmt: skip
    return y
