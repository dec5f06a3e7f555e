"""lowrank_ops.Experts: a model's experts over frozen stacks of matrices, 4-bit or dense, each with a trained adapter."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .. import cores, functional
from ..cores import Core
from ..formats import Moment, QuantizedWeight
from ..functional import LowRankUpdate
from ..svd.store import FactorStore
from .foreign import Unhooked, known_hooks
from .kinds import Adapter, LoRA, described
from .linear import AdaptedLayer, check_adapter, check_branch, check_weight
from .names import call_named
from .rounding import RoundingPlan
from .route import Rows, route_of
from .start import Start, start


class ExpertsLinear(AdaptedLayer):
    """y[p] = W_e x[p] + U_be (D_be x[p]) + b_e + s · U_e C_e (D_e drop(x[p])), e the expert of row p: one matrix of every
    expert of a block.

    It is to a stack of matrices what :class:`Linear` is to one; :meth:`from_weight` makes it. It stands inside
    :class:`Experts`.

    Attributes:
        weight: a 4-bit weight or a frozen Parameter [E, N, K]; None in the replace form.
        bias: frozen Parameter [E, N], or None.
        adapter, down, up, core, …: as in :class:`Linear`, tensors with a leading E; the pattern of a core is shared.
        num_experts: E.
        transposed: whether the model keeps the Parameter as [E, K, N]; merging makes it so again.
        peft_swapped: whether PEFT takes that Parameter for [E, N, K] all the same; None if it cannot adapt it.
    """

    num_experts: int
    peft_swapped: bool | None = False
    # Whether the block tells which token each row is.
    knows_tokens = True

    @classmethod
    def from_weight(
        cls,
        weight: QuantizedWeight | Tensor,
        bias: Tensor | None = None,
        adapter: Adapter | None = None,
        quantize: str | RoundingPlan | None = "nf4",
        factors: FactorStore | None = None,
        started: Start | None = None,
        transposed: bool = False,
        moment: Moment | None = None,
        branch: LowRankUpdate | None = None,
    ) -> ExpertsLinear:
        """Make a layer over a stack.

        Args:
            weight: [E, N, K], dense or of 4 bits; 4-bit weights keep their bytes, and may be on the meta device.
            bias: [E, N], kept as a frozen Parameter that shares its memory, or None.
            adapter: the kind of update, or None for none.
            quantize: the format for a dense W, ``"nf4"``, ``"fp4"`` or ``"mxfp4"``; None keeps W dense.
            factors: singular vectors from ``lowrank-ops precompute``, looked up expert by expert.
            started: the first state of the kind, if already made.
            transposed: as the attribute.
            moment: of the stack's inputs, for starts that look at data.
            branch: U_b D_b of every expert beside a 4-bit W, down [E, R, K] and up [E, N, R], or None.

        Raises:
            TypeError, ValueError: as :meth:`Linear.from_linear`; weight is not a stack; bias has another shape.
        """
        check_adapter(adapter)
        weight = check_weight(weight, quantize)
        if len(weight.shape) != 3:
            raise ValueError(f"weight must be a stack [E, N, K], got {list(weight.shape)}")
        E, N, K = weight.shape
        if bias is not None and tuple(bias.shape) != (E, N):
            raise ValueError(f"bias must be {[E, N]} for a weight {[E, N, K]}, got {list(bias.shape)}")
        if adapter is not None:
            check_fits(adapter, (E, N, K))
        if branch is not None and isinstance(weight, QuantizedWeight):
            check_branch(branch, weight)
        layer = cls.__new__(cls)
        nn.Module.__init__(layer)
        layer.num_experts, layer.transposed = int(E), transposed
        made = started or start(adapter, weight, quantize, factors, moment=moment, branch=branch)
        if started is not None and made.weight is weight:
            made.branch = branch
        layer._assemble(made, None if bias is None else bias.detach(), adapter, weight)
        return layer

    @property
    def shape(self) -> tuple[int, int, int]:
        """(E, N, K)."""
        return self.num_experts, self.out_features, self.in_features

    def forward(self, x: Tensor, rows: Rows) -> Tensor:
        if self.disabled:
            return self._base(x, rows.offsets)
        if self.pooled is not None:
            if torch.compiler.is_compiling() and not (torch.is_grad_enabled() and x.requires_grad):
                return self.pooled.experts(functional.cast_input(x), rows, self.out_features)
            if (route := route_of(self)) is not None:
                return route.experts(self, x, rows)
        if self.strength == 1 or self.adapter is None:
            return self._full(x, rows.offsets, self._relative_update())
        update = self._weaker_update()
        if update is not None:
            return self._full(x, rows.offsets, update)
        full = self._full(x, rows.offsets, self._relative_update())
        return torch.lerp(self._base(x, rows.offsets), full, self.strength)

    def _full(self, x: Tensor, offsets: Tensor, update: LowRankUpdate | None) -> Tensor:
        """W_e x + b_e with the branch and an update; U_e C_e V_eᵀ x + b_e in the replace form."""
        if self.weight is None:
            return self._replace(x, offsets, self._replacing_core())
        return functional.experts_linear(x, self.weight, offsets, update, self.bias, branch=self.branch)

    def _base(self, x: Tensor, offsets: Tensor) -> Tensor:
        """The original W_e x + b_e, with the branch; U_e diag(S_e) V_eᵀ x + b_e in the replace form."""
        if self.weight is not None:
            return functional.experts_linear(x, self.weight, offsets, self.base_update, self.bias, branch=self.branch)
        core = self.make_core(self.core_offset)
        assert core is not None
        return self._replace(x, offsets, core)

    def _replace(self, x: Tensor, offsets: Tensor, core: Core) -> Tensor:
        """U_e C_e (V_eᵀ x) + b_e."""
        assert self.down is not None and self.up is not None
        h = functional.experts_linear(x, self.down, offsets)
        rows, cols = (index.to(h.device) for index in cores.pattern(core))
        # Rows past the last offset are 0 and stay so, whichever expert's core they meet.
        expert = torch.searchsorted(offsets[1:], torch.arange(len(x), device=x.device), right=True)
        values = core.values[expert.clamp(max=self.num_experts - 1)]
        h = torch.zeros_like(h).index_add(1, rows, (values * h[:, cols]).to(h.dtype))
        return functional.experts_linear(h, self.up, offsets, None, self.bias)

    def extra_repr(self) -> str:
        return f"num_experts={self.num_experts}, {super().extra_repr()}"


def check_fits(adapter: Adapter, shape: Sequence[int]) -> None:
    """Raise ValueError if a layer [N, K], or a stack [E, N, K], cannot take the kind."""
    *stack, N, K = shape
    adapter.check(N, K)
    if stack and isinstance(adapter, LoRA) and (adapter.dora or adapter.lora_bias):
        raise ValueError(f"experts take neither DoRA nor lora_bias, got {described(adapter)}")


@dataclass(frozen=True)
class Matrix:
    """A Parameter of a model's experts that holds one matrix of every expert.

    Args:
        name: of the Parameter in the block, ``"gate_up_proj"``, or in a part of it, ``"mlp.w1"``.
        transposed: whether it is [E, K, N].
        bias: the name of the Parameter [E, N] of biases, or None.
        experts: E of a Parameter that is flat, [E · N, K] (transposed [E · K, N]); 0 for one of three dimensions.
    """

    name: str
    transposed: bool = False
    bias: str | None = None
    experts: int = 0

    def view(self, parameter: Tensor) -> Tensor:
        """W [E, N, K] of the Parameter."""
        weight = parameter.detach()
        if self.experts:
            weight = weight.unflatten(0, (self.experts, -1))
        return weight.mT if self.transposed else weight

    def stored(self, weight: Tensor) -> Tensor:
        """The Parameter as the model keeps it, from W [E, N, K]."""
        weight = (weight.mT if self.transposed else weight).contiguous()
        return weight.flatten(0, 1) if self.experts else weight


@dataclass(frozen=True)
class Layout:
    """How a class of experts keeps its matrices, and the class that computes with them."""

    kind: type[Experts]
    matrices: tuple[Matrix, ...]


# Functions of integrations that recognise a module as a block of experts; None for any other module.
FAMILIES: list[Callable[[nn.Module], Layout | None]] = []


class Experts(nn.Module):
    """y[t] = Σ_i w[t, i] · expert_{index[t, i]}(x[t]): a model's experts over stacks of frozen matrices with adapters.

    :func:`lowrank_ops.adapt` puts it in the place of a block whose experts are Parameters of three dimensions. Its class
    also derives from the block's class, whose activation, attributes and other children it keeps. Each Parameter becomes
    a child of the same name, an :class:`ExpertsLinear` with ``weight`` [E, N, K]; so a layer is called
    ``model.layers.0.mlp.experts.gate_up_proj``. :func:`lowrank_ops.merge` gives the block back.

    Rows of expert parallelism whose index is at least E count for nothing. Routing weights may have another dtype than x.

    Numerics: each product as :func:`lowrank_ops.functional.experts_linear`; the sum over a token's experts in float32.
    """

    # Tells transformers not to initialise the block with random numbers.
    _is_hf_initialized = True
    knows_tokens = True
    original: type[nn.Module]  # the block's class
    _layout: Layout

    def run(self, x: Tensor, rows: Rows) -> Tensor:
        """The experts' outputs [P, N] for x [P, K], row by row; what a family defines."""
        raise TypeError(f"{type(self).__name__} must define how its experts compute")

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        x = hidden_states.reshape(-1, hidden_states.shape[-1])
        y = self.mix(x, top_k_index, top_k_weights)
        return y.to(hidden_states.dtype).view(*hidden_states.shape[:-1], y.shape[-1])

    def mix(self, x: Tensor, index: Tensor, weights: Tensor, weigh_input: bool = False) -> Tensor:
        """Σ_i w[t, i] · expert_{index[t, i]}(x[t]), float32 [T, N]; with weigh_input the weight multiplies x[t] instead."""
        T, k = index.shape
        experts, order = index.reshape(-1).sort(stable=True)
        tokens, E = order // k, self.layers()[-1].num_experts
        bounds = torch.arange(E + 1, device=experts.device, dtype=experts.dtype)
        rows = Rows(torch.searchsorted(experts, bounds, out_int32=True), tokens, T)
        x = x[tokens]
        if weigh_input:
            x = (x * weights.reshape(-1)[order].unsqueeze(1)).to(x.dtype)
        y = self.run(x, rows)
        back = torch.zeros_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))
        y = y[back].view(T, k, y.shape[-1])
        return (y if weigh_input else y * weights.unsqueeze(-1)).sum(1, dtype=torch.float32)

    @property
    def layout(self) -> Layout:
        """How the block keeps its matrices."""
        return self._layout

    def layers(self) -> list[ExpertsLinear]:
        """The stacks, in the order in which they multiply."""
        found = [self.get_submodule(matrix.name) for matrix in self._layout.matrices]
        assert all(isinstance(layer, ExpertsLinear) for layer in found)
        return found  # type: ignore[return-value]

    def __reduce__(self) -> tuple[Any, ...]:
        # The class is made at run time, so pickle cannot find it by its name.
        return _blank, (self._layout.kind, self.original), self.__getstate__()


# A class for each block's class, so that two models of a family have the same.
_CLASSES: dict[tuple[type[Experts], type[nn.Module]], type[Experts]] = {}


def _class_of(kind: type[Experts], original: type[nn.Module]) -> type[Experts]:
    known = _CLASSES.get((kind, original))
    if known is not None:
        return known
    own = {"__doc__": kind.__doc__, "__module__": kind.__module__, "original": original}
    made = _CLASSES[kind, original] = type(f"Adapted{original.__name__}", (kind, original), own)
    return made


def _blank(kind: type[Experts], original: type[nn.Module]) -> Experts:
    made = _class_of(kind, original)
    return made.__new__(made)


@dataclass(frozen=True)
class Stack:
    """A target of :func:`lowrank_ops.adapt`: a matrix of every expert of a block that has no adapters yet."""

    block: nn.Module
    matrix: Matrix

    @property
    def shape(self) -> tuple[int, int, int]:
        """(E, N, K)."""
        E, N, K = self.matrix.view(self.block.get_parameter(self.matrix.name)).shape
        return E, N, K

    def read(self) -> tuple[Tensor, Tensor | None]:
        """W [E, N, K], a view, and the biases [E, N] or None."""
        _unhooked(self.block)
        holder = _unhooked(self.holder)[0]
        bias = None if self.matrix.bias is None else holder.get_parameter(self.matrix.bias).detach()
        return self.matrix.view(holder.get_parameter(self.matrix.name.rpartition(".")[2])), bias

    @property
    def holder(self) -> nn.Module:
        """The module that holds the Parameter: the block or a part of it."""
        return self.block.get_submodule(self.matrix.name.rpartition(".")[0])

    @property
    def peft_swapped(self) -> bool | None:
        """Whether PEFT takes a Parameter [E, K, N] for [E, N, K]: it knows better only by an attribute of the module.

        None for a flat Parameter, which PEFT takes for one matrix.
        """
        if self.matrix.experts:
            return None
        return self.matrix.transposed and not getattr(self.holder, "is_transposed", False)


def layout_of(module: nn.Module) -> Layout | None:
    """The layout of a block of experts in a form that :class:`Experts` takes; None for any other module."""
    if isinstance(module, Experts):
        return None
    return next((layout for family in FAMILIES if (layout := family(module)) is not None), None)


def find_stacks(modules: Mapping[str, nn.Module]) -> dict[str, Stack]:
    """The stacks of experts among the modules of a model, by the names of their Parameters."""
    found = {}
    for name, module in modules.items():
        layout = layout_of(module)
        for matrix in () if layout is None else layout.matrices:
            found[f"{name}.{matrix.name}" if name else matrix.name] = Stack(module, matrix)
    return found


def stand_in(block: nn.Module, layers: Mapping[str, ExpertsLinear]) -> Experts:
    """Make the module that stands in for a block; the block stays unchanged.

    Args:
        block: recognised by :func:`layout_of`. Its Parameters may be on the meta device.
        layers: by the names of the Parameters; those not given are kept dense, without an adapter.

    Raises:
        ValueError: the block is none of experts, has hooks, or a name is not one of its Parameters.
    """
    layout = layout_of(block)
    if layout is None:
        raise ValueError(f"block must hold experts in a known layout, got {type(block).__name__}")
    names = [matrix.name for matrix in layout.matrices]
    if unknown := [name for name in layers if name not in names]:
        raise ValueError(f"the experts have {', '.join(names)}, got a layer for {unknown[0]}")
    plain, put_hooks_on = _unhooked(block)
    made = _blank(layout.kind, type(block))
    _take(made, plain)
    made._layout = layout
    for matrix in layout.matrices:
        layer, stack = layers.get(matrix.name), Stack(block, matrix)
        if layer is None:
            layer = ExpertsLinear.from_weight(*stack.read(), None, None, transposed=matrix.transposed)
        if block.get_parameter(matrix.name).is_meta:  # offloaded, if it has hooks
            _unhooked(stack.holder)[1](layer)
        holder, name = _holder(made, matrix.name)
        holder._parameters.pop(name)
        if matrix.bias is not None:
            holder, bias_name = _holder(made, matrix.bias)
            holder._parameters.pop(bias_name)
        layer.peft_swapped, layer.knows_tokens = stack.peft_swapped, layout.kind.knows_tokens
        holder._modules[name] = layer.train(block.training)
    put_hooks_on(made)
    return made


def _unhooked(module: nn.Module) -> Unhooked:
    unhooked = known_hooks(module)
    if unhooked is None:
        raise ValueError(
            "the experts have hooks, or a forward of their own set on them, which would be lost; remove them"
        )
    return unhooked


def plain_block(experts: Experts) -> nn.Module:
    """The block that an :class:`Experts` stands in for, with W' = W + ΔW in its own layout."""
    made = experts.original.__new__(experts.original)
    _take(made, experts)
    vars(made).pop("_layout")
    for matrix, layer in zip(experts._layout.matrices, experts.layers(), strict=True):
        holder, name = _holder(made, matrix.name)
        holder._modules.pop(name)
        weight = call_named(matrix.name, layer.merged_weight)
        holder.register_parameter(name, nn.Parameter(matrix.stored(weight), requires_grad=False))
        if matrix.bias is not None:
            holder.register_parameter(matrix.bias, layer.bias)
    return made


def _take(made: nn.Module, module: nn.Module) -> None:
    """Give a blank module the contents of another, in dictionaries of its own."""
    for name, value in vars(module).items():
        vars(made)[name] = value.copy() if name.startswith("_") and isinstance(value, dict) else value


def _holder(block: nn.Module, name: str) -> tuple[nn.Module, str]:
    """The module of a block that holds a Parameter, copied once so that it can be changed, and the name there."""
    *path, last = name.split(".")
    for part in path:
        child = block._modules[part]
        assert child is not None
        own = copy.copy(child)
        _take(own, child)
        block._modules[part] = block = own
    return block, last
