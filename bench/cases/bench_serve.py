"""python -m lowrank_ops.bench.cases.bench_serve: tokens a second of the server's engine, beside llama.cpp's and vLLM's.

A causal model of a Hugging Face directory is served in NF4; with --gguf the same model by llama.cpp (the package
xllamacpp), with --vllm the dense model in bfloat16 by vLLM. All run without HTTP, vLLM in a process of its own. Prompts are
random tokens, every token is the most probable one, no beginning is kept of earlier texts, and the end of a text is
passed over. The samples of all cases are taken in turn. The ratios of processor time tell more than those of time on a
machine that does other work; take one thread for them, because the threads of llama.cpp wait busily for one another.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

import lowrank_ops as lo
from lowrank_ops.serving.load import Service, load
from lowrank_ops.serving.rows import Completion

from ..common import interleave, torch_threads
from ..report import Table

CLIENTS, RANK = 8, 16
DTYPES = "float32", "bfloat16"  # of the adapters' numbers
PEERS = "llama.cpp", "vLLM"


@dataclass(frozen=True)
class Case:
    """Clients that each send a prompt of so many tokens and get so many back.

    ``adapters``: each has one of its own, whose numbers have this dtype.
    """

    name: str
    clients: int
    prompt: int
    drawn: int
    adapters: str = ""

    @property
    def tokens(self) -> int:
        """The tokens that are counted: the prompt's, if only one is drawn."""
        return self.clients * (self.prompt if self.drawn == 1 else self.drawn)


def cases(prompt: int, drawn: int) -> list[Case]:
    return [
        Case("a prompt", 1, prompt, 1),
        Case("one stream", 1, 16, drawn),
        Case(f"{CLIENTS} clients", CLIENTS, 16, drawn),
        *(Case(f"{CLIENTS} clients with {CLIENTS} adapters in {d}", CLIENTS, 16, drawn, d) for d in DTYPES),
    ]


class Endless(Completion):
    """A completion that goes on at the end of a text."""

    def take(self, token: int, ends: frozenset[int]) -> bool:
        return super().take(token, frozenset())


def prompts(case: Case, vocabulary: int, choose: random.Random) -> list[list[int]]:
    return [[choose.randrange(vocabulary) for _ in range(case.prompt)] for _ in range(case.clients)]


def write_adapters(model: Path, directory: Path) -> None:
    """Write one LoRA with random numbers for each client and dtype, as a pool over the model reads it."""
    from transformers import AutoConfig, AutoModelForCausalLM

    made = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(model))
    adapted = lo.adapt(made, lo.LoRA(RANK), quantize=None)
    for i in range(CLIENTS):
        for layer in adapted.modules():
            if isinstance(layer, lo.Linear) and isinstance(layer.up, torch.Tensor):
                torch.nn.init.normal_(layer.up, std=1e-3)  # in float32 again
        for name in DTYPES:
            for parameter in lo.adapter_parameters(adapted):
                parameter.data = parameter.data.to(getattr(torch, name))
            lo.save_adapter(adapted, directory / f"{i}-{name}")


def timed(run: Callable[[], float | None], processor: list[float]) -> float:
    """The seconds of a call; appends its seconds of processor time, which a call in another process returns."""
    began, busy = time.perf_counter(), time.process_time()
    elsewhere = run()
    processor.append(time.process_time() - busy if elsewhere is None else elsewhere)
    return time.perf_counter() - began


def ours(service: Service, case: Case, choose: random.Random) -> Callable[[], None]:
    """Run the case by the engine."""

    def run() -> None:
        rows = [
            Endless(
                f"{i}-{case.adapters}" if case.adapters else None, ids, decode=service.tokenizer.decode,
                on_text=lambda text: None, max_tokens=case.drawn, temperature=0,
            )
            for i, ids in enumerate(prompts(case, service.vocabulary, choose))
        ]  # fmt: skip
        service.engine.submit(rows)
        for row in rows:
            row.done.result()

    return run


def llama_cpp(file: Path, threads: int) -> Any:
    """A server of llama.cpp for as many clients."""
    xllamacpp: Any = import_module("xllamacpp")

    made = xllamacpp.CommonParams()
    made.model.path = str(file)
    made.n_ctx, made.n_parallel, made.cache_prompt, made.cache_ram_mib = 1024 * CLIENTS, CLIENTS, False, 0
    made.cpuparams.n_threads = made.cpuparams_batch.n_threads = threads
    made.verbosity = 0
    return xllamacpp.Server(made)


def theirs(server: Any, case: Case, vocabulary: int, choose: random.Random) -> Callable[[], None]:
    """Run the case by llama.cpp."""
    senders = ThreadPoolExecutor(CLIENTS)

    def complete(ids: list[int]) -> None:
        asked = {"prompt": ids, "n_predict": case.drawn, "temperature": 0, "ignore_eos": True, "cache_prompt": False}
        answer = server.handle_completions(asked)
        drawn = answer["usage"]["completion_tokens"]
        if drawn != case.drawn:
            raise RuntimeError(f"llama.cpp drew {drawn} tokens in place of {case.drawn}")

    def run() -> None:
        list(senders.map(complete, prompts(case, vocabulary, choose)))

    return run


def vllm(python: Path, model: Path, threads: int) -> subprocess.Popen[str]:
    """A process with vLLM."""
    command = [str(python), str(Path(__file__).with_name("vllm_worker.py")), str(model.resolve()), str(threads)]
    return subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=tempfile.gettempdir()
    )


def vllms(
    worker: subprocess.Popen[str], case: Case, vocabulary: int, choose: random.Random
) -> Callable[[], float | None]:
    """Run the case by vLLM."""
    assert worker.stdin is not None and worker.stdout is not None
    to, answers = worker.stdin, worker.stdout

    def run() -> float:
        print(json.dumps([prompts(case, vocabulary, choose), case.drawn]), file=to, flush=True)
        answer = answers.readline()
        if not answer:
            raise RuntimeError(f"vLLM's process ended with {worker.wait()}")
        return float(answer)

    return run


def measure(
    model: Path,
    gguf: Path | None,
    python: Path | None,
    *,
    head: bool,
    prompt: int,
    drawn: int,
    threads: int,
    seconds: float,
) -> Table:
    """Measure all cases for at least ``seconds`` each."""
    with tempfile.TemporaryDirectory() as scratch, torch_threads(threads):
        write_adapters(model, Path(scratch))
        service = load(model, scratch, head=head, prefix_bytes=0, max_batch=CLIENTS)
        asked = cases(prompt, drawn)
        runs: dict[str, Callable[[], float | None]] = {}
        choose = random.Random(0)
        peer = None if gguf is None else llama_cpp(gguf, threads)
        worker = None if python is None else vllm(python, model, threads)
        for case in asked:
            runs[case.name] = ours(service, case, choose)
            if peer is not None and not case.adapters:
                runs[f"{case.name}, {PEERS[0]}"] = theirs(peer, case, service.vocabulary, choose)
            if worker is not None and not case.adapters:
                runs[f"{case.name}, {PEERS[1]}"] = vllms(worker, case, service.vocabulary, choose)
        for run in runs.values():
            run()  # reads adapters, lays out weights
        processor: dict[str, list[float]] = {name: [] for name in runs}
        samples = interleave({name: partial(timed, run, processor[name]) for name, run in runs.items()}, seconds)
        service.engine.close()
        if worker is not None:
            worker.communicate()
    text = f"{model.name}, {threads} threads; medians of at least {min(map(len, samples.values()))} samples."
    return table(asked, samples, processor, text)


def table(
    asked: Sequence[Case],
    samples: Mapping[str, Sequence[float]],
    processor: Mapping[str, Sequence[float]],
    text: str,
) -> Table:
    """Tokens a second and ratios, by medians; clients with adapters are compared with clients without."""
    lines = []
    for case in asked:
        without = next(other for other in asked if other.clients == case.clients and not other.adapters)
        others = {peer: f"{case.name}, {peer}" for peer in PEERS}
        if case.adapters:
            others = {"no adapters": without.name}
        rate, cells = case.tokens / statistics.median(samples[case.name]), []
        for who, other in others.items():
            if other in samples:
                against = case.tokens / statistics.median(samples[other])
                busy = statistics.median(processor[other]) / statistics.median(processor[case.name])
                cells.append([f"{who} {against:.1f}", f"{rate / against:.2f}x", f"{busy:.2f}x"])
        lines += [[case.name, f"{rate:.1f}", *of_peer] for of_peer in cells or [[""] * 3]]
    return Table("Serving", ["", "tokens/s", "against", "ratio", "by processor time"], lines, text)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m lowrank_ops.bench.cases.bench_serve", description=str(__doc__).split(": ")[1]
    )
    parser.add_argument("model", type=Path, metavar="MODEL_DIR")
    parser.add_argument("--gguf", type=Path, metavar="FILE", help="the model for llama.cpp; needs xllamacpp")
    parser.add_argument(
        "--vllm", type=Path, metavar="PYTHON", help="the interpreter of an environment with vLLM for the CPU"
    )
    parser.add_argument("--quantize-head", action="store_true", help="the head and the embeddings in NF4 too")
    parser.add_argument("--prompt", type=int, default=256, help="tokens of the long prompt (default %(default)s)")
    parser.add_argument("--drawn", type=int, default=24, help="tokens that each client gets (default %(default)s)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--seconds", type=float, default=10, help="for each case (default %(default)s)")
    asked = parser.parse_args(arguments)
    if asked.gguf is not None and not asked.gguf.is_file():
        parser.error(f"--gguf must be a file, got {asked.gguf}")
    for name in ("prompt", "drawn", "threads"):
        if getattr(asked, name) < 2 - (name == "threads"):
            parser.error(f"--{name} must be at least {2 - (name == 'threads')}, got {getattr(asked, name)}")
    print(
        measure(
            asked.model, asked.gguf, asked.vllm, head=asked.quantize_head, prompt=asked.prompt, drawn=asked.drawn,
            threads=asked.threads, seconds=asked.seconds,
        )
    )  # fmt: skip
    return 0


if __name__ == "__main__":
    sys.exit(main())
