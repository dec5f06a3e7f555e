"""The choice of tile sizes, which needs no GPU."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("triton")

from lowrank_ops.kernels import config
from lowrank_ops.kernels.config import KERNELS, Arch, Config, choose, get_config

H200 = Arch("NVIDIA H200", 90, 132)


@pytest.fixture
def tables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty directory of tuned tables."""
    monkeypatch.setattr(config, "DIRECTORY", tmp_path)
    get_config.cache_clear()
    config.tuned_table.cache_clear()
    yield tmp_path
    get_config.cache_clear()
    config.tuned_table.cache_clear()


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("bits", [16, 32])
@pytest.mark.parametrize("M", [1, 3, 17, 64, 65, 1000, 100_000])
def test_default_is_a_legal_tile(tables: Path, kernel: str, bits: int, M: int) -> None:
    for N, K, R, block_size in [(1, 1, 1, 64), (4096, 14336, 16, 64), (1001, 1003, 70, 64), (4096, 4096, 512, 0)]:
        c = get_config(kernel, H200, M, N, K, R, bits, block_size)
        sizes = (c.BLOCK_M, c.BLOCK_N, c.BLOCK_K, c.BLOCK_R)
        assert all(s > 0 and s & (s - 1) == 0 for s in (*sizes, c.num_warps)), c
        assert c.BLOCK_M == 1 or min(sizes) >= 16, c
        summed = {"few_forward_split": K, "few_backward_split": N}.get(kernel, M)
        assert 1 <= c.SPLITS <= max(1, summed // 256), c


def test_override_comes_first(tables: Path) -> None:
    mine, shape = Config(BLOCK_M=64), (H200, 16, 4096, 4096, 16, 16, 64)
    assert choose(mine, "expand", *shape) == mine
    assert choose({"expand": mine}, "expand", *shape) == mine
    assert choose({"shrink": mine}, "expand", *shape) == choose(None, "expand", *shape) != mine


def test_table_nearest_in_log_space(tables: Path) -> None:
    entries = [
        {"bits": 16, "N": 4096, "K": 4096, "M": M, "R": 16, "config": {"BLOCK_N": M, "num_warps": 8}}
        for M in (16, 64, 256)
    ]
    (tables / "nvidia_h200.json").write_text(json.dumps({"few_forward": entries}))
    for M, nearest in [(1, 16), (31, 16), (33, 64), (127, 64), (129, 256), (5000, 256)]:
        c = get_config("few_forward", H200, M, 4096, 4096, 16, 16, 64)
        assert (c.BLOCK_N, c.num_warps) == (nearest, 8)
        assert c.BLOCK_M == config.default_config("few_forward", H200, M, 4096, 4096, 16, 16, 64).BLOCK_M
    for other in [(H200, 16, 4096, 1024, 16, 16, 64), (H200, 16, 4096, 4096, 16, 32, 64)]:
        assert get_config("few_forward", *other) == config.default_config("few_forward", *other)
    elsewhere = Arch("NVIDIA A100", 80, 108)
    assert get_config("few_forward", elsewhere, 16, 4096, 4096, 16, 16, 64).num_warps == 4


def test_tables_of_dense_factors_are_not_for_nf4_ones(tables: Path) -> None:
    entry = {"bits": 16, "N": 16, "K": 4096, "M": 16, "R": 16, "config": {"num_warps": 8}}
    (tables / "nvidia_h200.json").write_text(json.dumps({"shrink": [entry]}))
    shape = (H200, 16, 16, 4096, 16, 16)
    assert get_config("shrink", *shape).num_warps == 8
    assert get_config("shrink", *shape, 64) == config.default_config("shrink", *shape, 64)


def test_shipped_tables_are_legal() -> None:
    for path in sorted(config.DIRECTORY.glob("*.json")):
        for kernel, entries in json.loads(path.read_text()).items():
            assert kernel in KERNELS, path
            for entry in entries:
                assert {"bits", "N", "K", "M", "config"} <= entry.keys(), (path, entry)
                Config(**entry["config"])


def test_choice_is_printed_once(
    tables: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("LOWRANK_OPS_PRINT_CONFIG", "1")
    for _ in range(3):
        get_config("expand", H200, 17, 4096, 4096, 16, 16)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert "expand M=17 N=4096" in lines[0]
    assert "NVIDIA H200" in lines[0]
    assert "default" in lines[0]


def test_few_programs_and_many_tokens_are_split() -> None:
    def splits(M: int, N: int) -> int:
        return get_config("token_sum", H200, M, N, M, 16, 16).SPLITS

    assert splits(8192, 1024) > 1
    assert splits(64, 1024) == 1
    assert splits(8192, 64 * 300) == 1


def test_a_core_of_few_entries_is_split_too(tables: Path) -> None:
    assert get_config("core_gradient", H200, 8192, 4096, 0, 4096, 16).SPLITS > 1
    assert get_config("core_gradient", H200, 64, 4096, 0, 4096, 16).SPLITS == 1
    assert get_config("core_gradient", H200, 8192, 64 * 300, 0, 4096, 16).SPLITS == 1


@pytest.mark.parametrize("kernel", ["few_forward_split", "few_backward_split"])
def test_few_columns_are_split(tables: Path, kernel: str) -> None:
    def splits(M: int, columns: int, size: int, block_size: int = 64, bits: int = 16) -> int:
        N, K = (columns, size) if kernel == "few_forward_split" else (size, columns)
        return get_config(kernel, H200, M, N, K, 16, bits, block_size).SPLITS

    for columns, size in [(1024, 4096), (1024, 14336), (4096, 4096)]:
        tiles = columns // 64
        assert splits(16, columns, size) > 1
        # At most two programs per multiprocessor, and at least 512 terms to sum in each.
        assert tiles * splits(16, columns, size) <= 2 * H200.processors
        assert size // splits(16, columns, size) >= 512
    assert splits(16, 14336, 4096) == 1
    assert splits(1, 1024, 4096) == 1
    assert splits(1024, 1024, 4096) == 1
    assert splits(16, 1024, 4096, block_size=0) == 1
    assert splits(16, 1024, 4096, bits=32) == 1
