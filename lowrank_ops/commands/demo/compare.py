"""Compare every kind of adapter on the demo's task: ``lowrank-ops demo --compare``.

Each kind gets a fresh model, the same seed, batches and number of steps, and a learning rate that suits it. The result
is a table, also as CSV, and a plot of the gained rank against the trained parameters. ``lowrank-ops scaling fit --law
fine-tuning`` reads the tables of several comparisons.
"""

from __future__ import annotations

import argparse
import csv
import platform
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

import lowrank_ops as lo

from ...adapters.foreign import is_linear, linear_shape
from ...adapters.kinds import Adapter
from ...files import replacing
from .. import _data
from .._cli import EXTRAS, CommandError, check_matplotlib, make_console, megabytes, plot_path
from . import task


class Entry(NamedTuple):
    """A kind in the comparison.

    Args:
        label: its name in the table and the plot.
        kind: makes the adapter for a given rank.
        learning_rate: peak learning rate.
    """

    label: str
    kind: Callable[[int], Adapter]
    learning_rate: float


# Learning rates: tried two to five for each kind, a factor of 3 apart, and took the one with the lowest loss (the lower
# rate if equal) on 48 held-out training pairs after 15 steps of 16 others cut to 32 tokens (rank 16, seed 0). QPiSSA
# uses PiSSA's, SVFT random uses banded's, and SVF replace uses SVF's. The test pairs took no part.
KINDS = {
    "lora": Entry("LoRA", lambda rank: lo.LoRA(rank, alpha=rank), 1e-3),
    "rslora": Entry("rsLoRA", lambda rank: lo.LoRA(rank, alpha=rank, rslora=True), 1e-3),
    "pissa": Entry("PiSSA", lambda rank: lo.LoRA(rank, alpha=rank, init="pissa"), 3e-4),
    "qpissa": Entry("QPiSSA", lambda rank: lo.LoRA(rank, alpha=rank, init="pissa", iterations=5), 3e-4),
    "milora": Entry("MiLoRA", lambda rank: lo.LoRA(rank, alpha=rank, init="milora"), 1e-3),
    "loftq": Entry("LoftQ", lambda rank: lo.LoRA(rank, alpha=rank, init="loftq"), 1e-3),
    "nystrom": Entry("Nyström", lambda rank: lo.LoRA(rank, alpha=rank, init="nystrom"), 1e-3),
    # A core of 4R x 4R has about as many parameters as the sparse cores below, and a quarter of LoRA's.
    "lora-xs": Entry("LoRA-XS", lambda rank: lo.LoRAXS(4 * rank), 1e-3),
    "svf": Entry("SVF", lambda rank: lo.SVF(), 3e-2),
    "svft-banded": Entry("SVFT banded", lambda rank: lo.SVFT("banded", bandwidth=8), 3e-3),
    "svft-random": Entry("SVFT random", lambda rank: lo.SVFT("random", bandwidth=8), 3e-3),
    "svf-replace": Entry("SVF replace", lambda rank: lo.SVF(form="replace"), 3e-2),
}


def selected(names: str | None) -> dict[str, Entry]:
    """Select kinds by a comma-separated list, in the order of KINDS; all without a list.

    Raises:
        CommandError: a name is unknown, or the list is empty.
    """
    if names is None:
        return KINDS
    chosen = [name.strip() for name in names.split(",") if name.strip()]
    unknown = [name for name in chosen if name not in KINDS]
    if unknown or not chosen:
        wrong = f"knows no {', '.join(unknown)}" if unknown else "names no kind"
        raise CommandError(f"--kinds {wrong}; the kinds are {','.join(KINDS)}")
    return {name: entry for name, entry in KINDS.items() if name in chosen}


def frozen_bytes(layer: lo.Linear) -> int:
    """Bytes a layer keeps for its kind besides W, bias and trained parameters: frozen factors, patterns, offsets."""
    kept = [t for t in (layer.weight, layer.bias) if t is not None]
    own = sum(task.weight_bytes(t) if isinstance(t, nn.Module) else t.nbytes for t in kept)
    return task.weight_bytes(layer) - own - sum(p.nbytes for p in layer.trained())


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Run the demo with checked options; return the results."""
    entries = selected(arguments.kinds)
    plot = None if arguments.plot is None else plot_path(arguments.plot)
    check_matplotlib("--compare", EXTRAS)
    console = make_console(arguments)
    began = time.perf_counter()
    model, tokenizer = _data.load_model(arguments.model)
    kinds = {name: _kind(name, entry, arguments.rank, model) for name, entry in entries.items()}
    pairs = _data.load_pairs()
    train_pairs, test_pairs = _data.hold_out(pairs)
    if len(train_pairs) < arguments.batch_size:
        raise CommandError(f"--batch-size must be at most {len(train_pairs)}, the pairs to train on")
    source, parameters = str(model.name_or_path), sum(p.numel() for p in model.parameters())
    console.print(
        f"task    find a function's body by its docstring: {len(train_pairs)} pairs to train on, {len(test_pairs)} from "
        f"other modules to be told apart\n"
        f"kinds   {len(kinds)}, each {arguments.steps} steps of {arguments.batch_size} pairs on a fresh model in NF4"
    )
    with console.status("measuring the model as it came"):
        mrr = {"dense": task.evaluate(model, tokenizer, test_pairs)}
    console.print(f"rank    mean reciprocal rank among {len(test_pairs)}: {mrr['dense']:.3f} float32")

    tokens = task.training_tokens(
        model, tokenizer, train_pairs, steps=arguments.steps, batch_size=arguments.batch_size, seed=arguments.seed
    )
    rows = []
    for name, kind in kinds.items():
        with console.status(f"{entries[name].label}: preparing") as status:
            row = _measure(name, kind, arguments, (train_pairs, test_pairs), mrr, status)
        edge = max(1, min(10, arguments.steps // 2))
        first, last = (sum(part) / edge for part in (row["loss"][:edge], row["loss"][-edge:]))
        rows.append(row | {"tokens": tokens, "final_loss": last})
        console.print(
            f"{row['label']:<12}  loss {first:.3f} -> {last:.3f} (means of {edge} steps)  mean reciprocal rank "
            f"{row['mrr_before']:.3f} -> {row['mrr_after']:.3f}"
        )
    _print_table(console, rows)
    if plot is None:
        plot = Path(arguments.out or tempfile.mkdtemp(prefix="lowrank-ops-compare-")) / "adapters.png"
    with replacing(plot) as scratch:
        figure(rows, mrr).savefig(scratch, format="png")
    table = plot.with_suffix(".csv")
    write_table(rows, table)
    seconds = time.perf_counter() - began
    console.print(f"plot    {plot}\ntable   {table}\ndone    in {seconds:.0f} s")
    return {
        "model": source,
        "parameters": parameters,
        "versions": {"lowrank_ops": lo.__version__, "python": platform.python_version(), "torch": torch.__version__},
        "steps": arguments.steps,
        "rank": arguments.rank,
        "seed": arguments.seed,
        "batch_size": arguments.batch_size,
        "pairs": {"all": len(pairs), "train": len(train_pairs), "test": len(test_pairs)},
        "mrr": mrr,
        "kinds": rows,
        "plot": str(plot),
        "table": str(table),
        "seconds": seconds,
    }


def _measure(
    name: str,
    kind: Adapter,
    arguments: argparse.Namespace,
    pairs: tuple[list[_data.Pair], list[_data.Pair]],
    mrr: dict[str, float],
    status: Any,
) -> dict[str, Any]:
    """Train one kind on a fresh model; return its row of the results.

    Args:
        pairs: the training pairs and the test pairs.
        mrr: gets ``"nf4"`` from the first kind that keeps W: the rank at which all such kinds start.
        status: a line that shows progress.
    """
    entry = KINDS[name]
    model, tokenizer = _data.load_model(arguments.model)
    torch.manual_seed(arguments.seed)
    lo.adapt(model, kind, targets="all-linear", quantize="nf4")
    layers = [module for module in model.modules() if isinstance(module, lo.Linear)]
    status.update(f"{entry.label}: measuring its start")
    keeps = all(layer.start_error is None for layer in layers)
    if keeps and "nf4" in mrr:
        before = mrr["nf4"]
    else:
        before = task.evaluate(model, tokenizer, pairs[1])
        if keeps:
            mrr["nf4"] = before
    started = time.perf_counter()
    try:
        losses = task.train(
            model,
            tokenizer,
            pairs[0],
            steps=arguments.steps,
            batch_size=arguments.batch_size,
            learning_rate=entry.learning_rate,
            seed=arguments.seed,
            on_step=lambda n, loss: status.update(f"{entry.label}: step {n} of {arguments.steps}, loss {loss:.3f}"),
        )
    except CommandError as error:
        raise CommandError(f"{name}: {error}") from error
    seconds = (time.perf_counter() - started) / arguments.steps
    status.update(f"{entry.label}: measuring")
    trained = lo.adapter_parameters(model)
    return {
        "name": name,
        "label": entry.label,
        "kind": str(kind),
        "learning_rate": entry.learning_rate,
        "parameters": sum(p.numel() for p in trained),
        "trained_bytes": sum(p.nbytes for p in trained),
        "frozen_bytes": sum(frozen_bytes(layer) for layer in layers),
        "base_bytes": sum(layer.weight.nbytes for layer in layers if layer.weight is not None),
        "seconds_per_step": seconds,
        "mrr_before": before,
        "mrr_after": task.evaluate(model, tokenizer, pairs[1]),
        "loss": losses,
    }


def _kind(name: str, entry: Entry, rank: int, model: nn.Module) -> Adapter:
    """Make the adapter after checking that every layer can take it."""
    try:
        kind = entry.kind(rank)
        for module in model.modules():
            if is_linear(module):
                kind.check(*linear_shape(module))
    except ValueError as error:
        raise CommandError(f"{name}: {error}; leave it out with --kinds, or choose another --rank") from error
    return kind


def _print_table(console: Any, rows: Sequence[dict[str, Any]]) -> None:
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))  # fits into 80 columns
    table.add_column("kind", no_wrap=True)
    for title in ("peak lr", "parameters", "trained", "frozen", "s/step", "before", "after"):
        table.add_column(title, justify="right", no_wrap=True)
    for row in rows:
        table.add_row(
            row["label"],
            f"{row['learning_rate']:g}",
            f"{row['parameters']:,}",
            megabytes(row["trained_bytes"]),
            megabytes(row["frozen_bytes"]),
            f"{row['seconds_per_step']:.2f}",
            f"{row['mrr_before']:.3f}",
            f"{row['mrr_after']:.3f}",
        )
    console.print(table)
    console.print(
        "trained, frozen: bytes of trained parameters, and of what else the kind keeps; before, after: mean reciprocal rank"
    )
    if any(not row["base_bytes"] for row in rows):
        console.print("the replace form keeps its frozen factors in place of W, the others in addition to W")


def write_table(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Write one line for each kind, for ``scaling fit``: the loss of the last steps, and the final rank as the score."""
    with replacing(path) as scratch, scratch.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(("name", "kind", "parameters", "tokens", "loss", "score"))
        for row in rows:
            writer.writerow([row[k] for k in ("name", "kind", "parameters", "tokens", "final_loss", "mrr_after")])


# ---- the plot ----

_POINT, _SIZE = 8, 9  # sizes of a marker and of a label, in points


def figure(rows: Sequence[dict[str, Any]], mrr: dict[str, float]) -> Any:
    """Plot the rank after training against the trained parameters, with every kind labelled.

    Args:
        rows: the results under ``"kinds"``.
        mrr: the rank before training: ``"dense"``, and ``"nf4"`` if measured.

    Returns:
        a matplotlib Figure, drawn without a display.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    drawn = Figure(figsize=(8, 5), dpi=150, layout="constrained")
    FigureCanvasAgg(drawn)
    axes = drawn.add_subplot()
    axes.set_xscale("log")
    axes.set_xlabel("trained parameters")
    axes.set_ylabel("mean reciprocal rank after training")
    axes.grid(alpha=0.3)
    groups = {"factors are trained": ("o", "tab:blue", False), "only a core is trained": ("s", "tab:orange", True)}
    for title, (marker, colour, core) in groups.items():
        those = [row for row in rows if row["kind"].startswith("LoRA(") != core]
        if those:
            x, y = ([row[key] for row in those] for key in ("parameters", "mrr_after"))
            axes.scatter(x, y, marker=marker, c=colour, s=_POINT**2 / 2, label=title, zorder=3)
    for key, style in (("dense", "--"), ("nf4", ":")):
        if key in mrr:
            title = {"dense": "float32, untrained", "nf4": "NF4, untrained"}[key]
            axes.axhline(mrr[key], linestyle=style, color="gray", label=title)
    axes.margins(x=0.2, y=0.15)
    drawn.legend(loc="outside upper center", ncols=4, fontsize=_SIZE)
    _label(axes, [(row["label"], row["parameters"], row["mrr_after"]) for row in rows])
    return drawn


def _label(axes: Any, points: Sequence[tuple[str, float, float]]) -> None:
    """Put each label at the nearest position around its point where it covers no point and no other label."""
    from matplotlib.transforms import Bbox

    canvas = axes.figure.canvas
    canvas.draw()  # distances are known only after the layout
    renderer, inside = canvas.get_renderer(), axes.get_window_extent()
    pixels = axes.figure.dpi / 72

    def box(x: float, y: float) -> Any:
        half = pixels * _POINT / 2
        return Bbox([[x - half, y - half], [x + half, y + half]])

    taken = [box(*axes.transData.transform((x, y))) for _, x, y in points]
    directions = ((1, 0), (-1, 0), (1, 0.7), (1, -0.7), (-1, 0.7), (-1, -0.7), (0, 1), (0, -1), (1, 1.5), (1, -1.5))
    places = [(r * dx, r * dy) for r in (_POINT, 18, 30, 45, 60, 80, 100) for dx, dy in directions]
    line = {"arrowstyle": "-", "color": "gray", "linewidth": 0.6}
    for text, x, y in sorted(points, key=lambda point: -point[2]):
        for dx, dy in places:
            far = dy != 0 or abs(dx) > _POINT
            note = axes.annotate(
                text, (x, y), (dx, dy), textcoords="offset points", fontsize=_SIZE, va="center",
                ha="left" if dx > 0 else "right" if dx < 0 else "center", arrowprops=line if far else None,
            )  # fmt: skip
            note.set_in_layout(False)
            extent = _text_extent(note, renderer).padded(2 * pixels, 0)
            fits = all(inside.contains(*corner) for corner in extent.corners())
            if (fits and not any(extent.overlaps(other) for other in taken)) or (dx, dy) == places[-1]:
                break
            note.remove()
        taken.append(extent)


def _text_extent(note: Any, renderer: Any) -> Any:
    """The extent of the text alone, without the line to the point."""
    from matplotlib.text import Text

    note.update_positions(renderer)
    return Text.get_window_extent(note, renderer)
