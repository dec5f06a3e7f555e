"""The benchmark command: its options, the order of its cases, and its output."""

from __future__ import annotations

import argparse
import copy
import importlib
import pkgutil
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch

from . import cases, goals, plot, watch
from .common import Settings
from .report import Report

# Each file of cases declares its OPS and its SECTIONS, {place: section}. The most valuable has the lowest place: a run that
# is out of time leaves out the last ones.
_modules = [importlib.import_module(f"{cases.__name__}.{file.name}") for file in pkgutil.iter_modules(cases.__path__)]
_families = [module for module in _modules if hasattr(module, "SECTIONS")]
_sections = [(place, section) for family in _families for place, section in family.SECTIONS.items()]
SECTIONS: list[Callable[[Report], None]] = [section for _, section in sorted(_sections, key=lambda pair: pair[0])]
OPS: list[str] = [op for family in _families for op in family.OPS]
# Including the start of the process, and the build on a GPU, this stays under ten and eight minutes.
MINUTES = {"cpu": 9.5, "cuda": 7.0}
TUNING = 80.0  # seconds of a whole run on a GPU reserved for tuning


def shape(text: str) -> tuple[int, int]:
    try:
        N, K = (int(size) for size in text.split("x"))
    except ValueError:
        raise argparse.ArgumentTypeError(f"a shape is NxK, such as 4096x4096, got {text!r}") from None
    if N < 64 or K < 64 or K % 64:
        raise argparse.ArgumentTypeError(f"N and K must be 64 or more, K a multiple of 64, got {text!r}")
    return N, K


def positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number above 0, got {text!r}")
    return int(text)


def default_folder() -> Path:
    """bench/results in a checkout; a folder in the current directory in an installation."""
    results = Path(__file__).resolve().parent / "results"
    return results if results.is_dir() else Path("lowrank-ops-bench")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="default: cpu")
    parser.add_argument("--quick", action="store_true", help="one shape, few tokens, short runs")
    parser.add_argument("--op", choices=OPS, action="append", help="only this op; may be repeated")
    parser.add_argument("--shape", type=shape, metavar="NxK", help="only this shape of the weight")
    parser.add_argument(
        "--threads", type=positive, metavar="N", help="torch's threads; default: all, and 1 for what goals need"
    )
    parser.add_argument(
        "--minutes",
        type=float,
        metavar="X",
        help="time limit, beyond which cases are left out; a whole run: {cpu} or {cuda}".format(**MINUTES),
    )
    parser.add_argument(
        "--out", type=Path, metavar="DIR", help="default: bench/results for a whole run, otherwise nowhere"
    )
    parser.add_argument(
        "--tune",
        action="store_true",
        help="CUDA: only search tile sizes, all of them, or in --minutes the most valuable ones first",
    )


def run(arguments: argparse.Namespace) -> int:
    asked = arguments
    if asked.device == "cuda" and not torch.cuda.is_available():
        print("lowrank-ops bench: --device cuda: torch finds no CUDA device here", file=sys.stderr)
        return 2
    if asked.tune and asked.device != "cuda":
        print("lowrank-ops bench: --tune needs --device cuda: only GPU kernels have tile sizes", file=sys.stderr)
        return 2
    whole = not (asked.quick or asked.op or asked.shape)
    minutes = asked.minutes or (MINUTES[asked.device] if whole else float("inf"))
    threads = [asked.threads or torch.get_num_threads()]
    if asked.device == "cpu" and not asked.threads and not asked.quick and threads[0] > 1:
        threads.append(1)
    settings = Settings(
        torch.device(asked.device), asked.op or OPS, asked.quick, asked.shape, threads, 60 * minutes
    )  # fmt: skip
    if asked.tune:
        from . import tune

        torch.manual_seed(0)
        began = time.monotonic()
        left = (lambda: settings.seconds - (time.monotonic() - began)) if asked.minutes else None
        print(f"wrote {tune.run(settings, left)}")
        return 0
    folder = asked.out or (default_folder() if whole else None)
    tuning = whole and asked.device == "cuda"
    report = watch.run(settings, partial(measure, tuning=tuning), partial(save, folder=folder))
    finished = with_tables(report)
    print("\n" + finished.text())
    if folder and (written := save(report, folder)):
        print("wrote", written)
        if picture := plot.save(finished, written.with_suffix(".png")):
            print("wrote", picture)
    # A peer may be absent, but ours must not be.
    return int(report.over or any(name.startswith(goals.OURS) for name in report.absent))


def measure(report: Report, tuning: bool) -> None:
    """Run the sections that the report does not have yet."""
    report.reserve = TUNING if tuning else 0.0
    for section in SECTIONS[report.sections :]:
        section(report)
        report.sections += 1
        if report.watch:
            report.watch.finished(report)
    report.after = report.measure_limits()
    if tuning:
        from . import tune  # nothing else here needs Triton

        path = tune.run(report.settings, lambda: report.left)
        report.notes.append(f"- Tile sizes were searched for {path.name}; a run after this one uses them.")


def with_tables(report: Report) -> Report:
    """A copy that begins with the tables that are computed from its rows."""
    computed = [table for table in (goals.goals(report), *goals.headlines(report)) if table.rows]
    finished = copy.copy(report)
    finished.tables = [*computed, *report.tables]
    return finished


def save(report: Report, folder: Path | None) -> Path | None:
    """Write what the report has so far."""
    return with_tables(report).write(folder) if folder else None


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m lowrank_ops.bench", description="Benchmarks; see docs/benchmarking.md."
    )
    add_arguments(parser)
    return run(parser.parse_args(argv))
