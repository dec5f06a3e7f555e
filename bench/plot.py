"""Time over the limit against M: one line for each system, one panel for each shape."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .goals import BARE, DECODED, OURS, WORK
from .report import Report, Row

COLOURS = ("tab:blue", "tab:orange", "tab:green", "tab:red", "tab:purple", "tab:brown", "tab:pink", "tab:gray",
           "tab:olive", "tab:cyan", "black")  # fmt: skip
MARKERS = "osD^vPX<>*h"
LEFT_OUT = (BARE, DECODED)  # they serve the table of the overhead


def panels(report: Report) -> list[list[list[Row]]]:
    """For each of forward and training step the rows of each shape, in bfloat16 on all threads."""
    threads = max((row.threads for row in report.rows), default=0)
    chosen = [
        row
        for row in report.rows
        if row.op in WORK and row.threads == threads and row.dtype == "bfloat16" and row.provider not in LEFT_OUT
    ]
    cases = {op: list(dict.fromkeys(row.case for row in chosen if row.op == op)) for op in WORK}
    return [[[row for row in chosen if row.case == case] for case in found] for found in cases.values() if found]


def save(report: Report, path: Path) -> Path | None:
    """Draw it; None where there are no rows of the kind, or no matplotlib (which is then listed as absent)."""
    found = panels(report)
    drawn = report.build("plot", lambda: figure(found, report)) if found else None
    if drawn is None:
        return None
    path.parent.mkdir(parents=True, exist_ok=True)
    drawn.savefig(path)
    return path


def figure(found: Sequence[Sequence[Sequence[Row]]], report: Report) -> Any:
    """A matplotlib Figure, drawn without a display.

    The limit is that of ours, adapter included: a common one, so that a distance between lines is one of times.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    columns = max(map(len, found))
    drawn = Figure(figsize=(1 + 3.6 * max(columns, 2), 1.2 + 3.4 * len(found)), dpi=110, layout="constrained")
    FigureCanvasAgg(drawn)
    grid = drawn.subplots(len(found), columns, squeeze=False, sharey="row")
    names = list(dict.fromkeys(row.provider for line in found for panel in line for row in panel))
    style = {name: (COLOURS[i % len(COLOURS)], MARKERS[i % len(MARKERS)]) for i, name in enumerate(names)}
    lines = {}
    for axes_row, line in zip(grid, found, strict=True):
        for axes in axes_row[len(line) :]:
            axes.axis("off")
        for axes, panel in zip(axes_row, line, strict=False):
            limits = {row.M: report.limit(row) for row in panel if row.provider == OURS}
            for name in names:
                points = sorted((r.M, r.seconds / limits[r.M]) for r in panel if r.provider == name and r.M in limits)
                if points:
                    colour, marker = style[name]
                    ours = name == OURS
                    (lines[name],) = axes.plot(
                        *zip(*points, strict=True), color=colour, marker=marker, markersize=5 if ours else 4,
                        linewidth=2.6 if ours else 1.3, zorder=4 if ours else 3,
                    )  # fmt: skip
            axes.axhline(1, color="gray", linestyle=":", linewidth=1)
            axes.set_xscale("log", base=2)
            axes.set_yscale("log")
            ticks = sorted(limits)
            while len(ticks) > 8:
                ticks = ticks[::2]
            axes.set_xticks(ticks, [str(M) for M in ticks])
            axes.set_xlabel("tokens M")
            axes.grid(alpha=0.3, which="both", linewidth=0.5)
            axes.set_title(f"{WORK[panel[0].op]}, {panel[0].N} x {panel[0].K}", fontsize=10)
        axes_row[0].set_ylabel("time / limit of 4-bit W and adapter")
    drawn.legend(lines.values(), lines.keys(), loc="outside upper center", ncols=min(columns + 1, 4), fontsize=9)
    return drawn
