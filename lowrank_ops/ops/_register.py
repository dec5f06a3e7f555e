"""Registration with torch, autograd, and the way past the dispatcher."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ._operands import LAYOUTS, flat, grouped

LIBRARY = torch.library.Library("lowrank_ops", "DEF")
SCHEMAS: dict[str, str] = {}
KERNELS: dict[str, Callable[..., Any]] = {}


def _from_flat(name: str, implementation: Callable[..., Any]) -> Callable[..., Any]:
    """The implementation as the dispatcher calls it."""
    if (layout := LAYOUTS.get(name)) is None:
        return implementation
    return lambda *arguments: implementation(*grouped(layout, arguments))


def register(name: str, schema: str, implementation: Callable[..., Any], fake: Callable[..., Any]) -> None:
    """Define an op and register its implementation, which chooses by device itself, and its fake."""
    SCHEMAS[name], KERNELS[name] = schema, implementation
    LIBRARY.define(name + schema, tags=(torch.Tag.pt2_compliant_tag,))
    for device in ("CPU", "CUDA"):
        LIBRARY.impl(name, _from_flat(name, implementation), device)
    torch.library.register_fake(f"lowrank_ops::{name}", _from_flat(name, fake), lib=LIBRARY)


def register_autograd(name: str, save: Callable[..., None], differentiate: Callable[..., tuple[Any, ...]]) -> None:
    """What torch.library.register_autograd does, which reads the schema anew at each call: as long as all the rest."""
    op, kernel = getattr(torch.ops.lowrank_ops, name).default, _from_flat(name, KERNELS[name])
    after, devices = torch._C._after_autograd_keyset, (torch._C.DispatchKey.CPU, torch._C.DispatchKey.CUDA)

    def below(keyset: Any, *arguments: Any) -> Any:
        rest = keyset & after
        # Where nothing is left but the device's kernel it is called here: the dispatcher's way to it costs as much again.
        if rest.highestPriorityTypeId() in devices:
            return kernel(*arguments)
        with torch._C._AutoDispatchBelowAutograd():
            return op.redispatch(rest, *arguments)

    class Differentiable(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, keyset: Any, *arguments: Any) -> Any:
            output = below(keyset, *arguments)
            save(ctx, arguments, output)
            return output

        @staticmethod
        def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
            return None, *differentiate(ctx, *grads)

    def implementation(keyset: Any, *arguments: Any) -> Any:
        if torch.is_grad_enabled() and any(isinstance(a, Tensor) and a.requires_grad for a in arguments):
            return Differentiable.apply(keyset, *arguments)
        return below(keyset, *arguments)

    LIBRARY.impl(name, implementation, "Autograd", with_keyset=True)


def keep(ctx: Any, x: Tensor | None, h: Tensor | None, arguments: Sequence[Any]) -> None:
    """Save the tensors of all arguments as autograd wants them, and the rest beside them."""
    ctx.save_for_backward(x, h, *(a if isinstance(a, Tensor) else None for a in arguments))
    ctx.plain = [None if isinstance(a, Tensor) else a for a in arguments]


def kept(ctx: Any) -> tuple[Tensor | None, Tensor | None, list[Any]]:
    x, h, *tensors = ctx.saved_tensors
    return x, h, [a if t is None else t for t, a in zip(tensors, ctx.plain, strict=True)]


def differentiate_twice(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    # Without this, a gradient taken with create_graph=True would silently miss its own gradient.
    raise RuntimeError(
        "the ops of lowrank_ops can be differentiated once; a second derivative needs plain PyTorch, such as "
        "lowrank_ops.reference.adapted_linear with weight.dequantize()"
    )


# The dispatcher's state in a thread where it has nothing to do beside autograd: no transform of torch.func, no mode (fake
# tensors, counters), no tracing, no autocast. The first one is that of inference mode.
_BARE = torch._C.DispatchKeySet(torch._C.DispatchKey.BackendSelect)
_IDLE = (_BARE.raw_repr(), _BARE.add(torch._C.DispatchKey.ADInplaceOrView).raw_repr())

# What a kernel may be given as it is; a subclass of Tensor may hold its numbers elsewhere.
_PLAIN = {Tensor, torch.nn.Parameter, float, int, bool, type(None)}


def call(name: str, x: Tensor, *arguments: Any) -> Any:
    """The op of that name, its matrices and cores in groups; where the dispatcher would but pass the call on, its kernel.

    Passing two dozen arguments on takes longer than one token through a small matrix. Tensors with a minus that is put off
    (``is_neg``) are for the caller to resolve.
    """
    if (
        not torch.is_grad_enabled()
        and not torch.compiler.is_compiling()
        and torch._C._dispatch_tls_local_include_set().raw_repr() in _IDLE
        and not torch._C._is_torch_function_mode_enabled()
        and not torch.autograd._profiler_enabled()
        and (x.is_cpu or x.is_cuda)
        and {type(x), *(type(a[0] if type(a) is tuple else a) for a in arguments)} <= _PLAIN
    ):
        return KERNELS[name](x, *arguments)
    return getattr(torch.ops.lowrank_ops, name).default(*flat(LAYOUTS[name], (x, *arguments)))
