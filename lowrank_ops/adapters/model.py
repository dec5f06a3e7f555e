"""A whole model: replace its linear layers by adapted 4-bit layers, list the trained parameters, merge back."""

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

# Heads that Hugging Face puts on a base model for a task. They are freshly initialised, so they must not be quantised
# or frozen silently. Some are a layer, others a module with layers inside.
HEADS = ("lm_head", "score", "classifier", "pre_classifier", "classification_head", "qa_outputs")

# Fused paths of torch's transformer layers in eval, which read their children's weights and never call them: the
# attribute that enables them and the value that disables them.
_FUSED: dict[type[nn.Module], tuple[str, Any]] = {
    nn.TransformerEncoderLayer: ("activation_relu_or_gelu", 0),
    nn.TransformerEncoder: ("use_nested_tensor", False),
}

# The classes of transformers and diffusers that load models in 4 bits or from GGUF.
_QUANTIZERS = ("Bnb4BitHfQuantizer", "BnB4BitDiffusersQuantizer", "GgufHfQuantizer", "GGUFQuantizer")

# Functions of integrations, called with a model whose layers were replaced.
AFTER_REPLACING: list[Callable[[nn.Module], None]] = []

# Below this many weights the work ends before a progress bar could be read.
_PROGRESS_FROM = 100_000_000


def adapt(
    model: nn.Module,
    adapter: Adapter | None,
    targets: str | Iterable[str] = "all-linear",
    quantize: str | None = "nf4",
    factors: str | os.PathLike[str] | None = None,
) -> nn.Module:
    """Replace linear layers by :class:`lowrank_ops.Linear`, in place; freeze everything except the adapters.

    Args:
        model: a Hugging Face model or any other module. A model that transformers loaded in 4 bits counts as quantised,
            and transformers refuses to train or cast it, until its last ``Linear4bit`` is replaced; a warning counts
            those that stay.
        adapter: the kind of update, or None for none: then the layers are only quantised, or prepared for an
            :class:`AdapterPool`.
        targets: ``"all-linear"`` for every linear layer except the output heads of the Hugging Face models in it, and
            except layers that a wrapper has beside such a model, which a warning lists (heads are also frozen; call
            ``requires_grad_()`` on a fresh one afterwards); another string is a regular expression
            that must match a layer's whole name; a list (or a set) holds whole names, or endings of names
                (``["q_proj", "v_proj"]``). One warning lists, by class and number, covered modules that cannot be
                adapted: convolutions, embeddings, experts in one tensor, linear layers of classes with their own
                forward.
        quantize: the format of the weights, ``"nf4"``, ``"fp4"`` or ``"mxfp4"``, or None to keep them dense.
        factors: a directory written by ``lowrank-ops precompute``; singular vectors it lacks for a layer's weight are
            computed; a warning tells if it fits no layer.

    Returns:
        model.

    Raises:
        FileNotFoundError: the directory ``factors`` does not exist.
        ValueError: a target matches no linear layer; a layer is adapted already; its weight is not finite or on the
            meta device; the rank is above min(N, K); the kind needs W before it was quantised. The message names the
            layer, and the model stays unchanged.
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
    # Build everything before replacing anything, so that a failure leaves the model unchanged.
    replacements: dict[nn.Module, nn.Module] = {
        layer: call_named(name, Linear.from_linear, layer, adapter, quantize, store)
        for name, layer in _track(layers.items(), "adapting", sum(_weights(layer) for layer in layers.values()))
    }
    if store is not None:
        store.check_used()
    if left:
        warnings.warn(_describe(left), stacklevel=2)
    replace_layers(model, replacements)
    freeze(model)
    packed = [name for name, module in model.named_modules() if is_4bit(module)]
    if packed and adapter is not None:
        warnings.warn(
            f"{len(packed)} layers stay bitsandbytes' ({', '.join(packed[:3])}{', …' * (len(packed) > 3)}), and "
            "transformers refuses to train or cast such a model; to take over their bytes too, call "
            "lowrank_ops.adapt(model, None, [n for n, m in model.named_modules() "
            "if isinstance(m, bitsandbytes.nn.Linear4bit)])",
            stacklevel=2,
        )
    return model


def freeze(model: nn.Module) -> None:
    """Leave only the adapters trainable."""
    trained = {id(p) for p in _trained_parameters(model) if p.requires_grad}
    for parameter in model.parameters():
        parameter.requires_grad_(id(parameter) in trained)


def adapter_parameters(model: nn.Module) -> list[nn.Parameter]:
    """The trained parameters of all adapters, for an optimizer.

    Raises:
        ValueError: the model has no adapter.
    """
    parameters = list(_trained_parameters(model))
    if not parameters:
        raise ValueError("model has no adapter; call lowrank_ops.adapt(model, lowrank_ops.LoRA()) first")
    return parameters


def parameter_groups(model: nn.Module, *, lr: float, lr_up: float) -> list[dict[str, Any]]:
    """LoRA+: group the trained parameters for an optimizer, U at the learning rate lr_up, the others at lr.

    Args:
        model: with a trained LoRA; other parameters that require a gradient, such as a head, are in the group of ``lr``.
        lr: learning rate of D and the others.
        lr_up: learning rate of U; the paper chooses about 16 · lr.

    Returns:
        ``[{"params": …, "lr": lr}, {"params": …, "lr": lr_up}]``.

    Raises:
        ValueError: a rate is negative or not finite; no layer trains U (LoRA-XS, SVF and SVFT train a core alone).
        TypeError: a rate is not a number.

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

    W' has the dtype W had before it was quantised, so a model that was cast later must be cast again. The error of the
    4-bit format stays.

    Raises:
        ValueError: there is no such layer; trained parameters are sharded over processes; a pool routes a layer.
    """
    layers = {module: name for name, module in model.named_modules() if isinstance(module, Linear)}
    if isinstance(model, Linear) or not layers:
        raise ValueError("model has no lowrank_ops.Linear inside it to merge")
    for layer, name in layers.items():
        call_named(name, check_whole, layer)
        call_named(name, check_unpooled, layer)
    replacements: dict[nn.Module, nn.Module] = {}
    for layer, _ in _track(layers.items(), "merging", sum(_weights(layer) for layer in layers)):
        weight, dense = layer.merged_weight(), _make_plain(layer)
        if layer.transposed:
            weight = weight.t().contiguous()
        dense.register_parameter("weight", nn.Parameter(weight, requires_grad=False))
        dense.register_parameter("bias", layer.bias)
        replacements[layer] = dense.train(layer.training)
    replace_layers(model, replacements)
    return model


def _make_plain(layer: Linear) -> nn.Module:
    """The layer that stood in the model before, without its weight."""
    with torch.device("meta"):
        if not layer.transposed:
            return nn.Linear(layer.in_features, layer.out_features, bias=False)
        from transformers.pytorch_utils import Conv1D

        return Conv1D(layer.out_features, layer.in_features)


def _trained_parameters(model: nn.Module) -> Iterator[nn.Parameter]:
    for module in model.modules():
        if isinstance(module, Linear):
            yield from module.trained()


def _targets(model: nn.Module, targets: str | Iterable[str]) -> tuple[dict[str, nn.Module], dict[str, nn.Module]]:
    """The targeted linear layers by one name each, and the targeted modules that cannot be adapted."""
    linear = {name: m for name, m in model.named_modules() if is_linear(m) or isinstance(m, Linear)}
    others = {name: m for name, m in model.named_modules() if name not in linear}
    check_peft(model)
    if isinstance(targets, str) and targets == "all-linear":
        heads = _heads(model)
        # MultiheadAttention reads its projection's weight and never calls the layer.
        unused = {id(m.out_proj) for m in model.modules() if isinstance(m, nn.MultiheadAttention)}
        beside = _find_beside(model) - heads
        if fresh := [name for name, m in linear.items() if m in beside and id(m) not in unused]:
            warnings.warn(
                f"targets='all-linear' leaves out {', '.join(fresh[:3])}{', …' * (len(fresh) > 3)} beside the Hugging Face "
                "model, as heads: frozen; call requires_grad_() on one to train it, or name it in targets to adapt it",
                stacklevel=3,
            )
        heads |= beside
        chosen = {name: m for name, m in linear.items() if m not in heads and id(m) not in unused}
        if not chosen:
            raise ValueError(
                f"targets='all-linear' matches nothing: the model has no linear layer{_hint(model, linear, '')}"
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
            f"{_hint(model, linear, unmatched[0])}"
        )
    for module in model.modules():
        if isinstance(module, nn.MultiheadAttention) and module.out_proj in chosen.values():
            raise ValueError(
                "targets match the out_proj of an nn.MultiheadAttention, which reads its weight and never calls the layer"
            )
    return chosen, _find_left_out(others, covered, chosen)


def _heads(model: nn.Module) -> set[nn.Module]:
    """The output heads of Hugging Face models, whether given or wrapped, and every module in them."""
    pretrained: set[Any] = {model} if hasattr(model, "config") else set()
    pretrained |= _find_pretrained(model)
    tops = [getattr(m, name, None) for m in pretrained for name in HEADS]
    tops += [m.get_output_embeddings() for m in {model, *pretrained} if hasattr(m, "get_output_embeddings")]
    return {m for top in tops if isinstance(top, nn.Module) for m in top.modules()}


def _find_beside(model: nn.Module) -> set[nn.Module]:
    """The modules beside a Hugging Face model in the wrapper that holds it, such as a fresh head."""
    pretrained = _find_pretrained(model)
    children = [child for wrapper in _wrappers(model, pretrained) for child in wrapper.children()]
    return {m for child in children if pretrained.isdisjoint(child.modules()) for m in child.modules()}


def _find_pretrained(model: nn.Module) -> set[nn.Module]:
    return {m for m in model.modules() if hasattr(m, "config") and hasattr(m, "get_output_embeddings")}


def _wrappers(model: nn.Module, pretrained: set[nn.Module]) -> Iterator[nn.Module]:
    """The modules around Hugging Face models, from the outermost on."""
    if model in pretrained or pretrained.isdisjoint(model.modules()):
        return
    yield model
    for child in model.children():
        yield from _wrappers(child, pretrained)


def _find_left_out(others: Mapping[str, nn.Module], covered: set[str], chosen: Iterable[str]) -> dict[str, nn.Module]:
    """Covered modules that hold a matrix but are not linear layers; blocks that contain other such modules are left out."""
    left = {name: m for name, m in others.items() if name in covered and _has_matrix(name, m)}
    parts = (name.split(".") for name in (*left, *chosen))
    blocks = {".".join(path[:depth]) for path in parts for depth in range(len(path))}
    return {name: m for name, m in left.items() if name not in blocks}


def _multiplies(name: str, module: nn.Module) -> bool:
    """Tell whether a module multiplies by matrices without being a linear layer: experts or attention's projections, say."""
    if isinstance(module, nn.Linear | nn.MultiheadAttention):
        return True
    own = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
    if isinstance(getattr(module, "in_features", None), int) and isinstance(getattr(module, "out_features", None), int):
        return bool(own)
    experts = "experts" in name.split(".") or "experts" in type(module).__name__.lower()
    return experts and any(tensor.dim() >= 3 for tensor in own)


def _has_matrix(name: str, module: nn.Module) -> bool:
    return any(p.dim() >= 2 for p in module.parameters()) or any(_multiplies(name, m) for m in module.modules())


def _describe(left: Mapping[str, nn.Module]) -> str:
    """Describe what was left out: how many modules of each class, and the first names."""
    classes = defaultdict(list)
    for name, module in left.items():
        classes[type(module).__name__].append(name)
    parts = [
        f"{len(names)} layer{'s' * (len(names) > 1)} of class {kind} ({', '.join(names[:3])}{', …' * (len(names) > 3)})"
        for kind, names in classes.items()
    ]
    return f"adapt left out {', '.join(parts)}: targets cover them and they cannot be adapted, so they stay as they are"


def _hint(model: nn.Module, linear: Mapping[str, nn.Module], target: str) -> str:
    """Name a module that the target means but that is not a linear layer; for no target, a subclass of nn.Linear."""
    others = {name: m for name, m in model.named_modules() if name not in linear}
    names = named_or_ending(others, target) if target else {n for n, m in others.items() if isinstance(m, nn.Linear)}
    first = next((name for name in others if name in names), None)
    return "" if first is None else f"; {first!r} is of class {type(others[first]).__name__}, which cannot be adapted"


def replace_layers(model: nn.Module, replacements: dict[nn.Module, nn.Module]) -> None:
    """Put the new layers in every place of the old ones; a shared layer stays shared."""
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
    """After the last packed layer of another library is replaced, remove what says that the model is quantised.

    Otherwise transformers and diffusers refuse to train or cast it and save the configuration of the quantiser with merged
    weights, and TRL casts the adapters to bfloat16.
    """
    for module in model.modules():
        state: dict[str, Any] = vars(module)
        known = type(state.get("hf_quantizer")).__name__ in _QUANTIZERS or state.get("is_loaded_in_4bit")
        # Packed parameters of other libraries hold integers; in our weights these are buffers.
        packed = any(is_4bit(m) for m in module.modules()) or not all(
            p.is_floating_point() for p in module.parameters()
        )
        if not known or packed:
            continue
        for name in ("hf_quantizer", "quantization_method", "is_loaded_in_4bit", "is_4bit_serializable"):
            state.pop(name, None)
        state["is_quantized"] = False
        config: Any = getattr(module, "config", None)
        if isinstance(config, dict):  # diffusers' configuration forbids removal
            kept = {key: value for key, value in config.items() if key != "quantization_config"}
            state["_internal_dict"] = type(config)(kept)
        elif hasattr(config, "quantization_config"):
            del config.quantization_config
        for part in module.modules():
            if hasattr(inner := getattr(part, "config", None), "_is_quantized"):
                del inner._is_quantized  # type: ignore[union-attr]


def _weights(layer: nn.Module) -> int:
    N, K = linear_shape(layer)
    return N * K


def _track(items: Iterable[T], description: str, weights: int) -> Iterable[T]:
    """Yield the items, with a progress bar on stderr if the model is large and rich is installed."""
    if weights < _PROGRESS_FROM:
        return items
    try:
        from rich.console import Console
        from rich.progress import track
    except ImportError:
        print(f"{description} {weights / 1e9:.1f} billion weights ...", file=sys.stderr)
        return items
    return track(list(items), description, console=Console(stderr=True))
