"""Plot time over the limit against tokens, one line for each system: a run's first shape, forward and training step."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lowrank_ops.files import replacing

from .goals import BARE, DECODED, IN_FLOAT32, OURS, WORK
from .report import Report, Row

COLOURS = ("tab:blue", "tab:orange", "tab:green", "tab:red", "tab:purple", "tab:brown", "tab:pink", "tab:gray",
           "tab:olive", "tab:cyan", "black")  # fmt: skip
MARKERS = "osD^vPX<>*h"
LEFT_OUT = (
    BARE,
    DECODED,
    IN_FLOAT32[DECODED],
    "plain torch",
)  # the first two show what an adapter costs; the last is for tests


def panels(report: Report) -> list[list[Row]]:
    """Rows of forward and of the training step: first shape, bfloat16, all threads."""
    threads = max((row.threads for row in report.rows), default=0)
    found = []
    for op in WORK:
        rows = [row for row in report.rows if (row.op, row.threads, row.dtype) == (op, threads, "bfloat16")]
        found.append([row for row in rows if row.case == rows[0].case and row.provider not in LEFT_OUT])
    return [panel for panel in found if panel]


def save(report: Report, path: Path) -> Path | None:
    """Draw and save the plot; None if there are no such rows, or no matplotlib (which is then listed as absent)."""
    found = panels(report)
    drawn = report.build("plot", lambda: figure(found, report)) if found else None
    if drawn is None:
        return None
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as scratch:
        drawn.savefig(scratch)
    return path


def figure(found: Sequence[Sequence[Row]], report: Report) -> Any:
    """Draw a matplotlib Figure without a display.

    All lines use our limit, adapter included, so that distances between lines compare times.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import FormatStrFormatter, LogLocator, NullFormatter

    drawn = Figure(figsize=(1 + 4.6 * len(found), 4.4), dpi=110, layout="constrained")
    FigureCanvasAgg(drawn)
    names = list(dict.fromkeys(row.provider for panel in found for row in panel))
    style = {name: (COLOURS[i % len(COLOURS)], MARKERS[i % len(MARKERS)]) for i, name in enumerate(names)}
    lines = {}
    for axes, panel in zip(drawn.subplots(1, len(found), squeeze=False)[0], found, strict=True):
        limits = {row.M: report.limit(row) for row in panel if row.provider == OURS}
        for name in names:
            points = sorted((r.M, r.seconds / limits[r.M]) for r in panel if r.provider == name and r.M in limits)
            if points:
                colour, marker = style[name]
                ours = name == OURS
                (lines[name],) = axes.plot(
                    *zip(*points, strict=True), color=colour, marker=marker, markersize=6 if ours else 4,
                    linewidth=3 if ours else 1.3, zorder=4 if ours else 3,
                )  # fmt: skip
        axes.axhline(1, color="gray", linestyle=":", linewidth=1)
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter(FormatStrFormatter("%g"))
        axes.yaxis.set_minor_formatter(NullFormatter())
        axes.set_xticks(sorted(limits), [str(M) for M in sorted(limits)])
        axes.set_xlabel("tokens")
        axes.grid(alpha=0.3, linewidth=0.5)
        axes.set_title(f"{WORK[panel[0].op]}, {panel[0].N} x {panel[0].K}", fontsize=10)
        axes.set_ylabel("time / limit of a 4-bit W with its adapter", fontsize=9)
    drawn.legend(lines.values(), lines.keys(), loc="outside lower center", ncols=2 * len(found), fontsize=8)
    return drawn
