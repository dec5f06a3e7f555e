"""make gpu-first: the order of its steps, its time, and that every step starts, all without a GPU."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from lowrank_ops.bench import gpu_first
from lowrank_ops.bench.gpu_first import Step


def step(name: str, code: str, weight: float = 1, after: str = "") -> Step:
    return Step(name, weight, ["-c", code], ["-c", code], after)


def test_a_step_that_fails_or_hangs_does_not_stop_the_next(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_first, "find_architecture", lambda: "90")
    hang = "import subprocess, sys, time; subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(99)']); "
    chosen = [
        step("build", "import os; print(os.environ['CUDAARCHS']); exit(3)"),
        step("instead", "print('built | without')", after="build"),
        step("hangs", f"print('begun', flush=True); {hang}time.sleep(99)", 0.05),
        step("not needed", "raise SystemExit(1)", after="instead"),
        step("last", "print('the end')"),
    ]
    assert gpu_first.run(tmp_path, total=40.0, chosen=chosen) == 2
    rows = [line.split(" | ") for line in (tmp_path / "summary.md").read_text().splitlines()[4:]]
    assert [(row[0].strip("| "), row[1].split(" ")[0]) for row in rows] == [
        ("build", "failed"), ("instead", "ok"), ("hangs", "ended"), ("last", "ok"),
    ]  # fmt: skip
    assert [row[4].strip(" |") for row in rows] == ["90-real", "built / without", "begun", "the end"]
    assert "##### last" in (tmp_path / "log.txt").read_text()


def test_without_time_the_rest_is_listed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_first, "find_architecture", lambda: "90")
    assert gpu_first.run(tmp_path, total=0.5, chosen=[step("one", ""), step("two", "")]) == 2
    assert (tmp_path / "summary.md").read_text().count("no time left") == 2


def test_without_a_gpu_it_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(gpu_first, "find_architecture", lambda: "")
    assert gpu_first.main(["--out", str(tmp_path)]) == 1
    assert "no CUDA device" in capsys.readouterr().err


def test_correctness_comes_first() -> None:
    names = [step.name for step in gpu_first.steps(Path("out"))]
    assert names[:3] == ["build", "build without CUDA", "what is here"] and "bfloat16" in names[3]
    assert names.index("benchmark") > max(names.index(f"test: {of}") for of in ("graph capture", "decode and encode"))
    assert names.index("benchmark") < names.index("tile sizes")


def test_every_step_names_what_is_there() -> None:
    for step in gpu_first.steps(Path("out")):
        paths = [word.removeprefix("--ignore=") for word in step.command if word.startswith(("tests/", "--ignore="))]
        assert all((gpu_first.ROOT / path).exists() for path in paths)
        assert paths or "pytest" not in step.command


@pytest.mark.slow
def test_the_dry_run_starts_a_step_of_each_kind(tmp_path: Path) -> None:
    names = ("build", "what is here", "test: routed and experts", "tile sizes")
    chosen = [step for step in gpu_first.steps(tmp_path) if step.name in names]
    assert len(chosen) == len(names) and gpu_first.run(tmp_path, dry=True, chosen=chosen) == 0
    summary, log = ((tmp_path / name).read_text() for name in ("summary.md", "log.txt"))
    assert summary.count("| ok |") == len(names) and sys.executable in log
    assert "test_any_mix[cuda-" in log and "test_experts_linear.py::test_16_bit[cuda-" in log
