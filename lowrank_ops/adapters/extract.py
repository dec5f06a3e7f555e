"""The adapter nearest to the difference of two checkpoints, layer by layer from their files: ``lowrank-ops extract``."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import safe_open
from torch import Tensor, nn

from .. import cores
from ..formats import QuantizedWeight
from ..svd.store import largest
from .checkpoint import is_better_made_again, layer_record, layer_tensors
from .kinds import Adapter, LoRA
from .linear import Linear
from .names import call_named
from .peft_files import OURS, PREFIX, lora_config
from .precompute import Layer, checkpoint_tensors, linear_layers
from .versions import write_files

_PASSES = 8  # of the fit between factors whose columns are nearly orthogonal


class Extracted(NamedTuple):
    """What became of a layer: its name, its rank, ‖Δ‖ / ‖W‖, and the part of ‖Δ‖² that the adapter has."""

    name: str
    rank: int
    change: float
    kept: float


def extract(
    tuned: str | os.PathLike[str],
    base: str | os.PathLike[str],
    kind: Adapter,
    out: str | os.PathLike[str],
    targets: str | list[str] = "all-linear",
    factors: str = "auto",
    advance: Callable[[str], object] | None = None,
) -> list[Extracted]:
    """min ‖Δ − ΔW'‖_F over what the kind can be, Δ = W_tuned − W_base, for every linear layer; written as an adapter.

    A LoRA is the truncated SVD of Δ. LoRA-XS, SVF and SVFT have the singular vectors of W_base, and their cores are the
    least squares between them: C_ij = u_iᵀ Δ v_j / (‖u_i‖² ‖v_j‖²) on the entries of the kind where these are orthogonal,
    and repeated on what is left where 4-bit factors are nearly so. A layer that did not change has ΔW' = 0.

    Args:
        tuned, base: directories of checkpoints of one model, dense or in 4 bits, which are decoded.
        kind: LoRA, LoRA-XS, SVF or SVFT, the last two in the additive form.
        out: the directory of the adapter, as :func:`.checkpoint.save_adapter` writes it.
        targets: as in :func:`.precompute.linear_layers`.
        factors: as in :func:`.checkpoint.save_adapter`.
        advance: called with the name of each finished layer.

    Raises:
        FileNotFoundError, ValueError: as :func:`.precompute.linear_layers`; the checkpoints have other layers or shapes; the
            kind has a start of its own, more parts than an update, or the replace form; a weight is not finite.

    Warns of tensors that changed and are in no layer, such as norms and embeddings, and of experts, which are left out.

    Numerics: float32.
    """
    if factors not in ("auto", "recipe", "stored"):
        raise ValueError(f"factors must be 'auto', 'recipe' or 'stored', got {factors!r}")
    if isinstance(kind, LoRA):
        if kind.init != "kaiming" or kind.dora or kind.lora_bias:
            raise ValueError(f"a LoRA is extracted without init, dora and lora_bias, got {kind}")
    elif kind.form != "additive":
        raise ValueError(f"only the additive form is extracted, got {kind}")
    ours = {layer.name: layer for layer in linear_layers(base, targets)}
    theirs = {layer.name: layer for layer in linear_layers(tuned, targets)}
    for name in ours.keys() ^ theirs.keys():
        raise ValueError(f"layer {name!r} is only in {base if name in ours else tuned}")
    experts = [name for name, layer in ours.items() if layer.experts or ".experts." in name]
    layers = {name: layer for name, layer in ours.items() if name not in experts}
    if not layers:
        raise ValueError(f"{base} has no linear layer but experts, and their change is not extracted")
    for name, layer in layers.items():
        if layer.shape != theirs[name].shape:
            raise ValueError(f"layer {name!r} is {layer.shape} in {base} and {theirs[name].shape} in {tuned}")
        call_named(name, kind.check, *layer.shape)
    tensors: dict[str, Tensor] = {}
    records: dict[str, Any] = {}
    kinds: dict[str, LoRA] = {}
    found = []
    for name, layer in layers.items():
        made, row = call_named(name, _extract, name, layer, theirs[name], kind)
        record = layer_record(made, {})
        stored = factors == "stored" or (factors == "auto" and not is_better_made_again(made, record))
        tensors |= {f"{PREFIX}{name}.{key}": tensor for key, tensor in layer_tensors(made, stored).items()}
        if isinstance(kind, LoRA):
            kinds[name] = kind
        else:
            records[name] = record
        found.append(row)
        if advance is not None:
            advance(name)
    _warn_of_the_rest(Path(tuned), Path(base), ours, experts)
    metadata = {"format": "pt"} | ({"lowrank_ops": json.dumps(records)} if records else {})
    config = {"peft_type": OURS} if records else lora_config(kinds, list(kinds))
    write_files(Path(out), tensors, config | {"base_model_name_or_path": str(base)}, metadata)
    return found


@torch.no_grad()
def _extract(name: str, ours: Layer, theirs: Layer, kind: Adapter) -> tuple[Linear, Extracted]:
    """The adapted layer over the base's weight."""
    weight = ours.load().float()
    change = theirs.load().float() - weight
    if not bool(torch.isfinite(change).all()):
        raise ValueError("a weight is not finite")
    N, K = ours.shape
    linear = nn.Linear(K, N, bias=False, device="meta")
    linear.weight = nn.Parameter(weight, requires_grad=False)
    layer = Linear.from_linear(linear, kind, quantize=None)
    size = float(change.norm())
    if isinstance(kind, LoRA):
        assert isinstance(layer.down, Tensor) and isinstance(layer.up, Tensor)
        if size > 0:
            U, S, Vt = largest(change, kind.rank)
            root = (S / kind.scale).sqrt()
            layer.up.copy_(U * root)
            layer.down.copy_(root.unsqueeze(1) * Vt)
        else:
            layer.up.zero_()
    elif size > 0:
        _fit(layer, change)
    update = layer.update
    assert update is not None
    left = float((change - update.delta()).norm())
    kept = 1 - (left / size) ** 2 if size > 0 else 1.0
    return layer, Extracted(name, update.rank, size / float(weight.norm() or 1.0), kept)


def _fit(layer: Linear, change: Tensor) -> None:
    """Set the core to the least squares of ‖Δ − s · U C D‖ over its entries."""
    assert layer.core is not None and layer.up is not None and layer.down is not None
    up, down = (
        f.dequantize(torch.float32) if isinstance(f, QuantizedWeight) else f.float() for f in (layer.up, layer.down)
    )
    lengths = up.square().sum(0).unsqueeze(1) * down.square().sum(1)
    update = layer.update
    assert update is not None
    values = layer.core.detach()  # the Parameter's own memory
    for _ in range(_PASSES):
        core = layer.make_core(values)
        assert core is not None
        left = change - update.scale * (up @ core.dense() @ down)
        step = (up.T @ left @ down.T) / lengths.clamp(min=torch.finfo(torch.float32).tiny) / update.scale
        if isinstance(core, cores.Dense):
            values += step
        else:
            rows, columns = cores.pattern(core)
            values += step[rows, columns]


def _warn_of_the_rest(tuned: Path, base: Path, layers: dict[str, Layer], experts: list[str]) -> None:
    """Say what the adapter does not have."""
    held = {key for layer in layers.values() for _, key in (*layer.places, *(e for p in layer.packed for e in p))}
    before, after = checkpoint_tensors(base), checkpoint_tensors(tuned)
    changed = [key for key in before.keys() | after.keys() if key not in held and _differ(key, before, after)]
    if changed:
        warnings.warn(
            f"{len(changed)} tensors changed that are no linear layers and are not in the adapter: "
            f"{', '.join(sorted(changed)[:3])}{', …' * (len(changed) > 3)}",
            stacklevel=3,
        )
    if experts:
        warnings.warn(f"{len(experts)} matrices of experts are left out, such as {experts[0]!r}", stacklevel=3)


def _differ(key: str, before: dict[str, Path], after: dict[str, Path]) -> bool:
    if key not in before or key not in after:
        return True
    read = []
    for path in (before[key], after[key]):
        with safe_open(path, framework="pt") as file:
            read.append(file.get_tensor(key))
    return read[0].shape != read[1].shape or not torch.equal(*read)
