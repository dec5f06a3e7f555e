"""Commands killed at random steps, or whose disk is full or read-only: the old state or none, and a start again ends.

``LOWRANK_OPS_FAULTS`` sets the number of kills; `make test-faults` has more.
"""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from file_faults import killed_at, small_disk

pytest.importorskip("transformers")

from transformers import LlamaConfig, LlamaForCausalLM, modeling_utils

import lowrank_ops as lo
from lowrank_ops.__main__ import main
from lowrank_ops.adapters.versions import read_files
from lowrank_ops.commands import _data
from lowrank_ops.preference import load_reward_model

KILLS = int(os.environ.get("LOWRANK_OPS_FAULTS", 2))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of eight layers' weights, in several files."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    folder = tmp_path_factory.mktemp("llama")
    config = LlamaConfig(vocab_size=32, **sizes)
    LlamaForCausalLM(config).save_pretrained(folder, max_shard_size="6kB")
    return folder


def contents(folder: Path) -> dict[str, Any]:
    return {path.name: content(path) for path in folder.iterdir() if path.is_file()}


def content(path: Path) -> Any:
    """The bytes of a file; of safetensors the header without digests, and the numbers: metadata come in any order."""
    data = path.read_bytes()
    if path.suffix != ".safetensors":
        return data
    end = 8 + int.from_bytes(data[:8], "little")
    return json.loads(re.sub(rb"[0-9a-f]{64}", b"", data[8:end])), data[end:]


def left_over(folder: Path) -> list[Path]:
    """The scratch folders in it."""
    return [path for path in folder.iterdir() if path.name.endswith(".new")]


def run(*arguments: object) -> None:
    assert main(list(map(str, arguments))) == 0


def dice() -> random.Random:
    seed = random.randrange(1 << 30)
    print("seed", seed)
    return random.Random(seed)


def test_precompute_goes_on_after_kills(model: Path, tmp_path: Path) -> None:
    pick, out = dice(), tmp_path / "out"
    arguments = ("precompute", model, "--rank", 3, "--device", "cpu", "--out")
    run(*arguments, tmp_path / "whole")
    wanted = contents(tmp_path / "whole")
    for _ in range(KILLS):
        shutil.rmtree(out, ignore_errors=True)
        for _ in range(pick.randrange(1, 4)):  # a run that goes on is killed, too
            killed_at(pick.randrange(150), lambda: run(*arguments, out))
        for name, held in contents(out).items() if out.exists() else ():
            if name.endswith(".safetensors"):
                assert held == wanted[name]
        run(*arguments, out)
        assert contents(out) == wanted and not left_over(out)
    (out / ".index.json.0123abcd.new").mkdir()  # of a process that was killed after its last rename
    run(*arguments, out)
    assert not left_over(out)


def test_training_of_rewards_leaves_one_model_or_none(small_model: str, tmp_path: Path) -> None:
    pairs = tmp_path / "pairs.jsonl"
    rows = [{"prompt": f"say {i}", "chosen": f"good {i}", "rejected": f"bad {i}"} for i in range(8)]
    pairs.write_text("".join(json.dumps(row) + "\n" for row in rows))

    def train(out: Path, seed: int, rank: int) -> None:
        options = ("--steps", 1, "--rank", rank, "--seed", seed, "--batch-size", 4, "--holdout", 0.25, "--json")
        run("reward", pairs, "--model", small_model, "--out", out, *options)

    train(tmp_path / "old", 0, 2)
    train(tmp_path / "new", 1, 3)
    wanted = [contents(tmp_path / name) for name in ("old", "new")]
    pick, out = dice(), tmp_path / "out"
    for _ in range(KILLS):
        shutil.rmtree(out, ignore_errors=True)
        shutil.copytree(tmp_path / "old", out)
        killed_at(pick.randrange(40), lambda: train(out, 1, 3))
        read_files(out)
        try:
            load_reward_model(_data.load_transformer(small_model)[0], out)
        except ValueError as error:
            assert "belongs to another version of the adapter" in str(error)
        else:
            files = {name: held for name, held in contents(out).items() if name in wanted[0]}
            assert files in wanted or _one_version(out, wanted)
        train(out, 1, 3)
        assert contents(out) == wanted[1] and not left_over(out)


def _one_version(out: Path, wanted: list[dict[str, Any]]) -> bool:
    """The tensors and the head are of one version, whose configuration waits under its own name."""
    tensors = {name: content(out / name) for name in ("adapter_model.safetensors", "reward_head.safetensors")}
    return any(all(held[name] == value for name, value in tensors.items()) for held in wanted)


def test_a_merged_model_is_saved_whole(model: Path, tmp_path: Path) -> None:
    def merged(scale: float) -> torch.nn.Module:
        loaded = lo.adapt(LlamaForCausalLM.from_pretrained(model), lo.LoRA(2))
        with torch.no_grad():
            for parameter in lo.adapter_parameters(loaded):
                parameter.fill_(scale)
        return lo.merge(loaded)

    one, other = merged(0.1), merged(0.2)
    for folder, made in (("old", one), ("new", other)):
        made.save_pretrained(tmp_path / folder, max_shard_size="6kB")
    wanted = [contents(tmp_path / name) for name in ("old", "new")]
    assert wanted[0] != wanted[1] and len(wanted[0]) > 4 and "quantization_config" not in str(wanted[0]["config.json"])
    out, step, seen = tmp_path / "out", 0, set()

    def save() -> None:
        other.save_pretrained(out, max_shard_size="6kB")

    while True:
        shutil.rmtree(out, ignore_errors=True)
        shutil.copytree(tmp_path / "old", out)
        killed = killed_at(step, save, (modeling_utils, "safe_save_file"))
        if (out / "config.json").exists():
            seen.add(wanted.index(contents(out)))
        save()
        assert contents(out) == wanted[1] and not left_over(tmp_path)
        if not killed:
            break
        step += 3
    assert seen == {0, 1} and step > 10


COMMANDS: dict[str, Callable[[Path], tuple[object, ...]]] = {
    "quantize": lambda model: ("quantize", model, "--out"),
    "precompute": lambda model: ("precompute", model, "--rank", 16, "--device", "cpu", "--out"),
}


@pytest.mark.parametrize("command", COMMANDS)
def test_a_full_and_a_read_only_disk(
    command: str, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = COMMANDS[command](model)
    run(*arguments, tmp_path / "whole")
    wanted = contents(tmp_path / "whole")

    def refused(out: Path, why: str) -> None:
        capsys.readouterr()
        assert main([str(part) for part in (*arguments, out)]) == 1
        said = capsys.readouterr().err
        assert why in said and str(out) in said and "Traceback" not in said

    with small_disk(tmp_path / "disk", "24k") as disk:
        out = disk / "out"
        refused(out, "No space left on device")
        left = contents(out)
        assert "config.json" not in left
        assert all(wanted[name] == held for name, held in left.items() if name.endswith(".safetensors"))
        subprocess.run(["mount", "-o", "remount,size=4m", disk], check=True)
        run(*arguments, out)
        same = {name: held for name, held in contents(out).items() if name != "quantization.json"}
        assert same == {name: held for name, held in wanted.items() if name != "quantization.json"}
        shutil.rmtree(out)
        out.mkdir()
        subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
        refused(out, "Read-only file system")
        assert not contents(out)
        refused(disk / "another", "Read-only file system")
