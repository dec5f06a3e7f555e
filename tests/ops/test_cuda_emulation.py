"""The CUDA kernels, executed on the host and compiled for every target.

``tests/emulation/cuda_emulation.h`` runs a block's threads as fibers under the address and undefined-behaviour
sanitizers; ``tests/emulation/defects.cu`` has kernels with known defects, to show that the emulation catches them.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import run_driver as run

from lowrank_ops import reference
from lowrank_ops.kernels.operands import FP4, INT8, MXFP4, NF4, Format

ROOT = Path(__file__).resolve().parents[2]
EMULATION = ROOT / "tests" / "emulation"
SOURCES = sorted((ROOT / "csrc" / "cuda").glob("*.cu"))
TARGETS = ("80", "86", "89", "90", "100", "120")

KINDS = [(NF4, False), (NF4, True), (FP4, False), (FP4, True), (MXFP4, False), (INT8, False), (INT8, True)]
DTYPES = (torch.float32, torch.bfloat16, torch.float16)  # in the order of out_dtype
SIZES = (1, 2, 31, 32, 33, 64 * 7 + 5, 1023, 1024, 4096 + 17, 3 * 8192 + 1)  # a warp decodes 1024, a block 8192


def request(
    packed: torch.Tensor,
    absmax: torch.Tensor,
    absmax2: torch.Tensor | None,
    offset: torch.Tensor | None,
    numel: int,
    block_size: int,
    dtype: int,
    misaligned: int = 0,
    seed: int = 0,
    format: int = 3,
) -> bytes:
    out_bytes = numel * (4 if dtype == 0 else 2)
    absmax2_entries = 0 if absmax2 is None else absmax2.numel()
    absmax_bytes = absmax.numel() * absmax.element_size()
    head = [format, numel, block_size, absmax_bytes, absmax2_entries, dtype, out_bytes, misaligned, seed]
    arrays = [t.numpy().tobytes() for t in (packed, absmax, absmax2, offset) if t is not None]
    return np.array(head, dtype=np.int64).tobytes() + b"".join(arrays)


def scales(
    blocks: int, double_quant: bool, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """absmax, absmax2 and offset; absmax includes zero, subnormal and negative numbers and numbers beyond float16."""
    if double_quant:
        index = torch.randint(0, 256, (blocks,), dtype=torch.uint8, generator=generator)
        absmax2 = torch.rand(-(-blocks // reference.ABSMAX_BLOCK), generator=generator) / 3
        return index, absmax2, torch.tensor(0.0625123)
    absmax = torch.rand(blocks, generator=generator) * 10.0 ** torch.randint(-9, 4, (blocks,), generator=generator)
    absmax[: blocks // 3 : 4] = torch.tensor([0.0, 1e-41, -0.3, 1e5]).repeat(blocks)[: len(absmax[: blocks // 3 : 4])]
    return absmax, None, None


@pytest.mark.parametrize("misaligned", [0, 1, 2], ids=["aligned", "packed_off", "out_off"])
@pytest.mark.parametrize(
    ("format", "double_quant"), KINDS, ids=lambda v: getattr(v, "name", "double" if v is True else "")
)
@pytest.mark.parametrize("dtype", range(3), ids=["float32", "bfloat16", "float16"])
def test_decode_is_bit_exact(emulator: Path, dtype: int, format: Format, double_quant: bool, misaligned: int) -> None:
    generator = torch.Generator().manual_seed(dtype)
    requests, expected, cases = b"", [], []
    for seed, (numel, block_size) in enumerate((n, b) for n in SIZES for b in format.block_sizes):
        packed = torch.randint(0, 256, (format.bytes_of(numel),), dtype=torch.uint8, generator=generator)
        blocks = -(-numel // block_size)
        absmax, absmax2, offset = scales(blocks, double_quant, generator)
        if format.exponents:
            absmax = torch.arange(blocks).mul(37).add(seed).remainder(255).to(torch.uint8)
        requests += request(
            packed, absmax, absmax2, offset, numel, block_size, dtype, misaligned, seed, format.element_type
        )
        w = reference.dequantize(format, packed, absmax, absmax2, offset, 1, numel, block_size, DTYPES[dtype])
        expected.append(w.view(torch.int32 if dtype == 0 else torch.int16).numpy().reshape(-1))
        cases.append((numel, block_size))
    result = run(emulator, "decode", data=requests)
    assert result.returncode == 0, result.stderr.decode()
    got = np.frombuffer(result.stdout, dtype=expected[0].dtype)
    assert got.size == sum(e.size for e in expected)
    for case, bits in zip(cases, expected, strict=True):
        ours, got = got[: bits.size], got[bits.size :]
        different = np.flatnonzero(ours != bits)
        assert different.size == 0, f"(numel, block_size) = {case}: {different.size} differ, first {different[:5]}"


def test_decode_of_nothing(emulator: Path) -> None:
    result = run(emulator, "decode", data=request(torch.zeros(0), torch.zeros(0), None, None, 0, 64, 1))
    assert (result.returncode, result.stdout) == (0, b""), result.stderr.decode()


@pytest.mark.parametrize(("block_size", "dtype"), [(16, 0), (48, 0), (0, 0), (-64, 0), (64, 3), (64, -1)])
def test_decode_rejects(emulator: Path, block_size: int, dtype: int) -> None:
    data = request(torch.zeros(2, dtype=torch.uint8), torch.ones(1), None, None, 4, block_size, dtype)
    result = run(emulator, "decode", data=data)
    assert result.returncode == 3
    assert re.search(rb"dequantize: (block_size|out_dtype) must be", result.stderr)


def test_decode_rejects_a_format(emulator: Path) -> None:
    data = request(torch.zeros(2, dtype=torch.uint8), torch.ones(1), None, None, 4, 64, 0, format=4)
    result = run(emulator, "decode", data=data)
    assert (result.returncode, b"format must be 3, 5, 6 or 7, got 4" in result.stderr) == (3, True)


def test_the_exponent_255_is_nan(emulator: Path) -> None:
    for seed, numel in enumerate((33, 2048)):
        exponents = torch.full((-(-numel // 32),), 127, dtype=torch.uint8)
        exponents[1] = 255
        data = torch.zeros((numel + 1) // 2, dtype=torch.uint8)
        result = run(emulator, "decode", data=request(data, exponents, None, None, numel, 32, 0, 0, seed, 6))
        got = np.frombuffer(result.stdout, dtype=np.float32)
        assert np.array_equal(np.isnan(got), np.arange(numel) // 32 == 1)


@pytest.mark.parametrize("threads", [32, 96])
def test_warp_operations(emulator: Path, threads: int) -> None:
    """Against the CUDA C++ programming guide, sections on warp shuffles and votes."""
    lane = np.arange(32)
    expected = 100 + np.array(
        [
            lane * 3 % 32,
            lane // 8 * 8 + 11 % 8,
            np.where(lane < 3, lane, lane - 3),
            np.where(lane % 8 < 3, lane, lane - 3),
            np.where(lane > 28, lane, lane + 3),
            np.where(lane % 8 > 4, lane, lane + 3),
            lane ^ 5,
            # A lane may read lanes of an earlier group, but not of a later one.
            np.where((lane ^ 12) // 8 <= lane // 8, lane ^ 12, lane),
        ]
    )
    ballot = sum(1 << i for i in range(0, 32, 3))
    votes = np.repeat(np.array([[ballot - (1 << 32) if ballot >> 31 else ballot], [1], [0]]), 32, axis=1)
    half = np.where(lane % 2, 100 + lane, -1)[None]
    for seed in range(4):
        result = run(emulator, "warp", threads, seed)
        assert result.returncode == 0, result.stderr.decode()
        values = np.frombuffer(result.stdout, dtype=np.int32)
        assert np.array_equal(values[:-3].reshape(12, 32), np.concatenate([expected, votes, half]))
        assert values[-3:].tolist() == [threads, 131, 100]


def test_conversions(emulator: Path) -> None:
    result = run(emulator, "convert")
    assert result.returncode == 0, result.stderr.decode()
    values = np.frombuffer(result.stdout[: 2 * 65536 * 4], dtype=np.int32).reshape(2, 65536)
    back = np.frombuffer(result.stdout[2 * 65536 * 4 :], dtype=np.uint16).reshape(2, 65536)
    bits = np.arange(65536, dtype=np.uint16)
    for ours, returned, dtype in zip(values, back, (torch.float16, torch.bfloat16), strict=True):
        floats = torch.from_numpy(bits.view(np.int16)).view(dtype).float()
        number = ~floats.isnan().numpy()
        assert np.array_equal(ours[number], floats.view(torch.int32).numpy()[number])
        assert np.array_equal(returned[number], bits[number])
        assert np.isnan(ours.view(np.float32)[~number]).all()
        assert (returned[~number] == 0x7FFF).all()


def test_kernels_without_defect_are_right(emulator: Path) -> None:
    for seed in range(8):
        result = run(emulator, "defect", "none", seed)
        assert (result.returncode, result.stdout) == (0, b"right\n"), result.stderr.decode()


@pytest.mark.parametrize("defect", ["missing_barrier", "missing_trailing_barrier", "uninitialised", "contracted"])
def test_defect_changes_the_result(emulator: Path, defect: str) -> None:
    outputs = {run(emulator, "defect", defect, seed).stdout for seed in range(4)}
    assert b"wrong\n" in outputs


@pytest.mark.parametrize(
    ("defect", "message"),
    [
        ("divergent_barrier", r"threads diverge: 64 in a barrier at \S*defects.cu:\d+, 64 returned"),
        ("divergent_shuffle", r"threads diverge: 16 in a warp operation at \S*defects.cu:\d+, 112 returned"),
        ("outside_mask", r"lane \d+ calls a warp operation at \S*defects.cu:\d+ whose mask 0xffff leaves it out"),
        ("global_bounds", r"AddressSanitizer: heap-buffer-overflow"),
        ("shared_bounds", r"AddressSanitizer: heap-buffer-overflow|index 128 out of bounds"),
        ("stack_bounds", r"AddressSanitizer: stack-buffer-(over|under)flow"),
        ("misaligned", r"misaligned address"),
        ("too_many_threads", r"row_sum: invalid configuration argument"),
        ("too_much_shared", r"tile_sum: invalid argument"),
    ],
)
def test_defect_is_reported(emulator: Path, defect: str, message: str) -> None:
    result = run(emulator, "defect", defect, 0)
    assert result.returncode != 0
    assert re.search(message, result.stderr.decode()), result.stderr.decode()


@pytest.fixture(scope="session")
def nvcc() -> str:
    compiler = shutil.which("nvcc")
    if compiler is None:
        pytest.skip("compiling CUDA needs nvcc on the PATH")
    return compiler


@pytest.mark.parametrize("source", SOURCES, ids=lambda source: source.name)
def test_compiles_without_spills(nvcc: str, source: Path, tmp_path: Path) -> None:
    known = subprocess.run([nvcc, "--list-gpu-code"], check=True, capture_output=True, text=True).stdout.split()
    targets = [target for target in TARGETS if f"sm_{target}" in known]
    command = [nvcc, "-std=c++17", "-O3", "--threads", "2", "-Xptxas", "-v", f"-I{ROOT / 'csrc'}"]
    command += [f"-gencode=arch=compute_{t},code=sm_{t}" for t in targets]
    command += ["-c", str(source), "-o", str(tmp_path / "kernels.o")]
    result = subprocess.run(command, capture_output=True, text=True)
    log = result.stdout + result.stderr
    assert result.returncode == 0, log
    assert "warning" not in log, log
    kernels = re.findall(
        r"Compiling entry function '(\S+)' for 'sm_(\d+)'.*?"
        r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads",
        log,
        flags=re.DOTALL,
    )
    assert {target for _, target, *_ in kernels} == set(targets)
    wasteful = [kernel for kernel in kernels if kernel[2:] != ("0", "0", "0")]
    assert not wasteful, "(kernel, target, stack, spill stores, spill loads): " + str(wasteful)


def test_portability_macros_are_cuda(nvcc: str, tmp_path: Path) -> None:
    """defects.cu uses every macro of csrc/cuda/launch.h; nvcc has to accept what the emulation accepts."""
    command = [nvcc, "-std=c++17", "-ptx", "-arch=compute_90", f"-I{ROOT / 'csrc'}", f"-I{EMULATION}"]
    result = subprocess.run(
        [*command, str(EMULATION / "defects.cu"), "-o", str(tmp_path / "defects.ptx")], capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    assert ".shared .align 16" in (tmp_path / "defects.ptx").read_text()
