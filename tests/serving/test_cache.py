"""The buffers of a cache, in any order of new tokens and of rows that come and go, against a list of tokens for each row."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from torch import Tensor

from lowrank_ops.serving.cache import Prefixes, RowLayer

HEADS, SIZE = 2, 3


def tokens(*shape: int) -> Tensor:
    return torch.randn(*shape[:1], HEADS, *shape[1:], SIZE)


@pytest.mark.parametrize("window", [None, 1, 2, 6])
def test_rows_come_and_go(window: int | None) -> None:
    torch.manual_seed(0)
    choose = random.Random(0)

    def filled(rows: int, length: int) -> tuple[RowLayer, list[Tensor]]:
        other, keys = RowLayer(window), tokens(rows, length)
        other.update(keys, -keys)
        return other, list(keys)

    layer, texts = filled(2, 3)  # texts: [heads, tokens, size] of each row
    for _ in range(200):
        what = choose.choice(["draw", "draw", "draw", "join", "leave"])
        if what == "draw":
            new = choose.choice([1, 1, 4])
            length, held, keys = layer.length, layer.held, tokens(len(texts), new)
            assert layer.get_mask_sizes(new) == (held + new, length - held)
            assert held == (length if window is None else min(length, window - 1))
            seen, values = layer.update(keys, -keys)
            texts = [torch.cat([text, more], 1) for text, more in zip(texts, keys, strict=True)]
            assert seen.shape == (len(texts), HEADS, held + new, SIZE)
            for i, text in enumerate(texts):
                n = min(held + new, text.shape[1])
                assert torch.equal(seen[i, :, held + new - n :], text[:, text.shape[1] - n :])
                assert not seen[i, :, : held + new - n].count_nonzero()
            assert torch.equal(values, -seen)
        elif what == "join" and len(texts) < 9:
            other, more = filled(choose.randint(1, 3), choose.randint(1, 9))
            layer.join(other)
            texts += more
        elif what == "leave" and len(texts) > 1:
            going = sorted(choose.sample(range(len(texts)), choose.randint(1, len(texts) - 1)))
            count = len(going)
            gaps = [i for i in range(count) if i not in going]
            moving = [i for i in going if i >= count]
            layer.move(moving, gaps, count)
            for source, target in zip(moving, gaps, strict=True):
                texts[target] = texts[source]
            texts = texts[:count]
            layer.shorten(layer.length - max(text.shape[1] for text in texts))
        assert layer.rows == len(texts) and layer.get_seq_length() == max(text.shape[1] for text in texts)


def test_new_tokens_are_written_where_they_stay() -> None:
    """Of 1,000 forwards only those copy that fill a buffer."""
    layer = RowLayer()
    layer.update(tokens(2, 10), tokens(2, 10))
    places = set()
    for _ in range(1000):
        layer.update(tokens(2, 1), tokens(2, 1))
        places.add(layer._keys.data_ptr())
    assert len(places) <= 8


@pytest.mark.parametrize("window", [None, 12, 40])
def test_prefixes(window: int | None) -> None:
    layer = RowLayer(window)
    text = list(range(30))
    keys = tokens(1, 30)
    layer.update(keys, -keys)
    kept = Prefixes(1 << 20)
    kept.add("a", text, [layer], 0)
    for ids, common in (([*text, 7], 30), ([*text[:20], 9, 9], 20), (text, 29), (text[:16], 0), ([1, *text], 0)):
        found = kept.find("a", ids)
        if window == 12 and common < 30:
            common = 0
        assert (found[1] if found else 0) == common, ids
        if found:
            cache: Any = type("Cache", (), {"layers": [RowLayer(window)]})
            found[0].begin(cache, common)
            more = tokens(1, 2)
            seen, values = cache.layers[0].update(more, -more)
            held = common if window is None else min(common, window - 1)
            assert torch.equal(seen, torch.cat([keys[:, :, common - held : common], more], 2))
            assert torch.equal(values, -seen)
    assert kept.find("b", [*text, 7]) is None


def test_the_least_recently_used_prefixes_leave() -> None:
    def add(to: Prefixes, first: int, length: int = 20) -> None:
        layer = RowLayer()
        layer.update(tokens(1, length), tokens(1, length))
        to.add(None, range(first, first + length), [layer], 0)

    kept = Prefixes(1 << 20)
    add(kept, 0)
    each = kept.nbytes
    kept = Prefixes(2 * each)
    add(kept, 0)
    add(kept, 100)
    assert kept.find(None, range(21))
    add(kept, 200)
    assert len(kept) == 2 and kept.nbytes == 2 * each
    assert kept.find(None, range(21)) and not kept.find(None, range(100, 121))
    add(kept, 0, 40)  # in place of the text that it goes on from
    assert len(kept) == 1 and kept.nbytes == 2 * each
    add(kept, 300, 41)
    assert len(kept) == 1
    nothing = Prefixes(0)
    add(nothing, 0)
    assert not len(nothing)
