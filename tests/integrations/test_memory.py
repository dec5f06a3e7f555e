"""The memory that loading takes beyond its result, in a process of its own; LOWRANK_OPS_MEMORY=large for models of 1 GB."""

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


@pytest.mark.slow
@pytest.mark.parametrize("family, stored, dtype", CASES)
def test_the_peak_is_at_most_two_tensors_beyond_the_result(
    family: str, stored: str, dtype: str, tmp_path: Path
) -> None:
    measure_loading.make(tmp_path, family, getattr(torch, stored), SIZE)
    command = [sys.executable, measure_loading.__file__, str(tmp_path), dtype, "load"]
    # Otherwise the allocator keeps what was freed.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    measured = json.loads(done.stdout.splitlines()[-1])
    sizes = measure_loading.SIZES[SIZE][family]
    wide = sizes["intermediate_size"] * (2 if family == "mixtral" else 1)  # gate and up of an expert count as one
    matrix = sizes["hidden_size"] * max(wide, sizes["vocab_size"])
    # A matrix as the file has it, and the same one in the dtype asked for.
    widest = max(getattr(torch, stored).itemsize, getattr(torch, dtype).itemsize)
    assert measured["peak"] - measured["after"] < 2 * matrix * widest
