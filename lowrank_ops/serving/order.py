"""Tell the row of the batch that each token of a layer's input belongs to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

import torch
from torch import Tensor, nn

from ..adapters.experts import ExpertsLinear


class Order(Enum):
    """How a layer's input [..., K] follows from a batch of B rows."""

    ROWS = "[B, …, K], or flattened [B · T, K]"
    ENCODER = "as ROWS, but before generate repeats every row for its beams"
    SEQUENCE_FIRST = "[T, B, …, K]"
    WINDOWS = "[B · windows, …, K], a row's windows one after the other"
    FOLDED = "[B · frames, …, K] or [B · places, …, K], a row's parts one after the other"
    MEDIA = "images, videos or sounds of the batch one after the other, of which a row may have any number"
    CHOSEN = "tokens that a router has chosen"


# Classes of transformers that hand [T, B, K] to the layers in them, or in some of their children.
_SEQUENCE_FIRST: dict[str, tuple[str, ...]] = {
    "XLNetLayer": (),
    "LongformerSelfAttention": (),
    "LEDEncoderSelfAttention": (),
    "FSMTEncoder": ("layers",),
    "FSMTDecoder": ("layers",),
    "Mask2FormerMaskedAttentionDecoderLayer": ("fc1", "fc2"),
    "OneFormerTransformerDecoderFFNLayer": (),
}
# Models of diffusers that fold the frames of a video, or its places, into the batch.
_FOLDED = ("UNetMotionModel", "LatteTransformer3DModel")
# The kinds of media, and the attributes of a configuration with the id of the token that stands for one.
_PLACEHOLDERS = {kind: (f"{kind}_token_id", f"{kind}_token_index") for kind in ("image", "video", "audio")}
# The arguments of a model with the sizes of its media, [count, 3]: patches in time, height and width.
GRIDS = ("image_grid_thw", "video_grid_thw")


@dataclass
class Media:
    """What a model's configuration says of its media.

    Attributes:
        tokens: kind -> the id of its placeholder.
        merged: patches along each side of a square that make one placeholder.
        lengths: numbers of placeholders that every image has, if they are fixed.
    """

    tokens: Mapping[str, int] = field(default_factory=dict)
    merged: int = 1
    lengths: tuple[int, ...] = ()


@dataclass
class Batch:
    """What the latest forward of the pool's model tells of its rows.

    Attributes:
        tokens: their number, of all rows together; 0 before a forward.
        ids: the input ids [B, T], if the model has media and got ids.
        grids: the sizes of images and of videos, in the order of ``GRIDS``.
    """

    tokens: int = 0
    ids: Tensor | None = None
    grids: tuple[Tensor | None, ...] = (None, None)


def find_orders(model: nn.Module) -> dict[int, Order]:
    """id of a module -> the order of its input, for modules whose order is not ROWS."""
    orders: dict[int, Order] = {}

    def mark(module: nn.Module, order: Order) -> None:
        orders.update((id(m), order) for m in module.modules())

    for module in model.modules():
        if module is not model and isinstance(getattr(module, "window_size", None), int | tuple | list):
            mark(module, Order.WINDOWS)
        if type(module).__name__ in _FOLDED:
            mark(module, Order.FOLDED)
    for module in model.modules():
        config, encoder = getattr(module, "config", None), getattr(module, "get_encoder", None)
        if getattr(config, "is_encoder_decoder", False) and callable(encoder):
            found = encoder()
            if found is not module:
                mark(found, Order.ENCODER)
        if media_of(module).tokens and callable(decoder := getattr(module, "get_decoder", None)):
            text, head = decoder(), getattr(module, "get_output_embeddings", lambda: None)()
            if text is not module:
                inside = {*text.modules(), *(() if head is None else head.modules())}
                orders.update((id(part), Order.MEDIA) for part in module.modules() if part not in inside)
    for name, module in model.named_modules():
        attention = getattr(module, "self_attn", None)
        torchs = isinstance(module, nn.TransformerEncoderLayer | nn.TransformerDecoderLayer)
        if torchs and not getattr(attention, "batch_first", True):
            mark(module, Order.SEQUENCE_FIRST)
        for kind in type(module).__mro__:
            here = _SEQUENCE_FIRST.get(kind.__name__) if kind.__module__.startswith("transformers.") else None
            for part in () if here is None else here or ("",):
                mark(module.get_submodule(part), Order.SEQUENCE_FIRST)
        if isinstance(module, ExpertsLinear) and not module.knows_tokens:
            mark(module, Order.CHOSEN)
        if isinstance(module, nn.ModuleList | nn.ModuleDict) and "expert" in name.rpartition(".")[2]:
            mark(module, Order.CHOSEN)
    return orders


def media_of(model: nn.Module) -> Media:
    """What the configuration of a model says of its media."""
    config: Any = getattr(model, "config", None)
    tokens: dict[str, int] = {}
    for kind, names in _PLACEHOLDERS.items():
        for name in names:
            if isinstance(token := getattr(config, name, None), int):
                tokens[kind] = token
    merged = getattr(getattr(config, "vision_config", None), "spatial_merge_size", 1)
    lengths = (getattr(config, name, None) for name in ("image_seq_length", "mm_tokens_per_image"))
    return Media(tokens, merged, tuple(length for length in lengths if isinstance(length, int) and length > 0))


def rows_of(order: Order, shape: Sequence[int], names: Sequence[int], batch: Batch, media: Media) -> Tensor | None:
    """The row of each token of x, int64 [tokens]; None if it cannot be told.

    Args:
        shape: of x [..., K].
        names: the slot of each row; rows with equal ones may stand for each other.
    """
    tokens, B = torch.Size(shape[:-1]).numel(), len(names)
    if not B:
        return torch.zeros(0, dtype=torch.int64, device="cpu") if not tokens else None
    rows = torch.arange(B, device="cpu")
    if order is Order.CHOSEN:
        return None
    if order is Order.MEDIA:
        return _media_rows(shape, tokens, names, batch, media)
    if order is Order.SEQUENCE_FIRST:
        return (
            rows.repeat(shape[0]).repeat_interleave(tokens // (shape[0] * B))
            if len(shape) > 2 and shape[1] == B
            else None
        )
    if order is Order.FOLDED:
        return rows.repeat_interleave(tokens // B) if shape[0] % B == 0 else None
    if len(shape) > 2:
        if shape[0] == B or (order is Order.WINDOWS and shape[0] % B == 0):
            return rows.repeat_interleave(tokens // B)
        if order is Order.ENCODER and B % shape[0] == 0:
            beams = B // shape[0]
            if all(names[b] == names[b - b % beams] for b in range(B)):
                return rows[::beams].repeat_interleave(tokens // shape[0])
        return None
    # A model may flatten its batch before a layer; then rows still follow one another. Any other number of tokens is a
    # choice of them.
    return rows.repeat_interleave(tokens // B) if tokens in (B, batch.tokens) else None


def _media_rows(shape: Sequence[int], tokens: int, names: Sequence[int], batch: Batch, media: Media) -> Tensor | None:
    """As :func:`rows_of`, for a layer before the text: by the placeholders of each row and the sizes of the media."""
    if batch.ids is None or len(batch.ids) != len(names):
        return None
    found: list[Tensor] = []
    for kind, token in media.tokens.items():
        counts = (batch.ids == token).flatten(1).sum(1).tolist()
        grid = dict(zip(("image", "video"), batch.grids, strict=True)).get(kind)
        if not sum(counts):
            continue
        if grid is not None:
            patches = grid.prod(-1).tolist()
            owners = _owners(counts, [n // media.merged**2 for n in patches])
            pooled = sum(patches) // max(tokens, 1)
            if owners is None or pooled * tokens != sum(patches) or any(n % pooled for n in patches):
                continue
            found.append(owners.repeat_interleave(torch.tensor(patches, device="cpu") // pooled))
        elif len(shape) > 2:
            with_media = [row for row, count in enumerate(counts) if count]
            owners = torch.tensor(with_media, device="cpu") if len(with_media) == shape[0] else None
            for length in media.lengths:
                if owners is None and not any(count % length for count in counts) and sum(counts) == shape[0] * length:
                    owners = _owners(counts, [length] * shape[0])
            if owners is not None:
                found.append(owners.repeat_interleave(tokens // shape[0]))
    # Images and videos pass the same layers, and a layer cannot know which of them it has.
    slots = torch.tensor(names, device="cpu")
    return (
        found[0]
        if found and all(torch.equal(slots[one], slots[found[0]]) for one in found if len(one) == tokens)
        else None
    )


def _owners(counts: Sequence[int], lengths: Sequence[int]) -> Tensor | None:
    """The row of each medium, whose placeholders follow one another; None if they do not fill the rows' exactly."""
    owners: list[int] = []
    rest = list(lengths)[::-1]
    for row, count in enumerate(counts):
        while count > 0 and rest:
            count -= rest.pop()
            owners.append(row)
        if count:
            return None
    return None if rest else torch.tensor(owners, dtype=torch.int64, device="cpu")
