"""Settings of a run, interleaved timing, and measured limits."""

from __future__ import annotations

import itertools
import mmap
import platform
import re
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from lowrank_ops.ops import _cpu

Key = tuple[str, str]  # the op and dtype, and the provider
Call = Callable[[], object]
Sampler = Callable[[], float]  # one sample: the seconds of one call


@dataclass(frozen=True)
class Settings:
    """Settings from the command line; ``threads`` are torch's on the CPU, and the first number gets all rows."""

    device: torch.device
    ops: Sequence[str]
    quick: bool = False
    shape: tuple[int, int] | None = None
    threads: Sequence[int] = (1,)
    seconds: float = float("inf")

    @property
    def share(self) -> float:
        """The most seconds of one call; a provider that needs more is dropped."""
        return min(20.0, self.seconds / 50)

    @property
    def kind(self) -> str:
        """ "cpu" or "cuda"; all code that differs between the two reads this."""
        return self.device.type

    def shapes(self, *shapes: tuple[int, int]) -> Sequence[tuple[int, int]]:
        return [self.shape] if self.shape else shapes[:1] if self.quick else shapes


@dataclass(frozen=True)
class Provider:
    """A measured system: one call for each copy of its weight, and the bytes and operations of one call."""

    calls: Sequence[Call]
    bytes: int
    flops: int = 0


# ---- timing


def cache_bytes(settings: Settings) -> int:
    """A GPU's L2, or all instances of the CPU's last level together (64 MiB if the system does not tell)."""
    if settings.kind == "cuda":
        return int(torch.cuda.get_device_properties(settings.device).L2_cache_size)
    sizes: dict[tuple[int, str], int] = {}
    for index in Path("/sys/devices/system/cpu").glob("cpu[0-9]*/cache/index*"):
        level, size, cpus = ((index / name).read_text().strip() for name in ("level", "size", "shared_cpu_list"))
        sizes[int(level), cpus] = int(size.removesuffix("K")) << 10
    last = max((level for level, _ in sizes), default=0)
    return sum(size for (level, _), size in sizes.items() if level == last) or 64 << 20


def copies(weight_bytes: int, settings: Settings) -> int:
    """The number of weights to rotate so that each leaves every cache before its next use (tiny ones may not)."""
    least, times = (8, 3) if settings.kind == "cuda" else (2, 2)
    return min(256, max(least, -(-times * cache_bytes(settings) // weight_bytes)))


@contextmanager
def torch_threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def cpu_sampler(calls: Sequence[Call]) -> Sampler:
    rotation = itertools.cycle(calls)
    start = time.perf_counter()
    next(rotation)()
    seconds = time.perf_counter() - start

    def sample() -> float:
        nonlocal seconds
        if seconds < 0.02:
            # Untimed, because threads of another provider's OpenMP runtime may still spin on the cores, and ours may
            # sleep.
            next(rotation)()
        call = next(rotation)
        start = time.perf_counter()
        call()
        seconds = time.perf_counter() - start
        return seconds

    if seconds < 0.1:
        sample()
        sample()
    return sample


def cuda_sampler(calls: Sequence[Call], graph: bool = True) -> Sampler:
    """Sample one pass over all copies; a CUDA graph leaves out the host's time between launches."""

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
    """Time providers in turn, each until it has used ``seconds``, with ``least`` to ``most`` samples.

    Two samples are enough of a provider that has used ten times its seconds.
    """
    samples: dict[str, list[float]] = {name: [] for name in samplers}
    spent = dict.fromkeys(samplers, 0.0)

    def goes_on(name: str) -> bool:
        count = len(samples[name])
        if count < least:
            return count < 2 or spent[name] < 10 * seconds
        return spent[name] < seconds and count < most

    while running := list(filter(goes_on, samples)):
        for name in running:
            began = time.perf_counter()
            samples[name].append(samplers[name]())
            spent[name] += time.perf_counter() - began
    return samples


# ---- what a worker tells the process that watches it


@dataclass(frozen=True)
class Case:
    """A case that begins: its description, torch's threads, and for each provider its key and the size of a call."""

    what: str
    threads: int
    providers: Sequence[tuple[Key, float]]


class Clock:
    """The call in progress, in memory that both processes see, because a message would disturb what is timed."""

    def __init__(self, context: Any) -> None:
        self.shared = context.RawArray("d", 2)  # the start of the call, 0 between calls; the provider's index

    def start(self, index: int) -> None:
        self.shared[1] = index
        self.shared[0] = time.monotonic()

    def stop(self) -> None:
        self.shared[0] = 0.0

    @property
    def running(self) -> tuple[float, int] | None:
        """Seconds since the start of the call, and the provider's index."""
        began, index = self.shared
        return (time.monotonic() - began, int(index)) if began else None


@dataclass(frozen=True)
class Watch:
    """The worker's side: tells what it measures, and marks each call."""

    clock: Clock
    connection: Connection

    def begin(self, what: str, threads: int, providers: Sequence[tuple[Key, float]]) -> None:
        self.connection.send(Case(what, threads, providers))

    def finished(self, report: object) -> None:
        self.connection.send(report)


# ---- limits


def products_in(dtype: torch.dtype, kind: str) -> torch.dtype:
    """The dtype of torch's fastest products: float32 for bfloat16 where the processor does not multiply that."""
    slow = dtype == torch.bfloat16 and kind == "cpu" and not _cpu.has_bfloat16()
    return torch.float32 if slow else dtype


@dataclass(frozen=True)
class Limits:
    """Bytes a second from memory, and operations a second of a large matrix product in each dtype."""

    bandwidth: float
    rates: Mapping[str, float]

    def seconds(self, moved: int, flops: int, dtype: str) -> float:
        """The least time for these bytes or operations."""
        return max(moved / self.bandwidth, flops / self.rates[dtype])

    def better(self, other: Limits) -> Limits:
        rates = {dtype: max(rate, other.rates[dtype]) for dtype, rate in self.rates.items()}
        return Limits(max(self.bandwidth, other.bandwidth), rates)

    def __str__(self) -> str:
        rates = ", ".join(f"{rate / 1e12:.2f} TFLOP/s {dtype}" for dtype, rate in self.rates.items())
        return f"{self.bandwidth / 1e9:.1f} GB/s, {rates}"


def reading(nbytes: int) -> Provider:
    """Sum a CPU tensor, in huge pages if the system has them, as the least time of reading."""
    if hasattr(mmap, "MADV_HUGEPAGE"):
        memory = mmap.mmap(-1, nbytes, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)  # a shared mapping may get no huge pages
        memory.madvise(mmap.MADV_HUGEPAGE)
        source = torch.frombuffer(memory, dtype=torch.float32).fill_(1)
    else:
        source = torch.ones(nbytes // 4)
    return Provider([source.sum], source.nbytes)


def measure_limits(settings: Settings) -> Limits:
    """Measure limits as medians. CPU: bandwidth of summing a large tensor. GPU: of a copy, bytes read plus written."""
    cuda, device = settings.kind == "cuda", settings.device

    def median(call: Call) -> float:
        sampler = cuda_sampler([call]) if cuda else cpu_sampler([call])
        return statistics.median(interleave({"": sampler}, 0.1 if settings.quick else 0.7, most=25)[""])

    least, side = (64 << 20, 2048) if settings.quick else (512 << 20, 8192 if cuda else 2048)
    nbytes = max(least, 8 * cache_bytes(settings)) // 4 * 4
    if cuda:
        source = torch.ones(nbytes // 4, device=device)
        bandwidth = 2 * source.nbytes / median(partial(torch.empty_like(source).copy_, source))
        del source
    else:
        bandwidth = nbytes / median(reading(nbytes).calls[0])
    rates: dict[str, float] = {}
    for dtype in (torch.float32, torch.bfloat16):
        if (fast := products_in(dtype, settings.kind)) != dtype:
            rates[name_of(dtype)] = rates[name_of(fast)]
            continue
        for n in (512, side):
            a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
            rates[name_of(dtype)] = 2 * n**3 / median(partial(torch.mm, a, b))
            if 2 * side**3 / rates[name_of(dtype)] > settings.share / 4:
                break  # the small product tells enough of a slow machine
    return Limits(bandwidth, rates)


# ---- names


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def slug(name: str) -> str:
    """Lower case with ``_`` in place of other signs than letters and digits, like the names of tile tables."""
    return re.sub(r"[^a-z0-9]+", "_", name.lower()).strip("_")


def device_name(settings: Settings) -> str:
    if settings.kind == "cuda":
        return torch.cuda.get_device_name(settings.device)
    cpuinfo = Path("/proc/cpuinfo")
    models = re.findall(r"model name\s*: (.*)", cpuinfo.read_text() if cpuinfo.is_file() else "")
    return models[0] if models else platform.processor() or platform.machine()
