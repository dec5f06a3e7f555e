"""``lowrank-ops evaluate``: how much worse than the first model the others are, and how many bits they need."""

from __future__ import annotations

import argparse
import math
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .. import NF4Config
from ..adapters.config import branch_bytes
from ..adapters.layer import AdaptedLayer
from ..files import load_json, replacing
from ._cli import CommandError, add_json, check_matplotlib, plot_path, write_json
from ._data import load_transformer
from .text import read_windows

EXTRA = 'pip install "lowrank-ops[train,bench]"'
# Rows of log-probabilities that are compared at a time: 64 of 262,144 words are 67 MB.
_ROWS = 64


@dataclass(frozen=True)
class Scores:
    """What a model says about a text, and what it says otherwise than the first model.

    Attributes:
        perplexity: exp of the mean of −log p(next token).
        kl: the mean over tokens of Σ p log(p / q), p of the first model and q of this one, in nats.
        agreement: the share of tokens at which both have the same most probable next token.
        tokens: the number of predicted tokens.
    """

    perplexity: float
    kl: float
    agreement: float
    tokens: int


class Judge:
    """Compares models over the same windows of text with the model that came first.

        kl = 1/T Σ_t Σ_v p_t(v) · (log p_t(v) − log q_t(v))

    Of the first model it keeps log p in a temporary file, [T, V] in float16, so that one model is in memory at a time. That
    rounds log p by at most 2⁻¹¹ of its size, which moves kl by less than 10⁻⁴. Sums are in float64.

    Args:
        windows: tokens [count, length], int64; in each window all but the first are predicted.

    Raises:
        ValueError: windows have another shape.
    """

    def __init__(self, windows: Tensor) -> None:
        if windows.dim() != 2 or not len(windows) or windows.shape[1] < 2:
            raise ValueError(f"windows must be [count, length] with length 2 or more, got {list(windows.shape)}")
        self.windows = windows
        self._kept: np.memmap[Any, np.dtype[np.float16]] | None = None
        self._best: list[Tensor] = []  # the most probable tokens of the first model
        self._folder = tempfile.TemporaryDirectory(prefix="lowrank-ops-evaluate-")

    def __enter__(self) -> Judge:
        return self

    def __exit__(self, *exception: object) -> None:
        self._kept = None
        self._folder.cleanup()

    def __call__(self, model: nn.Module) -> Scores:
        """The scores of a causal model of transformers, in eval mode, on its device.

        Raises:
            ValueError: it has another vocabulary than the first one, or gives numbers that are not finite.
        """
        first, loss, kl, agreed, at = self._kept is None, 0.0, 0.0, 0, 0
        for number, (targets, ours) in enumerate(self._predictions(model)):
            rows = slice(at, at := at + len(ours))
            own = ours.gather(1, targets[:, None])
            if not torch.isfinite(own).all():
                raise ValueError("the model gives log-probabilities that are NaN or infinite")
            loss -= float(own.sum(dtype=torch.float64))
            kept = self._keep(ours.shape[1])
            if ours.shape[1] != kept.shape[1]:
                raise ValueError(
                    f"the model has {ours.shape[1]} words, and the first model {kept.shape[1]}; only models of one "
                    "vocabulary can be compared"
                )
            best = ours.argmax(-1).cpu()
            if first:
                self._best.append(best)
                kept[rows] = ours.clamp(min=torch.finfo(torch.float16).min).half().cpu().numpy()
                continue
            # Rounding has moved the sum of p from 1.
            theirs = torch.from_numpy(kept[rows]).to(ours.device, torch.float32).log_softmax(-1)
            kl += float((theirs.exp() * (theirs - ours)).sum(dtype=torch.float64))
            agreed += int((best == self._best[number]).sum())
        return Scores(math.exp(min(loss / at, 700.0)), kl / at, 1.0 if first else agreed / at, at)

    def _predictions(self, model: nn.Module) -> Iterator[tuple[Tensor, Tensor]]:
        """The next tokens [m] and their log-probabilities [m, V], float32, some rows of a window at a time."""
        device, table = next(model.parameters()).device, getattr(model, "get_input_embeddings", lambda: None)()
        if table is not None and int(self.windows.max()) >= table.weight.shape[0]:
            raise ValueError(
                f"the model has {table.weight.shape[0]} words, and the text has the token {int(self.windows.max())}"
            )
        for window in self.windows:
            ids = window.to(device)
            with torch.no_grad():
                logits = model(ids[None], use_cache=False).logits[0, :-1]
            for at in range(0, len(logits), _ROWS):
                yield ids[1:][at : at + _ROWS], logits[at : at + _ROWS].float().log_softmax(-1)

    def _keep(self, V: int) -> np.memmap[Any, np.dtype[np.float16]]:
        if self._kept is None:
            count, length = self.windows.shape
            path = Path(self._folder.name) / "first"
            self._kept = np.memmap(path, np.float16, "w+", shape=(count * (length - 1), V))
        return self._kept


@dataclass(frozen=True)
class Size:
    """What the linear layers of a model take, without the output head: bytes, and the number of their weights."""

    bytes: int
    weights: int

    @property
    def bits(self) -> float:
        """Bits a weight."""
        return 8 * self.bytes / self.weights


def size_of(model: nn.Module, dense: torch.dtype | None = None) -> Size:
    """The size of the layers of a model that can have 4 bits: codes, scales, low-rank parts; biases do not count.

    A branch counts as it is stored, in 16 bits, whatever the model was cast to.

    Args:
        dense: the dtype in which dense weights count; default: the one they have.
    """
    count = weights = 0
    for layer in NF4Config().choose(model).values():
        matrices: list[Any] = [getattr(layer, "weight", None)]
        if isinstance(layer, AdaptedLayer):
            matrices += [factor for factor in (layer.down, layer.up) if factor is not None]
            count += 0 if layer.branch is None else layer.branch.rank * branch_bytes(layer.shape)
        elif not isinstance(layer, nn.Module):  # a stack of experts that is dense
            matrices = [layer.read()[0]]
        for matrix in matrices:
            if isinstance(matrix, Tensor):
                count += matrix.numel() * (dense or matrix.dtype).itemsize
            elif matrix is not None:
                count += matrix.nbytes
        weights += math.prod(getattr(layer, "shape", None) or matrices[0].shape)
    return Size(count, weights)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of the command to a parser."""
    add = parser.add_argument
    add(
        "models",
        nargs="+",
        metavar="MODEL",
        help="directories of causal models; the others are compared with the first",
    )
    add("--text", required=True, metavar="FILE", help="a text in UTF-8; - for standard input")
    add("--tokens", type=int, default=4096, help="the most tokens to take (default %(default)s)")
    add("--length", type=int, default=256, help="tokens that the model sees together (default %(default)s)")
    add("--device", help="default: cuda if available, otherwise cpu")
    add("--plot", metavar="FILE", help="draw KL against bits a weight into a .png file")
    add_json(parser)


def run(arguments: argparse.Namespace) -> int:
    """Evaluate; return 0, or 1 after an error message."""
    try:
        plot = None if arguments.plot is None else plot_path(arguments.plot)
        if plot is not None:
            check_matplotlib("--plot", EXTRA)
        results = evaluate(arguments)
    except (CommandError, ValueError, OSError, RuntimeError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(table(results), file=sys.stderr if arguments.json == "-" else sys.stdout)
    write_json({"text": arguments.text, "models": results}, arguments.json)
    if plot is not None:
        draw(results, plot)
    return 0


def evaluate(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """The results of every model, in the order given."""
    device = arguments.device or ("cuda" if torch.cuda.is_available() else "cpu")
    for directory in arguments.models:
        check_causal(Path(directory))
    results: list[dict[str, Any]] = []
    judge: Judge | None = None
    words: dict[int, str] = {}
    try:
        for directory in arguments.models:
            model, tokenizer = load_transformer(directory, causal=True)
            windows = read_windows(tokenizer, arguments.text, "--text", arguments.length, arguments.tokens)
            judge, words = judge or Judge(windows), words or words_of(tokenizer)
            different = [number for number, word in words_of(tokenizer).items() if words.get(number, word) != word]
            if different or not torch.equal(windows, judge.windows):
                where = f": token {min(different)} is another word" if different else ""
                raise CommandError(f"{directory} has another tokenizer than {arguments.models[0]}{where}")
            stored = getattr(torch, str(read_config(Path(directory)).get("dtype")), None)
            size = size_of(model, stored)
            began = time.monotonic()
            try:
                scores = judge(model.to(device))
            except ValueError as error:
                raise CommandError(f"{directory}: {error}") from error
            entry = {"model": str(directory), **asdict(scores), **asdict(size), "bits": size.bits}
            results.append(entry | {"seconds": time.monotonic() - began})
            del model
    finally:
        if judge is not None:
            judge.__exit__()
    return results


def words_of(tokenizer: Any) -> dict[int, str]:
    """The words of a tokenizer, by the numbers of their tokens."""
    return {number: word for word, number in tokenizer.get_vocab().items()}


def read_config(directory: Path) -> dict[str, Any]:
    """config.json of a directory.

    Raises:
        CommandError: there is none, or it is damaged.
    """
    try:
        config: dict[str, Any] = load_json((directory / "config.json").read_text())
    except (OSError, ValueError) as error:
        raise CommandError(f"{directory} is not a Hugging Face model directory: {error}") from error
    return config


def check_causal(directory: Path) -> None:
    """Raise CommandError unless the directory holds a causal language model."""
    names = read_config(directory).get("architectures") or ()
    if not any(name.endswith(("ForCausalLM", "LMHeadModel")) for name in names):
        raise CommandError(f"{directory} holds no causal language model: its architectures are {list(names)}")


def table(results: list[dict[str, Any]]) -> str:
    """The results as text, a line for each model."""
    names = names_of(results)
    wide = max(len("model"), *map(len, names))
    lines = [f"{'model':{wide}}  bits/weight        MB        KL  top-1  perplexity"]
    for name, row in zip(names, results, strict=True):
        lines.append(
            f"{name:{wide}}  {row['bits']:11.3f}  {row['bytes'] / 1e6:8.1f}  {row['kl']:8.4f}  {row['agreement']:5.3f}  "
            f"{row['perplexity']:10.3f}"
        )
    lines.append(f"over {results[0]['tokens']} tokens; bits and MB are of the linear layers without the output head")
    return "\n".join(lines)


def names_of(results: list[dict[str, Any]]) -> list[str]:
    """The last parts of the models' paths, or the paths where two end alike."""
    short = [Path(row["model"]).name for row in results]
    return short if len(set(short)) == len(short) else [row["model"] for row in results]


def draw(results: list[dict[str, Any]], path: Path) -> None:
    """Plot KL against bits a weight; the first model, whose KL is 0, is left out."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for name, row in list(zip(names_of(results), results, strict=True))[1:]:
        axes.plot(row["bits"], row["kl"], "o", markersize=6)
        axes.annotate(name, (row["bits"], row["kl"]), xytext=(6, 4), textcoords="offset points", fontsize=8)
    axes.margins(x=0.2, y=0.1)
    axes.set_ylim(bottom=0)
    axes.set_xlabel("bits a weight of the linear layers")
    axes.set_ylabel(f"KL to {names_of(results)[0]}, nats a token")
    axes.grid(alpha=0.3, linewidth=0.5)
    with replacing(path) as scratch:
        figure.savefig(scratch)
