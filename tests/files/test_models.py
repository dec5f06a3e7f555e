"""Directories of whole models: after a kill the old one, none, or the new one; and a start again mends it."""

from __future__ import annotations

import os
import random
import shutil
from pathlib import Path

import pytest
import torch
from file_faults import killed_at, small_disk

pytest.importorskip("transformers")

from lowrank_ops.adapters.config import NF4Config
from lowrank_ops.files import exclusive
from lowrank_ops.integrations.transformers_files import save_whole
from lowrank_ops.integrations.transformers_quantize import quantize_directory

SHARDS = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors", "model.safetensors.index.json"]


def save(directory: Path, version: str, names: list[str]) -> None:
    with save_whole(directory) as scratch:
        for name in (*names, "config.json"):
            (scratch / name).write_text(version)


def read(directory: Path) -> str:
    """The version that the directory has, "" for no model; fails if it has parts of several."""
    if not (directory / "config.json").exists():
        return ""
    found = {path.read_text() for path in directory.iterdir() if path.name != "notes.txt"}
    assert len(found) == 1, found
    return found.pop()


@pytest.mark.parametrize("old", [None, SHARDS, ["model.safetensors"]], ids=["none", "shards", "one"])
def test_a_kill_leaves_one_model_or_none(old: list[str] | None, tmp_path: Path) -> None:
    step, seen = 0, set()
    while True:
        parent = tmp_path / str(step)
        directory = parent / "model"
        directory.mkdir(parents=True)
        (directory / "notes.txt").write_text("kept")
        if old is not None:
            save(directory, "old", old)
        killed = killed_at(step, lambda directory=directory: save(directory, "new", SHARDS))  # type: ignore[misc]
        seen.add(read(directory))
        if not killed:
            break
        save(directory, "again", ["model.safetensors"])
        assert read(directory) == "again" and (directory / "notes.txt").read_text() == "kept"
        assert [path.name for path in parent.iterdir()] == ["model"]
        shutil.rmtree(parent)
        step += 3
    assert seen == ({"", "new"} if old is None else {"old", "", "new"})


def test_a_full_disk_leaves_the_old_model(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", "64k") as disk:
        save(disk / "model", "old", SHARDS)
        with pytest.raises(OSError, match="model was not written and is as it was before: .*No space left"):
            save(disk / "model", "new" * 100_000, SHARDS)
        assert read(disk / "model") == "old" and len(list(disk.iterdir())) == 1


def source(folder: Path) -> Path:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(vocab_size=32, **sizes)).save_pretrained(folder, max_shard_size="10kB")
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir() if p.is_file() and p.name != "quantization.json"}


def quantize_and_kill(tmp_path: Path, kills: int, seed: int) -> None:
    """Quantise into a directory that has a model of another block size, killed at random steps; then go on."""
    print("seed", seed)
    pick, model, out = random.Random(seed), source(tmp_path / "model"), tmp_path / "out"
    quantize_directory(model, tmp_path / "old", NF4Config(block_size=128))
    quantize_directory(model, tmp_path / "new", NF4Config(block_size=64))
    wanted = contents(tmp_path / "old"), contents(tmp_path / "new")
    assert len(list(out.parent.glob("new/*.safetensors"))) > 2
    for _ in range(kills):
        shutil.rmtree(out, ignore_errors=True)
        shutil.copytree(tmp_path / "old", out)
        killed_at(pick.randrange(250), lambda: quantize_directory(model, out, NF4Config(block_size=64)))
        if (out / "config.json").exists():
            assert contents(out) in wanted
        quantize_directory(model, out, NF4Config(block_size=64))
        assert contents(out) == wanted[1]
        assert not [path for path in out.iterdir() if path.name.endswith(".new")]


def test_quantize_goes_on_after_a_kill(tmp_path: Path) -> None:
    kills = int(os.environ.get("LOWRANK_OPS_FAULTS", 2))  # make test-faults has more
    quantize_and_kill(tmp_path, kills, random.randrange(1 << 30))


def test_a_complete_directory_is_tidied(tmp_path: Path) -> None:
    model, out = source(tmp_path / "model"), tmp_path / "out"
    quantize_directory(model, out, NF4Config())
    before = set(out.iterdir())
    (out / ".quantization.json.0123abcd.new").mkdir()  # of a process that was killed after its last rename
    quantize_directory(model, out, NF4Config())
    assert set(out.iterdir()) == before


def test_two_do_not_quantize_into_one_directory(tmp_path: Path) -> None:
    model, out = source(tmp_path / "model"), tmp_path / "out"
    out.mkdir()
    with exclusive(out), pytest.raises(OSError, match="out is being written by another process or thread"):
        quantize_directory(model, out, NF4Config())
    assert not list(out.iterdir())
