"""Interleaved timing, measured limits, and the table that both end in."""

from __future__ import annotations

import itertools
import json
import platform
import re
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import torch

from lowrank_ops import info

Call = Callable[[], object]
Sampler = Callable[[], float]  # one sample: the seconds of one call


@dataclass(frozen=True)
class Settings:
    """What the command line asked for."""

    device: torch.device
    ops: Sequence[str]
    quick: bool = False
    shape: tuple[int, int] | None = None

    def shapes(self, *shapes: tuple[int, int]) -> Sequence[tuple[int, int]]:
        return [self.shape] if self.shape else shapes[:1] if self.quick else shapes


@dataclass(frozen=True)
class Provider:
    """Something that does the work: one call per copy of its weight, and the bytes and operations of one call."""

    calls: Sequence[Call]
    bytes: int
    flops: int = 0


@dataclass(frozen=True)
class Row:
    """The median of ``samples``; ``spread`` is the distance of their quartiles, relative to it."""

    op: str
    N: int
    K: int
    M: int
    dtype: str
    provider: str
    seconds: float
    spread: float
    samples: int
    bytes: int
    flops: int
    ratio: float


# ---- timing


def cache_bytes(device: torch.device) -> int:
    """A GPU's L2, or all instances of the CPU's last level together (64 MiB where the system does not tell)."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).L2_cache_size)
    sizes: dict[tuple[int, str], int] = {}
    for index in Path("/sys/devices/system/cpu").glob("cpu[0-9]*/cache/index*"):
        level, size, cpus = ((index / name).read_text().strip() for name in ("level", "size", "shared_cpu_list"))
        sizes[int(level), cpus] = int(size.removesuffix("K")) << 10
    last = max((level for level, _ in sizes), default=0)
    return sum(size for (level, _), size in sizes.items() if level == last) or 64 << 20


def copies(weight_bytes: int, device: torch.device) -> int:
    """How many weights to rotate so that each has left every cache before it is used again (tiny ones may not)."""
    return min(256, max(8 if device.type == "cuda" else 2, -(-3 * cache_bytes(device) // weight_bytes)))


def cpu_sampler(calls: Sequence[Call]) -> Sampler:
    rotation = itertools.cycle(calls)
    seconds = 0.0

    def sample() -> float:
        nonlocal seconds
        if seconds < 0.02:
            # Untimed: the threads of another provider's OpenMP runtime may still spin on the cores, and ours may sleep.
            next(rotation)()
        call = next(rotation)
        start = time.perf_counter()
        call()
        seconds = time.perf_counter() - start
        return seconds

    if sample() < 0.1:
        sample()
    return sample


def cuda_sampler(calls: Sequence[Call], graph: bool = True) -> Sampler:
    """A sample is one pass over all copies; as a CUDA graph it is free of the host's time between launches."""

    def once() -> None:
        for call in calls:
            call()

    replay = once
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        once()
        once()
    torch.cuda.current_stream().wait_stream(stream)
    if graph:
        captured = torch.cuda.CUDAGraph()
        with torch.cuda.graph(captured):
            once()
        replay = captured.replay
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def sample() -> float:
        torch.cuda.synchronize()
        start.record()
        replay()
        stop.record()
        stop.synchronize()
        return float(start.elapsed_time(stop)) / 1000 / len(calls)

    sample()
    return sample


def interleave(
    samplers: Mapping[str, Sampler], seconds: float, least: int = 3, most: int = 200
) -> dict[str, list[float]]:
    """Round robin: all providers in turn, each until it has used ``seconds``, within ``least`` and ``most`` samples."""
    samples: dict[str, list[float]] = {name: [] for name in samplers}
    while running := [
        name for name, s in samples.items() if len(s) < least or (sum(s) < seconds and len(s) < most)
    ]:  # fmt: skip
        for name in running:
            samples[name].append(samplers[name]())
    return samples


# ---- limits


@dataclass(frozen=True)
class Limits:
    """Bytes a second that memory gives, and operations a second of a large matrix product in each dtype."""

    bandwidth: float
    rates: Mapping[str, float]

    def share(self, row: Row) -> float:
        """The time that the bytes or the operations need at least, over the time it took."""
        return max(row.bytes / self.bandwidth, row.flops / self.rates[row.dtype]) / row.seconds


def measure_limits(device: torch.device) -> Limits:
    """Medians too. CPU: bandwidth of summing a large tensor. GPU: of a copy, bytes read plus bytes written."""

    def median(call: Call) -> float:
        sampler = cpu_sampler([call]) if device.type == "cpu" else cuda_sampler([call])
        return statistics.median(interleave({"": sampler}, 1.0, most=25)[""])

    source = torch.ones(max(512 << 20, 8 * cache_bytes(device)) // 4, device=device)
    if device.type == "cpu":
        bandwidth = source.nbytes / median(source.sum)
    else:
        bandwidth = 2 * source.nbytes / median(partial(torch.empty_like(source).copy_, source))
    rates, side = {}, 2048 if device.type == "cpu" else 8192
    for dtype in (torch.bfloat16, torch.float32):
        a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
        rates[name_of(dtype)] = 2 * side**3 / median(partial(torch.mm, a, b))
    return Limits(bandwidth, rates)


# ---- report


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def slug(name: str) -> str:
    """Lower case, with ``_`` for what is no letter or digit, as the tables of tile sizes are called."""
    return re.sub(r"[^a-z0-9]+", "_", name.lower()).strip("_")


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cpuinfo = Path("/proc/cpuinfo")
    models = re.findall(r"model name\s*: (.*)", cpuinfo.read_text() if cpuinfo.is_file() else "")
    return models[0] if models else platform.processor() or platform.machine()


@dataclass
class Report:
    """Rows as they come in, printed at once; Markdown and JSON at the end."""

    settings: Settings
    rows: list[Row] = field(default_factory=list)
    absent: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.before = measure_limits(self.settings.device)

    def build(self, name: str, make: Callable[[], Any]) -> Any:
        """What ``make`` returns; None where it fails, and then it is on the list of what is absent."""
        try:
            return make()
        except Exception as error:
            self.absent[name] = f"{type(error).__name__}: {error}".splitlines()[0][:200]
            print(f"absent: {name}: {self.absent[name]}", flush=True)

    def case(self, op: str, shape: tuple[int, int], M: int, dtype: torch.dtype, providers: Mapping[str, Provider],
             graph: bool = True) -> dict[str, float]:  # fmt: skip
        """Time providers against each other; their medians. Ratios refer to the first; M = 0 where there is none."""
        cuda, quick = self.settings.device.type == "cuda", self.settings.quick
        samplers: dict[str, Sampler] = {}
        for name, provider in providers.items():
            sampler = (
                self.build(f"{name} as a CUDA graph", partial(cuda_sampler, provider.calls)) if cuda and graph else None
            )
            other = partial(cuda_sampler, graph=False) if cuda else cpu_sampler
            if sampler := sampler or self.build(name, partial(other, provider.calls)):
                samplers[name] = sampler
        medians: dict[str, float] = {}
        for name, times in interleave(samplers, (0.1 if cuda else 0.5) / (5 if quick else 1)).items():
            low, middle, high = statistics.quantiles(times, n=4)
            medians[name] = middle
            ratio = middle / next(iter(medians.values()))
            work = providers[name].bytes, providers[name].flops
            row = Row(op, *shape, M, name_of(dtype), name, middle, (high - low) / middle, len(times), *work, ratio)
            self.rows.append(row)
            print(f"{op}, {row.N} x {row.K}, {row.dtype} | {line(row, self.before)}", flush=True)
        return medians

    def finish(self) -> tuple[str, dict[str, Any]]:
        """Markdown and data. The limits are measured again and the better ones taken."""
        device, runs = self.settings.device, (self.before, measure_limits(self.settings.device))
        rates = {dtype: max(run.rates[dtype] for run in runs) for dtype in self.before.rates}
        limits = Limits(max(run.bandwidth for run in runs), rates)
        facts = {"device": device_name(device), "date": datetime.now(UTC).isoformat(timespec="minutes")}
        facts |= info.collect()
        text = [f"# {facts['device']}", "", *(f"- {name}: {fact}" for name, fact in facts.items()), ""]
        text += [
            f"Limits in this run: {' and '.join(f'{run.bandwidth / 1e9:.1f}' for run in runs)} GB/s before and after, "
            + ", ".join(f"{rate / 1e12:.2f} TFLOP/s {dtype}" for dtype, rate in rates.items())
            + ". Share: the time at the limit over the time taken. Ratio: the time over that of the first provider."
        ]
        for key, group in itertools.groupby(self.rows, lambda r: (r.op, r.N, r.K, r.dtype)):
            text += ["", "## {}, {} x {}, {}".format(*key), ""]
            text += ["| M | provider | time | moved | share | ratio | spread |", "|---|---|---|---|---|---|---|"]
            text += [f"| {line(row, limits)} |" for row in group]
        absent = "; ".join(f"{name} ({reason})" for name, reason in self.absent.items()) or "none"
        text += ["", *self.notes, "", f"Absent: {absent}.", ""]
        rows = [asdict(row) | {"share": limits.share(row)} for row in self.rows]
        data = {"facts": facts, "limits": asdict(limits), "rows": rows, "absent": self.absent, "notes": self.notes}
        return "\n".join(text), data

    def write(self, folder: Path, text: str, data: Mapping[str, Any]) -> str:
        """``cpu`` or the GPU's name, ``.md`` and ``.json``, in ``folder``."""
        folder.mkdir(parents=True, exist_ok=True)
        device = self.settings.device
        name = "cpu" if device.type == "cpu" else slug(device_name(device))
        (folder / f"{name}.md").write_text(text)
        (folder / f"{name}.json").write_text(json.dumps(data, indent=1) + "\n")
        return str(folder / f"{name}.md")


def line(row: Row, limits: Limits) -> str:
    return (
        f"{row.M or '-'} | {row.provider} | {row.seconds * 1e6:.1f} µs | {row.bytes / row.seconds / 1e9:.1f} GB/s | "
        f"{limits.share(row):.0%} | {row.ratio:.2f} | {row.spread:.0%}"
    )
