"""lowrank_ops.Conv1d and Conv2d: convolutions over a frozen kernel, dense or in 4 bits, with a LoRA."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, Self

import torch
from torch import Tensor, nn

from .. import functional
from ..formats import QuantizedWeight
from ..functional import LowRankUpdate
from .embedding import check_lora
from .foreign import check_in_place, is_conv, is_linear, known_hooks, linear_shape, weight_of
from .kinds import Adapter, LoRA
from .linear import AdaptedLayer, check_adapter, check_finite, check_weight
from .peft_files import LORA, Loaded
from .rounding import Base, RoundingPlan, keep_base
from .route import check_unpooled
from .start import Start

# What a convolution of torch is, beside its tensors.
_OPTIONS = (
    "in_channels",
    "out_channels",
    "kernel_size",
    "stride",
    "padding",
    "dilation",
    "transposed",
    "output_padding",
    "groups",
    "padding_mode",
    "_reversed_padding_repeated_twice",
)
# D, U and s.
Parts = tuple[Tensor, Tensor, float]


class Convolution(AdaptedLayer):
    """What :class:`Conv1d` and :class:`Conv2d` share."""

    bias: nn.Parameter | None
    groups: int
    kernel_size: tuple[int, ...]
    # A module of the same class and options without its tensors; in a tuple, so that it does not become a child.
    _shell: tuple[nn.Module]

    @classmethod
    def from_conv(
        cls,
        conv: nn.Module,
        adapter: Adapter | None = None,
        quantize: str | RoundingPlan | None = "nf4",
        started: Start | None = None,
    ) -> Self:
        """Make a layer over the kernel of a convolution, which stays unchanged.

        Args:
            conv: an ``nn.Conv1d`` or ``nn.Conv2d``, as this class, or a layer of this class without an adapter, whose kernel
                is shared.
            adapter: a :class:`LoRA` with ``init="kaiming"`` or ``"gaussian"``, or None for none.
            quantize: the format of a dense kernel, taken as the matrix [N, C / groups · kernel]; None keeps it dense,
                shared with ``conv``.
            started: D and U, if already made.

        Raises:
            TypeError: another kind of module or of adapter, or a dtype other than float32, bfloat16 and float16.
            ValueError: the layer has an adapter already; its kernel is on the meta device or not finite; the rank is above
                min(N, C · kernel) or no multiple of ``groups``; hooks would be lost.
        """
        conv, weight, put_hooks_on = check_conv(conv, adapter, quantize)
        if not isinstance(conv, nn.Conv1d if issubclass(cls, nn.Conv1d) else nn.Conv2d):
            raise TypeError(f"conv must be an nn.{cls.__name__}, got {type(conv).__name__}")
        if not isinstance(weight, QuantizedWeight) and quantize is not None:
            check_finite(weight)
            held = keep_base(weight, quantize).weight
        else:
            held = weight
        layer = cls._over(conv, held if isinstance(held, QuantizedWeight) else conv.weight.detach())
        layer._install(adapter, started or layer._start(adapter))
        put_hooks_on(layer)
        return layer.train(conv.training)

    @classmethod
    def from_weight(cls, weight: QuantizedWeight, conv: nn.Module) -> Self:
        """Make a layer without an adapter over a 4-bit weight [N, C / groups · kernel], with the options of a convolution
        whose own kernel is not read.

        Raises:
            TypeError: another kind of module. ValueError: the shapes differ; hooks would be lost.
        """
        plain, put_hooks_on = _check_plain(conv)
        expected = torch.Size(plain.weight.flatten(1).shape)
        if weight.shape != expected:
            raise ValueError(f"weight must be {list(expected)} as the convolution, got {list(weight.shape)}")
        layer = cls._over(plain, weight)
        layer._install(None, Start(None, None, None))
        put_hooks_on(layer)
        return layer.train(plain.training)

    @classmethod
    def _over(cls, conv: Any, weight: QuantizedWeight | Tensor) -> Self:
        layer = cls.__new__(cls)
        nn.Module.__init__(layer)
        vars(layer).update({name: vars(conv)[name] for name in _OPTIONS})
        layer.out_features, layer.in_features = linear_shape(conv)
        layer.weight = weight if isinstance(weight, QuantizedWeight) else nn.Parameter(weight, requires_grad=False)
        layer._dtype = weight.dtype
        bias = conv.bias
        if bias is not None and not isinstance(conv, Convolution):
            bias = nn.Parameter(bias.detach(), requires_grad=False)  # the other layer's may be trained on
        layer.register_parameter("bias", bias)
        layer.set_branch(None)
        shell = conv._shell[0] if isinstance(conv, Convolution) else _emptied(conv)
        layer._shell = (shell,)
        return layer

    def _start(self, adapter: Adapter | None) -> Start:
        if adapter is None:
            return Start(None, None, None)
        assert isinstance(adapter, LoRA)
        down, up = adapter.factors(self.out_features, self.in_features, self.device)
        return Start(None, down, up[:, : adapter.rank // self.groups].contiguous())

    def set_adapter(self, adapter: Adapter | None) -> None:
        """Give the layer a fresh LoRA, or none; W stays unchanged.

        Raises:
            ValueError: another kind; the rank is above min(N, C · kernel) or no multiple of ``groups``; or a pool routes
                the layer.
        """
        if adapter is not None:
            _check_kind(adapter, self)
        check_unpooled(self)
        self._install(adapter, self._start(adapter))

    @property
    def base(self) -> Base:
        """W as the matrix [N, C / groups · kernel]."""
        weight = self.weight
        assert weight is not None
        return Base(weight if isinstance(weight, QuantizedWeight) else weight.detach().flatten(1))

    def _relative_update(self) -> LowRankUpdate | None:
        if self.adapter is not None and self.groups > 1:
            raise ValueError(
                f"groups={self.groups}: the update joins the channels of all groups, as in PEFT, so it is no change of W "
                "and cannot be merged, combined or made another LoRA"
            )
        return super()._relative_update()

    def forward(self, x: Tensor) -> Tensor:
        if self.disabled or self.adapter is None:
            return convolve(self, x)
        assert isinstance(self.down, Tensor) and isinstance(self.up, Tensor)
        return convolve(self, x, (self.down, self.up, self.strength * self.adapter.scale), self._rate())

    def merged_weight(self, dtype: torch.dtype | None = None) -> Tensor:
        """W' = W + s · U D as the kernel [N, C / groups, …], added in float32 and rounded once.

        Raises:
            ValueError: the layer has an adapter and groups.
        """
        return super().merged_weight(dtype).view(self.out_features, -1, *self.kernel_size)

    def make_plain(self, weight: nn.Parameter) -> nn.Module:
        """The convolution that stood in the model before, with another kernel."""
        plain = _emptied(self._shell[0])
        plain._parameters = {"weight": weight, "bias": self.bias}
        return plain.train(self.training)

    def extra_repr(self) -> str:
        weight: Any = self.weight
        kind = weight.format.name if isinstance(weight, QuantizedWeight) else str(weight.dtype).removeprefix("torch.")
        return f"{self._shell[0].extra_repr()}, weight={kind}, adapter={self.adapter}"


class Conv1d(Convolution, nn.Conv1d):  # type: ignore[misc]
    """As :class:`Conv2d`, in place of an ``nn.Conv1d``: the kernel is [N, C / groups, k], x [B, C, T]."""


class Conv2d(Convolution, nn.Conv2d):  # type: ignore[misc]
    """y = W * x + bias + s · U * (D * drop(x)), * a convolution: the kernel W [N, C / groups, kh, kw] is frozen, dense or in
    4 bits, D [R, C · kh · kw] and U [N, R / groups] are trained.

    It takes the place of an ``nn.Conv2d``. D is a convolution with the kernel, stride, padding and dilation of W over all
    channels, U one of 1 × 1 with the groups of W. So for one group the kernel W + s · U D is the same map.
    A 4-bit W is decoded at every call, and again in the backward.

    Attributes:
        weight: a 4-bit weight [N, C / groups · kh · kw], or the frozen Parameter [N, C / groups, kh, kw].
        bias: frozen Parameter [N], or None.
        adapter: the :class:`LoRA`, or None.
        down, up: D and U, float32, or None.

    Numerics: the products with W in the dtype of x, the update in float32; the sum is rounded once to the dtype of x.

    Source: LoRA, arXiv 2106.09685, with PEFT's tensors ``lora_A`` [R, C, kh, kw] and ``lora_B`` [N, R / groups, 1, 1].
    PEFT's own D has no dilation and always pads with zeros.
    """


def convolve(conv: Any, x: Tensor, update: Parts | None = None, dropout: float = 0.0) -> Tensor:
    """y of a convolution, of torch or ours, with an update s · U * (D * drop(x)) or none."""
    x = functional.cast_input(x)
    with torch.autocast(x.device.type, enabled=False):
        y = _frozen(conv, x)
        if update is None:
            return y
        down, up, scale = update
        kernel = down.float().view(len(down), -1, *conv.kernel_size)
        h = _product(conv, nn.functional.dropout(x.float(), dropout), kernel, None, 1)
        ones = (1,) * len(conv.kernel_size)
        added = _function(conv)(h, up.float().view(*up.shape, *ones), groups=conv.groups)
        return (y.float() + scale * added).to(y.dtype)


def _function(conv: Any) -> Callable[..., Tensor]:
    function: Callable[..., Tensor] = nn.functional.conv1d if len(conv.kernel_size) == 1 else nn.functional.conv2d
    return function


def _product(conv: Any, x: Tensor, kernel: Tensor, bias: Tensor | None, groups: int) -> Tensor:
    """The product of x with a kernel that has the stride, the padding and the dilation of a convolution."""
    padding = conv.padding
    if conv.padding_mode != "zeros":
        x, padding = nn.functional.pad(x, conv._reversed_padding_repeated_twice, mode=conv.padding_mode), 0
    return _function(conv)(x, kernel, bias, conv.stride, padding, conv.dilation, groups)


def _frozen(conv: Any, x: Tensor) -> Tensor:
    """W * x + bias."""
    weight = conv.weight
    bias = None if conv.bias is None else conv.bias.to(x.dtype)
    if isinstance(weight, Tensor):
        return _product(conv, x, weight.to(x.dtype), bias, conv.groups)

    def decode() -> Tensor:
        kernel: Tensor = weight.dequantize(x.dtype)
        return kernel.view(conv.out_channels, -1, *conv.kernel_size)

    kernel = decode()
    if torch.compiler.is_compiling() or not (torch.is_grad_enabled() and x.requires_grad):
        return _product(conv, x, kernel, bias, conv.groups)
    # The graph would hold the dense kernel until the backward; it holds None in its place.
    at = kernel.data_ptr()
    with torch.autograd.graph.saved_tensors_hooks(
        lambda saved: None if saved.data_ptr() == at else saved, lambda saved: decode() if saved is None else saved
    ):
        return _product(conv, x, kernel, bias, conv.groups)


def conv_over(
    conv: nn.Module, adapter: Adapter | None, quantize: str | RoundingPlan | None, started: Start | None = None
) -> Convolution:
    """A :class:`Conv1d` or :class:`Conv2d` over a convolution, as :meth:`Convolution.from_conv` makes it."""
    return _class_of(conv).from_conv(conv, adapter, quantize, started)


def conv_over_weight(weight: QuantizedWeight, conv: nn.Module) -> Convolution:
    """A :class:`Conv1d` or :class:`Conv2d` over a 4-bit weight, as :meth:`Convolution.from_weight` makes it."""
    return _class_of(conv).from_weight(weight, conv)


def _class_of(conv: nn.Module) -> type[Convolution]:
    return Conv1d if isinstance(conv, nn.Conv1d) else Conv2d


def check_conv(
    conv: nn.Module, adapter: Adapter | None, quantize: str | RoundingPlan | None
) -> tuple[Any, QuantizedWeight | Tensor, Callable[[nn.Module], None]]:
    """A convolution without its hooks, W [N, C / groups · kernel] and how to hook a replacement; raise what
    :meth:`Convolution.from_conv` raises for a W of finite numbers."""
    if isinstance(conv, Convolution) and conv.adapter is not None:
        raise ValueError(f"the convolution has the adapter {conv.adapter} already")
    plain, put_hooks_on = _check_plain(conv)
    if adapter is not None:
        _check_kind(adapter, plain)
    if plain is not conv and quantize is None:
        check_in_place(conv.weight)
    weight = weight_of(plain)
    if weight.device.type == "meta":
        raise ValueError("weight is on the meta device and holds no numbers; load or materialise it first")
    return plain, check_weight(weight, quantize), put_hooks_on


def _check_plain(conv: nn.Module) -> tuple[Any, Callable[[nn.Module], None]]:
    if not (is_conv(conv) or isinstance(conv, Convolution)):
        raise TypeError(
            f"conv must be an nn.Conv1d or nn.Conv2d (not a subclass with a forward of its own), got {type(conv).__name__}"
        )
    if (unhooked := known_hooks(conv)) is None:
        raise ValueError("conv has hooks, or a forward of its own set on it, which would be lost; remove them first")
    return unhooked


def _check_kind(adapter: Adapter, conv: Any) -> None:
    check_adapter(adapter)
    check_lora(adapter, "a convolution")
    adapter.check(*linear_shape(conv))
    if (adapter.rank or 0) % conv.groups:
        raise ValueError(f"rank must be a multiple of groups = {conv.groups}, got {adapter.rank}")


def _emptied(conv: nn.Module) -> nn.Module:
    """A copy without tensors."""
    shell = nn.Module.__new__(type(conv))
    vars(shell).update(vars(conv))
    shell._parameters = {"weight": None, "bias": conv._parameters.get("bias")}
    if shell._parameters["bias"] is not None:  # its text tells whether there is one
        shell._parameters["bias"] = nn.Parameter(torch.empty(0, device="meta"), requires_grad=False)
    return shell


def to_kernels(layer: Convolution, parts: dict[str, Tensor]) -> dict[str, Tensor]:
    """D and U of a layer by PEFT's shapes, [R, C, kernel] and [N, R / groups, 1]; parts: by attributes."""
    ones = (1,) * len(layer.kernel_size)
    shapes = {"down": layer.kernel_size, "up": ones}
    return {key: part.view(len(part), -1, *shapes[key]) for key, part in parts.items()}


def with_kernels(
    layers: Mapping[str, AdaptedLayer], loras: Mapping[str, tuple[LoRA, Tensor, Tensor]]
) -> dict[str, tuple[LoRA, Tensor, Tensor]]:
    """LoRAs by the names of their layers, D and U of convolutions by PEFT's shapes."""
    made = dict(loras)
    for name, layer in layers.items():
        if isinstance(layer, Convolution):
            kind, down, up = loras[name]
            parts = to_kernels(layer, {"down": down, "up": up})
            made[name] = kind, parts["down"], parts["up"]
    return made


def to_matrices(layer: Any, loaded: Loaded) -> None:
    """Make the tensors of a file the matrices D and U: kernels of a convolution, and kernels of 1 × 1 of a linear layer.

    Raises:
        ValueError: a kernel does not fit the layer, or the kind is for other layers.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    if is_conv(layer) or isinstance(layer, Convolution):
        _check_kind(loaded.kind, layer)
        R, ones = loaded.kind.rank or 0, (1,) * len(layer.kernel_size)
        shapes = {
            "down": (R, layer.in_channels, *layer.kernel_size),
            "up": (layer.out_channels, R // layer.groups, *ones),
        }
    elif not isinstance(layer, nn.Linear) and not is_linear(layer):
        return
    made = {}
    for key in ("down", "up"):
        tensor = loaded.tensors.get(key)
        if tensor is None:
            continue
        needed = shapes.get(key)
        if needed is not None:
            # The state of a whole model has matrices.
            if tuple(tensor.shape) not in (needed, (needed[0], math.prod(needed[1:]))):
                raise ValueError(
                    f"the file's {LORA[key]} must be {list(needed)} for {loaded.kind} and this convolution, got "
                    f"{list(tensor.shape)}"
                )
            tensor = tensor.flatten(1)
        elif tensor.dim() > 2 and math.prod(tensor.shape[2:]) == 1:
            tensor = tensor.flatten(1)
        made[key] = tensor.contiguous()
    loaded.tensors = loaded.tensors | made
