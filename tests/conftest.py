"""The devices that the same test bodies run on, poisoned memory, CUDA kernels on the host, the demo's task made small."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import arm_machine
import pytest
import torch
from serving_helpers import CONTEXT, write_adapters

import lowrank_ops as lo
from lowrank_ops.commands import _data
from lowrank_ops.ops import _cpu

ROOT = Path(__file__).resolve().parents[1]
SANITIZE = os.environ.get("LOWRANK_OPS_SANITIZE", "")  # set by `make test-sanitized`
INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") not in ("", "0")
if INTERPRETED:
    DEVICES = ["interpret"]
else:
    # A listing of the tests names the GPU tests too.
    DEVICES = ["cpu", "cuda"] if torch.cuda.is_available() or "--collect-only" in sys.argv else ["cpu"]

if INTERPRETED:
    from triton.runtime import interpreter

    # The interpreter replaces the language's functions at every call of a device function: once a launch is enough, and
    # twice as fast.
    replaced: set[tuple[bool, ...]] = set()
    launch_kernel, replace_language = interpreter.GridExecutor.__call__, interpreter._patch_lang

    def launch_and_forget(self: Any, *args: Any, **kwargs: Any) -> None:
        replaced.clear()
        launch_kernel(self, *args, **kwargs)

    def replace_language_once(fn: Any) -> Any:
        seen = tuple(
            any(value is lang for value in fn.__globals__.values()) for lang in (interpreter.tl, interpreter.tl.core)
        )
        if seen in replaced:
            return interpreter._LangPatchScope()
        replaced.add(seen)
        return replace_language(fn)

    interpreter.GridExecutor.__call__, interpreter._patch_lang = launch_and_forget, replace_language_once


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if SANITIZE:  # no other test calls the kernels that were built so
        items[:] = [item for item in items if "isa" in getattr(item, "fixturenames", ())]
    for item in items:
        if "device" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.interpret)


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> Iterator[torch.device]:
    """cpu: the C++ kernels; cuda: Triton and CUDA on a GPU; interpret: Triton on CPU tensors, in its own process."""
    if request.param == "interpret":
        with lo.implementation("triton"):
            yield torch.device("cpu")
    else:
        yield torch.device(request.param)


@pytest.fixture(scope="session")
def arm() -> Iterator[dict[str, arm_machine.Machine]]:
    """For each instruction set of ARM, the compiled side on an emulated processor on which it is the best."""
    server = arm_machine.build()
    machines = {
        isa: arm_machine.Machine(arm_machine.emulated(server, name)) for isa, name in arm_machine.PROCESSORS.items()
    }
    yield machines
    for machine in machines.values():
        machine.close()


@pytest.fixture(scope="session")
def sanitized() -> Iterator[arm_machine.Machine]:
    """The compiled side on this machine, with the sanitizers that LOWRANK_OPS_SANITIZE names; a report ends it."""
    server = arm_machine.build_sanitized(SANITIZE, os.environ.get("LOWRANK_OPS_ISA", ""))
    machine = arm_machine.Machine([str(server)], ASAN_OPTIONS="detect_leaks=0", TSAN_OPTIONS="halt_on_error=1")
    threads = torch.get_num_threads()
    torch.set_num_threads(3 if SANITIZE == "thread" else 1)
    yield machine
    torch.set_num_threads(threads)
    machine.close()


def instruction_sets() -> list[str]:
    if _cpu.import_error():
        return []
    if not SANITIZE:
        return [*_cpu.module().isas(), *arm_machine.PROCESSORS]
    named = os.environ.get("LOWRANK_OPS_ISA")
    return [named] if named else _cpu.module().isas()


@pytest.fixture(params=instruction_sets())
def isa(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Force each CPU instruction set of this machine in turn; ARM runs on emulated processors."""
    if SANITIZE:
        machine = request.getfixturevalue("sanitized")
        machine.set_isa(request.param)
        machine.replace_module(monkeypatch)
        yield request.param
        return
    if request.param in arm_machine.PROCESSORS:
        request.getfixturevalue("arm")[request.param].replace_module(monkeypatch)
        yield request.param
        return
    before = _cpu.isa()
    _cpu.module().set_isa(request.param)
    yield request.param
    _cpu.module().set_isa(before)


@pytest.fixture
def dtypes() -> tuple[torch.dtype, ...]:
    """The dtypes to test besides float32; the interpreter computes bfloat16 wrongly, so the launchers refuse it there."""
    return (torch.float16,) if INTERPRETED else (torch.bfloat16, torch.float16)


@pytest.fixture(autouse=True)
def no_wait_for_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Do not flush files: no test takes the power away, and the disk may be busy with other things."""
    monkeypatch.setattr(os, "fsync", lambda file: None)


@pytest.fixture(autouse=True)
def poison(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fill the package's uninitialised memory with NaN, so that a value that no kernel wrote shows."""

    def fill(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.device.type == "meta" or torch.compiler.is_compiling():
            return tensor
        return tensor.fill_(float("nan")) if tensor.is_floating_point() else tensor.fill_(85)

    for owner, name in ((torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty")):
        original = getattr(owner, name)

        def poisoned(*args, _original=original, **kwargs):  # type: ignore[no-untyped-def]
            tensor = _original(*args, **kwargs)
            return fill(tensor) if type(tensor) is torch.Tensor else tensor

        monkeypatch.setattr(owner, name, poisoned)


@pytest.fixture(scope="session")
def emulator(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Path of the test driver, built once: csrc/cuda/*.cu as plain C++, with sanitizers."""
    if shutil.which("g++") is None or platform.system() != "Linux":
        pytest.skip("emulating CUDA needs g++ on Linux")
    emulation = ROOT / "tests" / "emulation"
    folder = tmp_path_factory.mktemp("emulation")
    command = ["g++", "-std=c++17", "-O2", "-g1", "-Wall", "-Wextra", "-Wno-unknown-pragmas"]
    command += ["-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer"]
    # nvcc contracts a * b + c too, unless the source uses intrinsics.
    command += ["-ffp-contract=fast", *(["-mfma"] if platform.machine() == "x86_64" else [])]
    command += ["-DLOWRANK_EMULATE", f"-I{ROOT / 'csrc'}", f"-I{emulation}"]
    jobs = []
    for source in [emulation / "main.cpp", emulation / "defects.cu", *sorted((ROOT / "csrc" / "cuda").glob("*.cu"))]:
        target = folder / f"{source.stem}.o"
        compile_one = [*command, "-x", "c++", "-c", str(source), "-o", str(target)]
        jobs.append((target, subprocess.Popen(compile_one, stderr=subprocess.PIPE, text=True)))
    for _, job in jobs:
        _, errors = job.communicate()
        assert job.returncode == 0, errors
    driver = folder / "driver"
    link = ["g++", "-fsanitize=address,undefined", *(str(target) for target, _ in jobs), "-o", str(driver), "-ldl"]
    subprocess.run(link, check=True)
    return driver


@pytest.fixture(scope="session")
def pairs() -> list[_data.Pair]:
    return _data.load_pairs()


@pytest.fixture(scope="session")
def small_model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A directory with a random BERT of odd sizes and MiniLM's tokenizer."""
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    tokenizer = _data.load_model()[1]
    config = BertConfig(
        vocab_size=len(tokenizer), hidden_size=36, num_hidden_layers=2, num_attention_heads=3, intermediate_size=51,
        max_position_embeddings=40,
    )  # fmt: skip
    directory = tmp_path_factory.mktemp("encoder")
    BertModel(config).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return str(directory)


@pytest.fixture(scope="session")
def causal_model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A random Llama of odd sizes whose tokens are bytes, so that generated text also holds incomplete characters."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {letter: i for i, letter in enumerate([*letters, "<end>"])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=len(vocabulary), hidden_size=36, num_hidden_layers=2, num_attention_heads=6, num_key_value_heads=2,
        intermediate_size=51, max_position_embeddings=CONTEXT, eos_token_id=256, bos_token_id=None, pad_token_id=None,
        initializer_range=0.4,
    )  # fmt: skip
    directory = tmp_path_factory.mktemp("causal")
    LlamaForCausalLM(config).save_pretrained(directory)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>").save_pretrained(directory)
    return str(directory)


@pytest.fixture(scope="session")
def encoder_adapters(small_model: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    root = tmp_path_factory.mktemp("encoder-adapters")
    return root, write_adapters(small_model, root, 16)


@pytest.fixture(scope="session")
def causal_adapters(causal_model: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    root = tmp_path_factory.mktemp("causal-adapters")
    return root, write_adapters(causal_model, root, 16)


@pytest.fixture
def few_pairs(pairs: list[_data.Pair], monkeypatch: pytest.MonkeyPatch) -> None:
    """The command on a tenth of its data."""
    monkeypatch.setattr(_data, "load_pairs", lambda: pairs[::10])
    monkeypatch.setattr(_data, "CANDIDATES", 60)
