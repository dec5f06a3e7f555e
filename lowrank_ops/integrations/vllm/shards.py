"""The part of a model's matrices that one process has, and the layers that compute with it. Knows nothing of vLLM."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from ... import functional
from ...adapters.linear import Linear
from ...files import load_json
from ...formats import MARKS, WEIGHTS, QuantizedWeight
from ...formats.absmax import AbsmaxWeight
from ...functional import LowRankUpdate
from ...serving.route import most_ranks

Matrix = Tensor | QuantizedWeight
Span = tuple[int, int]
# Matrices with more numbers than this keep their 8-bit scales rather than be joined with float32 ones (9 % more bytes): a
# call costs little beside reading them.
_JOINED = 1 << 24
# bitsandbytes' entries beside the packed bytes and the mark of the format.
_PLAIN, _NESTED = (".absmax", ".quant_map"), (".nested_absmax", ".nested_quant_map")
_MARKS = {mark: name for name, mark in MARKS.items() if name in ("nf4", "fp4")}


class Part(NamedTuple):
    """Which rows, one span after the other, and which columns of a matrix [N, K] a process has."""

    shape: tuple[int, int]
    rows: tuple[Span, ...]
    columns: Span

    @classmethod
    def of_rows(cls, shape: tuple[int, int], rows: Iterable[Span]) -> Part:
        """Some rows, where spans that touch are one span."""
        spans: list[Span] = []
        for begin, end in rows:
            if spans and spans[-1][1] == begin:
                spans[-1] = spans[-1][0], end
            else:
                spans.append((begin, end))
        return cls(shape, tuple(spans), (0, shape[1]))

    @property
    def is_whole(self) -> bool:
        return self.rows == ((0, self.shape[0]),) and self.columns == (0, self.shape[1])

    def take(self, matrix: Matrix) -> Matrix:
        """This part of W. A 4-bit part has the blocks and the numbers of the whole matrix.

        Raises:
            ValueError: the part of a 4-bit weight does not consist of whole blocks.
        """
        if self.is_whole:
            return matrix
        if isinstance(matrix, Tensor):
            return self.down(self.up(matrix))
        if not isinstance(matrix, AbsmaxWeight):
            raise ValueError(f"an {matrix.name()} weight cannot be split over processes")
        N, K = self.shape
        pieces = [matrix.cut(0, *span) if span != (0, N) else matrix for span in self.rows]
        taken = pieces[0] if len(pieces) == 1 else type(matrix).join(pieces)
        return taken.cut(1, *self.columns) if self.columns != (0, K) else taken

    def up(self, factor: Tensor) -> Tensor:
        """The rows of U [N, R] that belong to the part."""
        return (
            torch.cat([factor[begin:end] for begin, end in self.rows]) if self.rows != ((0, len(factor)),) else factor
        )

    def down(self, factor: Tensor) -> Tensor:
        """The columns of D [R, K] that belong to the part."""
        return factor[:, slice(*self.columns)].contiguous()

    def update(self, update: LowRankUpdate) -> LowRankUpdate:
        """The update of the part: U_part C D_part. 4-bit factors stay so where the part has whole blocks of them."""
        (N, K), R = self.shape, update.rank
        up = _take(Part((N, R), self.rows, (0, R)), update.up)
        down = _take(Part((R, K), ((0, R),), self.columns), update.down)
        return LowRankUpdate(down, up, update.core, update.scale)


def _take(part: Part, factor: Matrix) -> Matrix:
    try:
        return part.take(factor)
    except ValueError:
        assert isinstance(factor, QuantizedWeight)
        return part.take(factor.dequantize(torch.float32))


def whole_of(pieces: Sequence[tuple[Part, Matrix]]) -> Matrix:
    """The matrix of which several processes have parts, with the same numbers; 8-bit scales become float32."""
    shape, matrix = pieces[0][0].shape, pieces[0][1]
    if isinstance(matrix, Tensor):
        whole = matrix.new_empty(shape)
        for part, tensor in pieces:
            assert isinstance(tensor, Tensor)
            for (begin, end), rows in zip(part.rows, tensor.split([e - b for b, e in part.rows]), strict=True):
                whole[begin:end, slice(*part.columns)] = rows
        return whole
    assert isinstance(matrix, AbsmaxWeight)
    (N, K), B = shape, matrix.block_size
    packed = torch.empty(-(-N * K // 2), dtype=torch.uint8, device=matrix.device)
    scales = torch.empty(-(-N * K // B), dtype=torch.float32, device=matrix.device)
    for part, weight in pieces:
        assert isinstance(weight, AbsmaxWeight)
        for target, source, unit in ((packed, weight.held()["packed"], 2), (scales, weight._scales(), B)):
            at = 0
            for begin, end in part.rows:
                if part.columns == (0, K):
                    place = target[begin * K // unit : -(-end * K // unit)]
                else:  # of whole blocks
                    left, right = part.columns
                    place = target.view(N, K // unit)[begin:end, left // unit : right // unit]
                place.copy_(source[at : at + place.numel()].view_as(place))
                at += place.numel()
    return type(matrix)(packed, scales, None, None, shape, B, matrix.dtype, matrix.storage)


class Carrier(Tensor):
    """An empty tensor that stands for a 4-bit weight in the hands of a loader; its views stand for the same weight."""

    weight: QuantizedWeight

    @classmethod
    def of(cls, weight: QuantizedWeight) -> Carrier:
        made = torch.empty(0, dtype=weight.dtype).as_subclass(cls)
        made.weight = weight
        return made

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = super().__torch_function__(func, types, args, kwargs or {})
        given = next((arg for arg in args if isinstance(arg, Carrier)), None)
        if (weight := vars(given).get("weight") if given is not None else None) is not None:
            for view in made if isinstance(made, tuple | list) else (made,):
                if isinstance(view, Carrier):
                    view.weight = weight
        return made


@dataclass(frozen=True, eq=False)
class Shard:
    """A part of a matrix of the checkpoint, and the part of the branch beside it."""

    name: str
    part: Part
    weight: Matrix
    branch: LowRankUpdate | None = None


def take_matrix(tensor: Tensor, param: Tensor) -> Matrix:
    """The matrix that a loader handed over, on the device of a parameter, and in its dtype if it is dense.

    Raises:
        ValueError: it is not a matrix of floats.
    """
    if isinstance(tensor, Carrier):
        if tensor.weight.experts:
            raise ValueError(f"one matrix is needed, and the files have a stack {list(tensor.weight.shape)}")
        return tensor.weight.to(param.device)
    if tensor.dim() != 2 or not tensor.is_floating_point():
        raise ValueError(f"a matrix of floats is needed, got {tensor.dtype} {list(tensor.shape)}")
    return tensor.to(param.device, param.dtype)


def gather(entries: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Matrix]]:
    """The tensors of a checkpoint under their names, where the entries of a 4-bit weight become one weight.

    Raises:
        ValueError: the entries of a weight do not fit together, or some are missing.
    """
    held: dict[str, dict[str, Tensor]] = {}
    endings = (*_MARKS, *_PLAIN, *_NESTED)
    for key, tensor in entries:
        if key.endswith(MARKS["int8"]):
            raise ValueError(
                f"{key.removesuffix(MARKS['int8'])} is in int8, which the plugin does not read; quantise without it"
            )
        ending = next((e for e in endings if key.endswith(e)), "")
        if not ending and (tensor.dim() != 2 or tensor.shape[1] != 1):
            yield key, tensor
            continue
        name = key.removesuffix(ending)
        held.setdefault(name, {})[ending] = tensor
        if _is_complete(held[name]):
            yield name, _decoded(name, held.pop(name))
    for name, parts in held.items():
        if parts.keys() == {""}:  # a dense matrix with one column
            yield name, parts[""]
        else:
            _decoded(name, parts)  # says what is missing


def _is_complete(parts: dict[str, Tensor]) -> bool:
    mark = next((mark for mark in _MARKS if mark in parts), None)
    if mark is None or not {"", *_PLAIN} <= parts.keys():
        return False
    nested = "nested_offset" in load_json(bytes(parts[mark].tolist()))
    return not nested or parts.keys() >= set(_NESTED)


def _decoded(name: str, parts: dict[str, Tensor]) -> Matrix:
    kind: Any = WEIGHTS[next((_MARKS[mark] for mark in _MARKS if mark in parts), "nf4")]
    prefix = name.removesuffix("weight")
    weight: QuantizedWeight = kind.from_bitsandbytes({name + ending: t for ending, t in parts.items()}, prefix)
    return weight


def join(weights: Sequence[Matrix]) -> tuple[Matrix | None, list[Matrix]]:
    """The rows of several matrices as one matrix with the same numbers, and each matrix over its memory.

    Without a joined matrix, which is None then, the matrices stay as they are: where formats differ, and where large
    matrices have 8-bit scales that only float32 ones could stand for.
    """
    first, same = weights[0], len({type(weight) for weight in weights}) == 1
    if len(weights) == 1 or not same:
        return None, list(weights)
    whole: Matrix
    if isinstance(first, Tensor):
        whole = torch.cat([w for w in weights if isinstance(w, Tensor)])
    else:
        packed = [w for w in weights if isinstance(w, AbsmaxWeight)]
        sizes, K = {w.block_size for w in packed}, packed[0].in_features if packed else 0
        if len(packed) < len(weights) or len(sizes) > 1 or any(w.out_features * K % w.block_size for w in packed):
            return None, list(weights)
        joined = type(packed[0]).join(packed)
        if not joined.double_quant and packed[0].double_quant and joined.numel() > _JOINED:
            return None, list(weights)
        whole = joined
    views: list[Matrix] = []
    begin = 0
    for weight in weights:
        end = begin + int(weight.shape[0])
        views.append(whole[begin:end] if isinstance(whole, Tensor) else _rows(whole, begin, end))
        begin = end
    return whole, views


def _rows(whole: QuantizedWeight, begin: int, end: int) -> AbsmaxWeight:
    """Rows of a joined weight over the same memory; they begin at a group of scales if those are 8-bit."""
    assert isinstance(whole, AbsmaxWeight)
    K, size = whole.in_features, whole.block_size
    first, last = begin * K // size, -(-end * K // size)
    absmax2 = None if whole.absmax2 is None else whole.absmax2[first // 256 : -(-last // 256)]
    packed, absmax = whole.packed[begin * K // 2 : -(-end * K // 2)], whole.absmax[first:last]
    return type(whole)(packed, absmax, absmax2, whole.offset, (end - begin, K), size, whole.dtype, whole.storage)


class Routing(Protocol):
    """What a layer asks of the adapters of a batch."""

    memory: Tensor  # the arena
    table: Tensor  # [sites, slots, FIELDS]
    slots: Tensor  # int32 [tokens]: the slot of every token, -1 for none

    def covers(self, sites: range) -> bool:
        """Tell whether some token of the batch may have an update at one of the sites."""
        ...


class ShardedLinear(nn.Module):
    """y = [W_1; W_2; …] x + bias + s · U C (D x): matrices with one input, each with its own update for every token.

    Without updates matrices that :func:`join` joins are one op over one weight.

    Args:
        shards: in the order of their rows.

    Attributes:
        sites: the matrices as layers, as adapters are read for them.
        routing: the adapters, or None; ``first`` is the row of the tables for the first matrix.
    """

    def __init__(self, shards: Sequence[Shard]) -> None:
        super().__init__()
        self.shards = tuple(shards)
        plain = all(shard.branch is None for shard in shards)
        weights = [shard.weight for shard in shards]
        self.whole, views = join(weights) if plain else (None, weights)
        self.sites = nn.ModuleList(
            layer_over(weight, shard.branch) for weight, shard in zip(views, shards, strict=True)
        )
        # The joined memory is what is kept.
        self.shards = tuple(Shard(s.name, s.part, view, s.branch) for s, view in zip(shards, views, strict=True))
        self.routing: Routing | None = None
        self.first = 0
        self._bound: tuple[Tensor | None, list[functional.PreparedLinear]] | None = None

    def forward(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        routing = self.routing
        if routing is None or not routing.covers(range(self.first, self.first + len(self.shards))):
            made = [run(x) for run in self._runs(bias)]
            return made[0] if len(made) == 1 else torch.cat(made, -1)
        rows = x.reshape(-1, x.shape[-1])
        slots = routing.slots[: rows.shape[0]]
        made = [
            functional.routed(
                rows, site.weight, routing.memory, routing.table[self.first + i], slots, part, most_ranks(site),
                branch=site.branch,
            )
            for i, (site, part) in enumerate(zip(self._layers(), self._split(bias), strict=True))
        ]  # fmt: skip
        y = made[0] if len(made) == 1 else torch.cat(made, -1)
        return y.view(*x.shape[:-1], y.shape[-1])

    def _layers(self) -> Iterator[Any]:
        yield from self.sites

    def _split(self, bias: Tensor | None) -> list[Tensor | None]:
        if bias is None:
            return [None] * len(self.shards)
        return list(bias.split([int(shard.weight.shape[0]) for shard in self.shards]))

    def _runs(self, bias: Tensor | None) -> list[functional.PreparedLinear]:
        if self._bound is None or self._bound[0] is not bias:
            if self.whole is not None:
                runs = [functional.prepare(self.whole, bias)]
            else:
                parts = zip(self._layers(), self._split(bias), strict=True)
                runs = [functional.prepare(site.weight, part, branch=site.branch) for site, part in parts]
            self._bound = bias, runs
        return self._bound[1]


def layer_over(weight: Matrix, branch: LowRankUpdate | None = None) -> Linear:
    """A layer without an adapter, as adapters are read for it."""
    if isinstance(weight, QuantizedWeight):
        return Linear.from_weight(weight, branch=branch)
    dense = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta", dtype=weight.dtype)
    dense.weight = nn.Parameter(weight, requires_grad=False)
    return Linear.from_linear(dense, None, quantize=None)
