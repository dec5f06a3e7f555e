"""The layers of a model that targets mean: linear layers, without output heads and what cannot be adapted."""

from __future__ import annotations

import math
import re
import warnings
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from torch import Tensor, nn

from ..formats import QuantizedWeight
from .conv import Convolution
from .embedding import INITS, Embedding, is_embedding, takes_lora
from .experts import ExpertsLinear, Stack, check_fits, find_stacks
from .foreign import check_peft, is_conv, is_linear, linear_shape, weight_of
from .kinds import Adapter, LoRA, described
from .linear import Linear
from .names import call_named, check_model, named_or_ending
from .reads import read_and_not_called

# Heads that Hugging Face puts on a base model for a task. They are freshly initialised, so they must not be quantised
# or frozen silently. Some are a layer, others a module with layers inside.
HEADS = ("lm_head", "score", "classifier", "pre_classifier", "classification_head", "qa_outputs")


# Linear layers whose weight a module of transformers multiplies or changes by itself, if only in training: the class of
# the module -> the layers' names within it.
_READ: dict[str, tuple[str, ...]] = {
    "MambaMixer": ("dt_proj",),
    "FalconMambaMixer": ("dt_proj",),
    "JambaMambaMixer": ("dt_proj",),
    "LongcatFlashTopkRouter": ("classifier",),
    "Gemma3nTextAltUp": ("correction_coefs", "prediction_coefs"),
    "RwkvModel": ("blocks.*.attention.output", "blocks.*.feed_forward.value"),
    "WavLMAttention": ("q_proj", "k_proj", "v_proj", "out_proj"),
    "TDNNLayer": ("kernel",),
    "DetrMHAttentionMap": ("k_proj",),
    "ConditionalDetrMHAttentionMap": ("k_proj",),
    "MaskFormerDetrMHAttentionMap": ("k_proj",),
    "DabDetrMHAttentionMap": ("k_linear",),
    "LayoutLMv2Encoder": ("rel_pos_bias", "rel_pos_x_bias", "rel_pos_y_bias"),
    "LayoutLMv3Encoder": ("rel_pos_bias", "rel_pos_x_bias", "rel_pos_y_bias"),
    "PPDocLayoutV2ReadingOrderEncoder": ("rel_pos_bias",),
    "MobileBertLMPredictionHead": ("decoder", "dense"),
    "NeoMMEForMaskedLM": ("unembedding_projection",),
}
# The same for the kernels of mamba_ssm, which take weights in training; without them these modules call their layers.
_READ_BY_KERNELS: dict[str, tuple[str, ...]] = {
    "MambaMixer": ("x_proj", "out_proj"),
    "FalconMambaMixer": ("x_proj", "out_proj"),
    "Mamba2Mixer": ("out_proj",),
    "BambaMixer": ("out_proj",),
    "FalconH1Mixer": ("out_proj",),
    "GraniteMoeHybridMambaLayer": ("out_proj",),
    "NemotronHMamba2Mixer": ("out_proj",),
    "Zamba2MambaMixer": ("out_proj",),
}


# The share of the weights from which on convolutions that all-linear leaves are worth a warning.
_LARGE_SHARE = 0.1

# A linear layer, a layer of ours, or one matrix of every expert of a block.
Target = nn.Module | Stack


@dataclass(frozen=True)
class Targets:
    """What targets mean in a model.

    Attributes:
        layers: linear layers and stacks of experts to replace, by one name each.
        narrow: those of them that cannot take the adapter, and are only quantised: too small ones, experts for a DoRA.
        read: linear layers that stay, because the model reads their weight.
        others: covered modules that cannot be adapted.
        convolutions: those that all-linear leaves, where they hold much of the model's weights.
    """

    layers: dict[str, Target]
    narrow: list[str] = field(default_factory=list)
    read: list[str] = field(default_factory=list)
    others: dict[str, nn.Module] = field(default_factory=dict)
    convolutions: dict[str, nn.Module] = field(default_factory=dict)

    def warn(self, adapter: Adapter | None, rounded: bool = False) -> None:
        """Say in one warning, for the caller of the caller, what gets no adapter; rounded: convolutions are quantised."""
        said = []
        if self.convolutions and not rounded:
            said.append(
                f"{_describe(self.convolutions)}: 'all-linear' means no convolutions, which stay dense and hold more than "
                f"{_LARGE_SHARE:.0%} of the weights; name them in targets to adapt them, or round them by "
                "NF4Config(convolutions='nf4')"
            )
        if self.others:
            said.append(
                f"{_describe(self.others)}: targets cover them and they cannot be adapted, so they stay as they are"
            )
        if self.read:
            said.append(
                f"{_count(self.read)}: the model reads their weight and never calls them, so they stay as they are"
            )
        scales = getattr(adapter, "dora", False) or getattr(adapter, "lora_bias", False)
        stacks = [name for name in self.narrow if scales and len(shape_of(self.layers[name])) == 3]
        small = [name for name in self.narrow if name not in stacks]
        for names, why in ((small, "they are too small for"), (stacks, "experts cannot take")):
            if names:
                said.append(f"{_count(names)}: {why} {described(adapter)}, so they are only quantised")
        if said:
            warnings.warn(f"adapt left out {'; and '.join(said)}", stacklevel=3)


def find_targets(
    model: nn.Module, targets: str | Iterable[str], adapter: Adapter | None = None, experts: bool = True
) -> Targets:
    """The layers that targets mean, for an adapter or for none; stacks of experts are layers if ``experts``.

    Raises:
        ValueError: targets match no linear layer; a pattern or a name covers a layer whose weight the model reads, or that
            is too small for the adapter.
        TypeError: targets are no pattern and no names.
    """
    check_model(model)
    ours = Linear | ExpertsLinear
    linear: dict[str, Target] = {n: m for n, m in model.named_modules() if is_linear(m) or isinstance(m, ours)}
    parts = {part for layer in linear.values() if isinstance(layer, ours) for part in layer.modules()}
    stacks = find_stacks(dict(model.named_modules()))
    parts |= {stack.holder for stack in stacks.values()}
    if targets != "all-linear" and isinstance(adapter, LoRA):
        embeddings = {name: m for name, m in model.named_modules() if is_embedding(m) or isinstance(m, Embedding)}
        # A pattern may cover small tables, which are not meant; a list names what it means.
        linear |= {name: m for name, m in embeddings.items() if not isinstance(targets, str) or _fits(adapter, m)}
    if targets != "all-linear" and (adapter is None or takes_lora(adapter)):
        # What a pattern covers and the adapter does not fit is named in the warning.
        named = not isinstance(targets, str) or adapter is None
        linear |= {name: m for name, m in convolutions(model).items() if named or _fits(adapter, m)}
    others = {name: m for name, m in model.named_modules() if name not in linear and m not in parts}
    linear = {name: m for name, m in linear.items() if experts or not isinstance(m, ExpertsLinear)}
    linear |= stacks if experts else {}
    check_peft(model)
    readers = _find_readers(model)
    if isinstance(targets, str) and targets == "all-linear":
        return _find_all(model, linear, others, readers, adapter)
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
    for name, layer in chosen.items():
        if (reader := readers.get(_module_of(layer))) is not None:
            raise ValueError(
                f"targets match {name!r}, whose weight {reader} reads without calling the layer; leave it out of targets"
            )
        if adapter is not None:
            call_named(name, check_fits, adapter, shape_of(layer))
    return Targets(chosen, others=_find_left_out(others, covered, chosen))


def _fits(adapter: Adapter | None, layer: nn.Module) -> bool:
    assert isinstance(adapter, LoRA)
    fits = adapter.rank <= min(linear_shape(layer)) and adapter.init in INITS
    return fits and adapter.rank % getattr(layer, "groups", 1) == 0


def convolutions(model: nn.Module) -> dict[str, nn.Module]:
    """Name -> convolution of a model, of torch or ours."""
    # Those over time of state-space models, one channel by itself: their kernels take the weight and never call the layer.
    read = {
        child
        for module in model.modules()
        if type(module).__module__.startswith("transformers.")
        for child in module.children()
        if isinstance(child, nn.Conv1d) and 1 < child.groups == child.in_channels
    }
    found = {name: m for name, m in model.named_modules() if is_conv(m) or isinstance(m, Convolution)}
    return {name: m for name, m in found.items() if m not in read}


def _find_all(
    model: nn.Module,
    linear: Mapping[str, Target],
    others: Mapping[str, nn.Module],
    readers: Mapping[nn.Module, str],
    adapter: Adapter | None,
) -> Targets:
    heads = _heads(model)
    beside = _find_beside(model) - heads
    if fresh := [name for name, m in linear.items() if _module_of(m) in beside and m not in readers]:
        warnings.warn(
            f"targets='all-linear' leaves out {', '.join(fresh[:3])}{', …' * (len(fresh) > 3)} beside the Hugging Face "
            "model, as heads: frozen; call requires_grad_() on one to train it, or name it in targets to adapt it",
            stacklevel=4,
        )
    heads |= beside
    chosen = {name: m for name, m in linear.items() if _module_of(m) not in heads and m not in readers}
    if not chosen:
        raise ValueError(
            f"targets='all-linear' matches nothing: the model has no linear layer{_hint(model, linear, '')}"
        )
    narrow, error = [], None
    for name, layer in chosen.items():
        try:
            if adapter is not None:
                call_named(name, check_fits, adapter, shape_of(layer))
        except ValueError as too_small:
            narrow.append(name)
            error = error or too_small
    if error is not None and len(narrow) == len(chosen):
        raise error
    # The warning names an attention of torch as a whole.
    unused = [m.out_proj for m in model.modules() if isinstance(m, nn.MultiheadAttention)]
    read = [name for name, m in linear.items() if m in readers and m not in heads and m not in unused]
    left = {name: m for name, m in others.items() if m not in heads and _multiplies(name, m)}
    convs = {name: m for name, m in convolutions(model).items() if is_conv(m) and m not in heads}
    held = sum(p.numel() for m in convs.values() for p in m.parameters())
    rest = sum(map(math.prod, map(shape_of, chosen.values())))
    large = held > _LARGE_SHARE * (held + rest)
    return Targets(chosen, narrow, read, left, convs if large else {})


def _find_readers(model: nn.Module) -> dict[nn.Module, str]:
    """The layers whose weight a module that holds them reads -> the class of that module."""
    modules = list(model.modules())
    # transformers takes kernels from this package, or from its hub where the model asks for them.
    with_kernels = _is_installed("mamba_ssm") or any(getattr(m, "use_kernels", False) is True for m in modules)
    found: dict[nn.Module, str] = {
        m.out_proj: "MultiheadAttention" for m in modules if isinstance(m, nn.MultiheadAttention)
    }
    for module in modules:
        of: Any = type(module)
        if not of.__module__.startswith(("torch.", "transformers.", "lowrank_ops.")):
            children = (module._modules.get(name) for name in read_and_not_called(of))
            found |= {m: of.__name__ for m in children if m is not None and (is_linear(m) or is_conv(m))}
        for kind in of.__mro__:
            if not kind.__module__.startswith("transformers"):
                continue
            name = kind.__name__
            paths = _READ.get(name, ()) + (_READ_BY_KERNELS.get(name, ()) if with_kernels else ())
            for path in paths:
                pattern = re.compile(re.escape(path).replace(r"\*", "[^.]+"))
                found |= {m: name for inner, m in module.named_modules() if pattern.fullmatch(inner)}
    return found


def _is_installed(package: str) -> bool:
    try:
        version(package)
    except PackageNotFoundError:
        return False
    return True


def shape_of(target: Target) -> tuple[int, ...]:
    """(N, K), or (E, N, K) of a stack; of a convolution with groups, K counts the columns of a LoRA's D."""
    return target.shape if isinstance(target, Stack | ExpertsLinear) else linear_shape(target)


def target_weight(target: Target) -> QuantizedWeight | Tensor:
    """W [N, K], or [E, N, K] of a stack: a view, or the module that holds W."""
    return target.read()[0] if isinstance(target, Stack) else weight_of(target)


def _module_of(target: Target) -> nn.Module:
    return target.holder if isinstance(target, Stack) else target


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
    if isinstance(module, Embedding | Convolution | QuantizedWeight):
        return False
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
    """Describe modules: how many of each class, and the first names."""
    classes = defaultdict(list)
    for name, module in left.items():
        classes[type(module).__name__].append(name)
    return ", ".join(_count(names, f" of class {kind}") for kind, names in classes.items())


def _count(names: list[str], of: str = "") -> str:
    return f"{len(names)} layer{'s' * (len(names) > 1)}{of} ({', '.join(names[:3])}{', …' * (len(names) > 3)})"


def _hint(model: nn.Module, linear: Mapping[str, Target], target: str) -> str:
    """Name a module that the target means but that is not a linear layer; for no target, a subclass of nn.Linear."""
    others = {name: m for name, m in model.named_modules() if name not in linear}
    names = named_or_ending(others, target) if target else {n for n, m in others.items() if isinstance(m, nn.Linear)}
    first = next((name for name in others if name in names), None)
    return "" if first is None else f"; {first!r} is of class {type(others[first]).__name__}, which cannot be adapted"
