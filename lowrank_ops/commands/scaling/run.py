"""``lowrank-ops scaling fit runs.csv`` and ``lowrank-ops scaling plan --compute 1e21``: scaling laws on the command line."""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import operator
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from ... import scaling_laws as laws
from ...files import load_json, replacing, write_text
from ...scaling_laws import Chinchilla, FineTuning, Fit, Frontier
from ...scaling_laws.laws import Law, listed
from ...scaling_laws.runs import COLUMNS, ScalingError, read_runs
from .._cli import CommandError, check_matplotlib, plot_path
from .plots import LEVEL, figure_fit, figure_plan, short

EXTRAS = 'pip install "lowrank-ops[scaling]"'

_LAWS: dict[str, type] = {"chinchilla": Chinchilla, "frontier": Frontier, "fine-tuning": FineTuning}


# ---- laws in files ----


def to_json(fit: Fit) -> dict[str, Any]:
    """Convert a fit to JSON, from which :func:`from_json` restores its law and replicates."""

    def constants(law: Any) -> dict[str, Any]:
        values = {f.name: getattr(law, f.name) for f in dataclasses.fields(law)}
        return {k: v.tolist() if isinstance(v, np.ndarray) else v for k, v in values.items()}

    return {
        "law": next(name for name, kind in _LAWS.items() if isinstance(fit.law, kind)),
        "constants": constants(fit.law),
        "approach": fit.approach,
        "objective": fit.objective,
        "starts": fit.starts,
        "runs": len(fit.runs),
        "notes": list(fit.notes),
        "intervals": {name: fit.interval(of, LEVEL) for name, of, _ in _quantities(fit.law)}
        if fit.replicates
        else None,
        "level": LEVEL,
        "replicates": None if fit.replicates is None else constants(fit.replicates),
    }


def from_json(path: str | Path) -> tuple[Law, Any]:
    """Load the law and the replicates (or None) that ``scaling fit --json FILE`` wrote.

    Raises:
        ScalingError: the file cannot be read or does not hold a law.
    """
    try:
        content = load_json(Path(path).read_text())
        kind = _LAWS[content["law"]]
        law = kind(**content["constants"])
        replicates = content["replicates"]
        if replicates is not None:
            replicates = kind(**{k: np.array(v) if isinstance(v, list) else v for k, v in replicates.items()})
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ScalingError(f"{path} holds no law as `scaling fit --json` writes it: {error!r}") from error
    return law, replicates


def _quantities(law: Law) -> list[tuple[str, Callable[[Any], Any], str]]:
    """The reported quantities of a law: name, function of the law, and description."""
    if isinstance(law, FineTuning):
        words = {"E": "irreducible loss", "alpha": "of parameters", "beta": "of tokens", "A": ""}
        return [(k, operator.attrgetter(k), v) for k, v in words.items()]
    listing: list[tuple[str, Callable[[Any], Any], str]] = [
        ("a", lambda law: law.a, "N_opt grows as C^a"),
        ("b", lambda law: law.b, "D_opt grows as C^b"),
        ("G", lambda law: law.G, "N_opt = G (C/6)^a"),
    ]
    if isinstance(law, Chinchilla):
        words = {"E": "the loss that remains", "A": "", "B": "", "alpha": "of parameters", "beta": "of tokens"}
        listing = [(k, operator.attrgetter(k), v) for k, v in words.items()] + listing
    return listing


# ---- the commands ----


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the two commands and their options to a parser."""
    commands = parser.add_subparsers(dest="scaling", required=True, metavar="fit | plan")
    fit = commands.add_parser("fit", help="fit a law's constants to runs, with intervals")
    fit.add_argument("runs", nargs="+", help="CSV or JSONL: parameters, tokens or flops, loss, and optionally name")
    fit.add_argument("--law", choices=("chinchilla", "fine-tuning"), default="chinchilla", help="default: %(default)s")
    fit.add_argument(
        "--approach", choices=("parametric", "isoflop", "envelope"), default="parametric", help="default: %(default)s"
    )
    fit.add_argument(
        "--metric", choices=("loss", "score"), default="loss", help="score needs --law fine-tuning (default: loss)"
    )
    fit.add_argument("--ceiling", type=float, default=1.0, help="the best possible score (default 1)")
    fit.add_argument("--columns", metavar="KEY=NAME,...", help="names of columns, as in loss=val,parameters=size")
    fit.add_argument("--counting", choices=laws.COUNTING, help="what the parameters count (default: all)")
    fit.add_argument("--name", action="append", help="use only runs of this name; may be repeated")
    fit.add_argument("--drop-largest", type=int, default=0, metavar="K", help="leave out the K largest losses")
    fit.add_argument("--delta", type=float, default=1e-3, help="δ of the Huber loss (default %(default)s)")
    fit.add_argument("--budgets", type=_floats, metavar="C,C,...", help="FLOPs of the IsoFLOP budgets")
    fit.add_argument("--tolerance", type=float, default=0.1, help="how far a run may be from its budget (default 0.1)")
    fit.add_argument("--bootstrap", type=int, default=1000, help="resamples for the intervals; 0: none (default 1000)")
    fit.add_argument("--seed", type=int, default=0, help="seed of the resamples")
    plan = commands.add_parser("plan", help="tell the best use of a budget, or what to expect of a run")
    plan.add_argument("--compute", type=_floats, metavar="C,C,...", help="budgets in FLOPs")
    plan.add_argument(
        "--parameters", type=float, help="a size in place of a budget: tells its best tokens, or with --tokens its loss"
    )
    plan.add_argument("--tokens", type=float, help="with --parameters: the number of training tokens")
    plan.add_argument(
        "--law",
        default="epoch",
        metavar="NAME|FILE.json",
        help=f"a file written by `scaling fit --json`, or one of {', '.join(laws.PUBLISHED)} (default: epoch)",
    )
    for command in (fit, plan):
        command.add_argument(
            "--plot", metavar="FILE.png", help="file for the plot, or none (default: in a new temporary folder)"
        )
        command.add_argument(
            "--json", metavar="FILE", nargs="?", const="-", help="write JSON; without FILE to standard output"
        )


def run(arguments: argparse.Namespace) -> int:
    """Run a command; return 0, or 2 after an error message."""
    try:
        plot = _plot_path(arguments)
        if arguments.json and arguments.json != "-" and not Path(arguments.json).absolute().parent.is_dir():
            raise ScalingError(f"--json must name a file in a directory that exists, got {arguments.json}")
        text, results, draw = (_fit if arguments.scaling == "fit" else _plan)(arguments)
        if plot is not None and draw is not None:
            with replacing(plot) as scratch:
                draw().savefig(scratch, format="png")
            text += f"\nplot    {plot}"
            results["plot"] = str(plot)
        print(text, file=sys.stderr if arguments.json == "-" else sys.stdout)
        if arguments.json == "-":
            print(json.dumps(results, indent=2))
        elif arguments.json:
            write_text(arguments.json, json.dumps(results) + "\n")
    except (ScalingError, CommandError, ValueError, OSError) as error:
        print(f"lowrank-ops scaling: {error}", file=sys.stderr)
        return 2
    return 0


def _floats(text: str) -> list[float]:
    try:
        values = [float(part) for part in text.split(",")]
    except ValueError:
        values = []
    if not values or not all(math.isfinite(v) and v > 0 for v in values):
        raise argparse.ArgumentTypeError(f"needs numbers above 0, separated by commas, got {text!r}")
    return values


def _plot_path(arguments: argparse.Namespace) -> Path | None:
    """The file of the plot, or None; refuses a plot that cannot be drawn before any work."""
    if arguments.plot == "none":
        return None
    check_matplotlib("the plot", f"{EXTRAS}, or --plot none")
    if arguments.plot is None:
        return Path(tempfile.mkdtemp(prefix="lowrank-ops-scaling-")) / f"{arguments.scaling}.png"
    return plot_path(arguments.plot)


def _fit(arguments: argparse.Namespace) -> tuple[str, dict[str, Any], Callable[[], Any]]:
    named = {}
    for part in (arguments.columns or "").split(",") if arguments.columns else []:
        key, _, column = part.partition("=")
        if key.strip() not in COLUMNS or not column.strip():
            raise ScalingError(f"--columns takes KEY=NAME with a KEY of {', '.join(COLUMNS)}, got {part!r}")
        named[key.strip()] = column.strip()
    if arguments.metric == "score" and arguments.law != "fine-tuning":
        raise ScalingError("--metric score needs --law fine-tuning")
    tuning = arguments.law == "fine-tuning"
    counting = arguments.counting or ("trained" if tuning else None)
    runs, said = read_runs(
        arguments.runs, metric=arguments.metric, columns=named, counting=counting, names=arguments.name
    )
    if not 0 <= arguments.drop_largest < len(runs):
        raise ScalingError(f"--drop-largest must be in 0 … {len(runs) - 1}, got {arguments.drop_largest}")
    if arguments.drop_largest:
        order = np.argsort(runs.loss, kind="stable")
        cut = len(runs) - arguments.drop_largest
        left_out = sorted(runs.numbers[i] for i in order[cut:].tolist())
        said.append(f"left out, the {arguments.drop_largest} largest losses: rows {listed(left_out, 20)}")
        runs = runs.select(np.sort(order[:cut]))
    fit = laws.fit(
        runs,
        arguments.approach,
        law=FineTuning if tuning else Chinchilla,
        delta=arguments.delta,
        budgets=arguments.budgets,
        tolerance=arguments.tolerance,
        bootstrap=arguments.bootstrap,
        seed=arguments.seed,
        ceiling=arguments.ceiling if arguments.metric == "score" else None,
    )
    lines = [f"runs    {len(runs)}, parameters counted: {runs.counting}"]
    lines += [f"note    {text}" for text in (*said, *fit.notes)]
    if isinstance(fit.law, FineTuning):
        shown = (
            "L = E + A / (P^alpha D^beta)"
            if fit.law.ceiling is None
            else f"score = {fit.law.ceiling:g} - E - A / (P^alpha D^beta)"
        )
    else:
        shown = "L = E + A / N^alpha + B / D^beta" if isinstance(fit.law, Chinchilla) else "N_opt = G (C/6)^a"
    what = (
        f"sum of Huber losses {fit.objective:.6e}" if fit.starts else f"sum of squares of ln N_opt {fit.objective:.4g}"
    )
    reached = f", reached from {fit.starts[1]} of {fit.starts[0]} starts" if fit.starts else ""
    lines += [f"law     {shown}, approach {fit.approach}", f"fit     {what}{reached}", ""]
    lines += [_row("", "value", f"{LEVEL:.0%} interval" if fit.replicates else "", "")]
    for name, of, words in _quantities(fit.law):
        between = "{:.5g} … {:.5g}".format(*fit.interval(of, LEVEL)) if fit.replicates else ""
        lines.append(_row(name, f"{of(fit.law):.5g}", between, words))
    results = to_json(fit) | {"said": said}
    return "\n".join(lines), results, lambda: figure_fit(fit)


def _row(name: str, value: str, interval: str, words: str) -> str:
    return f"{name:<12}{value:>12}  {interval:<26}{words}".rstrip()


def _plan(arguments: argparse.Namespace) -> tuple[str, dict[str, Any], Callable[[], Any] | None]:
    size, tokens = arguments.parameters, arguments.tokens
    if (size is None) == (arguments.compute is None) or (tokens is not None and size is None):
        raise ScalingError("plan needs either --compute, or --parameters with or without --tokens")
    law: Law | None = laws.PUBLISHED.get(arguments.law)
    replicates = None
    if law is None:
        if not Path(arguments.law).is_file():
            raise ScalingError(f"--law must be one of {', '.join(laws.PUBLISHED)} or a file, got {arguments.law}")
        law, replicates = from_json(arguments.law)
    lines = [f"law     {arguments.law}, parameters counted: {law.counting}"]
    if replicates is None:
        lines.append(
            "note    no intervals: the law has no bootstrap; `scaling fit runs.csv --json law.json` makes both"
        )
    results: dict[str, Any] = {"law": arguments.law, "counting": law.counting, "level": LEVEL}

    def between(of: Callable[[Any], Any], show: Callable[[float], str]) -> str:
        if replicates is None:
            return ""
        low, high = laws.percentiles(replicates, of, LEVEL)
        return f"{show(low)} … {show(high)}"

    if size is not None:
        what, of = _one_run(arguments.law, law, size, tokens)
        show: Callable[[float], str] = short if what == "tokens" else "{:.4g}".format
        lines += [
            "",
            _row(what, show(float(of(law))), between(of, show), f"{LEVEL:.0%} interval" if replicates else ""),
        ]
        if what == "tokens":
            lines.append(f"where a model of {short(size)} parameters is the best use of its training FLOPs")
        results |= {"parameters": size, "tokens": tokens, what: float(of(law))}
        results["interval"] = laws.percentiles(replicates, of, LEVEL) if replicates else None
        return "\n".join(lines), results, None
    if isinstance(law, FineTuning):
        raise ScalingError(
            "a fine-tuning law has no best split: training costs about 4 FLOPs for each token and parameter of the base, "
            "whatever the adapter's size; ask for --parameters and --tokens"
        )
    results["plans"] = []
    lines.append("")
    for compute in arguments.compute:
        best = law.optimal(compute)
        lines.append(_row(f"{compute:.3g}", "FLOPs", f"{LEVEL:.0%} interval" if replicates else "", ""))
        plan: dict[str, Any] = {"compute": compute}
        for name, of, show in _budget_quantities(compute, best.loss is not None):
            lines.append(_row(f"  {name}", show(float(of(law))), between(of, show), ""))
            key = "tokens_per_parameter" if name == "D / N" else name
            plan[key] = float(of(law))
            plan[f"{key}_interval"] = laws.percentiles(replicates, of, LEVEL) if replicates else None
        others = {name: other.optimal(compute) for name, other in laws.PUBLISHED.items() if name != arguments.law}
        plan["published"] = {
            k: {"parameters": float(v.parameters), "tokens": float(v.tokens)} for k, v in others.items()
        }
        lines += [
            f"  by {k:<22} {short(float(v.parameters)):>8} parameters, {short(float(v.tokens)):>8} tokens"
            for k, v in others.items()
        ]
        results["plans"].append(plan)
    lines.append("(kaplan counts no embeddings and its budget is C_min, half of 6 N D at the critical batch size)")
    return "\n".join(lines), results, lambda: figure_plan(arguments.law, law, replicates, arguments.compute)


def _one_run(name: str, law: Law, size: float, tokens: float | None) -> tuple[str, Callable[[Any], Any]]:
    """The reported quantity of a model of a size: its loss or score after these tokens, or its best tokens."""
    if tokens is None:
        if not isinstance(law, Chinchilla | Frontier):
            raise ScalingError(f"the law {name} tells no best tokens for a size; --tokens is needed")
        return "tokens", lambda law: law.optimal_tokens(size)
    if not isinstance(law, Chinchilla | FineTuning):
        raise ScalingError(f"the law {name} tells no loss for parameters and tokens together")
    scored = isinstance(law, FineTuning) and law.ceiling is not None
    return "score" if scored else "loss", lambda law: law.predict(size, tokens)


def _budget_quantities(compute: float, loss: bool) -> list[tuple[str, Callable[[Any], Any], Callable[[float], str]]]:
    """The reported quantities of a budget: name, function of a law, format."""
    quantities: list[tuple[str, Callable[[Any], Any], Callable[[float], str]]] = [
        ("parameters", lambda law: law.optimal(compute).parameters, short),
        ("tokens", lambda law: law.optimal(compute).tokens, short),
        ("D / N", lambda law: law.optimal(compute).tokens / law.optimal(compute).parameters, lambda v: f"{v:.3g}"),
    ]
    if loss:
        quantities.append(("loss", lambda law: law.optimal(compute).loss, lambda v: f"{v:.4g}"))
    return quantities
