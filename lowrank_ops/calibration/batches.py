"""Batches as a model takes them, and which part of the model they run."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor, nn

from ..formats import Moment

Batch = Mapping[str, Any]


def take_batch(batch: Batch | Tensor, number: int) -> dict[str, Any]:
    """A batch as the model's keyword arguments, with its ids and mask checked."""
    if isinstance(batch, Tensor):
        batch = {"input_ids": batch}
    if not isinstance(batch, Mapping):
        raise TypeError(
            f"batch {number} must be a dictionary of tensors or ids [B, T], got {type(batch).__name__}; of pairs of inputs "
            "and targets, give the inputs alone"
        )
    taken = dict(batch)
    ids, mask = taken.get("input_ids"), taken.get("attention_mask")
    if isinstance(ids, Tensor) and (ids.dim() != 2 or ids.is_floating_point() or not ids.numel()):
        raise ValueError(f"batch {number}: input_ids must be integers [B, T], got {ids.dtype} {list(ids.shape)}")
    if mask is not None and not (isinstance(mask, Tensor) and mask.dim() == 2):
        got = list(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
        raise ValueError(f"batch {number}: attention_mask must be [B, T], got {got}")
    if mask is not None and not mask.any():
        raise ValueError(f"batch {number}: attention_mask leaves no token")
    return taken


def mask_of(batch: Batch) -> Tensor | None:
    """bool [B, T], the tokens that count; None for all."""
    mask = batch.get("attention_mask")
    return None if mask is None or bool(mask.all()) else mask.bool()


def digest(batches: Iterable[Batch]) -> str:
    """A digest of the batches: equal for the same batches in an earlier call."""
    found = hashlib.sha256()
    for batch in batches:
        for name, value in sorted(batch.items()):
            found.update(f"{name} {list(getattr(value, 'shape', []))}\n".encode())
            found.update(
                value.cpu().contiguous().numpy().tobytes() if isinstance(value, Tensor) else repr(value).encode()
            )
    return found.hexdigest()


def check_ids(model: nn.Module, batch: Batch) -> None:
    """Raise ValueError if a batch has a token that the model does not know."""
    find: Any = getattr(model, "get_input_embeddings", lambda: None)
    ids, table = batch.get("input_ids"), find()
    rows = getattr(table, "num_embeddings", None)
    if isinstance(ids, Tensor) and isinstance(rows, int) and not 0 <= int(ids.min()) <= int(ids.max()) < rows:
        raise ValueError(
            f"input_ids must be in [0, {rows}), got {int(ids.min())} to {int(ids.max())}: another tokenizer's"
        )


def run(model: nn.Module, batch: Batch, device: Any) -> None:
    """Run a forward without labels, and without a cache that nobody reads."""
    check_ids(model, batch)
    kept = {name: t.to(device) if isinstance(t, Tensor) else t for name, t in batch.items() if name != "labels"}
    if hasattr(getattr(model, "config", None), "use_cache"):
        kept["use_cache"] = False
    model(**kept)


def part_with(model: nn.Module, modules: Iterable[nn.Module]) -> nn.Module:
    """The base of a Hugging Face model if the modules are in it, which saves the head's logits; otherwise the model."""
    base = getattr(model, getattr(model, "base_model_prefix", "") or "-", None)
    if not isinstance(base, nn.Module):
        return model
    inside = set(base.modules())
    return base if inside.issuperset(modules) else model


def head_of(model: nn.Module) -> str:
    """The name of the output head of a Hugging Face model."""
    find: Any = getattr(model, "get_output_embeddings", lambda: None)
    names = {module: name for name, module in model.named_modules()}
    if (head := find()) not in names:
        raise ValueError(f"head=True: the model, a {type(model).__name__}, has no output head")
    return names[head]


def tied_to_head(model: nn.Module, head: str, moment: Moment) -> dict[str, Moment]:
    """The head's moments under its own name, and under the name of an embedding that shares its weight."""
    find: Any = getattr(model, "get_input_embeddings", lambda: None)
    table, output = find(), model.get_submodule(head)
    names = {module: name for name, module in model.named_modules()}
    tied = table in names and table.weight is output.weight
    return {head: moment} | ({names[table]: moment} if tied else {})
