"""Collect rows and tables of a run, with absent providers and skipped cases, and write its files."""

from __future__ import annotations

import csv
import itertools
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import torch

from lowrank_ops.commands import info
from lowrank_ops.files import replacing, write_text
from lowrank_ops.ops import _cpu

from .common import (
    Key,
    Limits,
    Provider,
    Sampler,
    Settings,
    Watch,
    cache_bytes,
    cpu_sampler,
    cuda_sampler,
    device_name,
    interleave,
    measure_limits,
    name_of,
    reading,
    slug,
    torch_threads,
)  # fmt: skip

READING = "reading memory"
INSIDE = ", inside"  # suffix of a provider while it is timed in a CUDA graph


@dataclass(frozen=True)
class Timing:
    """The median of ``samples``; ``spread`` is the distance of their quartiles relative to the median.

    On a GPU ``seconds`` is the time in a CUDA graph and ``outside`` the time without one, if both could be measured.
    """

    seconds: float
    spread: float
    samples: int
    outside: float | None = None


@dataclass(frozen=True)
class Row:
    """The result of one provider in one case; ``threads`` is 0 on a GPU, ``ratio`` is relative to the case's first provider.

    ``bandwidth``: bytes a second from memory between the samples of the case; None if not measured.
    """

    op: str
    N: int
    K: int
    M: int
    dtype: str
    threads: int
    provider: str
    bytes: int
    flops: int
    timing: Timing
    ratio: float
    bandwidth: float | None = None

    @property
    def seconds(self) -> float:
        return self.timing.seconds

    def cells(self) -> list[Any]:
        """The cells of a line of the table of all rows, in the order of ROW_COLUMNS."""
        return [*(getattr(self, name) for name in _OF_CASE), *asdict(self.timing).values(), self.ratio, self.bandwidth]

    @property
    def case(self) -> tuple[str, int, int, str, int]:
        return self.op, self.N, self.K, self.dtype, self.threads


_OF_CASE = ("op", "N", "K", "M", "dtype", "threads", "provider", "bytes", "flops")
ROW_COLUMNS = (*_OF_CASE, *(f.name for f in fields(Timing)), "ratio", "bandwidth")


@dataclass(frozen=True)
class Table:
    """A table of text cells, computed from rows or measured directly. A table without a title continues the previous one."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    text: str = ""

    def __str__(self) -> str:
        lines = [f"## {self.title}", ""] if self.title else []
        lines += [self.text, ""] if self.text else []
        lines += [f"| {' | '.join(cells)} |" for cells in (self.columns, ["---"] * len(self.columns), *self.rows)]
        return "\n".join(lines)


@dataclass
class Report:
    """Collect rows and print them at once; write Markdown and a table of all rows.

    A case starts only if more of ``settings.seconds`` is left than the longest case took; skipped cases are listed.
    """

    settings: Settings
    rows: list[Row] = field(default_factory=list)
    absent: dict[str, str] = field(default_factory=dict)
    skipped: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)

    reserve: float = 0.0  # seconds reserved for other work at the end
    done: dict[str, dict[str, Timing]] = field(default_factory=dict)  # timings by the description of the case
    sections: int = 0  # how many sections are complete
    over: bool = False  # whether the run was ended because its time was over
    costs: dict[Key, tuple[float, float, int]] = field(default_factory=dict)  # size, seconds, threads of a call
    watch: Watch | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        self.began = time.monotonic()
        self.longest = 1.0
        self._read_memory()
        self.before = self.measure_limits()
        self.after = self.before

    def _read_memory(self) -> None:
        self.reading = reading(max(128 << 20, 4 * cache_bytes(self.settings))) if self.settings.kind == "cpu" else None

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name not in ("reading", "watch")}

    def resume(self) -> None:
        """Make what a report that came from another process lacks."""
        self._read_memory()

    # ---- limits and time

    def measure_limits(self) -> dict[int, Limits]:
        """Measure limits by number of threads; 0 means the GPU."""
        if self.settings.kind == "cuda":
            found = {0: measure_limits(self.settings)}
        else:
            found = {}
            for threads in self.settings.threads:
                with torch_threads(threads):
                    found[threads] = measure_limits(self.settings)
        for threads, limits in found.items():
            print(f"limits{f', {threads} threads' if threads else ''}: {limits}", flush=True)
        return found

    @property
    def limits(self) -> dict[int, Limits]:
        """The better limits of before and after the run."""
        return {threads: limits.better(self.after[threads]) for threads, limits in self.before.items()}

    def limit(self, row: Row) -> float:
        """The least seconds for the row's bytes or operations."""
        limits = self.limits[row.threads]
        return replace(limits, bandwidth=row.bandwidth or limits.bandwidth).seconds(row.bytes, row.flops, row.dtype)

    def share(self, row: Row) -> float:
        """The least time for the row's bytes or operations over its measured time."""
        return self.limit(row) / row.seconds

    @property
    def left(self) -> float:
        return self.settings.seconds - (time.monotonic() - self.began)

    def skip(self, what: str) -> bool:
        """Tell whether too little time is left for a case; list it if so."""
        if self.left - self.reserve > self.longest:
            return False
        self.skipped.append(what)
        print(f"no time left: {what}", flush=True)
        return True

    # ---- measuring

    def build(self, name: str, make: Callable[[], Any]) -> Any:
        """Call ``make``; if it fails, list the name as absent and return None."""
        try:
            return make()
        except Exception as error:
            self.absent[name] = (f"{type(error).__name__}: {error}".splitlines() or [""])[0][:200]
            print(f"absent: {name}: {self.absent[name]}", flush=True)

    def drop(self, key: Key, size: float, seconds: float, what: str, threads: int, ended: bool = False) -> None:
        """List a provider whose one call takes longer than its share; it is not called again for as much work."""
        self.costs[key] = (size, seconds, threads)
        took = f"had not ended after {seconds:.1f} s" if ended else f"took {seconds:.1f} s"
        self._list_dropped(key, f"one call {took} ({what})")

    def _list_dropped(self, key: Key, why: str) -> None:
        op, name = key
        why = f"dropped: {why}; a call may take {self.settings.share:.3g} s"
        self.absent.setdefault(f"{name}, {op}", why)
        print(f"{name}, {op}: {why}", flush=True)

    def affordable(self, key: Key, size: float, what: str) -> bool:
        """Predict the time of a call from a smaller call of the same provider; drop what exceeds its share."""
        if key not in self.costs:
            return True
        before, seconds, threads = self.costs[key]
        expected = seconds * size / before * threads / torch.get_num_threads()
        if size < before or expected <= self.settings.share:
            return True
        self._list_dropped(key, f"{expected:.1f} s expected, since a smaller call took {seconds:.1f} s ({what})")
        return False

    def time(self, op: str, what: str, providers: Mapping[str, Provider], graph: bool = True, scale: float = 1.0
             ) -> dict[str, Timing]:  # fmt: skip
        """Time providers in turn; return nothing if no time is left.

        Args:
            op: names the work, whatever its size.
            what: describes the case; a case that this report has timed is not timed again.
            providers: the first is ours.
            graph: whether to time in a CUDA graph, too.
            scale: multiplies the seconds spent.
        """
        if what in self.done:
            return self.done[what]
        if self.skip(what):
            return {}
        began = time.monotonic()
        cuda = self.settings.kind == "cuda"
        sizes = {name: float(provider.flops or provider.bytes or 1) for name, provider in providers.items()}
        chosen = {name: p for name, p in providers.items() if self.affordable((op, name), sizes[name], what)}
        if self.watch:
            self.watch.begin(what, torch.get_num_threads(), [((op, name), sizes[name]) for name in chosen])
        samplers: dict[str, Sampler] = {}
        inside = []
        for index, (name, provider) in enumerate(chosen.items()):
            if cuda and graph:
                sampler = self._watched(index, f"{name} as a CUDA graph", partial(cuda_sampler, provider.calls))
                if sampler:
                    samplers[name + INSIDE] = sampler
                    inside.append(name)
            other = partial(cuda_sampler, graph=False) if cuda else cpu_sampler
            start = time.monotonic()
            if sampler := self._watched(index, name, partial(other, provider.calls)):
                samplers[name] = sampler
            took = time.monotonic() - start
            if name in samplers and not cuda and took > self.settings.share:
                del samplers[name]
                self.drop((op, name), sizes[name], took, what, torch.get_num_threads())
        seconds = scale * (0.1 if cuda else 0.3) / (5 if self.settings.quick else 1)
        samples = interleave(samplers, seconds)
        self.longest = max(self.longest, time.monotonic() - began)
        timings = {}
        for name in providers:
            outside = statistics.median(samples[name]) if name in samples else None
            times = samples.get(name + INSIDE) or samples.get(name)
            if times:
                low, middle, high = statistics.quantiles(times, n=4)
                timings[name] = Timing(
                    middle, (high - low) / middle, len(times), outside if name in inside else None
                )  # fmt: skip
                self.costs[op, name] = (sizes[name], middle, torch.get_num_threads())
        self.done[what] = timings
        return timings

    def _watched(self, index: int, name: str, make: Callable[[], Sampler]) -> Sampler | None:
        """Build a sampler; the watching process ends this one if that, or a sample, takes longer than a provider's share."""
        if self.watch is None:
            return self.build(name, make)
        clock = self.watch.clock

        def watched(call: Callable[[], Any]) -> Any:
            clock.start(index)
            try:
                return call()
            finally:
                clock.stop()

        sampler = self.build(name, partial(watched, make))
        return partial(watched, sampler) if sampler else None

    def case(self, op: str, shape: tuple[int, int], M: int, dtype: torch.dtype, providers: Mapping[str, Provider],
             graph: bool = True, scale: float = 1.0) -> dict[str, float]:  # fmt: skip
        """Add a row for every provider and return the medians; M = 0 if there are no tokens.

        On a CPU, memory is also read in turn with the providers if bytes may be the limit, because on a machine shared
        with others its bandwidth halves and doubles from minute to minute.
        """
        threads = 0 if self.settings.kind == "cuda" else torch.get_num_threads()
        of = f"{op}, {shape[0]} x {shape[1]}, {name_of(dtype)}{f', {threads} threads' if threads else ''}"
        what = f"{of}, M = {M}"
        if what in self.done:  # its rows are there
            return {name: timing.seconds for name, timing in self.done[what].items()}
        limits, work = self.limits[threads], next(iter(providers.values()))
        timed = dict(providers)
        if self.reading and 2 * work.bytes / limits.bandwidth >= work.flops / limits.rates[name_of(dtype)]:
            timed[READING] = self.reading
        timings = self.time(f"{op}, {name_of(dtype)}", what, timed, graph, scale)
        read = timings.pop(READING, None)
        bandwidth = self.reading.bytes / read.seconds if self.reading and read else None
        first = next(iter(timings.values()), None)
        for name, timing in timings.items():
            assert first is not None
            sizes, ratio = (providers[name].bytes, providers[name].flops), timing.seconds / first.seconds
            row = Row(op, *shape, M, name_of(dtype), threads, name, *sizes, timing, ratio, bandwidth)
            self.rows.append(row)
            print(f"{of} | {self.line(row)}", flush=True)
        if self.watch:
            self.watch.finished(self)
        return {name: timing.seconds for name, timing in timings.items()}

    # ---- writing

    def line(self, row: Row) -> str:
        cells = [str(row.M or "-"), row.provider, microseconds(row.seconds)]
        if not row.threads:
            cells.append("-" if row.timing.outside is None else microseconds(row.timing.outside))
        cells.append(f"{row.bytes / row.seconds / 1e9:.1f} GB/s")
        if row.threads:
            cells.append("-" if row.bandwidth is None else f"{row.bandwidth / 1e9:.1f} GB/s")
        cells += [f"{self.share(row):.0%}", f"{row.ratio:.2f}"]
        return " | ".join([*cells, f"{row.timing.spread:.0%}"])

    def text(self) -> str:
        """All results as Markdown: the summary, a table of all rows for each case, and the notes."""
        text = [self.summary()]
        order = dict.fromkeys(row.case for row in self.rows)
        for key, group in itertools.groupby(
            sorted(self.rows, key=lambda row: list(order).index(row.case)), lambda row: row.case
        ):
            op, N, K, dtype, threads = key
            of = f", {threads} thread{'s' if threads > 1 else ''}" if threads else ""
            columns = ["M", "provider", "time", *([] if threads else ["outside a CUDA graph"])]
            rows = [self.line(row).split(" | ") for row in group]
            columns += ["moved", *(["memory gave"] if threads else []), "share", "ratio", "spread"]
            text += [str(Table(f"{op}, {N} x {K}, {dtype}{of}", columns, rows)), ""]
        return "\n".join([*text, *dict.fromkeys(self.notes)])

    def summary(self) -> str:
        """The summary as Markdown: the machine, its limits, the tables, absent providers."""
        facts = {"date": datetime.now(UTC).isoformat(timespec="minutes")} | info.collect()
        text = [f"# {device_name(self.settings)}", "", "; ".join(f"{name}: {fact}" for name, fact in facts.items()), ""]
        for threads, limits in self.limits.items():
            of = f", {threads} thread{'s' if threads > 1 else ''}" if threads else ""
            runs = " and ".join(f"{run[threads].bandwidth / 1e9:.1f}" for run in (self.before, self.after))
            text += [f"Limits{of}: {limits}; before and after: {runs} GB/s."]
        for table in self.tables:
            text += ["", str(table)]
        absent = "; ".join(f"{name} ({reason})" for name, reason in self.absent.items()) or "none"
        text += ["", f"Absent: {absent}."]
        return "\n".join([*text, f"No time left for: {'; '.join(dict.fromkeys(self.skipped)) or 'nothing'}.", ""])

    def write(self, folder: Path) -> Path:
        """Write ``cpu_<instruction set>`` or ``<gpu>`` as summary ``.md`` and rows ``.csv``; return the summary's path."""
        folder.mkdir(parents=True, exist_ok=True)
        name = f"cpu_{_cpu.isa()}" if self.settings.kind == "cpu" else slug(device_name(self.settings))
        write_text(folder / f"{name}.md", self.summary())
        with replacing(folder / f"{name}.csv") as scratch, open(scratch, "w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow([*ROW_COLUMNS, "share"])
            writer.writerows([*(row.cells()), self.share(row)] for row in self.rows)
        return folder / f"{name}.md"


def microseconds(seconds: float) -> str:
    return f"{seconds * 1e6:.1f} µs"
