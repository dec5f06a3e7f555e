"""Register ops with torch, differentiate them, and bypass the dispatcher. Every private name of torch is used here.

Where this torch lacks one of these names, the code uses torch's public API instead: see :data:`MISSING`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from operator import attrgetter
from typing import Any, TypeVar

import torch
from torch import Tensor

from . import _contract
from ._operands import Signature, wide_dtype

F = TypeVar("F", bound=Callable[..., Any])

# The low-level Library, because calls through it cost less than calls through a custom_op.
LIBRARY = torch.library.Library("lowrank_ops", "DEF")
SIGNATURES: dict[str, Signature] = {}
SCHEMAS: dict[str, str] = {}
KERNELS: dict[str, Callable[..., Any]] = {}
CONTRACTS: dict[str, _contract.Contract] = {}


# Private names of torch: those that the bypass needs, that make autograd faster than torch.library, and that keep a hook
# out of compilation.
FOR_CALL = (
    "_C.DispatchKey.BackendSelect", "_C.DispatchKey.ADInplaceOrView", "_C.DispatchKeySet.add", "_C.DispatchKeySet.raw_repr",
    "_C._dispatch_tls_local_include_set", "_C._is_torch_function_mode_enabled", "autograd._profiler_enabled",
)  # fmt: skip
FOR_FRAMES = tuple(
    f"_C._dynamo.eval_frame.{name}" for name in ("_FrameAction.SKIP", "_FrameExecStrategy", "set_code_exec_strategy")
)
FOR_AUTOGRAD = (
    "_C.DispatchKey.CPU", "_C.DispatchKey.CUDA", "_C.DispatchKeySet.highestPriorityTypeId",
    "_C._AutoDispatchBelowAutograd", "_C._after_autograd_keyset", "_ops.OpOverload.redispatch",
)  # fmt: skip


def _first_missing(names: Sequence[str]) -> str:
    """The first of these names that this torch lacks; "" if it has them all."""
    for name in names:
        try:
            attrgetter(name)(torch)
        except AttributeError:
            return f"torch.{name}"
    return ""


# The missing name of each; "" if none is missing.
MISSING = {
    "call": _first_missing(FOR_CALL), "autograd": _first_missing(FOR_AUTOGRAD), "frames": _first_missing(FOR_FRAMES),
}  # fmt: skip


def register(
    name: str,
    declaration: str,
    implementation: Callable[..., Any],
    fake: Callable[..., Any],
    check: Callable[..., None] | None = None,
) -> None:
    """Define an op, which checks its arguments against the declaration where it is called.

    Args:
        name: of the op.
        declaration: see :mod:`lowrank_ops.ops._operands`.
        implementation: takes the operands by position; it chooses by device itself.
        fake: takes the operands by name and makes empty results.
        check: takes arguments and sizes by name, and raises for what the declaration cannot say.
    """
    signature = SIGNATURES[name] = Signature(declaration)
    SCHEMAS[name], KERNELS[name] = signature.schema, implementation
    CONTRACTS[name] = _contract.Contract(name, signature, check)
    LIBRARY.define(name + signature.schema, tags=(torch.Tag.pt2_compliant_tag,))
    for device in ("CPU", "CUDA"):
        LIBRARY.impl(name, _from_flat(name), device)

    def named(*arguments: Any) -> Any:
        CONTRACTS[name].check_meta(arguments)
        return fake(**signature.by_name(signature.group(arguments)))

    torch.library.register_fake(f"lowrank_ops::{name}", named, lib=LIBRARY)


def _from_flat(name: str) -> Callable[..., Any]:
    """The implementation with flat arguments, as the dispatcher calls it."""
    signature, implementation, contract = SIGNATURES[name], KERNELS[name], CONTRACTS[name]

    def checked(*arguments: Any) -> Any:
        flat = arguments if _contract.enter() else contract.check(arguments)
        return implementation(*(signature.group(flat) if signature.grouped else flat))

    return checked


def register_autograd(name: str, **kept_for: Sequence[str]) -> None:
    """Differentiate the op by the op ``{name}_backward``, whose arguments and outputs are matched by name.

    ``g`` is the gradient of the first output, ``h`` the second output, ``in_features`` the columns of x, and ``need_w``
    tells whether the gradient of w is needed. Every other argument is the forward's argument of the same name. The
    output ``dw`` is the gradient of w. A ``bias`` gets the sum of g over its rows; that of experts is frozen.

    Args:
        name: of the forward.
        kept_for: maps "x" or "h" to the operands whose gradients need it; it is kept only if one of them is needed, and
            the backward gets None otherwise.
    """
    forward, signature = SIGNATURES[name].arguments, SIGNATURES[f"{name}_backward"]
    backward, tensors = signature.arguments[1:], [at - 1 for at in signature.tensors[1:]]  # without g
    trained = [output.removeprefix("d") for output in signature.outputs]
    places = [forward.index(operand) for operand in trained]
    bias = forward.index("bias") if "bias" in forward and "offsets" not in forward else None
    # For each argument of the backward after g, its position in the forward; arguments the forward lacks are filled in.
    sources = [forward.index(argument) if argument in forward else 0 for argument in backward]
    kept = [(backward.index(operand), [trained.index(w) for w in of]) for operand, of in kept_for.items()]
    h, in_features, first_need = (
        backward.index(argument) if argument in backward else None
        for argument in ("h", "in_features", f"need_{trained[0]}")
    )
    differentiate = getattr(torch.ops.lowrank_ops, f"{name}_backward").default
    CONTRACTS[f"{name}_backward"].needs = kept_for

    def save(ctx: Any, inputs: Sequence[Any], output: Any) -> None:
        asked = ctx.needs_input_grad
        ctx.needs = needs = [asked[at] for at in places]
        ctx.bias_dtype = inputs[bias].dtype if bias is not None and asked[bias] else None
        arguments = [inputs[at] for at in sources]
        if h is not None:
            arguments[h] = output[1]
            ctx.mark_non_differentiable(output[1])
        if in_features is not None:
            arguments[in_features] = inputs[0].shape[-1]
        if first_need is not None:
            arguments[first_need : first_need + len(needs)] = needs
        for at, gradients in kept:
            if not any(needs[i] for i in gradients):
                arguments[at] = None
        # autograd wants tensors saved its own way; the rest goes onto ctx.
        kept_tensors = [arguments[at] for at in tensors]
        ctx.save_for_backward(*kept_tensors)
        ctx.sizes = _sizes(kept_tensors)
        for at in tensors:
            arguments[at] = None
        ctx.arguments = arguments
        ctx.set_materialize_grads(False)

    def backward_of(ctx: Any, g: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
        gradients: list[Tensor | None] = [None] * len(forward)
        if g is not None and any(ctx.needs):
            arguments = [*ctx.arguments]
            saved = ctx.saved_tensors
            for at, tensor in zip(tensors, saved, strict=True):
                arguments[at] = tensor
            # A hook may give back another tensor than was saved, and a caller may cast one in place.
            as_saved = _sizes(saved) == ctx.sizes
            made = _contract.checked(differentiate, (g, *arguments)) if as_saved else differentiate(g, *arguments)
            for at, need, gradient in zip(places, ctx.needs, made, strict=True):
                gradients[at] = gradient if need else None
        if g is not None and bias is not None and ctx.bias_dtype is not None:
            gradients[bias] = g.sum(0, dtype=wide_dtype(g)).to(ctx.bias_dtype)
        return tuple(gradients)

    _register_autograd(name, save, backward_of)
    _register_autograd(f"{name}_backward", lambda ctx, inputs, output: None, _refuse)


def _sizes(tensors: Sequence[Tensor | None]) -> list[Any]:
    return [None if tensor is None else (tensor.dtype, tensor.numel()) for tensor in tensors]


def _refuse(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    # Without this, a gradient taken with create_graph=True would silently miss its own gradient.
    raise RuntimeError(
        "the ops of lowrank_ops can be differentiated once; a second derivative needs plain PyTorch, such as "
        "lowrank_ops.reference.adapted_linear with weight.dequantize()"
    )


def _register_autograd(name: str, save: Callable[..., None], differentiate: Callable[..., tuple[Any, ...]]) -> None:
    """Do what torch.library.register_autograd does, without reading the schema at each call, which doubles the time."""
    if MISSING["autograd"]:
        torch.library.register_autograd(f"lowrank_ops::{name}", differentiate, setup_context=save, lib=LIBRARY)
        return
    op, kernel = getattr(torch.ops.lowrank_ops, name).default, _from_flat(name)
    count = len(SIGNATURES[name].arguments)
    after, devices = torch._C._after_autograd_keyset, (torch._C.DispatchKey.CPU, torch._C.DispatchKey.CUDA)

    def below(keyset: Any, *arguments: Any) -> Any:
        rest = keyset & after
        # If only the device's kernel is left, call it here: the dispatcher would double the cost.
        if rest.highestPriorityTypeId() in devices:
            return kernel(*arguments)
        with torch._C._AutoDispatchBelowAutograd():
            return op.redispatch(rest, *arguments)

    class Differentiable(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *arguments: Any) -> Any:
            inputs = arguments[:-1]
            output = below(arguments[-1], *inputs)
            save(ctx, inputs, output)
            return output

        @staticmethod
        def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
            return *differentiate(ctx, *grads), None

    def implementation(keyset: Any, *arguments: Any) -> Any:
        arguments += (None,) * (count - len(arguments))  # the dispatcher leaves out trailing defaults
        if torch.is_grad_enabled() and any(isinstance(a, Tensor) and a.requires_grad for a in arguments):
            return Differentiable.apply(*arguments, keyset)
        return below(keyset, *arguments)

    LIBRARY.impl(name, implementation, "Autograd", with_keyset=True)


# ---- bypassing the dispatcher ----

if not MISSING["call"]:
    # The dispatcher's state in a thread where only autograd is active: no torch.func transform, no mode (fake tensors,
    # counters), no tracing, no autocast. The first entry is the state in inference mode.
    _BARE = torch._C.DispatchKeySet(torch._C.DispatchKey.BackendSelect)
    _IDLE = (_BARE.raw_repr(), _BARE.add(torch._C.DispatchKey.ADInplaceOrView).raw_repr())

    def dispatcher_is_idle() -> bool:
        """Tell whether the dispatcher would only forward a call without gradients to its kernel; checked at each call."""
        return (
            not torch.is_grad_enabled()
            and not torch.compiler.is_compiling()
            and torch._C._dispatch_tls_local_include_set().raw_repr() in _IDLE
            and not torch._C._is_torch_function_mode_enabled()
            and not torch.autograd._profiler_enabled()
        )

else:

    def dispatcher_is_idle() -> bool:
        """Tell whether a call may bypass the dispatcher: never, because this torch does not show the dispatcher's state."""
        return False


def run_eagerly(function: F) -> F:
    """Let torch.compile make no graph of the function alone or of what it calls; inside a graph it is traced.

    It is for a hook, which a compiled model runs ahead of its graph. A torch without this makes a small graph of it.
    """
    if not MISSING["frames"]:
        frames: Any = torch._C._dynamo.eval_frame
        skip = frames._FrameExecStrategy(frames._FrameAction.SKIP, frames._FrameAction.SKIP)
        frames.set_code_exec_strategy(function.__code__, skip)
    return function


# Types that a kernel may read directly; a subclass of Tensor may keep its data elsewhere.
_PLAIN = {Tensor, torch.nn.Parameter, float, int, bool, type(None)}


def is_plain(x: Tensor, operands: Sequence[Any]) -> bool:
    """Tell whether a kernel may read x and the operands directly: x is on a CPU or a GPU, and no Tensor is of a subclass."""
    for operand in operands:
        if type(operand) not in _PLAIN and not (isinstance(operand, tuple) and type(operand[0]) in _PLAIN):
            return False
    return type(x) in _PLAIN and (x.is_cpu or x.is_cuda)


def call(name: str, x: Tensor, *operands: Any) -> Any:
    """Call the op; skip the dispatcher when it would only forward the call.

    Forwarding two dozen arguments takes longer than multiplying one token by a small matrix. The caller resolves
    tensors with lazy negation (``is_neg``).
    """
    if dispatcher_is_idle() and is_plain(x, operands):
        return KERNELS[name](x, *operands)
    op = getattr(torch.ops.lowrank_ops, name).default
    return _contract.checked(op, SIGNATURES[name].flatten((x, *operands)))


def call_paths() -> dict[str, str]:
    """How calls reach their kernels with this torch, for ``lowrank-ops info``."""
    call, autograd = MISSING["call"], MISSING["autograd"]
    return {
        "calls without gradients": f"through the dispatcher: {call} is missing" if call else "past the dispatcher",
        "calls with gradients": f"through torch.library: {autograd} is missing" if autograd else "by its own autograd",
    }
