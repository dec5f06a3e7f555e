"""``lowrank-ops demo``: a 4-bit MiniLM with a LoRA adapter learns to find a function by its docstring, and is reloaded."""

from __future__ import annotations

import argparse
import platform
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

import lowrank_ops as lo

from .. import _data
from .._cli import CommandError, make_console, megabytes
from . import task


@contextmanager
def training_bar(console: Any, steps: int) -> Iterator[Callable[[int, float], None]]:
    """A progress bar; what it gives is called after each step, with its number from 1 and its loss."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn("train   loss {task.fields[loss]}"),
        *(BarColumn(), MofNCompleteColumn(), TextColumn("steps"), TimeRemainingColumn()),
    )
    with Progress(*columns, console=console) as progress:
        bar = progress.add_task("train", total=steps, loss="  ...")

        def show(step: int, loss: float) -> None:
            progress.update(bar, completed=step, loss=f"{loss:.3f}")
            # A bar moves only in a terminal; a log gets ten lines.
            if not console.is_terminal and step % max(1, steps // 10) == 0:
                console.print(f"train   loss {loss:.3f} after {step} of {steps} steps")

        yield show


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Run the demo with checked options; return the results."""
    console = make_console(arguments)
    began = time.perf_counter()

    def adapted_model() -> tuple[nn.Module, Any]:
        model, tokenizer = _data.load_model(arguments.model, quantized=True)
        try:
            adapter = lo.LoRA(rank=arguments.rank, alpha=2 * arguments.rank)
            return lo.adapt(model, adapter, targets="all-linear", quantize="nf4"), tokenizer
        except (ValueError, RuntimeError) as error:
            raise CommandError(f"cannot adapt the model: {error}") from error

    model, tokenizer = _data.load_model(arguments.model)
    pairs = _data.load_pairs()
    train_pairs, test_pairs = _data.hold_out(pairs)
    if len(train_pairs) < arguments.batch_size:
        raise CommandError(f"--batch-size must be at most {len(train_pairs)}, the pairs to train on")
    parameters = sum(p.numel() for p in model.parameters())
    modules = len({pair.module for pair in test_pairs})
    kind = getattr(model.config, "model_type", "model")
    console.print(f"model   {kind}, {parameters / 1e6:.1f} M parameters, from {model.name_or_path}")
    console.print(
        f"task    find a function's body by its docstring; {len(pairs)} functions of Python {platform.python_version()}:\n"
        f"        {len(train_pairs)} to train on, {len(test_pairs)} from {modules} other modules to be told apart"
    )

    memory = {"before": task.weight_bytes(model)}
    with console.status("measuring the model as it came"):
        mrr = {"dense": task.evaluate(model, tokenizer, test_pairs)}
    torch.manual_seed(arguments.seed)
    model, tokenizer = adapted_model()
    layers = [module for module in model.modules() if isinstance(module, lo.Linear)]
    memory["after"] = task.weight_bytes(model)
    memory["linear_before"] = sum(4 * layer.in_features * layer.out_features for layer in layers)
    memory["linear_after"] = sum(layer.weight.nbytes for layer in layers if layer.weight is not None)
    memory["adapter"] = sum(p.nbytes for p in lo.adapter_parameters(model))
    console.print(
        f"memory  {len(layers)} linear layers: {megabytes(memory['linear_before'])} float32 -> "
        f"{megabytes(memory['linear_after'])} NF4, and an adapter of {megabytes(memory['adapter'])}\n"
        f"        whole model: {megabytes(memory['before'])} -> {megabytes(memory['after'])}, embeddings stay float32"
    )
    with console.status("measuring the 4-bit model"):
        mrr["before"] = task.evaluate(model, tokenizer, test_pairs)
    console.print(
        f"rank    mean reciprocal rank among {len(test_pairs)}: {mrr['dense']:.3f} float32, {mrr['before']:.3f} in 4 bits"
    )

    started = time.perf_counter()
    with training_bar(console, arguments.steps) as show:
        losses = task.train(
            model,
            tokenizer,
            train_pairs,
            steps=arguments.steps,
            batch_size=arguments.batch_size,
            learning_rate=arguments.learning_rate,
            seed=arguments.seed,
            on_step=show,
        )
    train_seconds = time.perf_counter() - started
    edge = max(1, min(10, len(losses) // 2))
    console.print(
        f"train   {arguments.steps} steps of {arguments.batch_size} pairs in {train_seconds:.0f} s; loss "
        f"{sum(losses[:edge]) / edge:.3f} -> {sum(losses[-edge:]) / edge:.3f} (means of {edge} steps)"
    )
    with console.status("measuring the trained model"):
        trained = task.embed_pairs(model, tokenizer, test_pairs)
    mrr["after"] = task.mean_reciprocal_rank(*trained)
    console.print(
        f"rank    mean reciprocal rank among {len(test_pairs)}: [bold]{mrr['before']:.3f} -> {mrr['after']:.3f}[/bold] "
        "on modules never trained on"
    )

    folder = arguments.out or tempfile.mkdtemp(prefix="lowrank-ops-adapter-")
    lo.save_adapter(model, folder)
    size = sum(file.stat().st_size for file in Path(folder).iterdir() if file.is_file())
    console.print(f"saved   {folder} ({megabytes(size)}, a directory that PEFT reads)")
    # A fresh model starts from other random values, so agreement can only come from the file.
    fresh, tokenizer = adapted_model()
    lo.load_adapter(fresh, folder)
    with console.status("measuring the reloaded model"):
        again = task.embed_pairs(fresh, tokenizer, test_pairs)
    mrr["reloaded"] = task.mean_reciprocal_rank(*again)
    difference = float((trained - again).abs().max())
    agrees = difference <= 1e-5
    console.print(
        f"loaded  into a fresh model: mean reciprocal rank {mrr['reloaded']:.3f}, largest difference of an embedding "
        f"{difference:.1e}, {'agrees' if agrees else '[bold red]DISAGREES[/bold red]'}"
    )
    seconds = time.perf_counter() - began
    console.print(f"done    in {seconds:.0f} s")
    return {
        "model": str(model.name_or_path),
        "parameters": parameters,
        "versions": {"lowrank_ops": lo.__version__, "python": platform.python_version(), "torch": torch.__version__},
        "steps": arguments.steps,
        "rank": arguments.rank,
        "seed": arguments.seed,
        "batch_size": arguments.batch_size,
        "learning_rate": arguments.learning_rate,
        "pairs": {"all": len(pairs), "train": len(train_pairs), "test": len(test_pairs), "test_modules": modules},
        "memory_bytes": memory,
        "mrr": mrr,
        "loss": losses,
        "reloaded": {"max_difference": difference, "agrees": agrees},
        "seconds": {"total": seconds, "train": train_seconds, "step": train_seconds / arguments.steps},
        "adapter": str(folder),
    }
