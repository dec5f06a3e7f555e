"""Helpers of the engine's and the server's tests: adapters on disk, a model's own completions, rows, blocked forwards."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

import lowrank_ops as lo
from lowrank_ops.serving.engine import Engine
from lowrank_ops.serving.rows import Completion, Row

KINDS = [lo.LoRA(3, alpha=6), lo.LoRAXS(5), lo.SVF(rank=9), lo.SVFT("banded", bandwidth=2, rank=11)]
WORDS = "the cat sat on a mat and saw seven small ships sail away over the grey sea at dawn".split()  # noqa: SIM905
CONTEXT = 96


def text_of(n: int) -> str:
    """A text of its own for each n, of 2 to 17 words."""
    return " ".join(WORDS[(n * 7 + i * (n % 5 + 1)) % len(WORDS)] for i in range(2 + n % 16))


def fresh(directory: str) -> Any:
    from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

    causal = "Llama" in AutoConfig.from_pretrained(directory).architectures[0]
    return (AutoModelForCausalLM if causal else AutoModel).from_pretrained(directory).eval()


def write_adapters(model: str, root: Path, count: int) -> list[str]:
    """Adapters of every kind in turn, far enough from W that a wrong one shows."""
    names = []
    for n in range(count):
        torch.manual_seed(100 + n)
        adapted = lo.adapt(fresh(model), KINDS[n % len(KINDS)])
        with torch.no_grad():
            for parameter in lo.adapter_parameters(adapted):
                parameter.add_(torch.randn_like(parameter) * 0.3)
        names.append(f"user-{n}")
        lo.save_adapter(adapted, root / names[-1], factors="stored")
    return names


def alone(model: str, root: Path, name: str | None) -> Any:
    """The model with one adapter attached, without a pool."""
    adapted = lo.adapt(fresh(model), None)
    return adapted if name is None else lo.load_adapter(adapted, root / name).eval()


def tokenizer_of(model: str) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(model)


def continued(model: Any, ids: list[int], count: int) -> list[int]:
    """The most probable tokens, one forward over the whole text for each."""
    drawn: list[int] = []
    with torch.no_grad():
        for _ in range(count):
            token = int(model(torch.tensor([ids + drawn])).logits[0, -1].argmax())
            if token == 256:
                break
            drawn.append(token)
    return drawn


def size_of(model: str, adapter: Path) -> int:
    pool = lo.AdapterPool(lo.adapt(fresh(model), None), 1 << 20)
    pool.load("one", adapter)
    return pool.stats()["used_bytes"]


def completion(pieces: list[str], **options: Any) -> Completion:
    return Completion(
        None, [1], decode=lambda ids: bytes(ids).decode(errors="replace"), on_text=pieces.append, **options
    )


def greedy(adapter: str, ids: list[int], count: int) -> Completion:
    how = {"decode": lambda tokens: str(tokens), "on_text": lambda text: None}
    return Completion(adapter, ids, max_tokens=count, temperature=0, **how)  # type: ignore[arg-type]


def replace(adapter: Path, other: Path, cut: int | None = None) -> None:
    """Replace an adapter's files by another's, truncated on request."""
    adapter.mkdir(exist_ok=True)
    for file in other.iterdir():
        new = adapter / (file.name + ".new")
        new.write_bytes(file.read_bytes()[:cut])
        new.replace(adapter / file.name)


def run(engine: Engine, rows: Sequence[Row]) -> list[Any]:
    engine.submit(rows)
    return [row.done.result(60) for row in rows]


def wait_for(condition: Any) -> None:
    for _ in range(6000):
        if condition():
            return
        time.sleep(0.01)
    pytest.fail("it did not come to be")


class Held:
    """A model whose forwards block until the test releases them."""

    def __init__(self, engine: Engine) -> None:
        self.entered, self.go, self._one = threading.Event(), threading.Event(), False
        self._handle = engine.model.register_forward_pre_hook(self._wait)

    def _wait(self, *_: Any) -> None:
        self.entered.set()
        while not self.go.wait(0.01):
            if self._one:
                self._one = False
                return

    def pass_one(self) -> None:
        """Let a single forward go."""
        self._one = True

    def release(self) -> None:
        """Let all forwards go, from now on unhindered."""
        self.go.set()
        self._handle.remove()


@contextmanager
def process(*options: object) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """The command ``serve`` as a process of its own: its address, and the process."""
    import httpx

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "lowrank_ops", "serve", *map(str, options), "--port", str(port), "--pool-mb", "16"]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}
    started = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)
    assert started.stderr is not None
    log: list[str] = []
    reader = threading.Thread(target=lambda: log.extend(started.stderr or []), daemon=True)
    reader.start()
    url = f"http://127.0.0.1:{port}"
    try:
        for _ in range(600):
            assert started.poll() is None, "".join(log)
            try:
                if httpx.get(f"{url}/health").status_code == 200:
                    break
            except httpx.TransportError:
                time.sleep(0.1)
        else:
            pytest.fail("the server did not start: " + "".join(log))
        yield url, started
    finally:
        if started.poll() is None:
            started.kill()
        started.wait()
