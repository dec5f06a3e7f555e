"""What is worked towards, against what a run has measured, and the price of the adapter: tables made from the rows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from .report import Report, Row, Table

WORK = {"adapted_linear": "forward", "adapted_linear_backward": "training step"}
OURS, BARE, DECODED = "ours", "ours, no adapter", "dequantise + dense, no adapter"
DENSE, DENSE_LORA = "dense, no adapter", "dense + LoRA"
INT4, PEFT, LIMIT = "ATen int4, no adapter", "bitsandbytes + PEFT", "the limit"


@dataclass(frozen=True)
class Goal:
    """The time of ours over that of ``against`` is to be ``at_most`` that, at every M of ``tokens`` that was measured."""

    text: str
    op: str
    against: str
    at_most: float
    tokens: tuple[int, int]


GOALS = {
    "cpu": (
        Goal("M = 1, 4: at most 1.15 x ATen int4", "adapted_linear", INT4, 1.15, (1, 4)),
        Goal("M = 1: at least 80 % of the bandwidth", "adapted_linear", LIMIT, 1 / 0.8, (1, 1)),
        Goal("M = 16 ... 512: at most 1.0 x dense", "adapted_linear", DENSE, 1.0, (16, 512)),
        Goal(
            "training, M = 128 ... 2048: at most 1.1 x dense + LoRA",
            "adapted_linear_backward",
            DENSE_LORA,
            1.1,
            (128, 2048),
        ),  # fmt: skip
        Goal("training, M = 128: 3 x faster than " + PEFT, "adapted_linear_backward", PEFT, 1 / 3, (128, 128)),
        Goal("training: faster than " + PEFT, "adapted_linear_backward", PEFT, 1.0, (1, 1 << 20)),
        Goal("quantise: 50 x faster than bitsandbytes", "nf4_quantize", "bitsandbytes", 1 / 50, (0, 0)),
    ),
    "cuda": (
        Goal("M = 1: at least 80 % of the copy bandwidth", "adapted_linear", LIMIT, 1 / 0.8, (1, 1)),
        Goal("M = 8 ... 64: 3 x faster than " + PEFT, "adapted_linear", PEFT, 1 / 3, (8, 64)),
        Goal(
            "training, M = 2048 ... 8192: 1.3 x faster than " + PEFT,
            "adapted_linear_backward",
            PEFT,
            1 / 1.3,
            (2048, 8192),
        ),  # fmt: skip
        Goal(
            "training, M = 2048 ... 8192: the adapter costs at most 8 %",
            "adapted_linear_backward",
            BARE,
            1.08,
            (2048, 8192),
        ),  # fmt: skip
    ),
}


def over(row: Row, against: str, report: Report) -> float | None:
    """The time of this row over that of another provider in its case, or over the limit."""
    if against == LIMIT:
        return 1 / report.share(row)
    found = [other for other in report.rows if other.case == row.case and other.M == row.M]
    return next((row.seconds / other.seconds for other in found if other.provider == against), None)


def goals(report: Report) -> Table:
    """One line for each goal, dtype and number of threads; a cell is the worst M of that shape.

    "At the limit" is what those ratios would be if ours took no longer than moving its bytes or doing its operations takes
    at the limits of this run: where that is above the goal, no kernel of this format could meet it there.
    """
    shapes = list(dict.fromkeys((row.N, row.K) for row in report.rows if row.op == "adapted_linear"))
    lines = []
    for goal in GOALS[report.settings.kind]:
        low, high = goal.tokens
        ours = [r for r in report.rows if r.op == goal.op and r.provider == OURS and low <= r.M <= high]
        ratios = {(r.dtype, r.threads, r.N, r.K, r.M): (over(r, goal.against, report), report.share(r)) for r in ours}
        for dtype, threads in dict.fromkeys((row.dtype, row.threads) for row in ours):
            cells, best, met = [], [], []
            for shape in shapes:
                case = (dtype, threads, *shape)
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
                lines.append(
                    [goal.text, f"{goal.at_most:.3g}", dtype, str(threads or "-"), *cells, verdict, ", ".join(best)]
                )
    columns = ["goal", "at most", "dtype", "threads", *(f"{N} x {K}" for N, K in shapes), "met", "at the limit"]
    text = (
        "The time of ours, adapter included, over the other's; of several M the worst. At the limit: the same ratios if "
        "ours took as long as its bytes or operations need at the limits above."
    )
    return Table("Goals", columns, lines, text)


def overhead(report: Report) -> Table:
    """What the adapter adds: over ours without it, and over decoding W and the dense product alone."""

    def cell(row: Row, against: str, seconds: Callable[[Row], float | None]) -> str:
        others = (o for o in report.rows if (o.case, o.M, o.provider) == (row.case, row.M, against))
        mine, theirs = seconds(row), next((seconds(other) for other in others), None)
        return f"{mine / theirs - 1:+.1%}" if mine and theirs else "-"

    views: Sequence[tuple[str, Callable[[Row], float | None]]] = [("", lambda row: row.seconds)]
    if report.settings.kind == "cuda":
        views = [(", in a CUDA graph", lambda row: row.seconds), (", outside", lambda row: row.timing.outside)]
    measured = {(row.case, row.M) for row in report.rows if row.provider == BARE}
    lines = []
    for row in report.rows:
        if row.provider == OURS and (row.case, row.M) in measured:
            what = [WORK[row.op], f"{row.N} x {row.K}, {row.dtype}", str(row.threads or "-"), str(row.M)]
            lines.append(what + [cell(row, other, view) for other in (BARE, DECODED) for _, view in views])
    over = [f"over {other}{view}" for other in ("ours without", "decoding + dense without") for view, _ in views]
    return Table("Overhead of the adapter", ["work", "layer", "threads", "M", *over], lines)
