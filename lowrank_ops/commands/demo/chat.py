"""``lowrank-ops demo --chat``: Gemma 3 270M in better 4 bits learns to explain functions, and is asked over HTTP.

The dense model is compared with plain NF4, and with NF4 that was rounded with calibration and has a low-rank branch. An
adapter over the latter is trained on the standard library. Then one server has the base and the adapter side by side.
"""

from __future__ import annotations

import argparse
import copy
import hashlib
import json
import logging
import platform
import random
import shutil
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import nn

import lowrank_ops as lo

from ...adapters.precompute import progress
from ...adapters.targets import shape_of
from ...files import load_json, write_text
from .. import _data
from .._cli import CommandError, make_console, megabytes
from ..evaluate import Judge, check_causal, size_of, table
from ..text import read_windows
from . import gemma, summaries
from .train import training_bar

LENGTH = 256  # tokens that the model sees together
CALIBRATION = 8192  # tokens
COMPARED = 1024  # tokens
BRANCH = 16  # its rank
HELD_OUT = 64  # functions of the test
QUESTIONS = 3
ADAPTER = "docstrings"


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Run the demo with checked options; return the results."""
    console = make_console(arguments)
    _check_server()
    began = time.perf_counter()
    if arguments.model is None:
        folder = Path(arguments.out or gemma.default_folder())
        gemma.state_licence(console, arguments.accept_licence or (folder / gemma.NAME).is_dir())
        source = gemma.get_model(folder, console)
    else:
        folder, source = Path(arguments.out or tempfile.mkdtemp(prefix="lowrank-ops-chat-")), Path(arguments.model)
    check_causal(source)
    train_pairs, test_pairs = _data.hold_out(_data.load_pairs())
    compared = compare(source, folder, train_pairs, test_pairs, console)

    model, tokenizer = _data.load_transformer(folder / "nf4", causal=True)
    training, test = (summaries.examples(tokenizer, pairs) for pairs in (train_pairs, test_pairs))
    if len(training) < arguments.batch_size:
        raise CommandError(f"--batch-size must be at most {len(training)}, the functions to train on")
    test = random.Random(0).sample(test, min(HELD_OUT, len(test)))
    torch.manual_seed(arguments.seed)
    try:
        lo.adapt(model, lo.LoRA(arguments.rank, alpha=2 * arguments.rank))
    except (ValueError, RuntimeError) as error:
        raise CommandError(f"cannot adapt the model: {error}") from error
    console.print(
        f"task    say in a sentence what a function does; {len(training)} short functions of Python "
        f"{platform.python_version()}\n        to learn from, {len(test)} of other modules to be asked about; "
        f"{sum(p.numel() for p in lo.adapter_parameters(model)):,} parameters"
    )
    pad = tokenizer.pad_token_id or 0
    with console.status("measuring the base"):
        loss = {"before": summaries.evaluate(model, test, pad)}
    started = time.perf_counter()
    with training_bar(console, arguments.steps) as show:
        losses = summaries.train(
            model, training, pad, steps=arguments.steps, batch_size=arguments.batch_size,
            learning_rate=arguments.learning_rate, seed=arguments.seed, on_step=show,
        )  # fmt: skip
    train_seconds = time.perf_counter() - started
    with console.status("measuring the trained model"):
        loss["after"] = summaries.evaluate(model, test, pad)
    adapters = folder / "adapters"
    lo.save_adapter(model, adapters / ADAPTER)
    console.print(
        f"train   {arguments.steps} steps of {arguments.batch_size} functions in {train_seconds:.0f} s, saved in "
        f"{adapters / ADAPTER}\nloss    on held-out functions: [bold]{loss['before']:.3f} -> {loss['after']:.3f}[/bold] "
        "nats a token of the sentence"
    )
    with console.status("letting the trained model answer"):
        expected = _greedy(model, tokenizer, test[0])
    del model

    answers = []
    with serving(folder / "nf4", adapters, source.name) as url:
        console.print(f"serve   {url}, the models {source.name} and {ADAPTER}; both get the same prompts")
        for example in test[:QUESTIONS]:
            with console.status("asking both"), ThreadPoolExecutor(2) as threads:
                asked = [threads.submit(ask, url, name, example.question) for name in (source.name, ADAPTER)]
                base, adapted = (answer.result() for answer in asked)
            answers.append({"prompt": example.question, "own": example.answer, "base": base, "adapter": adapted})
            _show(console, answers[-1])
    agrees = answers[0]["adapter"] == expected
    console.print(
        f"served  the adapter's first answer {'agrees' if agrees else '[bold red]DISAGREES[/bold red]'} with the model "
        "that was trained"
    )
    seconds = time.perf_counter() - began
    console.print(
        f"again   lowrank-ops serve {folder / 'nf4'} --adapters {adapters} --name {source.name}\n"
        f"done    in {seconds:.0f} s",
        markup=False,
    )
    return {
        "model": str(source),
        "versions": {"lowrank_ops": lo.__version__, "python": platform.python_version(), "torch": torch.__version__},
        "steps": arguments.steps,
        "rank": arguments.rank,
        "seed": arguments.seed,
        "batch_size": arguments.batch_size,
        "learning_rate": arguments.learning_rate,
        "compared": compared,
        "examples": {"train": len(training), "test": len(test)},
        "loss": loss,
        "losses": losses,
        "answers": answers,
        "agrees": agrees,
        "seconds": {"total": seconds, "train": train_seconds, "step": train_seconds / arguments.steps},
        "folder": str(folder),
    }


# ---- 4 bits ----


def compare(
    source: Path, folder: Path, training: Sequence[_data.Pair], test: Sequence[_data.Pair], console: Any
) -> list[dict[str, Any]]:
    """Write the calibrated model to ``folder / "nf4"`` and compare three models; an earlier result is used again.

    Args:
        source: the directory of the dense model.
        training: the functions to calibrate with.
        test: the functions to compare on.
    """
    folder.mkdir(parents=True, exist_ok=True)
    texts = {"calibration": (training, CALIBRATION), "test": (test, COMPARED)}
    for name, (pairs, _) in texts.items():
        write_text(folder / f"{name}.txt", _code(pairs))
    made, record = folder / "nf4", folder / "nf4" / "comparison.json"
    key = _key(source, folder)
    if record.is_file() and (known := load_json(record.read_text()))["of"] == key:
        console.print(f"4 bits  from an earlier run, {made}\n{table(known['models'])}", markup=False)
        return list(known["models"])
    if made.exists() and not record.is_file():
        raise CommandError(f"{made} is in the way: it was not made by this demo")
    dense: Any
    dense, tokenizer = _data.load_transformer(source, causal=True)
    calibration, compared = (
        read_windows(tokenizer, folder / f"{name}.txt", "--chat", LENGTH, tokens) for name, (_, tokens) in texts.items()
    )
    count = sum(p.numel() for p in dense.parameters())
    console.print(f"model   {dense.config.model_type}, {count / 1e6:.1f} M parameters, from {source}", markup=False)
    models: list[dict[str, Any]] = []
    with Judge(compared) as judge:

        def measure(name: str, model: nn.Module) -> None:
            with console.status(f"measuring {name}"):
                size, scores = size_of(model, torch.bfloat16), judge(model)
            models.append({"model": name, **asdict(scores), **asdict(size), "bits": size.bits})

        measure("bfloat16", dense)
        measure("NF4", lo.adapt(copy.deepcopy(dense), None))
        batches = [{"input_ids": part} for part in calibration.split(8)]
        with progress(len(batches), "calibrating") as advance:
            moments = lo.calibrate(dense, batches, progress=lambda _: advance("calibrating"))
        smallest = (min(shape_of(layer)[-2:]) for layer in lo.NF4Config().choose(dense).values())
        better: Any = lo.adapt(
            dense, None, quantize=lo.NF4Config(calibration=moments, compensate=min(BRANCH, *smallest))
        )
        measure("NF4, calibrated, with a branch", better)
    console.print(table(models), markup=False)
    with tempfile.TemporaryDirectory(dir=folder) as work:
        new = Path(work) / "nf4"
        better.save_pretrained(new)
        tokenizer.save_pretrained(new)
        write_text(new / record.name, json.dumps({"of": key, "models": models}, indent=2))
        shutil.rmtree(made, ignore_errors=True)
        new.rename(made)
    size = sum(file.stat().st_size for file in made.rglob("*.safetensors"))
    console.print(f"saved   {made} ({megabytes(size)}, embeddings in float32)", markup=False)
    return models


def _code(pairs: Sequence[_data.Pair]) -> str:
    """Functions with their docstrings, in an order that mixes modules."""
    texts = [summaries.source(pair._replace(body=f'"""{pair.docstring}"""\n{pair.body}')) for pair in pairs]
    random.Random(0).shuffle(texts)
    return "\n\n\n".join(texts)


def _key(source: Path, folder: Path) -> dict[str, Any]:
    """What the 4-bit model and the comparison depend on."""
    digests = {
        name: hashlib.sha256((folder / f"{name}.txt").read_bytes()).hexdigest() for name in ("calibration", "test")
    }
    changed = max(file.stat().st_mtime_ns for file in source.iterdir())
    sizes = [LENGTH, CALIBRATION, COMPARED, BRANCH]
    return {"model": str(source.resolve()), "changed": changed, "sizes": sizes, "version": lo.__version__, **digests}


# ---- the server ----


def _check_server() -> None:
    try:
        import lowrank_ops.serving.http  # noqa: F401
    except ImportError as error:
        raise CommandError(f"--chat needs the package {error.name}; {gemma.EXTRA}") from error


@contextmanager
def serving(model: Path, adapters: Path, name: str) -> Iterator[str]:
    """Serve a directory and its adapters at a free port of this machine; gives the address.

    Raises:
        CommandError: the model cannot be served.
    """
    from ...serving.load import ServeError, load
    from ...serving.process import Server

    try:
        service = load(model, adapters, name=name, device="cpu", capacity_bytes=256 << 20)
    except ServeError as error:
        raise CommandError(str(error)) from error
    server = Server(service, "127.0.0.1", 0, drain_seconds=10)
    logging.getLogger("uvicorn.error").setLevel(logging.WARNING)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    try:
        while not server.started:
            if not thread.is_alive():
                raise CommandError("the server ended before it listened")
            time.sleep(0.01)
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join()


def ask(url: str, model: str, prompt: str) -> str:
    """The answer of a served model to a prompt: its most probable tokens, until it ends or the limit is reached.

    Raises:
        CommandError: the server refuses or fails.
    """
    asked = {"model": model, "prompt": prompt, "max_tokens": summaries.ANSWER_TOKENS, "temperature": 0}
    request = urllib.request.Request(
        f"{url}/v1/completions", json.dumps(asked).encode(), {"Content-Type": "application/json"}
    )
    try:
        # A proxy of the environment is not for this machine.
        with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=600) as answer:
            text: str = json.load(answer)["choices"][0]["text"]
    except urllib.error.HTTPError as error:
        raise CommandError(f"the server answered {error.code}: {error.read().decode(errors='replace')}") from error
    return text


@torch.no_grad()
def _greedy(model: nn.Module, tokenizer: Any, example: summaries.Example) -> str:
    """The most probable tokens of a model, as :func:`ask` gets them."""
    ids = torch.tensor([example.question_ids])
    drawn = model.generate(ids, max_new_tokens=summaries.ANSWER_TOKENS, do_sample=False)  # type: ignore[operator]
    text: str = tokenizer.decode(drawn[0, ids.shape[1] :], skip_special_tokens=True)
    return text


def _show(console: Any, answer: dict[str, str]) -> None:
    from rich.table import Table
    from rich.text import Text

    shown = Table(width=min(console.width, 100), show_lines=False)
    for title in ("base in 4 bits", f"with the adapter {ADAPTER}"):
        shown.add_column(title, ratio=1)
    shown.add_row(*(Text(answer[name].strip()) for name in ("base", "adapter")))
    console.print(f"\n{answer['prompt']}", markup=False, style="cyan")
    console.print(shown, soft_wrap=False)
    console.print(f"its own docstring: {answer['own']}", markup=False)
