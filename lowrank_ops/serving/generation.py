"""Completions token by token: the model's cache and the rows that share it."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .rows import Completion, Row, padded


class Decoder:
    """Run a causal model token by token with the installed transformers; the engine's only use of its interface.

    The argument that takes the cache was renamed between versions, and a forward with ``**kwargs`` silently drops
    unknown arguments. So a name counts only if a forward has filled the cache passed under it.

    Attributes:
        pads: whether rows of different lengths may share a forward. This needs a model that takes mask and positions
            and whose results do not change with padding on the left. Other models may count positions over the padding
            or from another number, take padding into their state, or apply a mask of the whole text to new tokens; they
            get neither mask nor positions, and rows of one length.

    Raises:
        ValueError: no argument of the model's forward takes a cache, or the model keeps a state outside of it.
    """

    CACHE = ("cache", "past_key_values", "cache_params")  # since transformers 5.24; before; before, for a state

    def __init__(self, model: Any) -> None:
        import transformers

        self._model, self._new = model, transformers.DynamicCache
        self._named = inspect.signature(model.forward).parameters
        failed: Exception | None = None
        for name in sorted(self.CACHE, key=lambda name: name not in self._named):
            self._cache = name
            try:
                if self._try():
                    return
            except Exception as error:  # a model may raise anything for an unknown argument
                failed = failed or error
        raise ValueError(
            f"the model must keep a cache from which completions continue; the forward of {type(model).__name__} in "
            f"transformers {transformers.__version__} keeps none, or not all of its state, in what is passed as "
            f"{' or '.join(self.CACHE)}"
        ) from failed

    @torch.inference_mode()
    def _try(self) -> bool:
        """Run the model on two tokens and then on a third; tell whether the cache keeps all its state. Sets ``pads``."""
        device = next(self._model.parameters()).device
        ids, mask = torch.tensor([[0, 0, 2, 3, 4]], device=device), torch.tensor([[0, 0, 1, 1, 1]], device=device)
        positions = torch.tensor([[0, 0, 0, 1, 2]], device=device)
        self.pads = {"attention_mask", "position_ids"} <= set(self._named)
        if self.pads:
            padded = self._model(**self.inputs(ids[:, :4], mask[:, :4], positions[:, :4], self.make_cache())).logits
            alone = self._model(input_ids=ids[:, 2:4]).logits[0, -1].float()
            # The bound lies above bfloat16 rounding and below the effect of a wrong position or of padding in a state.
            change = (padded[0, -1].float() - alone).abs().max()
            self.pads = bool(change <= 0.05 * (alone.max() - alone.min()))
        logits = []
        for between in (False, True):
            cache = self.make_cache()
            self._model(**self.inputs(ids[:, 2:4], mask[:, 2:4], positions[:, 2:4], cache))
            if between:  # a text of another cache
                self._model(**self.inputs(ids[:, 3:], mask[:, 3:], positions[:, 2:4], self.make_cache()))
            out = self._model(**self.inputs(ids[:, 4:], mask[:, 2:], positions[:, 4:], cache))
            logits.append(out.logits[0, -1].float())
        # A model that also keeps a state in its layers continues from the state of the other text.
        alone, interrupted = logits
        if not bool((alone - interrupted).abs().max() <= 1e-3 * (alone.max() - alone.min())):
            return False
        try:
            return bool(cache.get_seq_length() == 3)
        except ValueError:  # a cache of states alone has no length
            return bool(cache.has_previous_state())

    def make_cache(self) -> Any:
        return self._new(config=self._model.config)

    def inputs(self, ids: Tensor, mask: Tensor, positions: Tensor, cache: Any) -> dict[str, Any]:
        """Inputs of a forward that fills the cache; ids and positions are [rows, new tokens], mask [rows, all tokens]."""
        named: dict[str, Any] = {"attention_mask": mask, "position_ids": positions} if self.pads else {}
        # A model that names neither argument keeps the cache anyway, as the trial showed, and returns more logits.
        named |= {name: value for name, value in (("use_cache", True), ("logits_to_keep", 1)) if name in self._named}
        return {"input_ids": ids, self._cache: cache, **named}

    def joins(self, cache: Any) -> bool:
        """Tell whether rows can be added to a cache, which requires plain keys and values."""
        from transformers.cache_utils import DynamicLayer

        return self.pads and all(type(layer) is DynamicLayer for layer in cache.layers)


class Generation:
    """The running completions and their cache, one line for each row, padded on the left.

    Args:
        forward: runs the decoder's model on rows with given inputs.
        pad: the token id that fills shorter rows.
        ends: token ids that end a completion.
        device: of the model.
    """

    def __init__(
        self, forward: Callable[..., Any], decoder: Decoder, pad: int, ends: frozenset[int], device: torch.device
    ) -> None:
        self.forward, self.decoder, self.pad, self.ends, self.device = forward, decoder, pad, ends, device
        self.rows: list[Completion] = []
        self.cache: Any = None
        self.mask = torch.zeros(0, 0, dtype=torch.long)

    def __bool__(self) -> bool:
        return bool(self.rows)

    @property
    def joins(self) -> bool:
        """Tell whether new rows can join the running ones."""
        return not self.rows or self.decoder.joins(self.cache)

    def step(self, new: Sequence[Row]) -> None:
        """Draw one token for every running row, and the first token for new rows."""
        self._keep([i for i, row in enumerate(self.rows) if not row.cancelled])
        if self.rows:
            last = torch.tensor([[row.drawn[-1]] for row in self.rows], device=self.device)
            self.mask = torch.cat([self.mask, torch.ones_like(self.mask[:, :1])], 1)
            positions = self.mask.sum(1, keepdim=True) - 1
            out = self._forward(self.rows, last, self.mask, positions, self.cache)
            self._keep(self._take(self.rows, out.logits))
        if new:
            rows = [row for row in new if isinstance(row, Completion)]
            ids, mask = padded(rows, self.pad, True, self.device)
            positions = (mask.cumsum(1) - 1).clamp(min=0)
            cache = self.decoder.make_cache()
            out = self._forward(rows, ids, mask, positions, cache)
            others = Generation(self.forward, self.decoder, self.pad, self.ends, self.device)
            others.rows, others.cache, others.mask = rows, cache, mask
            others._keep(self._take(rows, out.logits))
            self._join(others)

    def _forward(self, rows: Sequence[Row], ids: Tensor, mask: Tensor, positions: Tensor, cache: Any) -> Any:
        return self.forward(rows, **self.decoder.inputs(ids, mask, positions, cache))

    def _take(self, rows: Sequence[Completion], logits: Tensor) -> list[int]:
        """Draw a token for each row from logits [rows, 1, vocabulary]; return the indices of the rows that continue."""
        going = []
        for i, row in enumerate(rows):
            try:
                if not row.take(row.choose(logits[i, -1]), self.ends):
                    going.append(i)
            except Exception as error:  # fails this row alone
                row.fail(error)
        return going

    def _keep(self, going: list[int]) -> None:
        if len(going) == len(self.rows):
            return
        self.rows = [self.rows[i] for i in going]
        if not self.rows:
            self.cache = None
            return
        index = torch.tensor(going, device=self.mask.device)
        self.cache.reorder_cache(index)  # batch_select_indices skips the states of linear attention
        self.mask = self.mask[index]
        padding = self.mask.shape[1] - int(self.mask.sum(1).max())
        if padding and self.joins:
            self.mask = self.mask[:, padding:]
            for layer in self.cache.layers:
                layer.keys, layer.values = layer.keys[:, :, padding:], layer.values[:, :, padding:]

    def _join(self, others: Generation) -> None:
        if not others.rows:
            return
        if not self.rows:
            self.rows, self.cache, self.mask = others.rows, others.cache, others.mask
            return
        width = max(self.mask.shape[1], others.mask.shape[1])

        def side_by_side(a: Tensor, b: Tensor, after: int) -> Tensor:
            """Concatenate rows; pad the first on the left to the same width, ``after`` dimensions from the end."""
            wide = [nn.functional.pad(t, (0, 0) * after + (width - t.shape[-1 - after], 0)) for t in (a, b)]
            return torch.cat(wide)

        for mine, theirs in zip(self.cache.layers, others.cache.layers, strict=True):
            mine.keys = side_by_side(mine.keys, theirs.keys, 1)
            mine.values = side_by_side(mine.values, theirs.values, 1)
        self.mask = side_by_side(self.mask, others.mask, 0)
        self.rows = [*self.rows, *others.rows]
