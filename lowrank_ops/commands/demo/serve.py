"""Serve four adapters of different kinds in one batch, on the demo's task: ``lowrank-ops demo --serve``.

Each adapter is trained for a few steps on its own model and saved. A pool over one 4-bit model then serves all of them:
every row is compared with the model in which its adapter was trained, and the batch is timed against the same rows with
one adapter at a time, and without adapters.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from itertools import cycle
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import lowrank_ops as lo

from ...adapters.kinds import Adapter
from .. import _data
from .._cli import CommandError, make_console
from . import task
from .compare import KINDS

# The names match KINDS, which has the learning rates; SVF and SVFT use the top 4R singular directions.
SERVED: dict[str, Callable[[int], Adapter]] = {
    "lora": lambda rank: lo.LoRA(rank, alpha=rank),
    "lora-xs": lambda rank: lo.LoRAXS(4 * rank),
    "svf": lambda rank: lo.SVF(rank=4 * rank),
    "svft-banded": lambda rank: lo.SVFT("banded", bandwidth=8, rank=4 * rank),
}
ROWS = 32  # rows of the batch
TOKENS = 16  # tokens of every row; longer docstrings are cut, so that no way of batching computes padding
ROUNDS = 7  # rounds of timing, in which the ways take turns


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Run the demo with checked options; return the results."""
    console = make_console(arguments)
    began = time.perf_counter()
    model, tokenizer = _data.load_model(arguments.model)
    source = str(model.name_or_path)
    train_pairs, test_pairs = _data.hold_out(_data.load_pairs())
    if len(train_pairs) < arguments.batch_size:
        raise CommandError(f"--batch-size must be at most {len(train_pairs)}, the pairs to train on")
    ids = _inputs(model, tokenizer, [pair.docstring for pair in train_pairs + test_pairs])
    names = [name for name, _ in zip(cycle(SERVED), range(ROWS), strict=False)]
    folder = Path(arguments.out or tempfile.mkdtemp(prefix="lowrank-ops-serve-"))
    console.print(
        f"model   {source}, its linear layers in NF4\ntask    {len(SERVED)} adapters, {arguments.steps} steps each"
    )

    alone = torch.empty(0)
    trained = []
    for name in SERVED:
        with console.status(f"training {KINDS[name].label}"):
            adapted, losses = _train(name, arguments, train_pairs)
        lo.save_adapter(adapted, folder / name)
        with torch.no_grad():
            rows = _embed(adapted, ids)
        alone = rows.new_empty(ROWS, rows.shape[1]) if alone.numel() == 0 else alone
        mine = torch.tensor([other == name for other in names])
        alone[mine] = rows[mine]
        count = sum(p.numel() for p in lo.adapter_parameters(adapted))
        trained.append({"name": name, "label": KINDS[name].label, "parameters": count, "loss": losses})
        console.print(
            f"train   {KINDS[name].label:<12} {count:>9,} parameters, loss {losses[0]:.3f} -> {losses[-1]:.3f}, "
            f"saved in {folder / name}"
        )

    lo.adapt(model, None)
    # The pool stores the factors of each kind once; they are as large as the factors of a LoRA of the same rank.
    size = sum(file.stat().st_size for file in folder.glob("*/*.safetensors"))
    pool = lo.AdapterPool(model, capacity_bytes=2 * size, root=folder)
    for name in SERVED:
        pool.load(name, folder / name)
    base = _run_routed(pool, model, [None] * ROWS, ids)
    together = _run_routed(pool, model, names, ids)
    differences = {
        name: max(float((together[i] - alone[i]).abs().max()) for i in range(ROWS) if names[i] == name)
        for name in SERVED
    }
    moved = float((together - base).abs().amax(1).min())
    agrees = max(differences.values()) <= 1e-5 < moved
    verdict = "every row agrees" if agrees else "[bold red]DISAGREES[/bold red]"
    console.print(
        f"batch   {ROWS} rows through {len(SERVED)} adapters: largest difference to the adapter alone "
        f"{max(differences.values()):.1e}, {verdict}; every adapter moves its rows by {moved:.1e} or more"
    )
    with console.status("timing"):
        rates = _rates(pool, model, names, ids)
    _print_table(console, rates, ids.shape[1])
    seconds = time.perf_counter() - began
    console.print(f"serve   lowrank-ops serve {source} --adapters {folder}\ndone    in {seconds:.0f} s", markup=False)
    return {
        "model": source,
        "versions": {"lowrank_ops": lo.__version__, "python": platform.python_version(), "torch": torch.__version__},
        "threads": torch.get_num_threads(),
        "steps": arguments.steps,
        "rank": arguments.rank,
        "seed": arguments.seed,
        "batch_size": arguments.batch_size,
        "adapters": trained,
        "rows": ROWS,
        "tokens": ids.shape[1],
        "differences": differences,
        "agrees": agrees,
        "rows_per_second": rates,
        "pool": pool.stats(),
        "seconds": seconds,
        "folder": str(folder),
    }


def _inputs(model: nn.Module, tokenizer: Any, texts: Sequence[str]) -> Tensor:
    """The token ids [ROWS, TOKENS] of the first texts that are long enough."""
    limit = task.token_limit(model, TOKENS)
    rows = (row for row in tokenizer(list(texts), truncation=True, max_length=limit)["input_ids"] if len(row) == limit)
    chosen = [row for row, _ in zip(rows, range(ROWS), strict=False)]
    if len(chosen) < ROWS:
        raise CommandError(f"the demo needs {ROWS} docstrings of {limit} tokens, and found {len(chosen)}")
    return torch.tensor(chosen)


def _train(name: str, arguments: argparse.Namespace, pairs: Sequence[_data.Pair]) -> tuple[nn.Module, list[float]]:
    model, tokenizer = _data.load_model(arguments.model)
    torch.manual_seed(arguments.seed)
    try:
        lo.adapt(model, SERVED[name](arguments.rank))
    except (ValueError, RuntimeError) as error:
        raise CommandError(f"cannot adapt the model with {KINDS[name].label}: {error}") from error
    losses = task.train(
        model,
        tokenizer,
        pairs,
        steps=arguments.steps,
        batch_size=arguments.batch_size,
        learning_rate=KINDS[name].learning_rate,
        seed=arguments.seed,
    )
    return model, losses


def _embed(model: nn.Module, ids: Tensor) -> Tensor:
    """The embeddings of rows without padding, as defined by :func:`.task.embed`."""
    return nn.functional.normalize(model(input_ids=ids).last_hidden_state.mean(1), dim=-1)


def _run_routed(pool: lo.AdapterPool, model: nn.Module, names: Sequence[str | None], ids: Tensor) -> Tensor:
    with torch.no_grad(), pool.route(names):
        return _embed(model, ids)


def _rates(pool: lo.AdapterPool, model: nn.Module, names: Sequence[str], ids: Tensor) -> dict[str, float]:
    """Measure rows a second: medians of rounds in which every way takes a turn."""

    def together() -> None:
        _run_routed(pool, model, names, ids)

    def one_adapter_at_a_time() -> None:
        for name in SERVED:
            mine = [i for i in range(ROWS) if names[i] == name]
            _run_routed(pool, model, [name] * len(mine), ids[mine])

    def one_row_at_a_time() -> None:
        for i, name in enumerate(names):
            _run_routed(pool, model, [name], ids[i : i + 1])

    def no_adapter() -> None:
        _run_routed(pool, model, [None] * ROWS, ids)

    ways: list[Callable[[], None]] = [together, one_adapter_at_a_time, one_row_at_a_time, no_adapter]
    seconds: dict[str, list[float]] = {way.__name__: [] for way in ways}
    for number in range(ROUNDS + 1):
        for way in ways:
            started = time.perf_counter()
            way()
            if number:  # the first round warms up
                seconds[way.__name__].append(time.perf_counter() - started)
    return {name: ROWS / statistics.median(measured) for name, measured in seconds.items()}


def _print_table(console: Any, rates: dict[str, float], tokens: int) -> None:
    from rich.table import Table

    table = Table(
        title=f"throughput, {ROWS} rows of {tokens} tokens, {torch.get_num_threads()} threads", title_justify="left"
    )
    table.add_column("way")
    for heading in ("rows/s", "against no adapter"):
        table.add_column(heading, justify="right")
    for name, rate in rates.items():
        table.add_row(name.replace("_", " "), f"{rate:.1f}", f"{rate / rates['no_adapter']:.2f}x")
    console.print(table)
