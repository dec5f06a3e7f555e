"""What 4 bits cost a model, step by step: python -m lowrank_ops.bench.quantization MODEL --calibrate FILE --text FILE.

Makes the tables of docs/quantization.md: KL, top-1 and perplexity of every way to round a model, over text of the
calibration's kind and of another kind; the cosine error of an encoder; and the held-out loss of an adapter that is trained
over the plain and over the better base. Every finished row is kept in --out, so that a second call goes on where the first
one ended.
"""

from __future__ import annotations

import argparse
import functools
import json
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import lowrank_ops as lo
from lowrank_ops.commands.evaluate import Judge, draw, size_of
from lowrank_ops.commands.text import read_windows
from lowrank_ops.files import write_text
from lowrank_ops.formats import Moments

BASELINE = "NF4, double-quantised"
# The rows that training starts from.
TRAINED = (BASELINE, "calibrated, branch of 16")
HELD_OUT = 8  # windows that judge a trained adapter

STEPS = (
    "scales searched without data",
    "errors fed back, absmax scales",
    "calibrated, column order",
    "calibrated, damping 0.01",
    "calibrated, damping 0.4",
)
SHARED_OUT = "calibrated, the bytes of 16 ranks shared out"


def configs(moments: Moments) -> dict[str, lo.NF4Config]:
    """The ways that ``adapt``, ``from_pretrained`` and ``lowrank-ops quantize`` offer."""
    return {
        "NF4": lo.NF4Config(double_quant=False),
        BASELINE: lo.NF4Config(),
        "calibrated": lo.NF4Config(calibration=moments),
        "calibrated, branch of 16": lo.NF4Config(calibration=moments, compensate=16),
        "calibrated, branch of 32": lo.NF4Config(calibration=moments, compensate=32),
        "calibrated, float32 scales": lo.NF4Config(double_quant=False, calibration=moments),
        "calibrated, float32 scales, branch of 16": lo.NF4Config(
            double_quant=False, calibration=moments, compensate=16
        ),
    }


def steps(moments: Moments) -> dict[str, Callable[[str, Tensor], lo.NF4Weight]]:
    """Parts of the calibrated rounding alone: name -> what becomes of the weight of a layer."""
    quantize = lo.NF4Weight.quantize

    def second(name: str) -> Tensor:
        return moments[name].second

    made: list[Callable[[str, Tensor], lo.NF4Weight]] = [
        lambda name, w: quantize(w, scales="search"),
        lambda name, w: quantize(w, second_moment=second(name), scales="absmax"),
        lambda name, w: quantize(w, second_moment=second(name), order="columns"),
        lambda name, w: quantize(w, second_moment=second(name), damping=0.01),
        lambda name, w: quantize(w, second_moment=second(name), damping=0.4),
    ]
    return dict(zip(STEPS, made, strict=True))


def variants(load: Callable[[], Any], moments: Moments) -> Iterator[tuple[str, Callable[[], Any]]]:
    """Name -> how to make the model."""
    for name, config in configs(moments).items():
        yield name, functools.partial(_adapted, load, config)
    for name, rounded in steps(moments).items():
        yield name, functools.partial(_with_weights, load, rounded)
    yield SHARED_OUT, functools.partial(_shared_out, load, moments)


def _adapted(load: Callable[[], Any], config: lo.NF4Config) -> Any:
    return lo.adapt(load(), None, quantize=config)


def _shared_out(load: Callable[[], Any], moments: Moments) -> Any:
    model = load()
    size = sum(2 * 16 * (layer.in_features + layer.out_features) for layer in map(model.get_submodule, moments))
    return lo.adapt(model, None, quantize=lo.NF4Config(calibration=moments, compensate_bytes=size))


def _with_weights(load: Callable[[], Any], rounded: Callable[[str, Tensor], lo.NF4Weight]) -> Any:
    model = load()
    for name, layer in lo.NF4Config().choose(model).items():
        assert isinstance(layer, nn.Linear)
        parent, _, child = name.rpartition(".")
        bias = None if layer.bias is None else layer.bias.detach()
        setattr(model.get_submodule(parent), child, lo.Linear.from_weight(rounded(name, layer.weight.detach()), bias))
    return model


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options to a parser."""
    add = parser.add_argument
    add("model", metavar="MODEL", help="a directory of a dense causal model with its tokenizer")
    add("--calibrate", required=True, metavar="FILE", help="the text of the calibration, and of training")
    add("--text", required=True, metavar="FILE", help="another text of the same kind")
    add("--foreign", metavar="FILE", help="a text of another kind")
    add("--calibrate-tokens", type=int, default=12288, help="default: %(default)s")
    add("--tokens", type=int, default=2048, help="of --text, and half as many of --foreign (default %(default)s)")
    add("--length", type=int, default=256, help="tokens of a window (default %(default)s)")
    add("--only", nargs="*", metavar="NAME", help="only these rows; without a name none")
    add("--peer", nargs="+", default=[], metavar="NAME=BITS=DIR", help="dense directories that other libraries rounded")
    add(
        "--train",
        type=int,
        default=0,
        metavar="STEPS",
        help="also train an adapter over two bases, on later tokens of --calibrate",
    )
    add("--encoder", metavar="DIR", help="also the cosine error of this sentence encoder, on paragraphs of the texts")
    add("--out", type=Path, required=True, metavar="DIR", help="for results.json, moments.safetensors and kl.png")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m lowrank_ops.bench.quantization", description=__doc__)
    add_arguments(parser)
    asked = parser.parse_args(argv)
    asked.out.mkdir(parents=True, exist_ok=True)
    kept = Kept(asked.out / "results.json")
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(asked.model, local_files_only=True)
    calibration = read_windows(tokenizer, asked.calibrate, "--calibrate", asked.length, asked.calibrate_tokens)
    texts = {"text": read_windows(tokenizer, asked.text, "--text", asked.length, asked.tokens)}
    if asked.foreign:
        texts["foreign"] = read_windows(tokenizer, asked.foreign, "--foreign", asked.length, asked.tokens // 2)
    if asked.encoder:
        encode(asked, kept)
    if asked.only != [] or asked.train:
        batches = [window[None] for window in calibration]
        moments = gather(lambda: load(asked.model), batches, asked.out / "moments.safetensors")
        made = dict(variants(lambda: load(asked.model), moments))
        bits = {}
        for name, count, directory in (peer.split("=") for peer in asked.peer):
            bits[name], made[name] = float(count), functools.partial(load, directory)
        wanted = [name for name in made if name not in kept.rows("models") and name in (asked.only or made)]
        if wanted and asked.only != []:
            compare(asked.model, wanted, made, bits, texts, kept)
        if asked.train:
            lessons, held_out = train_texts(tokenizer, asked)
            for name in TRAINED:
                if name not in kept.rows("training"):
                    kept.add("training", name, train(made[name](), lessons, {"calibrate": held_out, **texts}))
    print(tables(kept))
    drawn = [{"model": name, **row} for name, row in kept.rows("models").items() if name not in STEPS]
    if len(drawn) > 1:
        draw(drawn, asked.out / "kl.png")
    return 0


class Kept:
    """Finished rows in a JSON file, by table and name."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.tables: dict[str, dict[str, Any]] = json.loads(path.read_text()) if path.exists() else {}

    def rows(self, table: str) -> dict[str, Any]:
        return self.tables.get(table, {})

    def add(self, table: str, name: str, row: dict[str, Any]) -> None:
        self.tables.setdefault(table, {})[name] = row
        write_text(self.path, json.dumps(self.tables, indent=1))
        print(f"{table}: {name}: {row}", file=sys.stderr, flush=True)


def load(directory: str) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(directory, local_files_only=True, dtype=torch.float32).eval()


def gather(load: Callable[[], nn.Module], batches: list[Any], path: Path) -> Moments:
    """The moments, from the file if there is one."""
    if not path.exists():
        lo.calibrate(load(), batches).save(path)
    return Moments.load(path)


def compare(
    directory: str,
    wanted: list[str],
    made: dict[str, Callable[[], Any]],
    bits: dict[str, float],
    texts: dict[str, Tensor],
    kept: Kept,
) -> None:
    """Score the models against the dense one."""
    judges = {name: Judge(windows) for name, windows in texts.items()}
    try:
        for name in ["dense", *wanted]:
            began = time.monotonic()
            model = load(directory) if name == "dense" else made[name]()
            seconds = time.monotonic() - began
            size = size_of(model)
            row: dict[str, Any] = {"bits": bits.get(name, size.bits), "seconds": seconds}
            for text, judge in judges.items():
                scores = asdict(judge(model))
                row |= scores if text == "text" else {f"{text}_{key}": value for key, value in scores.items()}
            kept.add("models", name, row)
            del model
    finally:
        for judge in judges.values():
            judge.__exit__()


def encode(asked: argparse.Namespace, kept: Kept) -> None:
    """1 − cos(embedding of the encoder, embedding of its rounded copy), mean over paragraphs of another text."""
    from transformers import AutoModel, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(asked.encoder, local_files_only=True)

    def dense() -> Any:
        return AutoModel.from_pretrained(asked.encoder, local_files_only=True, dtype=torch.float32).eval()

    longest = min(128, dense().config.max_position_embeddings)

    def batches(path: str, count: int) -> list[dict[str, Tensor]]:
        texts = [part for part in Path(path).read_text().split("\n\n") if len(part) > 80][:count]
        options = {"padding": True, "truncation": True, "max_length": longest, "return_tensors": "pt"}
        return [dict(tokenizer(texts[at : at + 16], **options)) for at in range(0, len(texts), 16)]

    def embed(model: Any) -> Tensor:
        found = []
        for batch in batches(asked.text, 256):
            with torch.no_grad():
                hidden = model(**batch).last_hidden_state
            mask = batch["attention_mask"].unsqueeze(-1)
            found.append(nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1))
        return torch.cat(found)

    moments = lo.calibrate(dense(), batches(asked.calibrate, 256))
    exact = embed(dense())
    for name, config in configs(moments).items():
        if name not in kept.rows("encoder"):
            model = lo.adapt(dense(), None, quantize=config)
            error = float((1 - (embed(model) * exact).sum(1)).mean())
            kept.add("encoder", name, {"bits": size_of(model).bits, "cosine_error": error})


def train_texts(tokenizer: Any, asked: argparse.Namespace) -> tuple[Tensor, Tensor]:
    """From --calibrate after the tokens of the calibration: a batch of 2 windows for each step, and windows to judge by."""
    before = asked.calibrate_tokens // asked.length
    needed = before + HELD_OUT + 2 * asked.train
    windows = read_windows(tokenizer, asked.calibrate, "--calibrate", asked.length, needed * asked.length)
    if len(windows) < needed:
        raise ValueError(f"--train {asked.train}: --calibrate has {len(windows)} windows, and {needed} are needed")
    held_out, lessons = windows[before:].split((HELD_OUT, 2 * asked.train))
    return lessons.view(asked.train, 2, -1), held_out


def train(model: Any, lessons: Tensor, held_out: dict[str, Tensor]) -> dict[str, Any]:
    """Train LoRA(16) over a base, no text twice: losses of texts that are not learned, before, half-way and after."""
    torch.manual_seed(0)
    lo.adapt(model, lo.LoRA(16, alpha=16))
    optimizer = torch.optim.AdamW(lo.adapter_parameters(model), lr=2e-4)
    losses: dict[str, dict[str, float]] = {name: {} for name in held_out}

    def judge(step: int) -> None:
        with torch.no_grad():
            for name, windows in held_out.items():
                found = [float(model(w[None], labels=w[None]).loss) for w in windows[:HELD_OUT]]
                losses[name][str(step)] = sum(found) / len(found)

    for step, batch in enumerate(lessons):
        if step in (0, len(lessons) // 2):
            judge(step)
        model.train()
        optimizer.zero_grad()
        model(batch, labels=batch).loss.backward()
        optimizer.step()
        model.eval()
    judge(len(lessons))
    return {"losses": losses}


def tables(kept: Kept) -> str:
    """The rows as Markdown."""
    lines = ["| | bits | KL | of NF4's | KL, other text | top-1 | perplexity |", "|---|---|---|---|---|---|---|"]
    models = kept.rows("models")
    plain = models.get(BASELINE, {}).get("kl")
    for name, row in models.items():
        ratio = f"{row['kl'] / plain:.3f}" if plain else ""
        foreign = f"{row['foreign_kl']:.4f}" if "foreign_kl" in row else ""
        lines.append(
            f"| {name} | {row['bits']:.3f} | {row['kl']:.4f} | {ratio} | {foreign} | {row['agreement']:.3f} | "
            f"{row['perplexity']:.2f} |"
        )
    if encoder := kept.rows("encoder"):
        lines += ["", "| encoder | bits | 1 − cos |", "|---|---|---|"]
        lines += [f"| {name} | {row['bits']:.3f} | {row['cosine_error']:.5f} |" for name, row in encoder.items()]
    if training := kept.rows("training"):
        steps = list(next(iter(training.values()))["losses"]["calibrate"])
        lines += ["", f"| loss after steps | of | {' | '.join(steps)} |", "|---" * (len(steps) + 2) + "|"]
        lines += [
            f"| {name} | --{text} | {' | '.join(f'{loss:.4f}' for loss in losses.values())} |"
            for name, row in training.items()
            for text, losses in row["losses"].items()
        ]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
