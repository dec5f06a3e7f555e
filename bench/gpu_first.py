"""python bench/gpu_first.py --out FOLDER: what to run on the first GPU that is there, in ten minutes at most.

Builds for that GPU alone, then runs the correctness tests that matter most, then the most telling cases of the benchmark,
then the search for tile sizes. Every step is a process of its own with a share of the time that is left; one that fails
or is ended does not stop the next. ``summary.md`` and ``log.txt`` in the folder are up to date at any moment.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from lowrank_ops.files import copy_file, write_text

ROOT = Path(__file__).resolve().parents[1]
TOTAL = 585.0  # seconds, so that the whole command stays under ten minutes
ARCHITECTURE = "import torch; print('%d%d' % torch.cuda.get_device_capability())"


@dataclass(frozen=True)
class Step:
    """A command of the interpreter, and how much of the time that is left it may take, relative to the steps after it.

    ``dry`` is the command that shows without a GPU that the step starts. ``after`` names a step whose failure calls for
    this one.
    """

    name: str
    weight: float
    command: Sequence[str]
    dry: Sequence[str]
    after: str = ""
    environment: dict[str, str] = field(default_factory=dict)


def tests(name: str, weight: float, *arguments: str) -> Step:
    """A step of pytest, in as many processes as the processor has cores if pytest-xdist is there: most time is compiling."""
    command = ["-m", "pytest", "-q", "-p", "no:cacheprovider", "--no-header", *arguments]
    cores = min(12, os.cpu_count() or 1)
    parallel = ["-n", str(cores)] if cores > 2 and importlib.util.find_spec("xdist") else []
    return Step(f"test: {name}", weight, [*command, *parallel], [*command, "--collect-only"])


def bench(name: str, weight: float, *arguments: str) -> Step:
    """A step of the benchmark; its ``--minutes`` are set when it starts."""
    command = ["-m", "lowrank_ops.bench", "--device", "cuda", *arguments]
    return Step(name, weight, command, [*command, "--help"])


def steps(out: Path) -> list[Step]:
    """All steps in order."""
    build = ["setup.py", "build_ext", "--inplace"]
    ops = "tests/ops/test_{}.py".format
    linear, routed, experts = ops("adapted_linear"), ops("routed_linear"), ops("experts_linear")
    known = (linear, routed, experts, ops("nf4"), ops("graph_capture"))
    cases = ("adapted_linear", "adapted_linear_backward", "routed_linear", "experts_linear", "experts_linear_backward",
             "nf4_quantize", "nf4_dequantize", "call", "svd_linear", "svd_linear_backward")  # fmt: skip
    return [
        Step("build", 25, build, [*build, "--help"], environment={"LOWRANK_OPS_BUILD": "cuda"}),
        Step("build without CUDA", 12, build, [*build, "--help"], "build", {"LOWRANK_OPS_BUILD": "cpu"}),
        Step("what is here", 2, ["-m", "lowrank_ops", "info"], ["-m", "lowrank_ops", "info"]),
        tests("bfloat16 and float16 products, forward and backward", 12, linear, "-k", "cuda and test_16_bit"),
        tests("decode and encode", 6, ops("nf4"), "-k", "cuda"),
        tests("routed and experts", 14, routed, experts, "-k", "cuda and (any_mix or test_16_bit or test_experts)"),
        tests("graph capture", 4, ops("graph_capture"), "-k", "cuda"),
        tests("float32 products, autograd, compile", 10, linear, "-k", "cuda and not test_16_bit"),
        bench("benchmark", 35, "--out", str(out), *(word for case in cases for word in ("--op", case))),
        bench("tile sizes", 18, "--tune"),
        tests("the rest", 10, "tests/ops", "-k", "cuda and not emulation", *(f"--ignore={path}" for path in known)),
    ]


def run_step(step: Step, seconds: float, dry: bool, architecture: str, log: Path) -> tuple[str, float, str]:
    """Run a step; its result, the seconds it took, and the last line that it printed."""
    command = [sys.executable, *(step.dry if dry else step.command)]
    if "lowrank_ops.bench" in step.command and not dry:
        command += ["--minutes", f"{0.9 * seconds / 60:.2f}"]
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    environment = {**os.environ, "PYTHONPATH": path, "PYTHONUNBUFFERED": "1", **step.environment}
    if architecture:
        environment["CUDAARCHS"] = f"{architecture}-real"
    began = time.monotonic()
    with open(log, "a") as file:
        print(f"\n##### {step.name}, {seconds:.0f} s: {' '.join(command)}", file=file, flush=True)
        start = file.tell()
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            code = process.wait(timeout=seconds)
            result = "ok" if code == 0 else f"failed ({code})"
        except subprocess.TimeoutExpired:
            result = f"ended after {seconds:.0f} s"
        finally:
            end(process)
    with open(log, errors="replace") as file:
        file.seek(start)
        lines = [line.strip() for line in file if line.strip()]
    return result, time.monotonic() - began, lines[-1][:200] if lines else ""


def end(process: subprocess.Popen[bytes]) -> None:
    """End a step with all processes that it has started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def find_architecture() -> str:
    """The compute capability of the GPU, such as 90; "" without one."""
    found = subprocess.run([sys.executable, "-c", ARCHITECTURE], capture_output=True, text=True)
    return found.stdout.strip() if found.returncode == 0 else ""


def run(out: Path, dry: bool = False, total: float = TOTAL, chosen: Sequence[Step] | None = None) -> int:
    """Run the steps; the number of those that did not end well."""
    began = time.monotonic()
    out.mkdir(parents=True, exist_ok=True)
    log = out / "log.txt"
    log.write_text("")
    architecture = "" if dry else find_architecture()
    if not dry and not architecture:
        print("gpu_first: torch finds no CUDA device here; --dry-run shows the order of the steps", file=sys.stderr)
        return 2
    left = list(steps(out) if chosen is None else chosen)
    results: dict[str, str] = {}
    table = ["| step | result | seconds | of | last line |", "| --- | --- | --- | --- | --- |"]
    while left:
        step = left.pop(0)
        if step.after and results.get(step.after) == "ok" and not dry:
            continue
        still = total - (time.monotonic() - began)
        share = 300.0 if dry else still * step.weight / (step.weight + sum(s.weight for s in left if not s.after))
        if share < 1:
            results[step.name], took, last = "no time left", 0.0, ""
        else:
            results[step.name], took, last = run_step(step, share, dry, architecture, log)
        last = last.replace("|", "/")
        table.append(f"| {step.name} | {results[step.name]} | {took:.0f} | {max(share, 0):.0f} | {last} |")
        print(table[-1], flush=True)
        head = f"GPU architecture {architecture or 'none: a dry run'}; {time.monotonic() - began:.0f} s so far."
        write_text(out / "summary.md", "\n".join([head, "", *table, ""]))
        for tiles in (ROOT / "kernels" / "configs").glob("*.json"):
            if not dry and tiles.stat().st_mtime > time.time() - (time.monotonic() - began):
                copy_file(tiles, out / tiles.name)
    return sum(result != "ok" for result in results.values())


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=str(__doc__).split("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for the results")
    parser.add_argument(
        "--dry-run", action="store_true", help="without a GPU: show the order, and that every step starts"
    )
    asked = parser.parse_args(arguments)
    return min(1, run(asked.out.resolve(), asked.dry_run))


if __name__ == "__main__":
    sys.exit(main())
