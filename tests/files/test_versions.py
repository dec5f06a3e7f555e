"""The two files of an adapter: one version for every reader, whatever happens to the writer."""

from __future__ import annotations

import errno
import json
import os
import random
import signal
import threading
import time
from pathlib import Path

import pytest
import torch
from file_faults import killed_at, small_disk
from models import plain

import lowrank_ops as lo
from lowrank_ops import files
from lowrank_ops.adapters import versions
from lowrank_ops.adapters.peft_files import CONFIG, TENSORS
from lowrank_ops.adapters.versions import read_files, write_files

FILES = {CONFIG, TENSORS}


def save(directory: Path, version: int, width: int = 4) -> None:
    tensors = {
        "base_model.model.a.lora_A.weight": torch.full((2, width), float(version)),
        "base_model.model.a.lora_B.weight": torch.full((3, 2), float(version)),
    }
    write_files(directory, tensors, {"peft_type": "LORA", "r": 2, "lora_alpha": version}, {"format": "pt"})


def version(directory: Path) -> int:
    """The version that a reader gets; fails if the configuration has another one than the tensors."""
    config, contents, _ = read_files(directory)
    found = {config["lora_alpha"], *(float(t.unique()) for t in contents.layers["a"].values())}
    assert len(found) == 1, f"a mixture of versions: {found}"
    return int(found.pop())


def names(directory: Path) -> set[str]:
    return {path.name for path in directory.iterdir()}


def test_a_kill_at_any_step_leaves_the_old_or_the_new_adapter(tmp_path: Path) -> None:
    for old in (None, 1):
        step, seen = 0, set()
        while True:
            directory = tmp_path / f"{old}.{step}"
            if old is not None:
                save(directory, old)
            if not killed_at(step, lambda directory=directory: save(directory, 2)):  # type: ignore[misc]
                break
            try:
                seen.add(version(directory))
            except FileNotFoundError:
                assert old is None
                seen.add(0)
            save(directory, 3)  # mends
            assert version(directory) == 3 and names(directory) == FILES
            step += 1
        assert seen == {old or 0, 2} and step > 10


def test_a_configuration_that_did_not_change_is_not_written_again(tmp_path: Path) -> None:
    save(tmp_path, 1)
    before = (tmp_path / CONFIG).stat().st_ino
    save(tmp_path, 1)
    assert (tmp_path / CONFIG).stat().st_ino == before


@pytest.mark.parametrize("owner, name", [(os, "replace"), (os, "fsync"), (files, "save_file")])
def test_a_failure_at_any_step_leaves_the_old_adapter(
    owner: object, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(tmp_path, 1)
    original = getattr(owner, name)
    for step in range(20):
        left = [step]

        def full(*arguments: object, **options: object) -> object:
            left[0] -= 1  # noqa: B023
            if left[0] == -1:  # noqa: B023
                raise OSError(errno.ENOSPC, "No space left on device")
            return original(*arguments, **options)

        monkeypatch.setattr(owner, name, full)
        try:
            save(tmp_path, 2)
        except OSError as error:
            assert error.errno == errno.ENOSPC
        else:
            break
        finally:
            monkeypatch.setattr(owner, name, original)
        assert version(tmp_path) in (1, 2)
        save(tmp_path, 1)
        assert version(tmp_path) == 1 and names(tmp_path) == FILES
    assert step > 0


def test_a_reader_beside_a_writer_sees_one_version(tmp_path: Path) -> None:
    save(tmp_path, 1)
    ended = threading.Event()

    def write() -> None:
        for turn in range(15):
            save(tmp_path, 1 + turn % 7)
        ended.set()

    writers = [threading.Thread(target=write) for _ in range(2)]
    for writer in writers:
        writer.start()
    reads = 0
    while any(writer.is_alive() for writer in writers):
        version(tmp_path)
        reads += 1
    assert reads and ended.is_set()
    assert names(tmp_path) == FILES


def test_a_replacement_between_the_files_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path, 1)
    original = versions.read_tensors

    def between(path: Path):  # type: ignore[no-untyped-def]
        monkeypatch.setattr(versions, "read_tensors", original)
        save(tmp_path, 2)
        return original(path)

    monkeypatch.setattr(versions, "read_tensors", between)
    assert version(tmp_path) == 2


def test_an_edited_configuration_counts(tmp_path: Path) -> None:
    save(tmp_path, 1)
    config = json.loads((tmp_path / CONFIG).read_text())
    (tmp_path / CONFIG).write_text(json.dumps(config | {"lora_alpha": 5}))
    assert read_files(tmp_path)[0]["lora_alpha"] == 5


def test_files_without_a_digest_are_read(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    save(tmp_path, 1)
    save_file(load_file(tmp_path / TENSORS), tmp_path / TENSORS)
    assert version(tmp_path) == 1


def test_files_that_never_rest_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path, 1)
    config = json.loads((tmp_path / CONFIG).read_text())
    (tmp_path / CONFIG).write_text(json.dumps(config | {"lora_alpha": 5}))
    monkeypatch.setattr(versions, "_PAUSE", 0)
    monkeypatch.setattr(versions, "_stamps", lambda directory: [object()])
    with pytest.raises(OSError, match="was replaced again each of the"):
        read_files(tmp_path)


def test_a_link_in_the_place_of_what_waits_is_not_followed(tmp_path: Path) -> None:
    save(tmp_path / "a", 1)
    digest = read_files(tmp_path / "a")[1].metadata["lowrank_ops_config"]
    secret = tmp_path / "secret"
    secret.write_bytes((tmp_path / "a" / CONFIG).read_bytes())
    (tmp_path / "a" / CONFIG).write_text(json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 7}))
    versions._waiting(tmp_path / "a", digest).symlink_to(secret)
    assert read_files(tmp_path / "a")[0]["lora_alpha"] == 7


def kill_at_random(tmp_path: Path, rounds: int, seed: int) -> None:
    """Kill a process that saves without end, again and again, and read what is left."""
    print("seed", seed)
    times = random.Random(seed)
    save(tmp_path, 1)
    for _ in range(rounds):
        child = os.fork()
        if child == 0:
            number = 0
            while True:
                save(tmp_path, 1 + number % 5, width=1 << 16)
                number += 1
        time.sleep(times.uniform(0.001, 0.05))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        version(tmp_path)
    save(tmp_path, 9)
    assert version(tmp_path) == 9 and names(tmp_path) == FILES


def test_kills_at_random_times(tmp_path: Path) -> None:
    kills = int(os.environ.get("LOWRANK_OPS_FAULTS", 10))  # make test-faults has more
    kill_at_random(tmp_path, kills, random.randrange(1 << 30))


def test_a_full_disk_keeps_the_older_adapter(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", "256k") as disk:
        save(disk / "a", 1)
        with pytest.raises(OSError, match=r"adapter_model.safetensors was not written and is as it was"):
            save(disk / "a", 2, width=1 << 16)
        assert version(disk / "a") == 1 and names(disk / "a") == FILES
        with pytest.raises(OSError, match="was not written"):
            save(disk / "b", 1, width=1 << 16)
        assert not (disk / "b" / TENSORS).exists()
        save(disk / "a", 3)
        assert version(disk / "a") == 3


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="file"):
        save(tmp_path / "file" / "a", 1)
    with small_disk(tmp_path / "disk", "1m") as disk:
        save(disk / "a", 1)
        os.system(f"mount -o remount,ro {disk}")
        with pytest.raises(OSError, match="was not written and is as it was before: Read-only"):
            save(disk / "a", 2)
        assert version(disk / "a") == 1


def test_save_adapter_writes_so(tmp_path: Path) -> None:
    lo.save_adapter(lo.adapt(plain(), lo.LoRA(4)), tmp_path)
    assert "lowrank_ops_config" in read_files(tmp_path)[1].metadata and names(tmp_path) == FILES
