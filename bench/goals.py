"""Make tables from the rows of a run: goals against measurements, and the headlines of each op."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from lowrank_ops.ops import _cpu

from .report import Report, Row, Table

WORK = {
    "adapted_linear": "forward",
    "adapted_linear_backward": "training step",
    "experts_linear": "experts, forward",
    "experts_linear_backward": "experts, training step",
}
OURS, BARE, DECODED = "ours", "ours, no adapter", "dequantise + dense, no adapter"
DOUBLE, BRANCH = "ours, rank 32", "ours, with a branch of rank 16"
DENSE, DENSE_LORA = "dense, no adapter", "dense + LoRA"
GROUPED, EAGER = "transformers grouped_mm, dense, no adapter", "transformers eager, dense, no adapter"
LOOP = "loop over adapted_linear"
INT4, PEFT, LIMIT = "ATen int4, no adapter", "bitsandbytes + PEFT", "the limit"
ASIDE = ("crossover", "truncated_svd r=64, flat", "bradley_terry")  # ops that appear only in the table of all rows


# Names of the dense peers where the processor has no products of bfloat16.
IN_FLOAT32 = {
    DENSE: "dense float32, no adapter",
    DENSE_LORA: "dense float32 + LoRA",
    DECODED: "dequantise + dense float32, no adapter",
    "dequantise + dense + LoRA": "dequantise + dense float32 + LoRA",
}


@dataclass(frozen=True)
class Goal:
    """time(``provider``) / time(``against``) ≤ ``at_most``, at every measured M within ``tokens``."""

    text: str
    op: str
    against: str
    at_most: float
    tokens: tuple[int, int]
    provider: str = OURS


def _memory(share: float) -> Goal:
    return Goal(f"M = 1: at least {share:.0%} of the bandwidth", "adapted_linear", LIMIT, 1 / share, (1, 1))


def _int4(at_most: float, low: int, high: int) -> Goal:
    text = f"M = {low}{f' ... {high}' if high > low else ''}: at most {at_most} x ATen int4"
    return Goal(text, "adapted_linear", INT4, at_most, (low, high))


def _dense(at_most: float, low: int, high: int, peer: str = DENSE) -> Goal:
    return Goal(
        f"M = {low} ... {high}: at most {at_most} x {peer.split(',')[0]}", "adapted_linear", peer, at_most, (low, high)
    )  # fmt: skip


def _experts(M: int, at_most: float, against: str = GROUPED, training: bool = False) -> Goal:
    text = f"experts,{' training,' if training else ''} M = {M}: at most {at_most} x {against}"
    return Goal(text, "experts_linear_backward" if training else "experts_linear", against, at_most, (M, M))


def _lora(peer: str) -> Goal:
    text = f"training, M = 128 ... 2048: at most 1.1 x {peer}"
    return Goal(text, "adapted_linear_backward", peer, 1.1, (128, 2048))


_EVERY_CPU = (
    _lora(DENSE_LORA),
    Goal("training, M = 128: 3 x faster than " + PEFT, "adapted_linear_backward", PEFT, 1 / 3, (128, 128)),
    Goal("training: faster than " + PEFT, "adapted_linear_backward", PEFT, 1.0, (1, 1 << 20)),
    _experts(1, 0.67, LOOP),
    _experts(64, 0.83, LOOP),
    Goal("quantise: 60 x faster than bitsandbytes", "nf4_quantize", "bitsandbytes", 1 / 60, (0, 0)),
    *(
        Goal(f"32 rows, {mix}: at most 1.15 x the base", "routed_linear", BARE, 1.15, (32, 32), f"ours, {mix}")
        for mix in ("8 x LoRA 16", "32 x LoRA-XS 64")
    ),
)  # fmt: skip
# By whether the processor has products of bfloat16.
CPU_GOALS = {
    True: (
        _memory(0.85),
        _int4(0.9, 1, 4),
        _dense(1.0, 16, 512),
        *(_experts(M, at_most) for M, at_most in ((1, 0.6), (64, 0.8))),
        _experts(64, 1.0, training=True),
        *_EVERY_CPU,
    ),
    False: (
        _memory(0.7),
        _int4(0.75, 1, 1),
        _int4(0.6, 4, 16),
        _dense(0.3, 4, 16, IN_FLOAT32[DENSE]),
        _dense(0.35, 64, 512, IN_FLOAT32[DENSE]),
        _dense(1.0, 16, 512),  # of float32 x
        *(_experts(M, at_most) for M, at_most in ((1, 0.6), (64, 0.3))),
        _experts(64, 0.12, training=True),
        _lora(IN_FLOAT32[DENSE_LORA]),
        *_EVERY_CPU,
    ),
}
GPU_GOALS = (
    Goal("M = 1: at least 80 % of the copy bandwidth", "adapted_linear", LIMIT, 1 / 0.8, (1, 1)),
    Goal("M = 8 ... 64: 3 x faster than " + PEFT, "adapted_linear", PEFT, 1 / 3, (8, 64)),
    Goal("training, M = 2048 ... 8192: 1.3 x faster than " + PEFT, "adapted_linear_backward", PEFT, 1 / 1.3, (2048, 8192)),
    Goal("training, M = 2048 ... 8192: the adapter costs at most 8 %", "adapted_linear_backward", BARE, 1.08, (2048, 8192)),
)  # fmt: skip


def goals_of(kind: str) -> tuple[Goal, ...]:
    return GPU_GOALS if kind == "cuda" else CPU_GOALS[_cpu.has_bfloat16()]


def over(row: Row, against: str, report: Report) -> float | None:
    """The time of a row over the time of another provider in its case, or over the limit."""
    if against == LIMIT:
        return 1 / report.share(row)
    found = [other for other in report.rows if other.case == row.case and other.M == row.M]
    return next((row.seconds / other.seconds for other in found if other.provider == against), None)


def goals(report: Report) -> Table:
    """Make a line for each goal and dtype, on all threads; a cell shows the worst M of its shape.

    "At the limit" shows the ratios if ours took only the time that moving its bytes or doing its operations needs at
    the limits of this run. If it exceeds the goal, no kernel of this format could meet the goal there.
    """
    shapes = list(
        dict.fromkeys((row.N, row.K) for row in report.rows if row.op in {g.op for g in goals_of(report.settings.kind)})
    )
    lines = []
    for goal in goals_of(report.settings.kind):
        low, high = goal.tokens
        ours = [r for r in report.rows if r.op == goal.op and r.provider == goal.provider and low <= r.M <= high]
        ratios = {(r.dtype, r.threads, r.N, r.K, r.M): (over(r, goal.against, report), report.share(r)) for r in ours}
        most = max((row.threads for row in ours), default=0)
        for dtype in dict.fromkeys(row.dtype for row in ours):
            cells, best, met = [], [], []
            for shape in shapes:
                case = (dtype, most, *shape)
                found = [(ratio, key[-1], share) for key, (ratio, share) in ratios.items() if key[:4] == case and ratio]
                if found:
                    ratio, M, share = max(found)
                    met.append(ratio <= goal.at_most)
                    cells.append(f"{ratio:.3g}{f' (M = {M})' if M else ''}")
                    best.append(f"{ratio * share:.2g}")
                else:
                    cells.append("-")
                    best.append("-")
            if met:
                verdict = "yes" if all(met) else "no" if not any(met) else f"{sum(met)} of {len(met)}"
                lines.append([goal.text, f"{goal.at_most:.3g}", dtype, *cells, verdict, ", ".join(best)])
    columns = ["goal", "at most", "dtype", *(f"{N} x {K}" for N, K in shapes), "met", "at the limit"]
    text = (
        "Our time, adapter included, over the other's; the worst of several M. At the limit: the same ratios if "
        "ours took as long as its bytes or operations need at the limits above."
    )
    return Table("Goals", columns, lines, text)


def headlines(report: Report) -> list[Table]:
    """The time of the first provider of each case, its share of the limit, and the others' times relative to it.

    Uses rows on the most threads in bfloat16 (or the op's first dtype), and for each layer after an op's first the fewest
    and the most tokens. Ops with the same providers share a table.
    """
    tables: dict[tuple[str, ...], list[list[str]]] = {}
    for op in dict.fromkeys(row.op for row in report.rows if not row.op.startswith(ASIDE)):
        rows = [row for row in report.rows if row.op == op]
        rows = [row for row in rows if row.threads == max(other.threads for other in rows)]
        dtypes = [row.dtype for row in rows]
        dtype = "bfloat16" if "bfloat16" in dtypes else next(iter(dtypes), "")
        cases: dict[tuple[int, int, int], dict[str, Row]] = {}
        for row in rows:
            if row.dtype == dtype:
                cases.setdefault((row.N, row.K, row.M), {})[row.provider] = row
        first = next((next(iter(found)) for found in cases.values()), "")
        seen = Counter(name for found in cases.values() for name in found if name != first)
        others = [name for name, count in seen.items() if 2 * count >= len(cases)]
        for (N, K, M), found in cases.items():
            tokens = [other for *layer, other in cases if layer == [N, K]]
            if ((N, K) == next(iter(cases))[:2] or M in (tokens[0], tokens[-1])) and (base := found.get(first)):
                line = [WORK.get(op, op), f"{N} x {K}", str(M or "-"), f"{base.seconds * 1e3:.3g} ms"]
                ratios = [f"{found[name].seconds / base.seconds:.3g}" if name in found else "-" for name in others]
                tables.setdefault((first, *others), []).append([*line, f"{report.share(base):.0%}", *ratios])
    text = "The time of the first, its share of the limit, and the others' times relative to it."
    return [
        Table("" if i else "Side by side", ["work", "layer", "M", first, "share", *others], lines, "" if i else text)
        for i, ((first, *others), lines) in enumerate(tables.items())
    ]
