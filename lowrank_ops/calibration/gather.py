"""lowrank_ops.calibrate: the moments of a model's layers over batches of text."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..adapters.config import WeightConfig
from ..adapters.targets import Target, find_targets
from ..formats import Moment, Moments
from .batches import Batch, check_ids, head_of, mask_of, part_with, run, take_batch, tied_to_head
from .blocks import OPENERS, InMemory, Source, by_blocks
from .observe import Observer


def calibrate(
    model: nn.Module | str | os.PathLike[str],
    batches: Iterable[Batch | Tensor],
    *,
    head: bool = False,
    gradients: bool = False,
    sequential: WeightConfig | None = None,
    folder: str | os.PathLike[str] | None = None,
    activations: torch.dtype | None = None,
    device: torch.device | str | None = None,
    progress: Callable[[str], None] | None = None,
) -> Moments:
    """H = E[x xᵀ] and E[x] of the input x of every linear layer, over the tokens of some batches.

    The layers are those that ``targets="all-linear"`` of :func:`lowrank_ops.adapt` means, experts included; they may be
    dense, in 4 bits or adapted. Layers with one input (q, k and v; gate and up) share one tensor. Each expert has the
    moments of the rows that are routed to it; :meth:`Moment.shrunk` moves those of rarely routed ones towards the mean of
    their layer. The model runs in eval mode and is afterwards as it was.

    Args:
        model: a model in memory; or the directory of a Hugging Face model with dense weights in safetensors files, of which
            one decoder block at a time is read, so that a model that does not fit can be calibrated.
        batches: an iterable of dictionaries of tensors, as the model takes them, or of ids [B, T]. Tokens whose
            ``attention_mask`` [B, T] is 0 count for nothing, in layers whose input has a row for each token.
        head: also the output head; an embedding that is tied to it gets the same moments under its own name.
        gradients: also the mean of dL/dW over the batches, for a model in memory, which may be frozen and in 4 bits. L is
            the loss that the model returns; ``labels`` are the ids, without padding, unless the batch has some.
        sequential: a configuration such as :class:`NF4Config`: each decoder block is rounded by it, with the block's own
            moments, before its outputs are computed, so that the next block sees them. A calibration that it has is
            not read, so ``NF4Config(calibration=folder, compensate=16)`` serves here and afterwards. None: the moments of
            the model as it is.
        folder: where to keep the moments and the activations between blocks, on disk. A call with the same choices goes on
            after the last complete block. The result reads the disk when it is used.
        activations: the dtype of the activations between blocks, such as bfloat16 for a float32 model; default: the model's
            own, so nothing is rounded.
        device: where a model that is read from a directory runs; default: the CPU.
        progress: is called with the name of each block that is done, or of each batch of a model that runs as a whole.

    Returns:
        the moments by the layer's name. A layer that saw no token has a count of 0, and is refused where it is used.

    Memory: the moments, 4 K² bytes for each input and for each expert; with blocks those of one block, its dense weights,
    and the activations between blocks, a number for each token and feature. With ``folder`` the last are on disk.

    Numerics: sums in float32 over at most 1024 rows at a time, so with B such sums the error is at most
    (1024 + B) · 2⁻²⁴ · E|x xᵀ|, element by element.

    Raises:
        ValueError: there is no batch; the blocks of the model are not found, and a directory, ``folder`` or ``sequential``
            needs them; ``gradients`` and the model returns no loss; the files have 4 bits.
        TypeError: a batch or a configuration is of another kind.
        FileNotFoundError: the directory is not one of a model.
    """
    if gradients and (sequential is not None or folder is not None or not isinstance(model, nn.Module)):
        raise ValueError(
            "gradients need the model in memory, where it runs as a whole: load it, in 4 bits if it does not fit, and leave "
            "out sequential and folder"
        )
    if not isinstance(model, nn.Module | str | os.PathLike):
        raise TypeError(f"model must be a torch.nn.Module or a path, got {type(model).__name__}")
    if progress is not None and not callable(progress):
        raise TypeError(f"progress must be a function or None, got {type(progress).__name__}")
    if sequential is not None and not isinstance(sequential, WeightConfig):
        raise TypeError(f"sequential must be an NF4Config, FP4Config or MXFP4Config, got {type(sequential).__name__}")
    if sequential is not None and sequential.compensate_bytes is not None:
        raise ValueError(
            "sequential takes a rank for each layer, compensate, because compensate_bytes is shared out after all blocks"
        )
    if isinstance(model, nn.Module) and device is not None:
        raise ValueError("device is for a model that is read from a directory; move the model that is in memory")
    taken = (take_batch(batch, number) for number, batch in enumerate(batches))
    advance = progress or (lambda name: None)
    if isinstance(model, nn.Module) and sequential is None and folder is None:
        with unchanged(model):
            return Moments(_whole(model, taken, head, gradients, advance))
    source = InMemory(model) if isinstance(model, nn.Module) else _open(Path(model), torch.device(device or "cpu"))
    with unchanged(source.model):
        layers = linear_layers(source.model)
        name = head_of(source.model) if head else None
        where = None if folder is None else Path(folder)
        return by_blocks(source, list(taken), layers, name, sequential, where, activations, advance)


def _open(directory: Path, device: torch.device) -> Source:
    for opener in OPENERS:
        if (source := opener(directory, device)) is not None:
            return source
    raise ValueError(f"{directory} cannot be read without transformers; pip install transformers")


def linear_layers(model: nn.Module) -> dict[str, Target]:
    """The layers to gather moments of, without the head."""
    return dict(find_targets(model, "all-linear").layers)


def _whole(
    model: nn.Module, batches: Iterator[dict[str, Any]], head: bool, gradients: bool, progress: Callable[[str], None]
) -> dict[str, Moment]:
    """The moments of a model that runs as a whole."""
    layers, name = linear_layers(model), head_of(model) if head else None
    if name is not None:
        layers[name] = model.get_submodule(name)
    observer, count = Observer(layers, gradients), 0
    holders = [layer if isinstance(layer, nn.Module) else layer.holder for layer in layers.values()]
    part, device = part_with(model, holders), next(model.parameters()).device
    with observer.attached(model), torch.set_grad_enabled(gradients):
        for count, batch in enumerate(batches, 1):
            observer.mask = mask_of(batch)
            if gradients:
                _backward(model, {k: t.to(device) if isinstance(t, Tensor) else t for k, t in batch.items()})
            else:
                run(part, batch, device)
            progress(f"batch {count}")
    if not count:
        raise ValueError("batches must hold at least one batch, got none")
    found = observer.moments(count)
    return found if name is None else found | tied_to_head(model, name, found[name])


def _backward(model: nn.Module, batch: dict[str, Any]) -> None:
    check_ids(model, batch)
    if "labels" not in batch:
        if "input_ids" not in batch:
            raise ValueError("gradients=True needs labels in each batch, or input_ids to predict")
        ids, mask = batch["input_ids"], batch.get("attention_mask")
        batch["labels"] = ids if mask is None else ids.masked_fill(mask == 0, -100)
    output: Any = model(**batch)
    loss = getattr(output, "loss", output)
    if not isinstance(loss, Tensor) or loss.dim() or not loss.requires_grad:
        raise ValueError(
            f"gradients=True needs a model that returns a loss for labels, and {type(model).__name__} returned "
            f"{type(output).__name__} without one that depends on its linear layers"
        )
    loss.backward()


@contextmanager
def unchanged(model: nn.Module) -> Iterator[None]:
    """Within it the model is in eval mode and its parameters take no gradient; afterwards all is as it was."""
    with ExitStack() as stack:
        for module in model.modules():
            stack.callback(setattr, module, "training", module.training)
        for parameter in model.parameters():
            if parameter.requires_grad:
                stack.callback(parameter.requires_grad_, True)
                parameter.requires_grad_(False)
        model.eval()
        yield
