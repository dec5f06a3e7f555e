"""The benchmark command: its CUDA path against a fake, its time budget, missing peers, numbers computed from rows."""

from __future__ import annotations

import contextlib
import csv
import json
import multiprocessing
import sys
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from lowrank_ops import NF4Weight
from lowrank_ops.__main__ import main
from lowrank_ops.bench import common, goals, peak, plot, suite, watch
from lowrank_ops.bench import report as reports
from lowrank_ops.bench.cases import bench_adapted_linear, bench_pool, bench_scaling, bench_serve
from lowrank_ops.bench.common import Limits, Settings
from lowrank_ops.bench.report import Report, Row, Table, Timing
from lowrank_ops.ops import _cpu

CPU = torch.device("cpu")
SHAPE = (64, 64)


class Stream:
    def wait_stream(self, other: Stream) -> None:
        pass


class Event:
    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing

    def record(self) -> None:
        self.at = time.perf_counter()

    def synchronize(self) -> None:
        pass

    def elapsed_time(self, other: Event) -> float:
        return 1e3 * (other.at - self.at) + 1e-3


@pytest.fixture
def fake_cuda(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A GPU whose tensors live on the CPU; the list records captures and replays."""
    log: list[str] = []

    class Graph:
        def replay(self) -> None:
            log.append("replayed")

    @contextlib.contextmanager
    def graph(graph: Graph) -> Iterator[None]:
        log.append("captured")
        yield

    fakes = {
        "Stream": Stream,
        "current_stream": Stream,
        "stream": lambda stream: contextlib.nullcontext(),
        "Event": Event,
        "CUDAGraph": Graph,
        "graph": graph,
        "synchronize": lambda: None,
        "get_device_name": lambda device: "Fake GPU (1 GB)",
        "get_device_properties": lambda device: SimpleNamespace(L2_cache_size=1 << 12),
        "reset_peak_memory_stats": lambda: None,
        "memory_allocated": lambda: 1 << 20,
        "max_memory_allocated": lambda: 3 << 20,
    }
    for name, fake in fakes.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    monkeypatch.setattr(Settings, "kind", "cuda")
    return log


def test_the_cuda_path_end_to_end(fake_cuda: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pytest.importorskip("triton")
    from lowrank_ops.kernels import config, launch

    monkeypatch.setattr(config, "DIRECTORY", tmp_path / "configs")
    settings = Settings(CPU, suite.OPS, quick=True, shape=SHAPE)
    with launch.recording(config.Arch("Fake GPU (1 GB)", 90, 132)) as launches:
        report = Report(settings)
        suite.measure(report, tuning=True)
    report = suite.with_tables(report)
    assert not [name for name in report.absent if name.startswith("ours")] and not report.skipped
    assert "captured" in fake_cuda and "replayed" in fake_cuda
    for row in report.rows:
        quantises = row.op.endswith("_quantize") and row.op != "absmax_quantize"
        captured = not quantises and row.op != "adapt" and not row.op.startswith("truncated_svd")
        assert (row.timing.outside is not None) == captured and row.threads == 0, row
    assert {"nf4_dequantize", "adapted_linear", "adapted_linear_backward"} <= {row.op for row in report.rows}
    tables = {table.title: table for table in report.tables}
    assert set(tables) >= {"Goals", "Side by side", "Scaling of cost"}
    memory = tables["Memory of a training step of a block"].rows
    assert memory and all(line[2] == "2 MB" for line in memory)

    written = report.write(tmp_path)
    assert written.name == "fake_gpu_1_gb.md" and "outside a CUDA graph" in report.text()
    with open(written.with_suffix(".csv"), newline="") as file:
        lines = list(csv.DictReader(file))
    assert [(line["op"], line["provider"]) for line in lines] == [(row.op, row.provider) for row in report.rows]
    assert [float(line["seconds"]) for line in lines] == [row.seconds for row in report.rows]

    # Every kernel's tile sizes are tried, and each number of tokens has an entry, since the nearest entry is used.
    table = json.loads((tmp_path / "configs" / "fake_gpu_1_gb.json").read_text())
    from lowrank_ops.bench import tune

    assert launches and set(table) == set(tune.TOKENS)
    for kernel, entries in table.items():
        assert {entry["M"] for entry in entries} == set(tune.TOKENS[kernel])


LIMITS = Limits(1e9, {"bfloat16": 1e12, "float32": 1e11})
NOTHING = common.Provider([lambda: None], 1)


@pytest.fixture
def make_report(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Report]:
    """Reports whose limits are known, not measured, for caches that are small."""
    monkeypatch.setattr(reports, "measure_limits", lambda settings: LIMITS)
    for module in (common, reports):
        monkeypatch.setattr(module, "cache_bytes", lambda settings: 1 << 12)
    asked = {"ops": suite.OPS, "quick": True, "threads": [torch.get_num_threads()]}
    return lambda **settings: Report(Settings(CPU, **asked | settings))


def test_what_cannot_be_captured_is_timed_outside(
    fake_cuda: list[str], make_report: Callable[..., Report], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(graph: object) -> None:
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(torch.cuda, "graph", refuse)
    report = make_report()
    report.case("op", SHAPE, 1, torch.float32, {"ours": NOTHING})
    assert "stream is capturing" in report.absent["ours as a CUDA graph"]
    assert report.rows[0].timing.outside is None and report.rows[0].seconds > 0


def test_what_has_no_time_is_listed(make_report: Callable[..., Report]) -> None:
    report = make_report(seconds=0.0)
    for section in suite.SECTIONS:
        section(report)
    assert not report.rows and len(report.skipped) >= len(suite.SECTIONS)
    assert "No time left for: adapted_linear" in report.text() and report.skipped[-1] in report.text()


def test_a_case_needs_as_much_time_as_the_longest_took(make_report: Callable[..., Report]) -> None:
    report = make_report(seconds=100.0)
    report.case("op", SHAPE, 1, torch.float32, {"ours": NOTHING})
    report.longest = 90.0
    assert not report.skip("short of it")
    report.reserve = 20.0
    assert report.skip("beyond it") and report.skipped == ["beyond it"]


def test_absent_peers_are_listed_and_the_run_goes_on(
    make_report: Callable[..., Report], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for package in ("bitsandbytes", "bitsandbytes.nn", "peft", "matplotlib", "matplotlib.figure"):
        monkeypatch.setitem(sys.modules, package, None)
    report = make_report(ops=["adapted_linear", "nf4_dequantize"], shape=SHAPE)
    for section in suite.SECTIONS:
        section(report)
    assert {"bitsandbytes", "bitsandbytes + PEFT"} <= set(report.absent)
    assert {row.op for row in report.rows if row.provider == "ours"} == {"adapted_linear", "nf4_dequantize"}
    assert plot.save(report, tmp_path / "cpu.png") is None and "matplotlib" in report.absent["plot"]


def test_the_command(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(common, "cache_bytes", lambda settings: 1 << 12)
    command = ["bench", "--quick", "--shape", "64x64", "--op", "adapted_linear", "--threads", "1"]
    assert main([*command, "--out", str(tmp_path)]) == 0
    name = f"cpu_{_cpu.isa()}"
    assert {path.name for path in tmp_path.iterdir()} == {f"{name}.md", f"{name}.csv", f"{name}.png"}
    assert "| forward | 64 x 64 | 16 |" in (tmp_path / f"{name}.md").read_text()
    printed = capsys.readouterr().out
    assert str(tmp_path / f"{name}.md") in printed and "| 16 | ours |" in printed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--shape", "64"], "a shape is NxK, such as 4096x4096, got '64'"),
        (["--shape", "64x100"], "K a multiple of 64, got '64x100'"),
        (["--threads", "0"], "must be a whole number above 0, got '0'"),
        (["--op", "nonsense"], "invalid choice: 'nonsense'"),
        (["--tune"], "--tune needs --device cuda"),
    ],
)
def test_bad_arguments(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        sys.exit(main(["bench", *arguments]))
    assert stopped.value.code == 2
    captured = capsys.readouterr()
    assert message in captured.err


def test_threads_have_limits_and_rows_of_their_own(
    make_report: Callable[..., Report], monkeypatch: pytest.MonkeyPatch
) -> None:
    before = torch.get_num_threads()
    report = make_report(ops=["adapted_linear"], shape=SHAPE, threads=[2, 1])
    bench_adapted_linear.run_first(report)
    of = {threads: {row.provider for row in report.rows if row.threads == threads} for threads in (1, 2)}
    dense = goals.DENSE if _cpu.has_bfloat16() else goals.IN_FLOAT32[goals.DENSE]
    assert set(report.limits) == {1, 2} and {goals.OURS, dense} <= of[1] < of[2]
    assert torch.get_num_threads() == before


# ---- calls that take too long


def wait_for_ever() -> None:
    threading.Event().wait()


def two_cases(report: Report, calls: Path) -> None:
    """Two cases with a provider that never returns; the file counts how often each is called."""

    def counted(name: str, call: Callable[[], object]) -> common.Provider:
        def run() -> None:
            with open(calls / name, "a") as file:
                file.write(".")
            call()

        return common.Provider([run], 100, 100)

    for M in (1, 2):
        providers = {"ours": counted("ours", int), "slow": counted("slow", wait_for_ever), "peer": counted("peer", int)}
        report.case("op", SHAPE, M, torch.float32, providers)
    report.sections += 1


def test_a_call_that_does_not_end_is_dropped_and_the_run_goes_on(
    make_report: Callable[..., Report], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    settings = make_report(seconds=25.0).settings  # a call may take half a second
    saved: list[list[int]] = []
    report = watch.run(
        settings, partial(two_cases, calls=tmp_path), lambda report: saved.append([row.M for row in report.rows])
    )
    assert [(row.M, row.provider) for row in report.rows] == [(M, name) for M in (1, 2) for name in ("ours", "peer")]
    (name,) = report.absent
    assert name == "slow, op, float32" and report.sections == 1 and not report.over
    assert "one call had not ended after 0." in report.absent[name] and "a call may take 0.5 s" in report.absent[name]
    assert (tmp_path / "slow").read_text() == ".", "it is not called again for as much work"
    assert [1, 1] in saved and "slow" in report.text()
    assert "op, 64 x 64, float32" in capfd.readouterr().err, "progress"


def test_a_run_that_is_killed_leaves_its_finished_cases(
    make_report: Callable[..., Report], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def save(report: Report) -> None:
        suite.save(report, tmp_path)
        if report.rows:
            raise KeyboardInterrupt

    def cases(report: Report) -> None:
        report.case("op", SHAPE, 1, torch.float32, {"ours": NOTHING})
        wait_for_ever()

    with pytest.raises(KeyboardInterrupt):
        watch.run(make_report().settings, cases, save)
    (table,) = tmp_path.glob("*.csv")
    assert "op,64,64,1,float32" in table.read_text() and table.with_suffix(".md").is_file()
    assert not multiprocessing.active_children(), "the measuring process is ended, too"


def test_a_run_ends_in_its_time(make_report: Callable[..., Report], monkeypatch: pytest.MonkeyPatch) -> None:
    def time_is_over(report: Report) -> None:
        monkeypatch.setattr(watch, "GRACE", float("-inf"))

    report = watch.run(make_report(seconds=1.0).settings, lambda report: wait_for_ever(), time_is_over)
    assert report.over and "the time was over" in report.text()


def test_what_would_take_too_long_is_not_called(make_report: Callable[..., Report]) -> None:
    report = make_report(seconds=100.0)  # a call may take 2 s
    report.costs["op, float32", "peer"] = (100.0, 1.0, 1)
    cases = {"ours": NOTHING, "peer": common.Provider([wait_for_ever], 1, 300)}
    report.case("op", SHAPE, 3, torch.float32, cases)
    assert "3.0 s expected, since a smaller call took 1.0 s" in report.absent["peer, op, float32"]
    report.case("op", SHAPE, 1, torch.float32, cases | {"peer": common.Provider([int], 1, 90)})
    assert [row.provider for row in report.rows] == ["ours", "ours", "peer"]


def test_a_failure_of_the_measuring_process_is_told(
    make_report: Callable[..., Report], capfd: pytest.CaptureFixture[str]
) -> None:
    def fail(report: Report) -> None:
        raise ValueError("a bug")

    with pytest.raises(RuntimeError, match="process failed"):
        watch.run(make_report().settings, fail, lambda report: None)
    assert "ValueError: a bug" in capfd.readouterr().err


def test_without_bfloat16_the_dense_peers_are_float32(
    make_report: Callable[..., Report], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_cpu, "has_bfloat16", lambda: False)
    limits = common.measure_limits(make_report().settings)
    assert limits.rates["bfloat16"] == limits.rates["float32"]
    weight = NF4Weight.quantize(torch.randn(SHAPE).bfloat16())
    x = torch.randn(3, 64).bfloat16()
    found = bench_adapted_linear.makers("adapted_linear", "cpu", torch.bfloat16, True)
    assert set(goals.IN_FLOAT32) & set(found) == set() and goals.INT4 in found
    expected = (x.float() @ weight.dequantize(torch.float32).T).bfloat16()
    for name in (goals.IN_FLOAT32[goals.DENSE], goals.IN_FLOAT32[goals.DECODED]):
        assert torch.equal(found[name](weight, torch.bfloat16).forward(x), expected)
    y = found[goals.IN_FLOAT32["dequantise + dense + LoRA"]](weight, torch.bfloat16).forward(x)
    assert y.dtype == torch.bfloat16
    assert {goal.against for goal in goals.goals_of("cpu")} >= {goals.INT4, goals.IN_FLOAT32[goals.DENSE], goals.LIMIT}


# ---- what is computed from rows


def test_memory_is_read_in_turn_where_bytes_are_the_limit(
    make_report: Callable[..., Report], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    report = make_report()
    reads = 0
    original = report.reading.calls[0]

    def read() -> None:
        nonlocal reads
        reads += 1
        original()

    report.reading = common.Provider([read], report.reading.bytes)
    report.case("op", SHAPE, 1, torch.float32, {"ours": common.Provider([lambda: None], 100, flops=100_000)})
    assert reads == 0 and report.rows[0].bandwidth is None, "at these limits the operations take longer"
    assert report.limit(report.rows[0]) == 1e-6
    report.case("op", SHAPE, 2, torch.float32, {"ours": NOTHING, "other": common.Provider([lambda: None], 7)})
    assert reads >= 3 and [row.provider for row in report.rows] == ["ours", "ours", "other"]
    for row, nbytes in zip(report.rows[1:], (1, 7), strict=True):
        assert row.bandwidth == report.rows[1].bandwidth and report.limit(row) == nbytes / row.bandwidth
    assert (
        "memory gave" in report.text()
        and str(row.bandwidth) in (report.write(tmp_path).with_suffix(".csv")).read_text()
    )


def row(provider: str, seconds: float, M: int = 1, op: str = "adapted_linear", outside: float | None = None) -> Row:
    return Row(op, 64, 64, M, "bfloat16", 1, provider, 1_000_000, 0, Timing(seconds, 0.0, 3, outside), 1.0)


def test_goals_take_the_worst_row(make_report: Callable[..., Report], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_cpu, "has_bfloat16", lambda: True)
    report = make_report()
    report.rows = [row("ours", 1.2e-3), row(goals.INT4, 1e-3), row("ours", 1e-3, 4), row(goals.INT4, 1e-3, 4)]
    report.rows += [row("ours", 1e-3, 16), row(goals.DENSE, 8e-4, 16), row("ours", 9e-3, 8), row(goals.DENSE, 1e-3, 8)]
    table = {line[0]: list(line[-3:]) for line in goals.goals(report).rows}
    # A megabyte at a gigabyte a second takes a millisecond.
    assert table["M = 1 ... 4: at most 0.9 x ATen int4"] == ["1.2 (M = 1)", "no", "1"]
    assert table["M = 16 ... 512: at most 1.0 x dense"] == ["1.25 (M = 16)", "no", "1.2"]
    assert table["M = 1: at least 85% of the bandwidth"] == ["1.2 (M = 1)", "no", "1"]
    assert len(table) == 3, "goals without rows are not listed"


def test_side_by_side_is_over_the_first_provider(make_report: Callable[..., Report]) -> None:
    report = make_report()
    report.rows = [row("ours", 1e-3), row("other", 2e-3), row("ours", 4e-3, 4), row("other", 2e-3, 4)]
    report.rows += [row("ours", 1e-3, op="nf4_quantize"), row("form few", 1e-3, op="crossover of adapted_linear")]
    first, second = goals.headlines(report)
    assert first.columns == ["work", "layer", "M", "ours", "share", "other"]
    assert [line[2:] for line in first.rows] == [["1", "1 ms", "100%", "2"], ["4", "4 ms", "25%", "0.5"]]
    assert [line[0] for line in second.rows] == ["nf4_quantize"] and not second.title


def test_results_in_the_repository_are_short() -> None:
    results = suite.default_folder()
    files = sorted(path for path in results.iterdir() if path.suffix != ".csv")
    assert files and {path.suffix for path in files} == {".md", ".png"}
    for path in results.glob("*.md"):
        assert len(path.read_text().splitlines()) <= 180 and path.with_suffix(".png").is_file()


def test_the_exponent_of_a_power_law() -> None:
    sizes = [1.0, 2.0, 8.0, 64.0]
    exponent, off = bench_scaling.fit(sizes, [3 * size**1.5 for size in sizes])
    assert exponent == pytest.approx(1.5) and off == pytest.approx(1.0)
    assert bench_scaling.fit(sizes, [1.0, 1.0, 1.0, 4.0])[1] > 1.2


def test_along_M_every_form_has_its_own_exponent() -> None:  # noqa: N802
    found = next(s for s in bench_scaling.series("cuda", False) if (s.cost, s.varied) == ("time", "M"))
    few, *many = bench_scaling.ranges(found, "cuda")
    assert found.values[few][-1] <= 1024 < found.values[many[0]][0] and len(found.values[many[-1]]) == 3
    assert few not in many and all(many.count(part) == 1 for part in many), "no line is there twice"


def test_the_pool_of_many_adapters_counts_what_it_holds() -> None:
    table = bench_pool.measure(40, (256, 512, 128), 2, 1 << 22)
    cells = {name: value for name, value in table.rows}
    assert cells["adapters, resident"] == "40, 40"
    assert cells["bytes of an adapter"] == f"{2 * 7 * 2 * bench_pool.RANK**2:,}"
    # D and U in NF4: half a byte per number, a byte per block of 64, and the second-level scales.
    factors = int(cells["of which shared factors"].replace(",", ""))
    numbers = 2 * bench_pool.RANK * sum(N + K for N, K in bench_pool.shapes(256, 512, 128).values())
    assert 0.5 * numbers < factors < 0.65 * numbers
    assert next(value for name, value in cells.items() if "bits of a row" in name) == "yes"


def test_serving_is_measured_for_every_case(causal_model: str, tmp_path: Path) -> None:
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\nwhile read asked; do echo 1000; done\n")
    python.chmod(0o755)
    table = bench_serve.measure(Path(causal_model), None, python, head=False, prompt=20, drawn=3, threads=1, seconds=0)
    cases = bench_serve.cases(20, 3)
    assert [name for name, *_ in table.rows] == [case.name for case in cases]
    for _, _, against, _, busy in table.rows[:3]:
        assert against.startswith("vLLM ") and float(busy[:-1]) > 10
    assert all(float(rate) > 0 for _, rate, *_ in table.rows)
    assert table.rows[-1][2].startswith("no adapters ")


def test_serving_ratios_are_of_medians() -> None:
    cases = bench_serve.cases(100, 10)
    samples = {case.name: [3.0, 1.0, 2.0] for case in cases} | {"a prompt, llama.cpp": [1.0, 1.0, 9.0]}
    samples[cases[3].name] = [4.0]
    processor = {name: [4.0] for name in samples} | {"a prompt, llama.cpp": [2.0]}
    prompt, one, eight, adapters, _ = bench_serve.table(cases, samples, processor, "").rows
    assert prompt == ["a prompt", "50.0", "llama.cpp 100.0", "0.50x", "0.50x"]
    assert one == ["one stream", "5.0", "", "", ""] and eight[1] == "40.0"
    assert adapters[1:] == ["20.0", "no adapters 40.0", "0.50x", "1.00x"]


def test_rows_that_are_another_adapters_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_pool, "FILES", 1)
    cells = bench_pool.measure(64, (256, 512, 128), 1, 1 << 22).rows
    assert next(value for name, value in cells if "bits of a row" in name) == "NO"


def test_a_plot_has_a_line_for_every_system(make_report: Callable[..., Report]) -> None:
    pytest.importorskip("matplotlib")
    report = make_report()
    report.rows = [row(name, s * M, M) for M in (1, 4) for name, s in (("ours", 2e-3), ("dense, no adapter", 3e-3))]
    report.rows.append(row(goals.BARE, 1.0))
    drawn = plot.figure(plot.panels(report), report)
    points = torch.stack([torch.tensor(line.get_xydata()) for line in drawn.axes[0].lines[:2]])
    torch.testing.assert_close(points, torch.tensor([[[1.0, 2], [4, 8]], [[1, 3], [4, 12]]]).double())


def test_a_table_is_markdown() -> None:
    assert str(Table("T", ["a", "b"], [["1", "2"]])) == "## T\n\n| a | b |\n| --- | --- |\n| 1 | 2 |"


def make_step(device: torch.device, megabytes: int) -> Callable[[], object]:
    def step() -> torch.Tensor:
        torch.ones(megabytes << 18).sum()  # the peak: freed before the result is allocated
        return torch.ones(megabytes << 17)

    return step


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_peak_memory_counts_what_was_freed_again() -> None:
    found = peak.peak_bytes(Settings(CPU, ()), make_step, (200,), (1,))
    assert found == pytest.approx(200 << 20, rel=0.05)
