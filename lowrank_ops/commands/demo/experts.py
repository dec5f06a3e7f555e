"""``lowrank-ops demo --experts``: a 4-bit mixture of experts with an adapter on every expert learns another kind of text.

A small Qwen3-MoE is first trained whole on the code of the standard library, byte by byte. Then its experts and projections
become NF4, and their adapters learn the prose of Python's language reference, of which whole topics are held out.
"""

from __future__ import annotations

import argparse
import copy
import hashlib
import importlib.util
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import lowrank_ops as lo

from .. import _data
from .._cli import EXTRAS, CommandError, make_console, megabytes
from . import task

TOKENS = 128  # bytes of a text
PRETRAINING = 400  # steps
PRETRAINING_RATE = 3e-3
HELD_OUT = 64  # texts of the test
TIMED = 7  # steps of each library that are timed
SHAPE: dict[str, Any] = {
    "vocab_size": 256,
    "hidden_size": 256,
    "moe_intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "num_experts": 64,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 4 * TOKENS,
    "tie_word_embeddings": True,
    "norm_topk_prob": True,
}
PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj"]


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Run the demo with checked options; return the results."""
    console = make_console(arguments)
    began = time.perf_counter()
    size, rank, steps = arguments.batch_size, arguments.rank, arguments.steps
    code, prose, test = read_code(), *read_prose()
    torch.manual_seed(arguments.seed)
    dense = make_model()
    parameters = sum(p.numel() for p in dense.parameters())
    in_experts = sum(p.numel() for name, p in dense.named_parameters() if ".experts." in name)
    console.print(
        f"model   Qwen3-MoE of {SHAPE['num_hidden_layers']} layers with {SHAPE['num_experts']} experts each, "
        f"{SHAPE['num_experts_per_tok']} for a byte; {parameters / 1e6:.1f} M parameters, {in_experts / parameters:.0%} in "
        f"experts\ntask    the next byte of the language reference of Python, for a model that knows its code"
    )
    with console.status(f"training the model from scratch on {megabytes(len(code))} of code, {PRETRAINING} steps"):
        started = time.perf_counter()
        losses = train(dense, code, PRETRAINING, size, PRETRAINING_RATE, arguments.seed)
        pretraining = time.perf_counter() - started
    console.print(
        f"whole   {PRETRAINING} steps on code in {pretraining:.0f} s; loss {losses[0]:.2f} -> "
        f"{statistics.mean(losses[-10:]):.2f}"
    )
    loss = {"dense": evaluate(dense, test)}
    memory = {"before": task.weight_bytes(dense)}
    adapter = lo.LoRA(rank, alpha=2 * rank)
    torch.manual_seed(arguments.seed)
    model = lo.adapt(copy.deepcopy(dense), adapter)
    memory |= {"after": task.weight_bytes(model), "adapter": sum(p.nbytes for p in lo.adapter_parameters(model))}
    console.print(
        f"memory  {megabytes(memory['before'])} float32 -> {megabytes(memory['after'])} with 4-bit experts and projections, "
        f"of which {megabytes(memory['adapter'])} are adapters"
    )
    loss["before"] = evaluate(model, test)
    console.print(f"loss    on held-out prose: {loss['dense']:.3f} float32, {loss['before']:.3f} in 4 bits")
    with console.status(f"training {sum(p.numel() for p in lo.adapter_parameters(model)):,} parameters of adapters"):
        started = time.perf_counter()
        losses = train(model, prose, steps, size, arguments.learning_rate, arguments.seed)
        seconds = time.perf_counter() - started
    loss["after"] = evaluate(model, test)
    console.print(
        f"train   {steps} steps of {size} texts in {seconds:.0f} s\n"
        f"loss    on held-out prose: [bold]{loss['before']:.3f} -> {loss['after']:.3f}[/bold] nats a byte"
    )
    folder = arguments.out or tempfile.mkdtemp(prefix="lowrank-ops-adapter-")
    lo.save_adapter(model, folder)
    fresh = lo.load_adapter(lo.adapt(copy.deepcopy(dense), None), folder)
    with torch.no_grad():
        difference = float((model(test).logits - fresh(test).logits).abs().max())
    agrees = difference <= 1e-4
    console.print(
        f"saved   {folder} (a directory that PEFT reads); loaded into a fresh model: largest difference of a logit "
        f"{difference:.1e}, {'agrees' if agrees else '[bold red]DISAGREES[/bold red]'}"
    )
    models = {"lowrank_ops": model} | with_peft(dense, rank)
    step = time_steps(models, prose, size)
    for name, times in step.items():
        if name != "lowrank_ops":
            console.print(
                f"step    {step['lowrank_ops']:.3f} s; {times:.3f} s with {name}'s LoRA over the dense experts "
                f"({times / step['lowrank_ops']:.1f} times)"
            )
    if len(step) == 1:
        console.print(f"step    {step['lowrank_ops']:.3f} s; PEFT is not installed and was not compared")
    total = time.perf_counter() - began
    console.print(f"done    in {total:.0f} s")
    return {
        "parameters": parameters,
        "in_experts": in_experts,
        "versions": {"lowrank_ops": lo.__version__, "python": platform.python_version(), "torch": torch.__version__},
        "steps": steps,
        "rank": rank,
        "seed": arguments.seed,
        "batch_size": size,
        "learning_rate": arguments.learning_rate,
        "memory_bytes": memory,
        "loss": loss,
        "losses": losses,
        "reloaded": {"max_difference": difference, "agrees": agrees},
        "seconds": {"total": total, "pretraining": pretraining, "train": seconds, "step": step},
        "adapter": str(folder),
    }


def make_model() -> nn.Module:
    """A Qwen3-MoE with random weights, float32.

    Raises:
        CommandError: transformers is missing or does not have the model.
    """
    try:
        from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM
    except ImportError as error:
        raise CommandError(f"the demo needs transformers with Qwen3-MoE ({error}); {EXTRAS}") from error
    return Qwen3MoeForCausalLM(Qwen3MoeConfig(**SHAPE)).float().eval()


def read_code() -> Tensor:
    """The bytes of every function of the standard library, uint8."""
    return _bytes("\n\n".join(f"{pair.definition}\n{pair.body}" for pair in _data.load_pairs()))


def read_prose() -> tuple[Tensor, Tensor]:
    """(bytes to train on, uint8; held-out texts [HELD_OUT, TOKENS], int64) of Python's language reference.

    Raises:
        CommandError: this Python has no language reference.
    """
    try:
        from pydoc_data.topics import topics
    except ImportError as error:
        raise CommandError(f"the demo needs Python's language reference, pydoc_data.topics ({error})") from error
    # In the order of a hash, which other versions of Python share for the most part. Topics quote each other, so a
    # paragraph of a held-out topic is left out of the others.
    order = sorted(topics, key=lambda name: hashlib.sha256(name.encode()).digest())
    paragraphs = [dict.fromkeys(topics[name].split("\n\n")) for name in order]
    held_out = dict.fromkeys(p for topic in paragraphs[: len(order) // 4] for p in topic)
    trained = dict.fromkeys(p for topic in paragraphs for p in topic if p not in held_out)
    test = _bytes("\n\n".join(held_out))
    texts = test[: len(test) // TOKENS * TOKENS].view(-1, TOKENS)
    return _bytes("\n\n".join(trained)), texts[:: max(1, len(texts) // HELD_OUT)][:HELD_OUT].long()


def _bytes(text: str) -> Tensor:
    return torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8)


def train(model: nn.Module, text: Tensor, steps: int, size: int, rate: float, seed: int) -> list[float]:
    """Train what requires a gradient on random pieces of a text; return the loss of every step."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    batch = batches(text, size, seed)
    return task.descend(parameters, lambda: loss_of(model, batch()), steps, rate, warm_up=0.05)


def loss_of(model: nn.Module, batch: Tensor) -> Tensor:
    loss: Tensor = model(input_ids=batch, labels=batch).loss
    return loss


def batches(text: Tensor, size: int, seed: int) -> Callable[[], Tensor]:
    """A function that draws pieces [size, TOKENS] of a text, int64."""
    generator = torch.Generator().manual_seed(seed)

    def draw() -> Tensor:
        starts = torch.randint(len(text) - TOKENS + 1, (size,), generator=generator)
        return torch.stack([text[start : start + TOKENS] for start in starts.tolist()]).long()

    return draw


@torch.no_grad()
def evaluate(model: nn.Module, texts: Tensor) -> float:
    """The mean loss of a byte, in nats."""
    return statistics.mean(model(input_ids=part, labels=part).loss.item() for part in texts.split(16))


def with_peft(dense: nn.Module, rank: int) -> dict[str, nn.Module]:
    """PEFT's LoRA over the dense experts and projections; nothing where PEFT is not installed."""
    if importlib.util.find_spec("peft") is None:
        return {}
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        r=rank, lora_alpha=2 * rank, target_modules=PROJECTIONS,
        target_parameters=["experts.gate_up_proj", "experts.down_proj"],
    )  # fmt: skip
    return {"PEFT": get_peft_model(copy.deepcopy(dense), config)}


def time_steps(models: dict[str, nn.Module], text: Tensor, size: int) -> dict[str, float]:
    """The median time of a training step of each model, in seconds; their steps take turns."""
    batch = batches(text, size, 0)
    times: dict[str, list[float]] = {name: [] for name in models}
    trained = {name: [p for p in model.parameters() if p.requires_grad] for name, model in models.items()}
    optimizers = {name: torch.optim.AdamW(parameters, lr=0.0) for name, parameters in trained.items()}
    for _ in range(TIMED):
        for name, model in models.items():
            tokens, started = batch(), time.perf_counter()
            task.take_step(optimizers[name], trained[name], loss_of(model, tokens))
            times[name].append(time.perf_counter() - started)
    return {name: statistics.median(seconds[1:]) for name, seconds in times.items()}
