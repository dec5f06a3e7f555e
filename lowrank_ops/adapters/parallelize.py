"""Tensor parallelism: the layers of a model split over processes by rows or columns."""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping
from typing import Any

from torch import nn

from ..formats import QuantizedWeight
from .foreign import is_4bit, is_linear
from .kinds import LoRA
from .linear import AdaptedLayer, Linear, check_unsplit, check_whole
from .names import call_named, check_model, modules_of
from .route import check_unpooled
from .split import Split

# Names of transformers' styles: the dimension of W that is split, and whether the parts of y are put together.
_STYLES = {
    "colwise": (0, False), "colwise_rep": (0, True), "colwise_gather_output": (0, True), "rowwise": (1, False),
    "rowwise_rep": (1, False), "rowwise_split_input": (1, False),
}  # fmt: skip
# Layers whose rows are heads.
_HEADS = ("q_proj", "k_proj", "v_proj")


def parallelize(model: nn.Module, mesh: Any, plan: Mapping[str, Any] | None = None) -> nn.Module:
    """Split linear layers over the processes of a mesh, in place: each computes with some rows or columns of W.

    A process keeps its part of W in 4 bits, of the bias and of the adapter: of ``up`` for ``"colwise"``, of ``down`` for
    ``"rowwise"``. The rest of the adapter is in every process, and its gradients are summed. Modules that the plan leaves
    out stay whole in every process. Call it after :func:`lowrank_ops.adapt`, in every process, on the same model with the
    same numbers, and give every process the same inputs and seed. Save the adapter with :func:`lowrank_ops.save_adapter`;
    ``state_dict`` of a split layer raises a ValueError, as a process has a part alone.

    Args:
        model: adapted, its layers on this process's device.
        mesh: a ``DeviceMesh`` with one dimension.
        plan: name of a layer, ``*`` for any one part of a name -> ``"colwise"``, ``"rowwise"``, another name of
            transformers' tensor-parallel styles for linear layers, or torch's ``ColwiseParallel()`` or
            ``RowwiseParallel()``; None takes the model's own ``tp_plan`` (transformers). Embeddings and heads in the
            model's own plan stay whole.

    Returns:
        model.

    Raises:
        ValueError: the plan matches no layer or a style is not known; a part would not have whole blocks of the 4-bit
            format, or whole heads; a layer is split, pooled or sharded already, or has a DoRA or ``lora_bias``; a
            dense layer is trained or of bitsandbytes. The message names the layer, and the model stays unchanged.

    Numerics: decoded weights are the same to the bit. Scales in 8 bits become float32 ones where a part does not begin a
    group of them, always for ``"rowwise"`` (4.5 bits a weight where it was 4.13). Sums are rounded in another order.
    """
    check_model(model)
    if not isinstance(getattr(mesh, "ndim", None), int):
        raise TypeError(f"mesh must be a DeviceMesh, got {type(mesh).__name__}")
    if mesh.ndim != 1:
        raise ValueError(
            f"mesh must have one dimension, got {mesh.ndim}; take the one of tensor parallelism, mesh['tp']"
        )
    modules = modules_of(model)
    own = plan is None
    if plan is None:
        plan = getattr(model, "tp_plan", None)
        if not plan:
            raise ValueError("the model has no tp_plan; give plan={name: 'colwise' or 'rowwise'}")
    splits: dict[nn.Module, tuple[str, Split]] = {}
    group, rank, size = mesh.get_group(), mesh.get_local_rank(), mesh.size()
    for pattern, style in plan.items():
        regex = re.compile(re.escape(pattern).replace(r"\*", r"[^.]+"))
        names = [name for name in modules if regex.fullmatch(name)]
        if not names and not own:
            raise ValueError(f"plan[{pattern!r}] matches no module of the model")
        for name in names:
            layer: Any = modules[name]
            if not isinstance(layer, Linear) and not (isinstance(layer, nn.Linear) and is_linear(layer)):
                if own and str(style).startswith("embedding"):
                    continue
                if any(isinstance(m, AdaptedLayer) for m in layer.modules()) or not own:
                    raise ValueError(
                        f"plan[{pattern!r}] is {style!r}, and {name!r} is no linear layer that can be split"
                    )
                continue
            dim, gather = _dimension(pattern, style)
            if isinstance(layer, Linear) or not (own and gather):
                splits[layer] = name, Split(group, rank, size, dim, gather, (layer.out_features, layer.in_features))
    if not splits:
        raise ValueError("the plan matches no linear layer of the model")
    head = _head_size(model)
    for layer, (name, split) in splits.items():
        call_named(name, _check, layer, split, head if name.endswith(_HEADS) and not split.gather else 1)
    for layer, (_, split) in splits.items():
        _apply(layer, split)
    return model


def split_layer(layer: nn.Module, mesh: Any, style: Any) -> None:
    """Split one layer as :func:`parallelize` does."""
    dim, gather = _dimension("", style)
    N, K = layer.out_features, layer.in_features
    split = Split(mesh.get_group(), mesh.get_local_rank(), mesh.size(), dim, gather, (int(N), int(K)))  # type: ignore[arg-type]
    _check(layer, split, 1)
    _apply(layer, split)


def _apply(layer: nn.Module, split: Split) -> None:
    if isinstance(layer, Linear) and layer.source is not None and not isinstance(layer.adapter, LoRA):
        # What a file of the adapter needs of the whole layer.
        split.key = None if layer.weight is None else layer.base.key()
        cut = "up" if split.dim == 0 else "down"
        factor: Any = getattr(layer, cut)
        split.frozen[cut] = copy.deepcopy(factor).to("cpu")
    split.apply(layer)


def _dimension(pattern: str, style: Any) -> tuple[int, bool]:
    """The dimension of W that a style splits, and whether it puts the parts of y together."""
    if isinstance(style, str):
        if style in _STYLES:
            return _STYLES[style]
    else:
        from torch.distributed.tensor import Replicate, Shard
        from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel

        inputs, outputs = (getattr(style, name, None) for name in ("input_layouts", "output_layouts"))
        whole, last = (Replicate(),), (Shard(-1),)
        if getattr(style, "use_local_output", False):
            if isinstance(style, ColwiseParallel) and inputs == whole and outputs in (whole, last):
                return 0, outputs == whole
            if isinstance(style, RowwiseParallel) and inputs in (whole, last) and outputs == whole:
                return 1, False
    raise ValueError(
        f"plan[{pattern!r}] must be {', '.join(map(repr, _STYLES))}, or torch's ColwiseParallel or RowwiseParallel with "
        f"local inputs and outputs that are whole or split in their last dimension, got {style!r}"
    )


def _check(layer: nn.Module, split: Split, head: int) -> None:
    """Raise unless the layer can be split so."""
    if isinstance(layer, AdaptedLayer):
        check_unsplit(layer)
        check_whole(layer)
        check_unpooled(layer)
        if layer.scales_rows:
            raise ValueError(
                f"{layer.adapter} scales or shifts whole rows and cannot be split; take a LoRA without these"
            )
    elif isinstance(getattr(layer, "split", None), Split):
        raise ValueError("the layer is split over processes already")
    elif is_4bit(layer):
        raise ValueError("a bitsandbytes layer cannot be split; adapt it, or give a plan that leaves it out")
    elif any(p.requires_grad for p in layer.parameters()):
        raise ValueError(
            "a layer that is trained whole cannot be split; freeze or adapt it, or give a plan that leaves it out"
        )
    weight: Any = layer.weight
    if hasattr(weight, "full_tensor") or (isinstance(weight, QuantizedWeight) and weight.keeper is not None):
        raise ValueError(
            "the weight is sharded or offloaded; call parallelize before fully_shard and without such hooks"
        )
    split.check(layer)
    if split.dim == 0 and split.whole[0] // split.size % head:
        raise ValueError(f"{split.whole[0] // head} heads cannot be split over {split.size} processes")


def _head_size(model: nn.Module) -> int:
    """The rows of a head; 1 if the model does not say it."""
    config: Any = getattr(model, "config", None)
    if hasattr(config, "get_text_config"):
        config = config.get_text_config()
    size = getattr(config, "head_dim", None)
    if not isinstance(size, int) and isinstance(heads := getattr(config, "num_attention_heads", None), int):
        size = getattr(config, "hidden_size", heads) // heads
    return size if isinstance(size, int) else 1
