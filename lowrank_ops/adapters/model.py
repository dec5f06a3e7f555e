"""A whole model: put layers over 4-bit weights with an adapter, list what trains, merge back."""

from __future__ import annotations

import math
import os
import re
import sys
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, TypeVar

import torch
from torch import nn

from ..formats import check_quantize
from ..svd.store import FactorStore
from .foreign import check_peft, is_4bit, is_linear, linear_shape
from .kinds import Adapter, LoRA
from .linear import Linear, check_adapter, check_whole
from .names import call_named, named_or_ending
from .route import check_unpooled

T = TypeVar("T")

# Heads that Hugging Face puts on a base model for a task: fresh, so neither to be quantised nor frozen unseen. Some are a
# layer, some a module with layers inside.
HEADS = ("lm_head", "score", "classifier", "pre_classifier", "classification_head", "qa_outputs")

# What torch's transformer layers run in eval reads the weights of their children and never calls them: the attribute
# that lets them, and the value that does not.
_FUSED: dict[type[nn.Module], tuple[str, Any]] = {
    nn.TransformerEncoderLayer: ("activation_relu_or_gelu", 0),
    nn.TransformerEncoder: ("use_nested_tensor", False),
}

# What integrations do with a model whose layers were replaced.
AFTER_REPLACING: list[Callable[[nn.Module], None]] = []

# Below this many weights the work is over before a progress bar could be read.
_PROGRESS_FROM = 100_000_000


def adapt(
    model: nn.Module,
    adapter: Adapter | None,
    targets: str | Iterable[str] = "all-linear",
    quantize: str | None = "nf4",
    factors: str | os.PathLike[str] | None = None,
) -> nn.Module:
    """Replace linear layers by :class:`lowrank_ops.Linear`, in place; freeze everything but the adapters.

    Args:
        model: a Hugging Face model or any other module. One that transformers loaded in 4 bits is a quantised model to it,
            which it refuses to train by itself or to cast, until its last ``Linear4bit`` is replaced.
        adapter: the kind of update, or None for none: the layers are then quantised, or made ready for an
            :class:`AdapterPool`.
        targets: ``"all-linear"`` for every linear layer but a Hugging Face model's output head (which is frozen too;
            give a fresh one ``requires_grad_()`` afterwards); another string is a regular expression
            that must match a layer's whole name; a list (or a set) holds whole names, or endings of names
            (``["q_proj", "v_proj"]``). One warning names, by class and number, what is covered too and cannot be adapted:
            convolutions, embeddings, experts in one tensor, linear layers of classes that compute otherwise.
        quantize: the format of the weights, ``"nf4"``, ``"fp4"`` or ``"mxfp4"``, or None to keep them dense.
        factors: a directory that ``lowrank-ops precompute`` wrote; singular vectors are taken from it where it has those of
            a layer's weight, and computed where it has not; a warning says where it has those of none.

    Returns:
        model.

    Raises:
        FileNotFoundError: there is no directory ``factors``.
        ValueError: a target matches no linear layer, a layer is adapted already, its weight is not finite or on the meta
            device, the rank is above min(N, K); the kind needs W before it was quantised. The message names the layer,
            and the model is left as it was.
    """
    check_adapter(adapter)
    check_quantize(quantize)
    if is_linear(model) or isinstance(model, Linear):
        raise ValueError("model is itself a linear layer and cannot be replaced in place; use Linear.from_linear")
    layers, left = _targets(model, targets)
    for name, layer in layers.items():
        if isinstance(layer, Linear):
            raise ValueError(f"layer {name!r} is a lowrank_ops.Linear already; merge the model first, or leave it out")
        if adapter is not None:
            call_named(name, adapter.check, *linear_shape(layer))
    store = None if factors is None else FactorStore.existing(factors)
    # Everything is built before anything is replaced, so that a failure leaves the model as it was.
    replacements: dict[nn.Module, nn.Module] = {
        layer: call_named(name, Linear.from_linear, layer, adapter, quantize, store)
        for name, layer in _track(layers.items(), "adapting", sum(_weights(layer) for layer in layers.values()))
    }
    if store is not None:
        store.check_used()
    if left:
        warnings.warn(_said(left), stacklevel=2)
    replace_layers(model, replacements)
    freeze(model)
    return model


def freeze(model: nn.Module) -> None:
    """Leave only the adapters trainable."""
    trained = {id(p) for p in _trained(model) if p.requires_grad}
    for parameter in model.parameters():
        parameter.requires_grad_(id(parameter) in trained)


def adapter_parameters(model: nn.Module) -> list[nn.Parameter]:
    """The trained parameters of all adapters: what an optimizer gets.

    Raises:
        ValueError: the model has no adapter.
    """
    parameters = list(_trained(model))
    if not parameters:
        raise ValueError("model has no adapter; call lowrank_ops.adapt(model, lowrank_ops.LoRA()) first")
    return parameters


def parameter_groups(model: nn.Module, *, lr: float, lr_up: float) -> list[dict[str, Any]]:
    """LoRA+: all that trains, as an optimizer takes it: every U at the learning rate lr_up, the rest at lr.

    Args:
        model: with a LoRA that is trained; whatever else asks for a gradient, a head say, is in the group of ``lr``.
        lr: of D and of the rest.
        lr_up: of U. The paper's choice is about 16 · lr.

    Returns:
        ``[{"params": …, "lr": lr}, {"params": …, "lr": lr_up}]``.

    Raises:
        ValueError: a rate is negative or not finite; no layer trains U (LoRA-XS, SVF and SVFT train a core alone).
        TypeError: a rate is no number.

    Source: LoRA+, arXiv 2402.12354.
    """
    for name, rate in (("lr", lr), ("lr_up", lr_up)):
        if not isinstance(rate, int | float) or isinstance(rate, bool):
            raise TypeError(f"{name} must be a number, got {rate!r}")
        if not 0 <= rate < math.inf:
            raise ValueError(f"{name} must be finite and not negative, got {rate}")
    layers = [m for m in model.modules() if isinstance(m, Linear) and isinstance(m.adapter, LoRA)]
    ups = {id(layer.up): layer.up for layer in layers if isinstance(layer.up, nn.Parameter) and layer.up.requires_grad}
    if not ups:
        raise ValueError("no layer of the model trains U; call lowrank_ops.adapt(model, lowrank_ops.LoRA()) first")
    rest = [p for p in model.parameters() if p.requires_grad and id(p) not in ups]
    return [{"params": rest, "lr": lr}, {"params": list(ups.values()), "lr": lr_up}]


def merge(model: nn.Module) -> nn.Module:
    """Replace every :class:`lowrank_ops.Linear` by a plain ``nn.Linear`` (or ``Conv1D``) with W' = W + ΔW, in place.

    W' has the dtype that W had before it was quantised, so a model that was cast since has to be cast again; what 4 bits
    lost stays lost.

    Raises:
        ValueError: there is no such layer; what is trained is sharded over processes; a pool routes a layer.
    """
    layers = {module: name for name, module in model.named_modules() if isinstance(module, Linear)}
    if isinstance(model, Linear) or not layers:
        raise ValueError("model has no lowrank_ops.Linear inside it to merge")
    for layer, name in layers.items():
        call_named(name, check_whole, layer)
        call_named(name, check_unpooled, layer)
    replacements: dict[nn.Module, nn.Module] = {}
    for layer, _ in _track(layers.items(), "merging", sum(_weights(layer) for layer in layers)):
        weight, dense = layer.merged_weight(), _empty(layer)
        if layer.transposed:
            weight = weight.t().contiguous()
        dense.register_parameter("weight", nn.Parameter(weight, requires_grad=False))
        dense.register_parameter("bias", layer.bias)
        replacements[layer] = dense.train(layer.training)
    replace_layers(model, replacements)
    return model


def _empty(layer: Linear) -> nn.Module:
    """What stood in the model before the layer did, without its numbers."""
    with torch.device("meta"):
        if not layer.transposed:
            return nn.Linear(layer.in_features, layer.out_features, bias=False)
        from transformers.pytorch_utils import Conv1D

        return Conv1D(layer.out_features, layer.in_features)


def _trained(model: nn.Module) -> Iterator[nn.Parameter]:
    for module in model.modules():
        if isinstance(module, Linear):
            yield from module.trained()


def _targets(model: nn.Module, targets: str | Iterable[str]) -> tuple[dict[str, nn.Module], dict[str, nn.Module]]:
    """Name -> layer of the linear layers that are meant, one name a layer; and of what is meant and cannot be adapted."""
    linear = {name: m for name, m in model.named_modules() if is_linear(m) or isinstance(m, Linear)}
    others = {name: m for name, m in model.named_modules() if name not in linear}
    check_peft(model)
    if isinstance(targets, str) and targets == "all-linear":
        heads = _heads(model)
        # MultiheadAttention reads its projection's weight and never calls the layer.
        unused = {id(m.out_proj) for m in model.modules() if isinstance(m, nn.MultiheadAttention)}
        chosen = {name: m for name, m in linear.items() if m not in heads and id(m) not in unused}
        if not chosen:
            raise ValueError(
                f"targets='all-linear' matches nothing: the model has no linear layer{_others(model, linear, '')}"
            )
        return chosen, {name: m for name, m in others.items() if m not in heads and _multiplies(name, m)}
    if isinstance(targets, str):
        try:
            pattern = re.compile(targets)
        except re.error as error:
            raise ValueError(
                f"targets must be 'all-linear', a list or a regular expression, got {targets!r}: {error}"
            ) from error
        chosen = {name: m for name, m in linear.items() if pattern.fullmatch(name)}
        unmatched = [] if chosen else [targets]
        covered = {name for name in others if pattern.fullmatch(name)}
    else:
        endings = list(targets) if isinstance(targets, Iterable) else [targets]
        if isinstance(targets, Mapping) or not all(isinstance(ending, str) for ending in endings):
            raise TypeError(f"targets must be 'all-linear', a regular expression or a list of names, got {targets!r}")
        if not endings:
            raise ValueError("targets must not be empty")
        found = {ending: named_or_ending(linear, ending) for ending in endings}
        chosen = {name: m for name, m in linear.items() if any(name in names for names in found.values())}
        unmatched = [ending for ending, names in found.items() if not names]
        covered = {name for ending in endings if ending not in linear for name in named_or_ending(others, ending)}
    if unmatched:
        known = sorted({name.rpartition(".")[2] for name in linear})
        raise ValueError(
            f"targets {unmatched} match no linear layer; the model's linear layers end in: {', '.join(known) or 'none'}"
            f"{_others(model, linear, unmatched[0])}"
        )
    for module in model.modules():
        if isinstance(module, nn.MultiheadAttention) and module.out_proj in chosen.values():
            raise ValueError(
                "targets match the out_proj of an nn.MultiheadAttention, which reads its weight and never calls the layer"
            )
    return chosen, _left_out(others, covered, chosen)


def _heads(model: nn.Module) -> set[nn.Module]:
    """The output head of a Hugging Face model, and all inside it."""
    head = getattr(model, "get_output_embeddings", lambda: None)()
    tops = {head} | {getattr(model, name, None) for name in HEADS if hasattr(model, "config")}
    return {m for top in tops if isinstance(top, nn.Module) for m in top.modules()}


def _left_out(others: Mapping[str, nn.Module], covered: set[str], chosen: Iterable[str]) -> dict[str, nn.Module]:
    """Of modules that are covered and no linear layers: those that hold a matrix, but for blocks around others of them."""
    left = {name: m for name, m in others.items() if name in covered and _has_matrix(name, m)}
    parts = (name.split(".") for name in (*left, *chosen))
    blocks = {".".join(path[:depth]) for path in parts for depth in range(len(path))}
    return {name: m for name, m in left.items() if name not in blocks}


def _multiplies(name: str, module: nn.Module) -> bool:
    """Whether it is a linear layer in all but its class, or holds several: such as experts, or attention's projections."""
    if isinstance(module, nn.Linear | nn.MultiheadAttention):
        return True
    own = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
    if isinstance(getattr(module, "in_features", None), int) and isinstance(getattr(module, "out_features", None), int):
        return bool(own)
    experts = "experts" in name.split(".") or "experts" in type(module).__name__.lower()
    return experts and any(tensor.dim() >= 3 for tensor in own)


def _has_matrix(name: str, module: nn.Module) -> bool:
    return any(p.dim() >= 2 for p in module.parameters()) or any(_multiplies(name, m) for m in module.modules())


def _said(left: Mapping[str, nn.Module]) -> str:
    """What was left out, by class: how many, and the first names."""
    classes = defaultdict(list)
    for name, module in left.items():
        classes[type(module).__name__].append(name)
    parts = [
        f"{len(names)} layer{'s' * (len(names) > 1)} of class {kind} ({', '.join(names[:3])}{', …' * (len(names) > 3)})"
        for kind, names in classes.items()
    ]
    return f"adapt left out {', '.join(parts)}: targets cover them and they cannot be adapted, so they stay as they are"


def _others(model: nn.Module, linear: Mapping[str, nn.Module], target: str) -> str:
    """What a target means that is no linear layer here; for none, a layer that derives from one."""
    others = {name: m for name, m in model.named_modules() if name not in linear}
    names = named_or_ending(others, target) if target else {n for n, m in others.items() if isinstance(m, nn.Linear)}
    first = next((name for name in others if name in names), None)
    return "" if first is None else f"; {first!r} is of class {type(others[first]).__name__}, which cannot be adapted"


def replace_layers(model: nn.Module, replacements: dict[nn.Module, nn.Module]) -> None:
    """Put the new layers wherever the old ones stand; a shared layer stays shared."""
    for parent in list(model.modules()):
        for name, child in parent._modules.items():
            if child in replacements:
                parent._modules[name] = replacements[child]
    for module in model.modules():
        for kind, (attribute, off) in _FUSED.items():
            if isinstance(module, kind):
                saved, adapted = f"_before_{attribute}", any(isinstance(child, Linear) for child in module.modules())
                if adapted and not hasattr(module, saved):
                    setattr(module, saved, getattr(module, attribute))
                    setattr(module, attribute, off)
                elif not adapted and hasattr(module, saved):
                    setattr(module, attribute, vars(module).pop(saved))
    _disown(model)
    for function in AFTER_REPLACING:
        function(model)


def _disown(model: nn.Module) -> None:
    """Where the last bitsandbytes layer is gone transformers need not take the model for a quantised one any more.

    It would refuse to train or cast it, and write bitsandbytes' configuration beside weights that are merged.
    """
    for module in model.modules():
        quantizer: Any = vars(module).get("hf_quantizer")
        if type(quantizer).__name__ == "Bnb4BitHfQuantizer" and not any(is_4bit(m) for m in module.modules()):
            quantizer.remove_quantization_config(module)


def _weights(layer: nn.Module) -> int:
    N, K = linear_shape(layer)
    return N * K


def _track(items: Iterable[T], description: str, weights: int) -> Iterable[T]:
    """The items, with a progress bar on stderr where the model is large and rich is installed."""
    if weights < _PROGRESS_FROM:
        return items
    try:
        from rich.console import Console
        from rich.progress import track
    except ImportError:
        print(f"{description} {weights / 1e9:.1f} billion weights ...", file=sys.stderr)
        return items
    return track(list(items), description, console=Console(stderr=True))
