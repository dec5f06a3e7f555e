"""Damaged and hostile files: refused with an error that names the file, or read as what they say; never worse."""

from __future__ import annotations

import json
import os
import random
import resource
import struct
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from models import plain, snapshot
from torch import nn

import lowrank_ops as lo
from lowrank_ops.adapters.peft_files import CONFIG, TENSORS
from lowrank_ops.formats import Moment, Moments
from lowrank_ops.svd.store import FactorStore

ROUNDS = int(os.environ.get("LOWRANK_OPS_FAULTS", 150))  # make test-faults has more
SECONDS, MEMORY = 5.0, 512 << 20  # that one input may take
DEEP = "[" * 100_000 + "]" * 100_000
VALUES: list[Any] = [
    None, True, -1, 0, 1 << 70, 1e308, float("nan"), "", "x", "../../etc/passwd", [], {}, [[]], {"": 0}, "\ud83d", [None],
]  # fmt: skip


def damaged(data: bytes, pick: random.Random) -> bytes:
    """The bytes with some bits turned, a part cut out, put in twice or made of noise, or another length of the header."""
    made = bytearray(data)
    kind = pick.randrange(6)
    at = pick.randrange(len(made))
    if kind == 0:
        for _ in range(pick.choice((1, 1, 8))):
            made[pick.randrange(len(made))] ^= 1 << pick.randrange(8)
    elif kind == 1:
        del made[at:]
    elif kind == 2:
        del made[at : at + pick.randrange(1, 64)]
    elif kind == 3:
        made[at:at] = made[at : at + 64]
    elif kind == 4:
        made[at : at + 16] = pick.randbytes(16)
    else:
        made[:8] = struct.pack("<Q", pick.choice((0, 1, len(made), 1 << 31, 1 << 40, (1 << 64) - 1)))
    return bytes(made)


def changed(value: Any, pick: random.Random) -> Any:
    """A JSON value with one part of it replaced by a value of another kind."""
    if isinstance(value, dict) and value and pick.random() < 0.9:
        key = pick.choice(sorted(value))
        if pick.random() < 0.1:
            return {**{k: v for k, v in value.items() if k != key}, str(pick.choice(VALUES)): value[key]}
        return value | {key: changed(value[key], pick)}
    if isinstance(value, list) and value and pick.random() < 0.7:
        at = pick.randrange(len(value))
        return [*value[:at], changed(value[at], pick), *value[at + 1 :]]
    if isinstance(value, str) and value[:1] == "{":
        return json.dumps(changed(json.loads(value), pick))
    return pick.choice(VALUES)


def damage(path: Path, pick: random.Random) -> None:
    data = path.read_bytes()
    if path.suffix == ".json":
        if pick.random() < 0.7:
            data = json.dumps(changed(json.loads(data), pick)).encode()
        elif pick.random() < 0.1:
            data = DEEP.encode()
        else:
            data = damaged(data, pick)
    elif pick.random() < 0.5 and path.suffix == ".safetensors":
        size = int.from_bytes(data[:8], "little")
        header = json.dumps(changed(json.loads(data[8 : 8 + size]), pick)).encode()
        data = struct.pack("<Q", len(header)) + header + data[8 + size :]
    else:
        data = damaged(data, pick)
    path.write_bytes(data)


def adapters(folder: Path) -> list[tuple[str, Callable[[], nn.Module]]]:
    """Adapters of several kinds, and whole states, in folders; each with a model that takes it."""
    kinds: list[tuple[str, lo.LoRA | lo.LoRAXS | lo.SVFT, str]] = [
        ("lora", lo.LoRA(4), "auto"),
        ("dora", lo.LoRA(2, dora=True), "auto"),
        ("xs", lo.LoRAXS(4), "stored"),
        ("svft", lo.SVFT("random", entries=2), "stored"),
        ("recipe", lo.LoRAXS(4), "recipe"),
    ]
    made: list[tuple[str, Callable[[], nn.Module]]] = []
    for name, kind, factors in kinds:
        model = lo.adapt(plain(), kind, quantize=None)
        lo.save_adapter(model, folder / name, factors=factors)
        made.append((name, lambda: lo.adapt(plain(), None, quantize=None)))
    for name, writer in (("model.safetensors", None), ("pytorch_model.bin", torch.save)):
        (folder / name).mkdir()
        state = lo.adapt(plain(), lo.LoRA(4)).state_dict()
        if writer is None:
            from safetensors.torch import save_file

            save_file(state, folder / name / name)
        else:
            writer(state, folder / name / name)
        made.append((name, lambda: lo.adapt(plain(), None)))
    return made


def attempt(what: str, action: Callable[[], object], where: Path) -> bool:
    """Run an action on damaged files; True if it took them. It may refuse them by name, in little time and memory."""
    began, peak = time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            action()
        taken = True
    except (ValueError, OSError, TypeError) as error:
        # A field of another type, in the configuration of a layer, is a TypeError that names the layer.
        assert not isinstance(error, TypeError) or str(error).startswith("layer "), what
        named = (str(where.parent), where.name, "layer ", "the file ", "a: ")
        assert any(name in str(error) for name in named), f"{what}: {error}"
        taken = False
    assert time.process_time() - began < SECONDS, what
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak) * 1024 < MEMORY, what
    return taken


def fuzz(folder: Path, rounds: int, seed: int) -> None:
    print("seed", seed)
    cases = adapters(folder)
    kept = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    weight = torch.randn(6, 5)
    store = FactorStore(folder / "store")
    factors = store.file(store.save(weight, lo.truncated_svd(weight, 3)))
    moments = folder / "moments.safetensors"
    x = torch.randn(8, 5)
    Moments({"a": Moment.of(x, weight)}).save(moments)
    kept |= {path: path.read_bytes() for path in (factors, moments)}
    taken = 0
    for turn in range(rounds):
        pick = random.Random(seed + turn)
        place = pick.randrange(len(cases) + 2)
        what = f"seed {seed + turn}"
        if place == len(cases):
            damage(factors, pick)
            taken += attempt(what, lambda: store.find(weight, 3), factors)
            factors.write_bytes(kept[factors])
            continue
        if place == len(cases) + 1:
            damage(moments, pick)
            taken += attempt(what, lambda: [m.check(weight, "a") for m in Moments.load(moments).values()], moments)
            moments.write_bytes(kept[moments])
            continue
        name, make = cases[place]
        path = pick.choice(sorted(p for p in (folder / name).iterdir()))
        damage(path, pick)
        model = make()
        before = snapshot(model)
        took = attempt(what, lambda model=model, name=name: lo.load_adapter(model, folder / name), path)  # type: ignore[misc]
        if not took:
            assert repr(snapshot(model)[0]) == repr(before[0]), what
        taken += took
        path.write_bytes(kept[path])
    print(f"{rounds} inputs, {taken} taken as they are")
    assert taken < rounds


def test_damaged_files_are_refused_by_name(tmp_path: Path) -> None:
    fuzz(tmp_path, ROUNDS, random.randrange(1 << 30))


@pytest.mark.parametrize("name", [CONFIG, TENSORS])
@pytest.mark.parametrize("kind", ["pipe", "folder", "loop", "dangling", "device", "empty", "huge"])
def test_what_is_no_file_is_refused(kind: str, name: str, tmp_path: Path) -> None:
    directory = tmp_path / "a"
    lo.save_adapter(lo.adapt(plain(), lo.LoRA(2)), directory)
    path = directory / name
    path.unlink()
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    elif kind in ("loop", "dangling", "device"):
        path.symlink_to({"loop": name, "dangling": "gone", "device": "/dev/zero"}[kind])
    else:
        path.touch()
        os.truncate(path, 0 if kind == "empty" else 1 << 40)  # a sparse file
    model = lo.adapt(plain(), None)
    assert not attempt(kind, lambda: lo.load_adapter(model, directory), path)


def test_a_root_is_not_left(tmp_path: Path) -> None:
    secret, root = tmp_path / "secret", tmp_path / "root"
    lo.save_adapter(lo.adapt(plain(), lo.LoRA(2)), secret)
    root.mkdir()
    (root / "linked").symlink_to(secret)
    (root / "files").mkdir()
    for name in (CONFIG, TENSORS):
        (root / "files" / name).symlink_to(secret / name)
    pool = lo.AdapterPool(lo.adapt(plain(), None), 1 << 20, root=root)
    for name in ("linked", "files", "../secret"):
        with pytest.raises(ValueError, match="source must be inside"):
            pool.load("a", root / name)
