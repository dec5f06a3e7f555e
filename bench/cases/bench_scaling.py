"""Measure how time and peak memory of adapted_linear grow with M, N·K, R, the number of adapted layers, and threads.

The exponent e of cost ~ size^e is the slope of a least-squares line through the logarithms. Only ours, NF4 with double
quantisation in bfloat16, factors in float32.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from lowrank_ops import NF4Weight
from lowrank_ops.functional import LowRankUpdate, adapted_linear
from lowrank_ops.kernels.operands import NF4
from lowrank_ops.ops import _cpu, _plan

from ..common import Provider, copies, torch_threads
from ..goals import OURS
from ..peak import measurable, peak_bytes
from ..report import Report, Table

OPS = ("scaling",)
DTYPE = torch.bfloat16


@dataclass(frozen=True)
class Point:
    """A training step or a forward of M tokens through ``layers`` consecutive square layers, rank R."""

    M: int = 256
    side: int = 4096
    R: int = 16
    layers: int = 1
    threads: int = 0
    training: bool = True


@dataclass(frozen=True)
class Series:
    """The same cost at several values of one field, with the others fixed."""

    cost: str  # time or memory
    varied: str
    values: Sequence[int]
    rest: Point

    @property
    def points(self) -> list[Point]:
        changes: list[dict[str, Any]] = [{self.varied: value} for value in self.values]
        return [replace(self.rest, **change) for change in changes]

    def __str__(self) -> str:
        rest = {"M": self.rest.M, "N = K": self.rest.side, "R": self.rest.R, "layers": self.rest.layers}
        fixed = ", ".join(f"{name} = {value}" for name, value in rest.items() if name != NAMES[self.varied][0])
        return f"{self.cost} of a {'training step' if self.rest.training else 'forward'}, {fixed}"


# The label of a field, and the power of it against which costs are fitted.
NAMES = {"M": ("M", 1), "side": ("N = K", 2), "R": ("R", 1), "layers": ("layers", 1), "threads": ("threads", 1)}


def powers(low: int, high: int, factor: int = 2) -> list[int]:
    return [low * factor**i for i in range(int(math.log(high / low, factor) + 1e-9) + 1)]


def series(kind: str, quick: bool) -> list[Series]:
    """The series of a device; the routed op has its own, against the number of adapters."""
    side, most = (512, 64) if quick else (4096, 2048 if kind == "cpu" else 8192)
    one, many = Point(1, side, training=False), Point(16 if quick else 256, side)
    sides = powers(side // 4, side if quick else 2 * side)
    threads = sorted({*powers(1, torch.get_num_threads()), torch.get_num_threads()}) if kind == "cpu" else []
    found = [
        Series("time", "M", powers(1, most), one),
        Series("time", "M", powers(1, most, 4), many),
        *(Series("time", "side", sides, rest) for rest in (one, many)),
        *(Series("time", "R", powers(4, 256, 4), rest) for rest in (one, many)),
        Series("time", "layers", powers(1, 8), replace(many, side=side // 2)),
        *(Series("time", "threads", threads, rest) for rest in (one, many)),
        Series("memory", "M", powers(many.M, 16 * many.M, 4), many),
        Series("memory", "side", sides, many),
        Series("memory", "R", powers(16, 256, 4), many),
        Series("memory", "layers", powers(1, 8), replace(many, side=side // 2)),
        Series("memory", "threads", threads, many),
    ]
    return [s for s in found if len(s.values) > 1]


def make(device: torch.device, point: Point) -> Callable[[], object]:
    """One step of a point."""
    shape = point.side, point.side
    weight = NF4Weight.quantize(torch.randn(shape, device=device).to(DTYPE))
    return step(stack(weight, point), point, *operands(device, point))


Stack = list[tuple[NF4Weight, Tensor, Tensor]]


def stack(weight: NF4Weight, point: Point) -> Stack:
    """Make layers, each with its own copy of the weight and its own factors."""

    def factor(*size: int) -> Tensor:
        return (torch.randn(size, device=weight.device) / 64).requires_grad_()

    R, side = point.R, point.side
    return [(copy.deepcopy(weight), factor(R, side), factor(side, R)) for _ in range(point.layers)]


def operands(device: torch.device, point: Point) -> tuple[Tensor, Tensor]:
    x, g = (torch.randn(point.M, point.side, device=device).to(DTYPE) for _ in range(2))
    return x.requires_grad_(point.training), g


def step(layers: Stack, point: Point, x: Tensor, g: Tensor) -> Callable[[], object]:
    trained = [factor for _, *factors in layers for factor in factors]
    updated = [(weight, LowRankUpdate(down, up)) for weight, down, up in layers]

    def forward() -> Tensor:
        y = x
        for weight, update in updated:
            y = adapted_linear(y, weight, update)
        return y

    def run() -> object:
        with torch.set_grad_enabled(point.training):
            y = forward()
            return torch.autograd.grad(y, [x, *trained], g) if point.training else y

    return run


def fit(sizes: Sequence[float], costs: Sequence[float]) -> tuple[float, float]:
    """Fit the exponent; also return the factor by which the farthest point misses the line."""
    xs, ys = ([math.log(value) for value in values] for values in (sizes, costs))
    x, y = sum(xs) / len(xs), sum(ys) / len(ys)
    slope = sum((a - x) * (b - y) for a, b in zip(xs, ys, strict=True)) / sum((a - x) ** 2 for a in xs)
    return slope, math.exp(max(abs(b - y - slope * (a - x)) for a, b in zip(xs, ys, strict=True)))


def ranges(found: Series, kind: str) -> list[slice]:
    """Divide a series into fitted ranges: along M one for each form and one for the last three points, otherwise one."""
    whole, last = slice(0, len(found.values)), slice(len(found.values) - 3, len(found.values))
    if found.varied != "M" or found.cost != "time":
        return [whole]
    forms = [_plan.plan_linear(kind, M, 4096, DTYPE, NF4, 64, None, _cpu.isa()).form for M in found.values]
    few = forms.count("few")
    parts = [slice(0, few), slice(few, len(forms))]
    return [part for part in [*parts, *([] if last in parts else [last])] if part.stop - part.start > 1]


def run(report: Report) -> None:
    settings = report.settings
    if "scaling" not in settings.ops:
        return
    lines: list[list[str]] = []
    built: Built = {}
    for one in series(settings.kind, settings.quick):
        if one.cost == "memory" and not measurable(settings):
            report.absent["peak memory"] = "only Linux reports the peak of a process"
            continue
        costs: list[float] = []
        for point in one.points:
            with torch_threads(point.threads or torch.get_num_threads()):
                cost = None
                if not report.skip(f"scaling: {one}, {NAMES[one.varied][0]} = {getattr(point, one.varied)}"):
                    cost = seconds(report, one, point, built) if one.cost == "time" else memory(report, point)
            if not cost:
                break
            costs.append(cost)
        if len(costs) < len(one.values):
            continue
        name, power = NAMES[one.varied]
        for part in ranges(one, settings.kind):
            values, of_part = one.values[part], costs[part]
            exponent, off = fit([value**power for value in values], of_part)
            ends = " → ".join(
                f"{c * 1e3:.3g} ms" if one.cost == "time" else f"{c / 1e6:.3g} MB" for c in of_part[:: len(of_part) - 1]
            )
            lines.append(
                [
                    str(one),
                    name if power == 1 else "N·K",
                    f"{name} = {values[0]} ... {values[-1]}",
                    ends,
                    f"{exponent:.2f}",
                    f"{off:.2f}",
                ]
            )
            print("scaling | " + " | ".join(lines[-1]), flush=True)
    columns = ["cost", "against", "range", "from → to", "exponent", "farthest point off by"]
    text = "Cost ~ size^exponent, fitted over the range; along M for each form the planner chooses, and at the end."
    if settings.kind == "cpu":
        text += f" Threads, where they do not vary: {torch.get_num_threads()}."
    report.tables.append(Table("Scaling of cost", columns, lines, text))


Built = dict[tuple[int, int, int], list[Stack]]


def seconds(report: Report, one: Series, point: Point, built: Built) -> float | None:
    """Time a point on rotated copies; the last set is kept for the next point."""
    key, device = (point.side, point.R, point.layers), report.settings.device
    if key not in built:
        built.clear()
        weight = NF4Weight.quantize(torch.randn(point.side, point.side, device=device).to(DTYPE))
        moved = point.layers * (weight.nbytes + 8 * point.side * point.R)
        built[key] = [stack(weight, point) for _ in range(copies(moved, report.settings))]
    x, g = operands(device, point)
    calls = [step(layers, point, x, g) for layers in built[key]]
    value = getattr(point, one.varied)
    timings = report.time(
        f"scaling: {one}", f"scaling: {one}, {NAMES[one.varied][0]} = {value}", {OURS: Provider(calls, 0)}, scale=0.5
    )
    return timings[OURS].seconds if timings else None


def memory(report: Report, point: Point) -> float | None:
    small = replace(point, M=8, side=128, R=4, layers=1)
    found: float | None = report.build(OURS, lambda: peak_bytes(report.settings, make, (point,), (small,)))
    return found


SECTIONS = {70: run}
