"""Files are written in one place, which does it so that none is lost: see lowrank_ops/files.py."""

from __future__ import annotations

import ast
import errno
import os
from pathlib import Path

import pytest
import torch
from file_faults import killed_at

from lowrank_ops import files

ROOT = Path(__file__).resolve().parents[2]
# Calls that write, by the last part of their names.
WRITES = {
    *("write_text", "write_bytes", "save_file", "savefig", "memmap", "symlink_to", "hardlink_to", "touch"),
    *("copy2", "copyfile", "copytree", "copyfileobj", "tofile", "savetxt", "savez"),
}
# The same, for the modules whose functions they are; others have harmless functions of these names.
OF_MODULES = {
    "torch": {"save"},
    "np": {"save"},
    "json": {"dump"},
    "pickle": {"dump"},
    "shutil": {"copy", "move"},
    "os": {"replace", "rename", "link", "symlink"},
}
# File -> what it writes that no user keeps.
ALLOWED = {
    "lowrank_ops/files.py": "the writers themselves",
    "kernels/aot.py": "the report that is part of the sources",
    "bench/peak.py": "a switch of the kernel in /proc",
    "bench/cases/bench_nf4.py": "a temporary folder of its own",
    "bench/cases/bench_pool.py": "a temporary folder of its own",
    "bench/gpu_first.py": "the log that running programs append to",
    "lowrank_ops/commands/evaluate.py": "a temporary folder of its own",
    "lowrank_ops/commands/demo/gemma.py": "a temporary folder of its own",
}
# Within ``with replacing(path) as scratch`` and the like, what is written has this name.
SCRATCH = "scratch"


def writes(tree: ast.AST) -> list[int]:
    """The lines of calls that write a file, other than to a scratch."""
    found = []
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
        of = getattr(getattr(node.func, "value", None), "id", "")
        given = [*node.args, *(k.value for k in node.keywords)]
        modes = [a.value for a in given if isinstance(a, ast.Constant) and isinstance(a.value, str)]
        if name == "write_text" and not isinstance(node.func, ast.Attribute):  # ours
            continue
        opens = name == "open" and any(set(mode) & set("wax+") and len(mode) < 4 for mode in modes)
        if (opens or name in WRITES or name in OF_MODULES.get(of, ())) and not any(
            isinstance(part, ast.Name) and part.id == SCRATCH for part in [*given, getattr(node.func, "value", None)]
        ):
            found.append(node.lineno)
    return found


@pytest.mark.parametrize("folder", ["lowrank_ops", "kernels", "bench"])
def test_files_are_written_in_one_place(folder: str) -> None:
    found = {}
    for path in sorted((ROOT / folder).rglob("*.py")):
        name = str(path.relative_to(ROOT))
        # Folders of lowrank_ops may be links to those beside it.
        if path.resolve() == path and name not in ALLOWED and (lines := writes(ast.parse(path.read_text()))):
            found[name] = lines
    assert not found, f"write these with lowrank_ops.files: {found}"


@pytest.mark.parametrize(
    "code",
    [
        "open(path, 'w')",
        "path.open('ab')",
        "open(path, mode='x')",
        "path.write_text(text)",
        "save_file(tensors, path)",
        "torch.save(state, path)",
        "json.dump(x, file)",
        "os.replace(a, b)",
        "shutil.copy(a, b)",
    ],
)
def test_the_search_finds_writers(code: str) -> None:
    assert writes(ast.parse(code))


def test_the_search_passes_readers_and_scratches() -> None:
    code = "open(path); open(path, 'rb'); text.replace(a, b); torch.save(x, scratch); scratch.open('w'); open(scratch, 'w')"
    assert not writes(ast.parse(code))


def test_a_kill_leaves_the_old_or_the_new_file(tmp_path: Path) -> None:
    path, step, seen = tmp_path / "a", 0, []
    path.write_text("old")
    while killed_at(step, lambda: files.write_text(path, "new")):
        seen.append(path.read_text())
        step += 1
    assert seen == sorted(seen, reverse=True) and set(seen) == {"old", "new"}
    files.write_text(path, "new")
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


def test_an_error_leaves_the_old_file_and_no_scratch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a"
    path.write_text("old")
    for name in ("fsync", "replace"):
        with monkeypatch.context() as patch:
            patch.setattr(os, name, lambda *_: (_ for _ in ()).throw(OSError(errno.ENOSPC, "No space left on device")))
            with pytest.raises(OSError, match="a was not written and is as it was before: No space left"):
                files.write_text(path, "new")
        assert [p.name for p in tmp_path.iterdir()] == ["a"] and path.read_text() == "old"


def test_writers_flush_the_file_before_its_name_and_the_folder_after(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []
    replace = os.replace
    monkeypatch.setattr(os, "fsync", lambda file: calls.append(os.path.basename(os.readlink(f"/proc/self/fd/{file}"))))
    monkeypatch.setattr(os, "replace", lambda a, b: (calls.append("rename"), replace(a, b)))
    files.write_tensors(tmp_path / "a", {"x": torch.ones(2)})
    assert calls == ["a", "rename", tmp_path.name]


def test_devices_stay_devices(tmp_path: Path) -> None:
    import threading

    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    got: list[str] = []
    reader = threading.Thread(target=lambda: got.append(fifo.read_text()))
    reader.start()
    files.write_text(fifo, "text")
    reader.join()
    assert got == ["text"] and fifo.is_fifo()
    files.write_text("/dev/null", "text")
    assert Path("/dev/null").is_char_device()


def test_scratch_folders_of_killed_processes_are_removed(tmp_path: Path) -> None:
    target = tmp_path / "model[1]"

    def work() -> None:
        with files.scratch_folder(target) as scratch:
            (scratch / "a").write_text("x")
            os.kill(os.getpid(), 9)

    child = os.fork()
    if child == 0:
        work()
    os.waitpid(child, 0)
    assert len(list(tmp_path.iterdir())) == 1
    with files.scratch_folder(target) as first, files.scratch_folder(target) as second:
        assert sorted(tmp_path.iterdir()) == sorted([first, second])
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["../x", "/etc/passwd", "a/b", "..", "", "a\\b", "a\0b", 3, None])
def test_names_that_lead_out_are_refused(name: object, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"index.json names .*, which must be the name of a file beside it"):
        files.inside(tmp_path, name, tmp_path / "index.json")
