"""Keys and values of rows that come and go, in buffers with room, and the prefixes of texts that are kept for later rows."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin, DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

_SHORTEST = 16  # tokens; a shorter prefix is computed sooner than it is found


class RowLayer(CacheLayerMixin):
    """A layer's keys and values [rows, heads, tokens, size], all rows aligned at their last token.

    Both lie in buffers with room for more rows and tokens, so that a forward writes what is new and copies nothing else.
    A buffer that is full is copied to one of twice the size; of a layer with a window only the window is.

    Args:
        window: the number of tokens that a token sees, with itself; None: all.

    Attributes:
        rows: their number.
        length: tokens of the longest row.
        held: tokens of it that the next forward can see.
    """

    is_sliding = False

    def __init__(self, window: int | None = None) -> None:
        super().__init__()
        self.window, self.is_sliding = window, window is not None
        self.rows = self.length = self._end = 0
        self._keys = self._values = torch.empty(0)

    @property
    def held(self) -> int:
        return self._of_window(self.length)

    def _of_window(self, length: int) -> int:
        return length if self.window is None else min(length, self.window - 1)

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Make empty buffers like the given keys and values."""
        self.dtype, self.device, self.rows = key_states.dtype, key_states.device, key_states.shape[0]
        self._keys, self._values = key_states[:, :, :0], value_states[:, :, :0]
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Add new tokens; return the keys and values that they see."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        new, held = key_states.shape[-2], self.held
        self._reserve(self.rows, held, new)
        self.length += new
        self._end += new
        seen = slice(self._end - held - new, self._end)
        self._keys[: self.rows, :, self._end - new : self._end] = key_states
        self._values[: self.rows, :, self._end - new : self._end] = value_states
        return self._keys[: self.rows, :, seen], self._values[: self.rows, :, seen]

    def _reserve(self, rows: int, before: int, after: int) -> None:
        """Make room for rows, with ``before`` tokens up to the end and ``after`` tokens behind it."""
        if rows <= self._keys.shape[0] and before <= self._end and self._end + after <= self._keys.shape[2]:
            return
        held, end = self.held, self._end

        def moved(old: Tensor) -> Tensor:
            more = old.new_empty(1 << (rows - 1).bit_length(), old.shape[1], 2 * (before + after), old.shape[3])
            more[: self.rows, :, before - held : before] = old[: self.rows, :, end - held : end]
            return more

        self._keys, self._values, self._end = moved(self._keys), moved(self._values), before

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """The tokens that a forward over new ones sees, and the first of them."""
        return self.held + query_length, self.length - self.held

    def get_seq_length(self) -> int:
        return self.length

    def get_max_length(self) -> int:
        return -1 if self.window is None else self.window

    def shorten(self, tokens: int) -> None:
        """Forget the first tokens, which are padding in every row."""
        self.length -= tokens

    def move(self, sources: Sequence[int], targets: Sequence[int], rows: int) -> None:
        """Copy rows to the places of rows that have left; ``rows`` remain."""
        held = slice(self._end - self.held, self._end)
        for part in (self._keys, self._values):
            for source, target in zip(sources, targets, strict=True):
                part[target, :, held] = part[source, :, held]
        self.rows = rows

    def join(self, others: RowLayer) -> None:
        """Take in the rows of another layer; the shorter ones get zeros in front, which their mask hides."""
        rows, length, mine = self.rows + others.rows, max(self.length, others.length), self.held
        held = self._of_window(length)
        self._reserve(rows, held, 0)
        end, theirs = self._end, slice(others._end - others.held, others._end)
        for part, new in ((self._keys, others._keys), (self._values, others._values)):
            part[: self.rows, :, end - held : end - mine] = 0
            part[self.rows : rows, :, end - held : end - others.held] = 0
            part[self.rows : rows, :, end - others.held : end] = new[: others.rows, :, theirs]
        self.rows, self.length = rows, length

    def view(self, row: int, length: int) -> tuple[Tensor, Tensor]:
        """The keys and values [1, heads, tokens, size] that a row of that length holds."""
        held = slice(self._end - self._of_window(length), self._end)
        return self._keys[row : row + 1, :, held], self._values[row : row + 1, :, held]

    def begin(self, keys: Tensor, values: Tensor, length: int, of: int) -> None:
        """Begin one row with the first ``length`` tokens of a text of which :meth:`view` gave keys and values."""
        assert not self.is_initialized
        self.lazy_initialization(keys, values)
        stop = keys.shape[2] - (of - length)
        held = slice(stop - self._of_window(length), stop)
        self._reserve(1, 0, self._of_window(length))
        self._keys[:1, :, : self._of_window(length)] = keys[:, :, held]
        self._values[:1, :, : self._of_window(length)] = values[:, :, held]
        self.length, self._end = length, self._of_window(length)


def make_cache(config: Any, rows: bool) -> DynamicCache:
    """An empty cache for a model; with ``rows``, of :class:`RowLayer` if it has keys and values alone."""
    cache = DynamicCache(config=config)
    if rows and all(type(layer) in (DynamicLayer, DynamicSlidingWindowLayer) for layer in cache.layers):
        cache.layers = [RowLayer(getattr(layer, "sliding_window", None)) for layer in cache.layers]
    return cache


def has_rows(cache: Any) -> bool:
    """Tell whether rows can come and go in a cache."""
    return all(isinstance(layer, RowLayer) for layer in cache.layers)


@dataclass(eq=False)
class Prefix:
    """A text with the keys and values that its layers hold at its end."""

    ids: np.ndarray[Any, Any]
    layers: list[tuple[Tensor, Tensor]]
    windows: list[int]  # different ones of the layers

    @property
    def nbytes(self) -> int:
        return self.ids.nbytes + sum(part.nbytes for layer in self.layers for part in layer)

    def serves(self, length: int) -> bool:
        """Tell whether a row can begin with the first ``length`` tokens; a window may have dropped some of them."""
        dropped = len(self.ids) - length
        return all(min(length, w - 1) + dropped <= min(len(self.ids), w - 1) for w in self.windows)

    def begin(self, cache: Any, length: int) -> None:
        """Begin an empty cache of one row with the first ``length`` tokens."""
        for layer, (keys, values) in zip(cache.layers, self.layers, strict=True):
            layer.begin(keys, values, length, len(self.ids))


class Prefixes:
    """The texts of latest rows, with their keys and values, for rows of the same adapter that begin alike.

    Args:
        limit: bytes; beyond it the least recently used leave.
    """

    def __init__(self, limit: int) -> None:
        self.limit, self.nbytes = limit, 0
        self._kept: OrderedDict[tuple[Hashable, bytes], Prefix] = OrderedDict()

    def __len__(self) -> int:
        return len(self._kept)

    def add(self, adapter: Hashable, ids: Sequence[int], layers: Iterable[RowLayer], row: int) -> None:
        """Keep a row's text, which is all that its layers hold of it, in place of texts that it begins with."""
        layers = list(layers)
        text = np.asarray(ids, dtype=np.int32)
        if len(text) < _SHORTEST or not self.limit or (adapter, text.tobytes()) in self._kept:
            return
        windows = sorted({layer.window for layer in layers if layer.window is not None})
        made = Prefix(text, [layer.view(row, len(text)) for layer in layers], windows)
        if made.nbytes > self.limit:
            return
        made.layers = [(keys.clone(), values.clone()) for keys, values in made.layers]
        for key, kept in list(self._kept.items()):
            n = len(kept.ids)
            if key[0] == adapter and n <= len(text) and made.serves(n) and np.array_equal(kept.ids, text[:n]):
                self.nbytes -= self._kept.pop(key).nbytes
        self._kept[adapter, text.tobytes()] = made
        self.nbytes += made.nbytes
        while self.nbytes > self.limit:
            self.nbytes -= self._kept.popitem(last=False)[1].nbytes

    def find(self, adapter: Hashable, ids: Sequence[int]) -> tuple[Prefix, int] | None:
        """The text that has the most tokens in common with a row's, and their number; the row's last token is left."""
        text = np.asarray(ids[:-1], dtype=np.int32)
        best: tuple[tuple[Hashable, bytes], Prefix] | None = None
        longest = _SHORTEST - 1
        for key, kept in self._kept.items():
            if key[0] != adapter:
                continue
            n = min(len(text), len(kept.ids))
            differ = np.flatnonzero(kept.ids[:n] != text[:n])
            common = int(differ[0]) if len(differ) else n
            if common > longest and kept.serves(common):
                best, longest = (key, kept), common
        if best is None:
            return None
        self._kept.move_to_end(best[0])
        return best[1], longest
