"""lowrank_ops.Linear: nn.Linear over a frozen, 4-bit or dense weight, with an adapter that is trained."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from . import _plan, functional
from .adapters import LoRA
from .functional import LowRankUpdate
from .nf4 import FLOAT_DTYPES, NF4Weight


class Linear(nn.Module):
    """y = W x + bias + s · U (D drop(x)): W and bias frozen, D and U trained.

    It stands in for ``nn.Linear`` wherever a layer is called. Its ``state_dict`` has ``weight`` and ``bias`` as a
    quantised bitsandbytes layer has them (or as ``nn.Linear`` with ``quantize=None``), and ``down`` and ``up``.

    Args:
        in_features, out_features: K and N.
        bias: whether there is one.
        adapter: the kind of update, or None for none; a layer smaller than the default rank needs a lower one.
        quantize: ``"nf4"`` (block size 64, double quantisation) or None, which keeps W dense.
        device, dtype: of W and bias. The factors are float32, whatever the dtype.

    Attributes:
        weight: :class:`NF4Weight`, or a frozen Parameter [N, K].
        bias: frozen Parameter [N], or None.
        adapter: the kind, or None.
        down, up: Parameters D [R, K] and U [N, R], or None.

    Raises:
        ValueError, TypeError: a rank above min(N, K), an unknown ``quantize``, sizes below 1.
    """

    down: nn.Parameter | None
    up: nn.Parameter | None
    bias: nn.Parameter | None
    weight: NF4Weight | nn.Parameter

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        adapter: LoRA | None = LoRA(),  # noqa: B008  (frozen)
        quantize: str | None = "nf4",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        check_adapter(adapter)
        if in_features < 1 or out_features < 1:
            raise ValueError(f"in_features and out_features must be at least 1, got {in_features} and {out_features}")
        dense = nn.Linear(in_features, out_features, bias, device, dtype)
        super().__init__()
        self._assemble(_quantized(dense.weight, quantize), None if dense.bias is None else dense.bias.detach(), adapter)

    @classmethod
    def from_linear(cls, linear: nn.Module, adapter: LoRA | None = None, quantize: str | None = "nf4") -> Linear:
        """The same layer over the weight of another, which stays as it is.

        Args:
            linear: an ``nn.Linear``, a transformers ``Conv1D``, or a quantised bitsandbytes ``Linear4bit`` (NF4), whose
                bytes are taken over as they are.
            adapter: the kind of update, or None for none.
            quantize: ``"nf4"``, or None to keep a dense W (shared with ``linear``, not copied).

        Raises:
            TypeError: not a linear layer, or a dtype other than float32, bfloat16 and float16.
            ValueError: adapted already, on the meta device, not finite, rank above min(N, K).
        """
        if isinstance(linear, Linear):
            raise ValueError("linear is a lowrank_ops.Linear already")
        if not is_linear(linear):
            raise TypeError(
                "linear must be an nn.Linear (not a subclass with a forward of its own), Conv1D or bitsandbytes "
                f"Linear4bit, got {type(linear).__name__}"
            )
        if _has_hooks(linear):
            raise ValueError(
                "linear has hooks, or a forward of its own set on it, which would be lost; remove them first"
            )
        check_adapter(adapter)
        if adapter is not None:
            adapter.check(*linear_shape(linear))
        weight: NF4Weight | Tensor
        if _is_4bit(linear):
            if getattr(linear.weight, "quant_state", None) is None:
                raise ValueError("linear is a bitsandbytes layer that is not quantised yet; move it to a device first")
            weight = NF4Weight.from_bitsandbytes(linear.state_dict())
        else:
            assert isinstance(linear.weight, Tensor)
            dense = linear.weight.detach()
            weight = _quantized(dense.t() if _is_conv1d(linear) else dense, quantize)
        layer = cls.__new__(cls)
        nn.Module.__init__(layer)
        bias = linear.bias
        layer._assemble(weight, bias.detach() if isinstance(bias, Tensor) else None, adapter)
        return layer.train(linear.training)

    def _assemble(self, weight: NF4Weight | Tensor, bias: Tensor | None, adapter: LoRA | None) -> None:
        self.out_features, self.in_features = weight.shape
        self.weight = weight if isinstance(weight, NF4Weight) else nn.Parameter(weight, requires_grad=False)
        self.register_parameter("bias", None if bias is None else nn.Parameter(bias, requires_grad=False))
        self.set_adapter(adapter)

    def set_adapter(self, adapter: LoRA | None) -> None:
        """Give the layer fresh factors of a kind, or none; W stays."""
        factors: tuple[nn.Parameter | None, nn.Parameter | None] = (None, None)
        if adapter is not None:
            down, up = adapter.factors(self.out_features, self.in_features, self.weight.device)
            factors = (nn.Parameter(down), nn.Parameter(up))
        self.adapter = adapter
        for name, factor in zip(("down", "up"), factors, strict=True):
            self.register_parameter(name, factor)

    @property
    def update(self) -> LowRankUpdate | None:
        """The adapter as :func:`lowrank_ops.functional.adapted_linear` takes it, with dropout only in training."""
        if self.adapter is None or self.down is None or self.up is None:
            return None
        dropout = self.adapter.dropout if self.training else 0.0
        return LowRankUpdate(self.down, self.up, scale=self.adapter.scale, dropout=dropout)

    def forward(self, x: Tensor) -> Tensor:
        return functional.adapted_linear(x, self.weight, self.update, self.bias)

    def merged_weight(self, dtype: torch.dtype | None = None) -> Tensor:
        """W' = W + s · U D, the [N, K] that the layer computes with (without dropout).

        Args:
            dtype: of the result; default that of the weight before it was quantised.

        Numerics: decoded, added and multiplied in float32, rounded once to ``dtype``.
        """
        with torch.no_grad():
            weight = self.weight
            merged = weight.dequantize(torch.float32) if isinstance(weight, NF4Weight) else weight.float().clone()
            if self.adapter is not None and self.down is not None and self.up is not None:
                merged.addmm_(self.up.float(), self.down.float(), alpha=self.adapter.scale)
            return merged.to(dtype or weight.dtype)

    def extra_repr(self) -> str:
        weight = self.weight
        kind = "nf4" if isinstance(weight, NF4Weight) else str(weight.dtype).removeprefix("torch.")
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"weight={kind}, adapter={self.adapter}"
        )

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
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        if isinstance(self.weight, NF4Weight):
            # `weight` is a submodule with an entry of its own name, which nn.Module takes for a stray one.
            if prefix + "weight" in unexpected_keys:
                unexpected_keys.remove(prefix + "weight")
            self.weight._load_entries(
                state_dict, prefix + "weight", local_metadata, missing_keys, unexpected_keys, error_msgs
            )


def is_linear(module: nn.Module) -> bool:
    """Whether :meth:`Linear.from_linear` takes it."""
    # A subclass that computes something else with its weight is not a linear layer.
    plain = isinstance(module, nn.Linear) and type(module).forward is nn.Linear.forward
    return plain or _is_4bit(module) or _is_conv1d(module)


def linear_shape(module: nn.Module) -> tuple[int, int]:
    """(N, K) of a :class:`Linear`, or of any layer that :func:`is_linear` knows."""
    if _is_conv1d(module):
        K, N = module.weight.shape  # type: ignore[misc]
        return N, K
    return int(module.out_features), int(module.in_features)  # type: ignore[arg-type]


def _is_conv1d(module: nn.Module) -> bool:
    # GPT-2's linear layer, W stored as [K, N]; recognised by name so that transformers need not be imported.
    return type(module).__name__ == "Conv1D" and type(module).__module__ == "transformers.pytorch_utils"


def _is_4bit(module: nn.Module) -> bool:
    return type(getattr(module, "weight", None)).__name__ == "Params4bit"


def _quantized(weight: Tensor, quantize: str | None) -> NF4Weight | Tensor:
    check_quantize(quantize)
    weight = weight.detach()
    if weight.dtype not in FLOAT_DTYPES:
        raise TypeError(f"weight must be float32, bfloat16 or float16, got {weight.dtype}")
    if quantize is None:
        return weight.contiguous()
    return NF4Weight.quantize(weight)


def _has_hooks(module: nn.Module) -> bool:
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    return any(hooks) or "forward" in vars(module)


def check_adapter(adapter: LoRA | None) -> None:
    if adapter is not None and not isinstance(adapter, LoRA):
        raise TypeError(f"adapter must be a LoRA or None, got {adapter!r}")


def check_quantize(quantize: str | None) -> None:
    if quantize not in ("nf4", None):
        raise ValueError(f"quantize must be 'nf4' or None, got {quantize!r}")


def explain(layer: Linear, x: Tensor) -> str:
    """Text: which kernel would run for this input, and why. Runs nothing; x may be on the meta device.

    Args:
        layer: a :class:`Linear`.
        x: an input of it, [..., K].
    """
    if not isinstance(layer, Linear):
        raise TypeError(f"layer must be a lowrank_ops.Linear, got {type(layer).__name__}")
    if not isinstance(x, Tensor) or x.dtype not in FLOAT_DTYPES:
        raise TypeError(f"x must be a float32, bfloat16 or float16 Tensor, got {getattr(x, 'dtype', type(x).__name__)}")
    if x.dim() < 1 or x.shape[-1] != layer.in_features:
        raise ValueError(f"x must be [..., K={layer.in_features}], got {list(x.shape)}")
    M = x.numel() // layer.in_features
    weight = layer.weight
    plan = _plan.plan_linear(weight.device.type, M, x.dtype, isinstance(weight, NF4Weight), _plan.forced())
    form = "W dense"
    if isinstance(weight, NF4Weight):
        form = f"W NF4, block {weight.block_size}{', 8-bit scales' if weight.double_quant else ''}"
    rank = 0 if layer.down is None else layer.down.shape[0]
    return (
        f"adapted_linear  M={M} N={layer.out_features} K={layer.in_features} R={rank}  {form}  "
        f"x {str(x.dtype).removeprefix('torch.')} on {weight.device}\n"
        f"runs      {_plan.IMPLEMENTATIONS[plan.implementation]}, form for {plan.form} tokens\n"
        f"because   {plan.reason}\n"
        f"rows      {_plan.ROWS[plan.implementation]}"
    )
