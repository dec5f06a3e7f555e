"""The first state of each kind over a weight W: the frozen parts, the trained parts, and a record of their origin."""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from .. import cores
from ..cores import Core
from ..files import load_json
from ..formats import Moment, NF4Weight, QuantizedWeight
from ..functional import LowRankUpdate
from ..svd.decompose import transposed_times, truncated_svd
from ..svd.store import FactorStore, is_exact, largest, stack_key, weight_key
from ..svd.weighted import weighted_low_rank
from .data_starts import check_gradient, corda_factors, loraga_factors, principal_inputs
from .dora import row_norms
from .kinds import BASE_CHANGING, CALIBRATED, SVF, SVFT, Adapter, LoRA, LoRAXS, Spectral
from .rounding import Base, Loss, Matrix, RoundingPlan, join_bases, keep_base, rounding_of, split_branch

# The key under which a state dict records the kind of a layer.
RECORD = "adapter"

# Matrices of a stack that are decomposed together.
_TOGETHER = 8

SVD = tuple[Tensor, Tensor, Tensor]


@dataclass(frozen=True)
class Source:
    """The weight the frozen parts were made from; saved with an adapter and compared when it is loaded.

    Args:
        weight: :func:`weight_key` of W.
        fingerprint: eight numbers computed from the factors, which distinguish them from other factors of the same W.
    """

    weight: str
    fingerprint: tuple[float, ...]

    def difference(self, other: Source) -> str:
        """Tell why ``other`` does not mean the same factors; empty if it does."""
        if self.weight != other.weight:
            return "they were made from another weight"
        largest = max(map(abs, (*self.fingerprint, *other.fingerprint)))
        off = max(abs(a - b) for a, b in zip(self.fingerprint, other.fingerprint, strict=True))
        # Another machine's rounding moves the vectors by about 1e-4; another basis by as much as their length.
        return "" if off <= 1e-2 * largest else f"their fingerprints differ by {off / largest:.2g} of their size"


def record_of(kind: Adapter, source: Source | None) -> dict[str, Any]:
    """The kind of a layer and the weight its frozen parts were made from, for JSON in files and state dicts."""
    record: dict[str, Any] = {"type": type(kind).__name__, "kind": asdict(kind)}
    if source is not None:
        record |= {"weight": source.weight, "fingerprint": list(source.fingerprint)}
    return record


def read_record(record: Any) -> tuple[Adapter, Source | None]:
    """The inverse of :func:`record_of`."""
    try:
        kind = _kind(record["type"], *record["kind"].items())
        return kind, Source(record["weight"], tuple(record["fingerprint"])) if "weight" in record else None
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"the record of its adapter is damaged: {error!r}") from error


def entry_of(kind: Adapter, source: Source | None) -> Tensor:
    """The record of a layer in a state dict: JSON as uint8."""
    return torch.tensor(list(json.dumps(record_of(kind, source)).encode()), dtype=torch.uint8, device="cpu")


def read_entry(prefix: str, entry: Tensor) -> tuple[Adapter, Source | None]:
    """The kind and the source in the record of a layer."""
    try:
        record = load_json(bytes(entry.to("cpu", torch.uint8).tolist()))
    except (AttributeError, TypeError, ValueError) as error:
        raise ValueError(f"{prefix + RECORD!r} is not a record of an adapter: {error}") from error
    return read_record(record)


@functools.lru_cache(maxsize=64)  # a file has few kinds and many layers
def _kind(name: str, *options: tuple[str, Any]) -> Adapter:
    kinds = {kind.__name__: kind for kind in (LoRA, LoRAXS, SVF, SVFT)}
    return kinds[name](**dict(options))


@dataclass
class Start:
    """The parts of a layer at its first step.

    Args:
        weight: the base the layer keeps, or None if the layer gives it up, and its branch with it.
        down, up: D [R, K] and U [N, R].
        core: C, whose trained values start at 0, or None.
        offset: a term added to the values of C (the replace form: S on the diagonal), or None.
        shift: D₀, U₀ of a kind that changes the base to W − s · U₀ D₀.
        source: the weight of frozen factors and changed bases.
        magnitude: m of a DoRA, or None.
        up_bias: b of a LoRA with ``lora_bias``, or None.
        error: ‖W' − W‖ / ‖W‖ in the Frobenius norm, if the layer may start as another map than its base.
        branch: U_b D_b beside the weight, or None.
        loss: what was lost when W was rounded, if it was measured.
    """

    weight: Matrix | None
    down: Matrix | None
    up: Matrix | None
    core: Core | None = None
    offset: Tensor | None = None
    shift: tuple[Tensor, Tensor] | None = None
    source: Source | None = None
    error: float | None = None
    magnitude: Tensor | None = None
    up_bias: Tensor | None = None
    branch: LowRankUpdate | None = None
    loss: Loss | None = None

    @classmethod
    def over(cls, base: Base, down: Matrix | None = None, up: Matrix | None = None, **parts: Any) -> Start:
        """A start that keeps a base."""
        return cls(base.weight, down, up, **parts, branch=base.branch, loss=base.loss)


def changes_base(adapter: Adapter | None) -> bool:
    """Tell whether the kind keeps another base than W."""
    return isinstance(adapter, LoRA) and adapter.init in BASE_CHANGING


def reads_moment(adapter: Adapter | None) -> bool:
    """Tell whether the first state of the kind depends on the inputs of the layer."""
    return isinstance(adapter, LoRA) and adapter.init in CALIBRATED


def reads_weight(adapter: Adapter | None) -> bool:
    """Tell whether the first state of the kind depends on the numbers in W."""
    if isinstance(adapter, LoRA):
        return adapter.dora or adapter.init in ("nystrom", "eora", *BASE_CHANGING)
    return adapter is not None


def start(
    adapter: Adapter | None,
    weight: Matrix,
    quantize: str | RoundingPlan | None,
    store: FactorStore | _Decomposed | None = None,
    key: str | None = None,
    *,
    moment: Moment | None = None,
    branch: LowRankUpdate | None = None,
) -> Start:
    """Make the first state of a kind over W.

    Args:
        adapter: the kind, or None for W alone.
        weight: W [N, K], dense, or already quantised to 4 bits.
        quantize: the base's format or how it is rounded, or None.
        store: precomputed factors, tried first.
        key: :meth:`Base.key` of the weight and the branch if known already.
        moment: of the layer's inputs, for starts that look at data.
        branch: what a quantised W has beside it; kinds that read W read W + U_b D_b.

    W may be a stack [E, N, K]; then every part is that of each matrix alone, joined.

    Raises:
        ValueError: the kind changes the base, or needs minor singular vectors, and W is already quantised; a rank or a
            pattern does not fit; W is not finite.
    """
    if adapter is None:
        return Start.over(keep_base(weight, quantize, branch))
    check_start(adapter, weight, quantize, moment)
    if len(weight.shape) == 3:
        rounding = rounding_of(quantize)
        roundings = [None] * int(weight.shape[0]) if rounding is None else rounding.of_experts(int(weight.shape[0]))
        moments = None if moment is None else moment.shrunk()
        branches = split_branch(branch, int(weight.shape[0]))
        matrices = [weight[e] for e in range(weight.shape[0])]
        reads = [m if b is None else Base(m, b).dense() for m, b in zip(matrices, branches, strict=True)]
        stores = _decompose(adapter, reads) if store is None else [store] * len(matrices)
        made = [
            start(adapter, w, roundings[e], stores[e], moment=moments and moments[e], branch=branches[e])
            for e, w in enumerate(matrices)
        ]
        return _join(made, weight, branch)
    if isinstance(adapter, LoRA):
        return _with_rows(adapter, _start_lora(adapter, weight, quantize, store, moment, branch))
    return _spectral(adapter, weight, quantize, store, key, branch)


def _start_lora(
    adapter: LoRA,
    weight: Matrix,
    quantize: str | RoundingPlan | None,
    store: FactorStore | _Decomposed | None,
    moment: Moment | None,
    branch: LowRankUpdate | None,
) -> Start:
    if adapter.init in BASE_CHANGING:
        return _start_changing_base(adapter, weight, quantize, store, moment)
    N, K = weight.shape
    base = keep_base(weight, quantize, branch)
    if adapter.init == "eora":
        assert isinstance(weight, Tensor) and moment is not None
        down, up = weighted_low_rank(weight.float() - base.dense(), moment.second.to(weight.device), adapter.rank)
        root = math.sqrt(adapter.scale)
        down, up = down / root, up / root
    elif adapter.init == "eva":
        assert moment is not None
        down = principal_inputs(moment, adapter.rank)[0].to(weight.device)
        up = down.new_zeros(N, adapter.rank)
    elif adapter.init == "nystrom":
        down = _nystrom(weight if branch is None else base.dense(), adapter.rank)
        up = down.new_zeros(N, adapter.rank)
    else:
        down, up = adapter.factors(N, K, weight.device)
    return Start.over(base, down, up)


def _with_rows(adapter: LoRA, made: Start) -> Start:
    """Add what a LoRA trains for each row of W."""
    if adapter.dora:
        assert made.weight is not None and made.down is not None and made.up is not None
        update = LowRankUpdate(made.down, made.up, None, adapter.scale)
        made.magnitude = row_norms(made.weight, update, branch=made.branch)
    if adapter.lora_bias:
        assert isinstance(made.up, Tensor)
        made.up_bias = made.up.new_zeros(made.up.shape[:-1])
    return made


def check_start(
    adapter: Adapter, weight: Matrix, quantize: str | RoundingPlan | None, moment: Moment | None = None
) -> None:
    """Raise what :func:`start` raises for a W of finite numbers."""
    adapter.check(weight.shape[-2], weight.shape[-1])
    if not isinstance(adapter, LoRA):
        return
    if reads_moment(adapter) and moment is None:
        raise ValueError(
            f"init={adapter.init!r} needs the moments of the layer's inputs: lowrank_ops.adapt(model, kind, "
            f"calibration=lowrank_ops.calibrate(model, batches{', gradients=True' * (adapter.init == 'loraga')}))"
        )
    if adapter.init == "loraga" and moment is not None:
        check_gradient(moment.gradient, weight.shape)
    if adapter.init == "eora" and (isinstance(weight, QuantizedWeight) or quantize is None):
        got = f"an {weight.name()} weight" if isinstance(weight, QuantizedWeight) else "quantize=None"
        raise ValueError(
            "init='eora' starts as what rounding W to 4 bits loses, so it needs the dense W and quantize='nf4' or its "
            f"like, got {got}"
        )
    if adapter.init not in BASE_CHANGING:
        return
    if isinstance(weight, QuantizedWeight):
        raise ValueError(
            f"init={adapter.init!r} changes the base and needs W before it was quantised, got an {weight.name()} weight; "
            "adapt the dense model, or take an init that keeps the base"
        )
    if adapter.init == "loftq" and quantize is None:
        raise ValueError(
            "init='loftq' compensates the quantisation error, so it needs quantize='nf4' or its like, got None"
        )
    if adapter.iterations > 1 and quantize is None:
        raise ValueError(
            f"iterations={adapter.iterations} alternate with quantising, so they need quantize='nf4' or its like, got None"
        )


@dataclass(frozen=True)
class _Decomposed:
    """The largest singular triples of one matrix, which was decomposed with others; found as in a store."""

    svd: SVD

    def find(self, weight: Matrix, rank: int, key: str | None = None) -> SVD:
        return self.svd


def _decompose(adapter: Adapter, matrices: Sequence[Matrix]) -> Sequence[_Decomposed | None]:
    """The singular triples that the kind starts from, of several matrices at a time: a GPU solves their small problems in
    parallel. None where it needs none, or all of them."""
    rank = 0
    if isinstance(adapter, Spectral):
        rank = adapter.size(*matrices[0].shape)
    elif adapter.init == "pissa":
        rank = adapter.rank
    if not rank or is_exact(rank, matrices[0]):
        return [None] * len(matrices)
    groups = (truncated_svd(list(matrices[at : at + _TOGETHER]), rank) for at in range(0, len(matrices), _TOGETHER))
    return [_Decomposed(svd) for group in groups for svd in zip(*group, strict=True)]


def _join(starts: Sequence[Start], weight: Matrix, branch: LowRankUpdate | None) -> Start:
    """The start over a stack from those over its matrices."""

    def joined(name: str) -> Any:
        parts = [getattr(made, name) for made in starts]
        if parts[0] is None:
            return None
        return type(parts[0]).stack(parts) if isinstance(parts[0], QuantizedWeight) else torch.stack(parts)

    first = starts[0]
    if first.weight is None:
        base = Base(weight)
    elif isinstance(weight, QuantizedWeight):
        base = Base(weight, branch)
    else:
        base = join_bases([Base(made.weight, made.branch, made.loss) for made in starts if made.weight is not None])
    core = None if first.core is None else torch.stack([made.core.values for made in starts if made.core is not None])
    shifts = [made.shift for made in starts if made.shift is not None]
    return Start(
        None if first.weight is None else base.weight,
        joined("down"),
        joined("up"),
        None if first.core is None or core is None else cores.with_values(first.core, core),
        joined("offset"),
        (torch.stack([down for down, _ in shifts]), torch.stack([up for _, up in shifts])) if shifts else None,
        _join_sources([made.source for made in starts if made.source is not None]),
        None if first.error is None else _join_errors([made.error or 0.0 for made in starts], weight),
        branch=base.branch,
        loss=base.loss,
    )


def _join_sources(sources: Sequence[Source]) -> Source | None:
    """The source of a stack; no two experts count alike in its fingerprint, so that their order shows."""
    if not sources:
        return None
    weights = torch.arange(len(sources), dtype=torch.float64, device="cpu").cos()
    numbers = weights @ torch.tensor([source.fingerprint for source in sources], dtype=torch.float64, device="cpu")
    return Source(stack_key([source.weight for source in sources]), tuple(numbers.tolist()))


def _join_errors(errors: Sequence[float], weight: Matrix) -> float:
    norms = [float(_dense(weight[e]).norm()) for e in range(len(errors))]
    return math.hypot(*(error * norm for error, norm in zip(errors, norms, strict=True))) / (math.hypot(*norms) or 1.0)


def _spectral(
    adapter: Spectral,
    weight: Matrix,
    quantize: str | RoundingPlan | None,
    store: FactorStore | _Decomposed | None,
    key: str | None,
    branch: LowRankUpdate | None,
) -> Start:
    """Make the first state of a kind with frozen factors from the SVD of W."""
    read = weight if branch is None else Base(weight, branch).dense()
    key = Base(weight, branch).key() if key is None else key
    U, S, Vt = _largest(read, adapter.size(*weight.shape), store, key)
    up = U * S if isinstance(adapter, LoRAXS) else U
    base = keep_base(weight, quantize, branch)
    core = empty_core(adapter, len(S), S.device)
    down, left = (keep_factor(factor, adapter.factors, base.weight) for factor in (Vt, up))
    made = Start.over(
        base,
        down,
        left,
        core=core,
        source=Source(key, fingerprint(Vt, up)),
    )
    if adapter.form == "replace":
        made.weight, made.branch, made.offset = None, None, diagonal_values(core, S)
        update = LowRankUpdate(down, left, cores.with_values(core, made.offset))
        made.error = _error(update.delta(), read)
    return made


def empty_core(adapter: Spectral, R: int, device: torch.device | str = "cpu", *stack: int) -> Core:
    """C = 0 on the pattern of the kind, float32; ``stack``: E of a stack of experts, whose pattern is the same."""

    def zeros(*shape: int) -> Tensor:
        return torch.zeros((*stack, *shape), device=device, dtype=torch.float32)

    if isinstance(adapter, LoRAXS):
        return cores.Dense(zeros(R, R))
    if isinstance(adapter, SVF):
        return cores.Diagonal(zeros(R))
    if adapter.pattern == "banded":
        d = adapter.bandwidth or 0
        return cores.Banded(zeros(R * (2 * d + 1) - d * (d + 1)), R)
    rows, cols = adapter.pairs(R)
    return cores.Sparse(rows.to(device), cols.to(device), zeros(len(rows)), R)


def diagonal_values(core: Core, diagonal: Tensor) -> Tensor:
    """Values on the pattern of ``core``: ``diagonal`` on the diagonal, 0 elsewhere."""
    if isinstance(core, cores.Dense):
        return torch.diag(diagonal)
    rows, cols = cores.pattern(core)
    return torch.where(rows == cols, diagonal[rows], 0.0)


def keep_factor(factor: Tensor, format: str | None, weight: Matrix | None = None) -> Matrix:
    """Convert a frozen factor to a format; None means the dtype of W, or NF4 if W has 4 bits."""
    if format is None:
        format = str(weight.dtype).removeprefix("torch.") if isinstance(weight, Tensor) else "nf4"
    factor = factor.contiguous()
    return NF4Weight.quantize(factor) if format == "nf4" else factor.to(getattr(torch, format))


def fingerprint(down: Tensor, up: Tensor) -> tuple[float, ...]:
    """U[:4] p and pᵀ D[:, :4] with p_i = cos(i) in float64: eight numbers that change with the sign or the order."""
    p = torch.arange(down.shape[0], dtype=torch.float64, device="cpu").cos()
    numbers = torch.cat([up[:4].double().cpu() @ p, p @ down[:, :4].double().cpu()])
    return tuple(numbers.tolist() + [0.0] * (8 - len(numbers)))


def base_of(weight: Tensor, scale: float, shift: tuple[Tensor, Tensor], quantize: str | RoundingPlan | None) -> Base:
    """W − s · U₀ D₀, subtracted in float32, then quantised to a format."""
    down, up = shift
    add = torch.addmm if weight.dim() == 2 else torch.baddbmm
    rest = add(weight.float(), up.float(), down.float(), alpha=-scale)
    rounding = rounding_of(quantize)
    if rounding is None:
        return Base(rest.to(weight.dtype))
    base = rounding.keep(rest)
    assert isinstance(base.weight, QuantizedWeight)
    base.weight.dtype = weight.dtype
    return base


def _largest(weight: Matrix, rank: int, store: FactorStore | _Decomposed | None, key: str | None = None) -> SVD:
    found = None if store is None else store.find(weight, rank, key)
    return largest(weight, rank) if found is None else found


def _balance(svd: SVD, scale: float) -> tuple[Tensor, Tensor]:
    """D and U with s · U D = U* S V*ᵀ; each takes √(S/s)."""
    U, S, Vt = svd
    root = (S / scale).sqrt()
    return (root.unsqueeze(1) * Vt).contiguous(), (U * root).contiguous()


def shift_of(adapter: LoRA, weight: Tensor) -> tuple[Tensor, Tensor]:
    """D₀ and U₀ that PiSSA or OLoRA takes out of W, by a whole decomposition in float32."""
    w, R = weight.float(), adapter.rank
    if adapter.init == "olora":
        Q, triangle = torch.linalg.qr(w)
        return triangle[:R].contiguous(), Q[:, :R].contiguous()
    U, S, Vt = torch.linalg.svd(w, full_matrices=False)
    return _balance((U[:, :R], S[:R], Vt[:R]), adapter.scale)


def _start_changing_base(
    adapter: LoRA,
    weight: Matrix,
    quantize: str | RoundingPlan | None,
    store: FactorStore | _Decomposed | None,
    moment: Moment | None,
) -> Start:
    assert isinstance(weight, Tensor)
    rank, scale, w = adapter.rank, adapter.scale, weight.float()
    if not torch.isfinite(w).all():
        raise ValueError("weight must be finite, got NaN or infinity in it")

    def lost(base: Base) -> Tensor:
        return w - base.dense()

    shift = (w.new_zeros(rank, weight.shape[1]), w.new_zeros(weight.shape[0], rank))
    if adapter.init == "loftq":
        base = base_of(weight, scale, shift, quantize)
        for step in range(adapter.iterations):
            factors = _balance(truncated_svd(lost(base), rank), scale)
            if step + 1 < adapter.iterations:
                shift, base = factors, base_of(weight, scale, factors, quantize)
    else:
        if adapter.init == "olora":
            factors = shift_of(adapter, weight)
        elif adapter.init == "corda" and moment is not None:
            factors = corda_factors(adapter, w, moment)
        elif adapter.init == "loraga" and moment is not None:
            factors = loraga_factors(adapter, moment, w.device)
        elif adapter.init == "milora":
            U, S, Vt = _largest(weight, min(weight.shape), store)
            factors = _balance((U[:, -rank:], S[-rank:], Vt[-rank:]), scale)
        else:
            factors = _balance(_largest(weight, rank, store), scale)
        base = base_of(weight, scale, factors, quantize)
        for _ in range(adapter.iterations - 1):
            factors = _balance(truncated_svd(lost(base), rank), scale)
            base = base_of(weight, scale, factors, quantize)
        shift = factors
    down, up = (factor.clone() for factor in factors)  # the shift stays unchanged while these are trained
    source = Source(weight_key(weight), fingerprint(*shift))
    started = base.dense() + scale * (up @ down)
    return Start.over(base, down, up, shift=shift, source=source, error=_error(started, weight))


def _nystrom(weight: Matrix, rank: int) -> Tensor:
    """D = σ Ω W, with kaiming's root mean square 1/√(3K)."""
    sketch = transposed_times(weight, torch.randn(rank, weight.shape[0], device=weight.device, dtype=torch.float32))
    rms = sketch.square().mean().sqrt().clamp(min=torch.finfo(torch.float32).tiny)
    return sketch * (1 / math.sqrt(3 * weight.shape[1]) / rms)


def _error(started: Tensor, weight: Matrix) -> float:
    w = _dense(weight)
    return float((started - w).norm() / w.norm().clamp(min=torch.finfo(torch.float32).tiny))


def _dense(weight: Matrix) -> Tensor:
    return weight.dequantize(torch.float32) if isinstance(weight, QuantizedWeight) else weight.float()
