"""Completions token by token: prompts in chunks, and the rows that share a forward and a cache."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Hashable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .rows import Completion, Row, padded

if TYPE_CHECKING:
    from .cache import Prefixes


class Decoder:
    """Run a causal model token by token with the installed transformers; the engine's only use of its interface.

    The argument that takes the cache was renamed between versions, and a forward with ``**kwargs`` silently drops
    unknown arguments. So a name counts only if a forward has filled the cache passed under it.

    Attributes:
        pads: whether rows of different lengths may share a forward. This needs a model that takes mask and positions
            and whose results do not change with padding on the left. Other models may count positions over the padding
            or from another number, take padding into their state, or apply a mask of the whole text to new tokens; they
            get neither mask nor positions, and rows of one length.
        chunks: whether a text may be read in parts, so that a part continues from the cache of those before it.

    Raises:
        ValueError: no argument of the model's forward takes a cache, or the model keeps a state outside of it.
    """

    CACHE = ("cache", "past_key_values", "cache_params")  # since transformers 5.24; before; before, for a state

    def __init__(self, model: Any) -> None:
        import transformers

        from .cache import has_rows, make_cache

        self._model, self._make, self._has_rows = model, make_cache, has_rows
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
        """Run the model on two tokens and then on a third; tell whether the cache keeps all its state.

        Sets ``pads`` and ``chunks``.
        """
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
        self.chunks = self.joins(self.make_cache())
        if self.chunks:
            whole = self._model(input_ids=ids[:, 1:]).logits[0, -1].float()
            cache = self.make_cache()
            for part in (slice(1, 3), slice(3, 5)):
                every, at = (
                    torch.ones_like(mask[:, 1 : part.stop]),
                    torch.arange(4, device=device)[None, part.start - 1 : part.stop - 1],
                )
                out = self._model(**self.inputs(ids[:, part], every, at, cache))
            change = (out.logits[0, -1].float() - whole).abs().max()
            self.chunks = bool(change <= 0.05 * (whole.max() - whole.min()))
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
        return self._make(self._model.config, self.pads)

    def inputs(self, ids: Tensor, mask: Tensor, positions: Tensor, cache: Any, every: bool = False) -> dict[str, Any]:
        """Inputs of a forward that fills the cache; ids and positions are [rows, new tokens], mask [rows, all tokens].

        The forward returns the logits of ``every`` token or at least of the last.
        """
        named: dict[str, Any] = {"attention_mask": mask, "position_ids": positions} if self.pads else {}
        # A model that names neither argument keeps the cache anyway, as the trial showed, and returns more logits.
        more = {"use_cache": True, "logits_to_keep": 0 if every else 1}  # 0 keeps all
        named |= {name: value for name, value in more.items() if name in self._named}
        return {"input_ids": ids, self._cache: cache, **named}

    def joins(self, cache: Any) -> bool:
        """Tell whether rows can be added to a cache, which requires keys and values alone."""
        return self.pads and self._has_rows(cache)


class Batch:
    """Completions side by side, their cache and the mask [rows, tokens] of its padding, which is on the left."""

    def __init__(self, rows: Sequence[Completion], cache: Any, mask: Tensor) -> None:
        self.rows, self.cache, self.mask = list(rows), cache, mask

    def keep(self, going: Sequence[int], in_place: bool) -> None:
        """Let the other rows leave; in place, the last rows move into the gaps and nothing else is copied."""
        count = len(going)
        if count == len(self.rows):
            return
        if in_place:
            gaps = sorted(set(range(count)).difference(going))
            moving = [i for i in going if i >= count]
            for layer in self.cache.layers:
                layer.move(moving, gaps, count)
            into = dict(zip(gaps, moving, strict=True))
            order = [into.get(i, i) for i in range(count)]
        else:
            order = list(going)
            index = torch.tensor(order, device=self.mask.device)
            self.cache.reorder_cache(index)  # batch_select_indices skips the states of linear attention
        self.rows, self.mask = [self.rows[i] for i in order], self.mask[order]
        if in_place and count and (padding := self.mask.shape[1] - int(self.mask.sum(1).max())):
            self.mask = self.mask[:, padding:]
            for layer in self.cache.layers:
                layer.shorten(padding)

    def join(self, others: Batch) -> None:
        """Take in the rows of another batch."""
        for mine, theirs in zip(self.cache.layers, others.cache.layers, strict=True):
            mine.join(theirs)
        width = max(self.mask.shape[1], others.mask.shape[1])
        self.mask = torch.cat([nn.functional.pad(m, (width - m.shape[1], 0)) for m in (self.mask, others.mask)])
        self.rows += others.rows


class Generation:
    """The completions that have begun, and those whose prompts are read or wait for it.

    A step draws one token for every completion that has begun, and then reads prompts; a long one takes several steps. A
    prompt that begins like an earlier text of the same adapter continues from the keys and values of that text.

    Args:
        forward: runs the decoder's model on rows with given inputs.
        pad: the token id that fills shorter rows.
        ends: token ids that end a completion.
        device: of the model.
        chunk: tokens of prompts, with padding, that a step reads; it reads one at least.
        prefixes: the earlier texts.
        version: a row -> what differs for other adapters, other versions of them and other strengths.
    """

    def __init__(
        self,
        forward: Callable[..., Any],
        decoder: Decoder,
        pad: int,
        ends: frozenset[int],
        device: torch.device,
        chunk: int,
        prefixes: Prefixes,
        version: Callable[[Row], Hashable],
    ) -> None:
        self.forward, self.decoder, self.pad, self.ends, self.device = forward, decoder, pad, ends, device
        self.chunk, self.prefixes, self.version = chunk, prefixes, version
        self._batch: Batch | None = None  # completions that have begun
        self._waiting: list[Completion] = []
        self._prompts: Batch | None = None  # rows whose prompts are read, the mask of all of each prompt,
        self._ids = torch.zeros(0, 0, dtype=torch.long)  # and the tokens [rows, tokens] that are left of them

    @property
    def rows(self) -> list[Completion]:
        """All rows that have not ended."""
        read = [*(self._batch.rows if self._batch else ()), *(self._prompts.rows if self._prompts else ())]
        return [*read, *self._waiting]

    def __bool__(self) -> bool:
        return bool(self._batch or self._prompts or self._waiting)

    @property
    def joins(self) -> bool:
        """Tell whether new rows can join the running ones."""
        batch = self._batch or self._prompts
        return batch is None or self.decoder.joins(batch.cache)

    def step(self, new: Sequence[Row]) -> None:
        """Draw one token for every completion that has begun, and read a part of the prompts."""
        self._waiting += [row for row in new if isinstance(row, Completion)]
        self._draw()
        self._waiting = [row for row in self._waiting if not row.cancelled]
        left = self.chunk
        while left > 0 and (self._prompts or self._waiting):
            left -= self._read(left)

    def _draw(self) -> None:
        batch = self._batch
        if batch is None:
            return
        self._keep(batch, [i for i, row in enumerate(batch.rows) if not row.cancelled])
        if batch.rows:
            last = torch.tensor([[row.drawn[-1]] for row in batch.rows], device=self.device)
            batch.mask = torch.cat([batch.mask, torch.ones_like(batch.mask[:, :1])], 1)
            positions = batch.mask.sum(1, keepdim=True) - 1
            out = self._forward(batch, last, batch.mask, positions)
            going = self._take(batch.rows, out.logits)
            for i in set(range(len(batch.rows))).difference(going):
                self._remember(batch, i)
            self._keep(batch, going)
        if not batch.rows:
            self._batch = None

    def _read(self, most: int) -> int:
        """Read at most so many tokens of the next prompts, but one of each; return how many.

        Rows whose prompts end join the completions.
        """
        prompts = self._prompts = self._prompts or self._begin()
        if all(row.cancelled for row in prompts.rows):
            self._prompts = None
            return 0
        count, left = self._ids.shape
        new = min(left, max(1, most // count)) if self.decoder.chunks else left
        stop = prompts.mask.shape[1] - left + new
        positions = (prompts.mask.cumsum(1) - 1).clamp(min=0)[:, stop - new : stop]
        every = any(row.echo for row in prompts.rows)
        out = self._forward(prompts, self._ids[:, :new], prompts.mask[:, :stop], positions, every)
        self._ids = self._ids[:, new:]
        for i, row in enumerate(prompts.rows):
            if row.echo and not row.cancelled:
                row.score(out.logits[i][prompts.mask[i, stop - new : stop].bool()])
        if new == left:
            self._prompts = None
            for i in range(count):
                self._remember(prompts, i)
            self._keep(prompts, self._take(prompts.rows, out.logits))
            if prompts.rows and self._batch:
                self._batch.join(prompts)
            elif prompts.rows:
                self._batch = prompts
        return count * new

    def _begin(self) -> Batch:
        """Begin the prompts of the next rows: of one that continues an earlier text, or of several that make a chunk.

        Rows that want scores of their prompts share no chunk with others, which need the last token's logits alone.
        """
        cache = self.decoder.make_cache()
        rows: list[Completion] = []
        longest = 0
        for row in self._waiting:
            starts = self.decoder.chunks and not row.echo
            known = self.prefixes.find(self.version(row), row.ids) if starts else None
            longest = max(longest, len(row.ids))
            full = bool(known) or longest * (len(rows) + 1) > self.chunk
            if rows and self.decoder.chunks and (full or row.echo != rows[0].echo):
                break
            rows.append(row)
            if known:
                text, length = known
                text.begin(cache, length)
                self._ids = torch.tensor([row.ids[length:]], device=self.device)
                del self._waiting[0]
                return Batch(rows, cache, torch.ones(1, len(row.ids), dtype=torch.long, device=self.device))
        self._ids, mask = padded(rows, self.pad, True, self.device)
        del self._waiting[: len(rows)]
        return Batch(rows, cache, mask)

    def _forward(self, batch: Batch, ids: Tensor, mask: Tensor, positions: Tensor, every: bool = False) -> Any:
        return self.forward(batch.rows, **self.decoder.inputs(ids, mask, positions, batch.cache, every))

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

    def _remember(self, batch: Batch, i: int) -> None:
        """Keep what the cache holds of a row's text for rows that begin like it."""
        if self.decoder.chunks:
            row, length = batch.rows[i], int(batch.mask[i].sum())
            self.prefixes.add(self.version(row), [*row.ids, *row.drawn][:length], batch.cache.layers, i)

    def _keep(self, batch: Batch, going: Sequence[int]) -> None:
        batch.keep(going, self.decoder.joins(batch.cache))
