"""The checked way to the ops: shapes, dtypes and devices are looked at here and nowhere below."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass

import torch
from torch import Tensor

from . import _plan
from .nf4 import FLOAT_DTYPES, NF4Weight


@dataclass(frozen=True)
class LowRankUpdate:
    """ΔW = s · U D, what is added to a frozen W.

    Args:
        down: D [R, K], float32, bfloat16 or float16. PEFT's ``lora_A.weight``; Bᵀ where papers write A Bᵀ.
        up: U [N, R], likewise. PEFT's ``lora_B.weight``; A where papers write A Bᵀ.
        scale: s.
        dropout: probability to drop an element of the update's input; kept ones are divided by 1 - dropout.

    Raises:
        TypeError, ValueError: a factor is no float matrix, the ranks differ, dropout is outside [0, 1).
    """

    down: Tensor
    up: Tensor
    _: KW_ONLY
    scale: float = 1.0
    dropout: float = 0.0

    def __post_init__(self) -> None:
        for name, factor, shape in (("down", self.down, "[R, K]"), ("up", self.up, "[N, R]")):
            if not isinstance(factor, Tensor):
                raise TypeError(f"{name} must be a Tensor {shape}, got {type(factor).__name__}")
            if factor.dim() != 2 or not factor.numel():
                raise ValueError(f"{name} must be a non-empty {shape}, got {list(factor.shape)}")
        if self.down.shape[0] != self.up.shape[1]:
            raise ValueError(
                f"down [R, K] and up [N, R] must agree in R, got {list(self.down.shape)} and {list(self.up.shape)}"
            )
        if isinstance(self.scale, Tensor):
            raise TypeError("scale must be a number, got a Tensor, through which no gradient would flow")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must be in [0, 1), got {self.dropout}")


def adapted_linear(
    x: Tensor, weight: Tensor | NF4Weight, update: LowRankUpdate | None = None, bias: Tensor | None = None
) -> Tensor:
    """y = W x + bias + s · U (D drop(x)), for every row of x, in one op.

    Args:
        x: [..., K], float32, bfloat16 or float16. Under autocast it is cast to autocast's dtype first.
        weight: W [N, K], frozen: an :class:`NF4Weight`, or a dense contiguous tensor of one of the three dtypes.
        update: the low-rank part; its factors may have another dtype than x and get gradients in their own.
        bias: [N].

    Returns:
        y [..., N] in the dtype of x. Gradients flow to x, down, up and bias.

    Raises:
        TypeError: no tensor, or a dtype that the kernels lack.
        ValueError: a shape or a device does not fit, W is not contiguous or asks for a gradient.

    Numerics: NF4 decodes exactly; where the multiply is in 16 bits, w is rounded to them once. Sums are in float32, y is
    rounded once (twice with many tokens on a GPU, where the update passes through memory in the dtype of x). Backward
    keeps h = D drop(x) in float32, R numbers a token, and x only where ``down`` is trained. The dropout mask comes from
    one integer that is drawn from torch's generator, and is made again in backward.

    Source: LoRA, arXiv 2106.09685, equation 3.
    """
    if not isinstance(x, Tensor):
        raise TypeError(f"x must be a Tensor [..., K], got {type(x).__name__}")
    if x.layout != torch.strided:
        raise ValueError(f"x must be a dense tensor, got layout {x.layout}")
    if update is not None and not isinstance(update, LowRankUpdate):
        raise TypeError(f"update must be a LowRankUpdate or None, got {type(update).__name__}")
    if bias is not None and not isinstance(bias, Tensor):
        raise TypeError(f"bias must be a Tensor [N] or None, got {type(bias).__name__}")
    device = x.device.type
    if device != "meta" and torch.is_autocast_enabled(device) and x.dtype in FLOAT_DTYPES:
        x = x.to(torch.get_autocast_dtype(device))
    # The reference computes in float64 too; the kernels do not.
    dtypes = (*FLOAT_DTYPES, torch.float64) if _plan.forced() == "reference" else FLOAT_DTYPES
    if x.dtype not in dtypes:
        raise TypeError(f"x must be float32, bfloat16 or float16, got {x.dtype}")
    if isinstance(weight, NF4Weight):
        packed: tuple[Tensor, Tensor | None, Tensor | None, Tensor | None] = (
            weight.packed,
            weight.absmax,
            weight.absmax2,
            weight.offset,
        )
        block_size = weight.block_size
    else:
        _check_dense(weight, dtypes)
        packed = (weight, None, None, None)
        block_size = 0
    N, K = weight.shape
    if x.dim() < 1 or x.shape[-1] != K:
        raise ValueError(f"x must be [..., K={K}] for a weight {N} x {K}, got {list(x.shape)}")
    operands: list[tuple[str, Tensor, tuple[int, ...]]] = []
    if update is not None:
        R = update.down.shape[0]
        operands += [("update.down", update.down, (R, K)), ("update.up", update.up, (N, R))]
    if bias is not None:
        operands.append(("bias", bias, (N,)))
    for name, tensor, shape in operands:
        if tensor.dtype not in dtypes:
            raise TypeError(f"{name} must be float32, bfloat16 or float16, got {tensor.dtype}")
        if tensor.shape != shape:
            raise ValueError(f"{name} must be {list(shape)} for a weight {N} x {K}, got {list(tensor.shape)}")
    for name, tensor, _ in [("weight", packed[0], ()), *operands]:
        if tensor.device != x.device:
            raise ValueError(f"{name} is on {tensor.device} and x on {x.device}; move one of them")
    seed = None
    if update is not None and update.dropout > 0:
        seed = torch.randint(2**63 - 1, (1,), dtype=torch.int64, device=x.device)
    down, up, scale, dropout = (
        (None, None, 1.0, 0.0) if update is None else (update.down, update.up, update.scale, update.dropout)
    )
    y, _ = torch.ops.lowrank_ops.adapted_linear.default(
        x.reshape(-1, K), *packed, N, block_size, down, up, bias, float(scale), float(dropout), seed
    )
    return y.view(*x.shape[:-1], N)


def _check_dense(weight: Tensor, dtypes: tuple[torch.dtype, ...]) -> None:
    if not isinstance(weight, Tensor):
        raise TypeError(f"weight must be a Tensor [N, K] or an NF4Weight, got {type(weight).__name__}")
    if weight.dtype not in dtypes:
        raise TypeError(f"weight must be float32, bfloat16 or float16, got {weight.dtype}")
    if weight.dim() != 2 or not weight.numel():
        raise ValueError(f"weight must be a non-empty [N, K], got {list(weight.shape)}")
    if not weight.is_contiguous():
        raise ValueError(
            f"weight must be contiguous, got strides {list(weight.stride())}; call weight.contiguous() once"
        )
    if weight.requires_grad and torch.is_grad_enabled():
        raise ValueError("weight is frozen here and gets no gradient, but it has requires_grad=True; detach it")
