"""A whole model: replace its linear layers by adapted 4-bit layers, list the trained parameters, merge back."""

from __future__ import annotations

import math
import os
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from ..formats import Moment, Moments, QuantizedWeight
from ..svd.store import FactorStore
from .config import WeightConfig, fit_budget
from .conv import Convolution, check_conv, conv_over
from .data_starts import share_ranks
from .embedding import Embedding, check_embedding
from .experts import Experts, ExpertsLinear, Stack, check_fits, plain_block, stand_in
from .foreign import is_4bit, is_linear, known_hooks, weight_of
from .frozen import restore, speed_up
from .kinds import Adapter, LoRA
from .linear import (
    AdaptedLayer,
    Linear,
    check_adapter,
    check_finite,
    check_linear,
    check_unsplit,
    check_weight,
    check_whole,
)
from .names import call_named, check_model
from .rounding import RoundingPlan, rounding_of
from .route import check_unpooled
from .start import Start, check_start, reads_moment
from .targets import Target, convolutions, find_targets, shape_of, target_weight
from .tokens import TokenRows, merge_rows, put_into, rows_of

T = TypeVar("T")

# Fused paths of torch's transformer layers in eval, which read their children's weights and never call them: the
# attribute that enables them and the value that disables them.
_FUSED: dict[type[nn.Module], tuple[str, Any]] = {
    nn.TransformerEncoderLayer: ("activation_relu_or_gelu", 0),
    nn.TransformerEncoder: ("use_nested_tensor", False),
}

# What libraries set on a model that they quantised.
_MARKS = (
    "hf_quantizer",
    "quantization_method",
    "is_loaded_in_4bit",
    "is_loaded_in_8bit",
    "is_4bit_serializable",
    "is_8bit_serializable",
)
# Dtypes of buffers of two dimensions that hold packed weights.
_PACKED = (torch.uint8, torch.int8, torch.int16, torch.int32)

# Functions of integrations, called with a model whose layers were replaced.
AFTER_REPLACING: list[Callable[[nn.Module], None]] = []

# Marks every module of a model that adapt has frozen.
_FROZEN = "_lowrank_ops_frozen"
# Marks every module of a merged model, which transformers then saves as a whole directory.
MERGED = "_lowrank_ops_merged"
# Marks a module with the names of its frozen parameters that an adapter's file put there, and that a file must hold again.
COPIED = "_lowrank_ops_copied"

# Below this many weights the work ends before a progress bar could be read.
_PROGRESS_FROM = 100_000_000


def adapt(
    model: nn.Module,
    adapter: Adapter | None,
    targets: str | Iterable[str] = "all-linear",
    quantize: str | WeightConfig | None = "nf4",
    factors: str | os.PathLike[str] | None = None,
    experts: bool = True,
    calibration: Moments | str | os.PathLike[str] | None = None,
) -> nn.Module:
    """Replace linear layers by :class:`lowrank_ops.Linear` and fused experts by :class:`lowrank_ops.Experts`, in place.

    Everything except the adapters is frozen. On a CPU without products of bfloat16, linear layers that stay dense, such as
    heads, become a ``FrozenLinear``, an ``nn.Linear`` over the same Parameters that runs in our
    kernels, until :func:`merge`.

    It may be called again to adapt other layers, and layers of ours that have no adapter yet:
    ``adapt(adapt(model, None), LoRA(16))``. The first call freezes every parameter of the model except adapters. A later
    call freezes only the weights of the layers that it replaces, so that what was unfrozen or added since stays as it is;
    after :func:`merge` the next call counts as the first.

    A layer whose weight was tied to another, such as a head to the embedding, gets a weight of its own when it is quantised
    or merged; transformers' ``tie_weights()`` then leaves it as it is.

    Args:
        model: a Hugging Face model or any other module. A model that transformers loaded in 4 bits counts as quantised,
            and transformers refuses to train or cast it, until its last ``Linear4bit`` is replaced; a warning counts
            those that stay.
        adapter: the kind of update, or None for none: then the layers are only quantised, or prepared for an
            :class:`AdapterPool`.
        targets: ``"all-linear"`` for every linear layer, matrices of experts included, except the output heads of the
            Hugging Face models in it, and except layers that a wrapper has beside such a model, which a warning lists
            (heads are also frozen; call ``requires_grad_()`` on a fresh one afterwards). Layers that are too small for the
            kind are then only quantised, and layers whose weight a model of transformers reads by itself stay as they are
            (Mamba's ``dt_proj``, for example; docs/adapters.md has the list). Another string is a regular expression that
            must match a layer's whole name; a list (or a set) holds whole names, or endings of names
            (``["q_proj", "v_proj"]``). Both may mean embeddings too, which become a :class:`lowrank_ops.Embedding` with a
            LoRA, and convolutions, which become a :class:`lowrank_ops.Conv1d` or :class:`lowrank_ops.Conv2d` with a LoRA or
            none. A block of experts has one layer for each Parameter that holds their matrices,
            ``model.layers.0.mlp.experts.gate_up_proj``. One warning lists what gets no adapter, by class and number: these
            layers, convolutions that hold more than a tenth of the weights, experts in an unknown layout, linear layers of
            classes with their own forward.
        quantize: the format for dense weights, ``"nf4"``, ``"fp4"`` or ``"mxfp4"``, or None to keep them dense; or a
            :class:`NF4Config` and its like, which also tells the options of the format, the layers that stay dense
            (``skip``), how the rounding looks at data, and the branch for what it loses. ``targets`` name the layers here,
            so ``head`` and ``embeddings`` of a configuration must be None. Weights that have 4 bits already keep their
            bytes. Over them every kind works that leaves the base as it is (factors of LoRA-XS, SVF and SVFT are then those
            of the decoded weight and its branch); PiSSA, MiLoRA, OLoRA, LoftQ, CorDA and LoRA-GA need dense weights.
        factors: a directory written by ``lowrank-ops precompute``; singular vectors it lacks for a layer's weight are
            computed; a warning tells if it fits no layer.
        experts: False leaves fused experts as they are.
        calibration: what :func:`lowrank_ops.calibrate` gathered of this model, or the path of its file, for starts that look
            at data; default: that of the configuration in ``quantize``.

    Returns:
        model.

    Raises:
        FileNotFoundError: the directory ``factors`` or the file of the calibration does not exist.
        ValueError: a target matches no linear layer; a layer has an adapter or an :class:`AdapterPool` already; its weight
            is not finite or on the meta device; the rank is above min(N, K) of a layer that targets name, or of every
            layer; targets name a layer whose weight the model reads; the kind needs W before it was quantised; moments are
            missing, of another model, or not positive; the rank of a branch is above min(N, K). The
            message names the layer, and the model stays unchanged: all of this is checked for every layer before the
            first one is replaced. Each dense weight is freed once its layer is replaced, so an error that no check
            foresees, such as memory that runs out or an interruption, leaves some layers replaced.

    Where the source of another library's class shows that it reads a weight and never calls the layer, the layer counts as
    one of these. What is not found so raises in the forward, with the layer's name, if the weight has 4 bits; over dense
    weights (``quantize=None``) :func:`find_reads` finds it.
    """
    check_adapter(adapter)
    config = quantize if isinstance(quantize, WeightConfig) else None
    if config is None:
        rounding_of(quantize)  # type: ignore[arg-type]
    elif config.head is not None or config.embeddings is not None:
        raise ValueError("head and embeddings of a configuration are for from_pretrained; name these layers in targets")
    if calibration is not None and not isinstance(calibration, Moments):
        calibration = Moments.load(calibration)
    if is_linear(model) or isinstance(model, Linear):
        raise ValueError("model is itself a linear layer and cannot be replaced in place; use Linear.from_linear")
    found = find_targets(model, targets, adapter, experts)
    kinds = {name: None if name in found.narrow else adapter for name in found.layers}
    layers = found.layers
    if config is not None and config.convolutions is not None:
        layers.update(
            {n: m for n, m in convolutions(model).items() if n not in layers and not isinstance(m, Convolution)}
        )
        kinds = {name: kinds.get(name) for name in layers}
    # Quantised layers without an adapter are what a layer becomes that gets none.
    for name in [name for name, kind in kinds.items() if kind is None and _is_done(layers[name])]:
        del layers[name]
    store = None if factors is None else FactorStore.existing(factors)
    plans = _plans(layers, kinds, quantize, config, calibration)
    _check_layers(layers, plans, store)
    plans = _with_ranks(plans)
    found.warn(adapter, config is not None and config.convolutions is not None)
    del found
    places = _places(model, layers)
    # Here nothing else holds a layer, so that its dense weight is freed before the next one is quantised.
    for names in _track(list(places), "adapting", sum(map(_weights, layers.values()))):
        made = _replacement({name: layers.pop(name) for name in names}, plans, store)
        for parent, child in places[names]:
            parent._modules[child] = made
    replace_layers(model, {})
    if config is not None and config.compensate_bytes is not None:
        new = {name: m for name, m in model.named_modules() if name in plans and isinstance(m, Linear | ExpertsLinear)}
        fit_budget(new, config.compensate_bytes)
    if store is not None:
        store.check_used()
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


class _Plan(NamedTuple):
    """What becomes of a layer."""

    adapter: Adapter | None
    quantize: RoundingPlan | None
    moment: Moment | None = None  # for the start of the adapter


def _plans(
    layers: Mapping[str, Target],
    kinds: Mapping[str, Adapter | None],
    quantize: Any,
    config: WeightConfig | None,
    calibration: Moments | None,
) -> dict[str, _Plan]:
    """What becomes of each layer, by name; raise if the moments do not fit."""
    roundings: dict[str, RoundingPlan | None]
    if config is None:
        roundings = dict.fromkeys(layers, rounding_of(quantize))
    else:
        dense = {name: layer for name, layer in layers.items() if _is_dense(layer)}
        for name in config.skipped(dense):
            del dense[name]
        # The calibration looks at no convolution.
        convs = {name for name, layer in dense.items() if isinstance(layer, nn.Conv1d | nn.Conv2d)}
        seen = {name: shape_of(layer) for name, layer in dense.items() if name not in convs}
        plain = RoundingPlan(config.format, config.options())
        roundings = dict.fromkeys(layers) | config.roundings(seen) | dict.fromkeys(convs, plain)
    if calibration is None and config is not None:
        calibration = config.moments
    plans = {}
    for name in layers:
        moment = calibration.get(name) if calibration is not None and reads_moment(kinds[name]) else None
        plans[name] = _Plan(kinds[name], roundings[name], moment)
    return plans


def _with_ranks(plans: dict[str, _Plan]) -> dict[str, _Plan]:
    """The plans with the ranks that EVA moves between layers; the moments were checked."""
    kinds: dict[str, LoRA] = {}
    moments: dict[str, Moment] = {}
    for name, plan in plans.items():
        if isinstance(plan.adapter, LoRA) and plan.adapter.init == "eva" and plan.moment is not None:
            kinds[name], moments[name] = plan.adapter, plan.moment
    return plans | {name: plans[name]._replace(adapter=kind) for name, kind in share_ranks(kinds, moments).items()}


def _is_dense(layer: Target) -> bool:
    return not isinstance(layer, nn.Embedding) and not isinstance(target_weight(layer), QuantizedWeight)


def _check_layers(layers: Mapping[str, Target], plans: Mapping[str, _Plan], store: FactorStore | None) -> None:
    """Raise if a layer cannot be replaced."""
    for name, layer in layers.items():
        plan = plans[name]
        if isinstance(layer, AdaptedLayer) and layer.adapter is not None:
            raise ValueError(f"layer {name!r} has an adapter already; merge the model first, or leave the layer out")
        if not isinstance(layer, Stack):
            call_named(name, check_unpooled, layer)
        if isinstance(layer, nn.Embedding):
            call_named(name, check_embedding, layer, plan.adapter)
            continue
        if isinstance(layer, nn.Conv1d | nn.Conv2d):
            _, weight, _ = call_named(name, check_conv, layer, plan.adapter, plan.quantize)
            if not isinstance(weight, QuantizedWeight) and plan.quantize is not None:
                call_named(name, check_finite, weight)
            continue
        if isinstance(layer, Stack | ExpertsLinear):
            weight = call_named(name, _check_stack, layer, *plan)
            matrices = [weight[e] for e in range(weight.shape[0])]
        else:
            _, weight, _ = call_named(name, check_linear, layer, *plan)
            matrices = [weight]
        if (
            not isinstance(weight, QuantizedWeight) and plan.quantize is not None
        ):  # a weight that stays dense was checked
            call_named(name, check_finite, weight)
        rounded_by = None if plan.quantize is None else plan.quantize.moment
        for moment in (rounded_by, None if plan.moment is rounded_by else plan.moment):
            if moment is not None:
                moment.check(weight, name)
        if store is not None:
            for matrix in matrices:
                call_named(name, store.check, matrix)


def _check_stack(
    layer: Stack | ExpertsLinear, adapter: Adapter | None, quantize: RoundingPlan | None, moment: Moment | None
) -> QuantizedWeight | Tensor:
    """W of a stack; raise what :meth:`ExpertsLinear.from_weight` raises for a W of finite numbers."""
    weight = check_weight(target_weight(layer), quantize)
    if adapter is not None:
        check_fits(adapter, weight.shape)
        check_start(adapter, weight, quantize, moment)
    return weight


def _places(model: nn.Module, layers: Mapping[str, Target]) -> dict[tuple[str, ...], list[tuple[nn.Module, str]]]:
    """Names of layers that are replaced together -> every module that holds what is replaced, and the name there.

    A linear layer is replaced alone, stacks with their block.
    """
    names: dict[nn.Module, tuple[str, ...]] = {}
    for name, layer in layers.items():
        module = layer.block if isinstance(layer, Stack) else layer
        names[module] = (*names.get(module, ()), name)
    places: dict[tuple[str, ...], list[tuple[nn.Module, str]]] = {together: [] for together in names.values()}
    for parent in model.modules():
        for child_name, child in parent._modules.items():
            if child in names:
                places[names[child]].append((parent, child_name))
    return places


def _replacement(layers: Mapping[str, Target], plans: Mapping[str, _Plan], store: FactorStore | None) -> nn.Module:
    """What replaces a layer, or the stacks of one block."""
    made = {}
    for name, layer in layers.items():
        plan = plans[name]
        made[name] = call_named(name, layer_over, layer, plan.adapter, plan.quantize, store, None, plan.moment)
    (new,) = replacements_of(layers, made).values()
    return new


def layer_over(
    layer: Target,
    adapter: Adapter | None,
    quantize: str | RoundingPlan | None,
    store: FactorStore | None = None,
    started: Start | None = None,
    moment: Moment | None = None,
) -> AdaptedLayer:
    """A new layer over the weight of a target, and its branch; started: the first state of the kind, if already made."""
    if isinstance(layer, Stack):
        dense, bias = layer.read()
        swapped = layer.matrix.transposed
        return ExpertsLinear.from_weight(dense, bias, adapter, quantize, store, started, swapped, moment)
    if isinstance(layer, ExpertsLinear):
        options = adapter, quantize, store, started, layer.transposed, moment, layer.branch
        made = ExpertsLinear.from_weight(weight_of(layer), layer.bias, *options)
        made.peft_swapped, made.knows_tokens = layer.peft_swapped, layer.knows_tokens
        return made.train(layer.training)
    if isinstance(layer, nn.Embedding):
        assert adapter is not None
        return Embedding.from_embedding(layer, adapter, started)
    if isinstance(layer, nn.Conv1d | nn.Conv2d):
        return conv_over(layer, adapter, quantize, started)
    return Linear.from_linear(layer, adapter, quantize, store, started, moment)


def replacements_of(layers: Mapping[str, Target], made: Mapping[str, AdaptedLayer]) -> dict[nn.Module, nn.Module]:
    """Old module -> new module: the layer itself, or the block of a stack."""
    replacements: dict[nn.Module, nn.Module] = {}
    blocks: dict[nn.Module, tuple[str, dict[str, ExpertsLinear]]] = {}
    for name, layer in layers.items():
        new = made[name]
        if isinstance(layer, Stack):
            assert isinstance(new, ExpertsLinear)
            blocks.setdefault(layer.block, (name, {}))[1][layer.matrix.name] = new
        else:
            replacements[layer] = new
    return replacements | {block: call_named(name, stand_in, block, new) for block, (name, new) in blocks.items()}


def _is_done(layer: Target) -> bool:
    return isinstance(layer, AdaptedLayer) and isinstance(layer.weight, QuantizedWeight) and layer.adapter is None


def freeze(model: nn.Module) -> None:
    """Leave only the adapters trainable; parts of the model that were frozen so before stay as they are."""
    trained = {id(p) for p in _trained_parameters(model)}
    known = _FROZEN in vars(model)
    for module in model.modules():
        if not known and _FROZEN not in vars(module):
            for parameter in module.parameters(recurse=False):
                if id(parameter) not in trained:
                    parameter.requires_grad_(False)
        vars(module)[_FROZEN] = True


def adapter_parameters(model: nn.Module) -> list[nn.Parameter]:
    """The trained parameters of all adapters, for an optimizer.

    Raises:
        ValueError: the model has no adapter.
    """
    check_model(model)
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
    check_model(model)
    layers = [m for m in model.modules() if isinstance(m, AdaptedLayer) and isinstance(m.adapter, LoRA)]
    ups = {id(layer.up): layer.up for layer in layers if isinstance(layer.up, nn.Parameter) and layer.up.requires_grad}
    if not ups:
        raise ValueError("no layer of the model trains U; call lowrank_ops.adapt(model, lowrank_ops.LoRA()) first")
    rest = [p for p in model.parameters() if p.requires_grad and id(p) not in ups]
    return [{"params": rest, "lr": lr}, {"params": list(ups.values()), "lr": lr_up}]


def merge(model: nn.Module) -> nn.Module:
    """Replace every layer of ours by the plain layer that stood there, with W' = W + U_b D_b + ΔW, in place.

    A block of experts gets back its class and its Parameters, in their own layout.

    W' has the dtype W had before it was quantised, so a model that was cast later must be cast again. The error of the
    4-bit format stays.

    Raises:
        ValueError: there is no such layer; trained parameters are sharded over processes; a pool routes a layer.
    """
    check_model(model)
    layers = {module: name for name, module in model.named_modules() if isinstance(module, AdaptedLayer)}
    if isinstance(model, AdaptedLayer | Experts) or not layers:
        raise ValueError("model has no lowrank_ops.Linear inside it to merge")
    for layer, name in layers.items():
        call_named(name, check_unsplit, layer)
        call_named(name, check_whole, layer)
        call_named(name, check_unpooled, layer)
    replacements: dict[nn.Module, nn.Module] = {}
    parts: list[nn.Module] = [*layers, *(module for module in model.modules() if isinstance(module, Experts))]
    for part in _track(parts, "merging", sum(_weights(layer) for layer in layers)):
        if isinstance(part, Experts):
            replacements[part] = plain_block(part)
        elif isinstance(part, Linear | Embedding | Convolution):
            weight = put_into(call_named(layers[part], part.merged_weight), rows_of(part))
            replacements[part] = make_plain(part, nn.Parameter(weight, requires_grad=False))
        # Hooks that nobody knows go with our module.
        if part in replacements and (unhooked := known_hooks(part)) is not None:
            unhooked[1](replacements[part])
    replace_layers(model, replacements)
    merge_rows(model)
    restore(model)
    for module in model.modules():
        vars(module).pop(_FROZEN, None)
        vars(module).pop(COPIED, None)
        vars(module)[MERGED] = True
    return model


def make_plain(layer: Linear | Embedding | Convolution, weight: nn.Parameter) -> nn.Module:
    """The layer that stood in the model before, with another weight."""
    if isinstance(layer, Embedding | Convolution):
        return layer.make_plain(weight)
    dense: nn.Module
    with torch.device("meta"):
        if layer.transposed:
            from transformers.pytorch_utils import Conv1D

            dense = Conv1D(layer.out_features, layer.in_features)
            weight = nn.Parameter(weight.detach().t().contiguous(), weight.requires_grad)
        else:
            dense = nn.Linear(layer.in_features, layer.out_features, bias=False)
    dense.register_parameter("weight", weight)
    bias = layer.bias
    if layer.up_bias is not None and (full := layer.merged_bias()) is not None:
        bias = nn.Parameter(full.detach().to(layer.dtype if bias is None else bias.dtype), requires_grad=False)
    dense.register_parameter("bias", bias)
    return dense.train(layer.training)


def _trained_parameters(model: nn.Module) -> Iterator[nn.Parameter]:
    for module in model.modules():
        if isinstance(module, AdaptedLayer | TokenRows):
            yield from module.trained()


def replace_layers(model: nn.Module, replacements: dict[nn.Module, nn.Module]) -> None:
    """Put the new layers in every place of the old ones; a shared layer stays shared."""
    parents = [*model.modules(), *(part for new in replacements.values() for part in new.modules())]
    for parent in parents:
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
    for name, module in model.named_modules():
        if isinstance(module, AdaptedLayer) and isinstance(module.weight, QuantizedWeight):
            module.weight.layer_name = name
    _disown(model)
    speed_up(model)
    for function in AFTER_REPLACING:
        function(model)


def _disown(model: nn.Module) -> None:
    """After the last packed layer of another library is replaced, remove what says that the model is quantised.

    Otherwise transformers and diffusers refuse to train or cast it and save the configuration of the quantiser with merged
    weights, and TRL casts the adapters to bfloat16.
    """
    for module in model.modules():
        state: dict[str, Any] = vars(module)
        if not any(state.get(name) for name in _MARKS) or any(_is_packed(part) for part in module.modules()):
            continue
        for name in _MARKS:
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


def _is_packed(module: nn.Module) -> bool:
    """Tell whether a module of another library holds weights in its own format."""
    if isinstance(module, AdaptedLayer | QuantizedWeight):
        return False
    for tensor in module.parameters(recurse=False):
        plain = type(tensor) is nn.Parameter and type(tensor.data) is Tensor or hasattr(tensor, "full_tensor")
        if not plain or not tensor.is_floating_point() or tensor.dtype.itemsize == 1:
            return True
    return any(b.dtype in _PACKED and b.dim() > 1 for b in module.buffers(recurse=False))


def _weights(layer: Target) -> int:
    return math.prod(shape_of(layer))


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
