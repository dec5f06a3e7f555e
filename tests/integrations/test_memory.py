"""The memory that loading and calibrating take, in a process of its own; LOWRANK_OPS_MEMORY=large for models of 1 GB."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import measure_loading
import pytest
import torch

SIZE = os.environ.get("LOWRANK_OPS_MEMORY", "small")
CASES = [("llama", "bfloat16", "float32"), ("mixtral", "float32", "bfloat16")]
if SIZE == "large":
    CASES = [
        (family, stored, dtype)
        for family in ("llama", "mixtral")
        for stored in ("bfloat16", "float32")
        for dtype in ("bfloat16", "float32")
    ]


def run(directory: Path, dtype: str, how: str) -> dict[str, float]:
    command = [sys.executable, measure_loading.__file__, str(directory), dtype, how]
    # Otherwise the allocator keeps what was freed.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    measured: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return measured


@pytest.mark.slow
@pytest.mark.parametrize("family, stored, dtype", CASES)
def test_the_peak_is_at_most_two_tensors_beyond_the_result(
    family: str, stored: str, dtype: str, tmp_path: Path
) -> None:
    measure_loading.make(tmp_path, family, getattr(torch, stored), SIZE)
    measured = run(tmp_path, dtype, "load")
    sizes = measure_loading.SIZES[SIZE][family]
    wide = sizes["intermediate_size"] * (2 if family == "mixtral" else 1)  # gate and up of an expert count as one
    matrix = sizes["hidden_size"] * max(wide, sizes["vocab_size"])
    # A matrix as the file has it, and the same one in the dtype asked for.
    widest = max(getattr(torch, stored).itemsize, getattr(torch, dtype).itemsize)
    assert measured["peak"] - measured["after"] < 2 * matrix * widest


@pytest.mark.slow
def test_calibrating_block_by_block_needs_no_more_for_more_blocks(tmp_path: Path) -> None:
    peaks, moments = [], []
    for size in ("small", "deep"):
        measure_loading.make(tmp_path / size, "llama", torch.bfloat16, size)
        measured = run(tmp_path / size, "bfloat16", "calibrate")
        peaks.append(measured["peak"])
        moments.append(measured["moments"])
    blocks = [measure_loading.SIZES[size]["llama"]["num_hidden_layers"] for size in ("small", "deep")]
    of_block = moments[0] / blocks[0]
    assert moments[1] == pytest.approx(of_block * blocks[1], rel=1e-2)
    # Two more blocks have twice this, and their weights.
    assert peaks[1] - peaks[0] < 0.5 * of_block
