"""python -m bench --device cpu|cuda [--quick] [--op NAME] [--shape NxK] [--threads N] [--out DIR] [--tune]"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

from . import bench_adapted_linear, bench_nf4, bench_svd, bench_svd_linear
from .common import Report, Settings

# Its `kernels` would hide Hugging Face's package of that name from bitsandbytes, which takes kernels from it.
ROOT = Path(__file__).resolve().parent.parent
sys.path[:] = [entry for entry in sys.path if Path(entry).resolve() != ROOT]

FAMILIES = (bench_nf4, bench_adapted_linear, bench_svd_linear, bench_svd)
OPS = [op for family in FAMILIES for op in family.OPS]


def shape(text: str) -> tuple[int, int]:
    N, K = (int(size) for size in text.split("x"))
    return N, K


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench", description="Benchmarks; see docs/performance.md.")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--quick", action="store_true", help="one shape, few tokens, short runs; about a minute")
    parser.add_argument("--op", choices=OPS, action="append", help="only this one; may be given several times")
    parser.add_argument("--shape", type=shape, metavar="NxK", help="only this shape of the weight")
    parser.add_argument("--threads", type=int, metavar="N", help="of torch, on the CPU")
    parser.add_argument("--out", type=Path, metavar="DIR", help="default: bench/results for a whole run, else nowhere")
    parser.add_argument("--tune", action="store_true", help="CUDA: search tile sizes, write kernels/configs/<gpu>.json")
    asked = parser.parse_args()
    if asked.device == "cuda" and not torch.cuda.is_available():
        parser.error("torch finds no CUDA device here")
    if asked.threads:
        torch.set_num_threads(asked.threads)
    torch.manual_seed(0)
    settings = Settings(torch.device(asked.device), asked.op or OPS, asked.quick, asked.shape)
    if asked.tune:
        if asked.device != "cuda":
            parser.error("--tune needs --device cuda")
        from . import tune

        print(f"wrote {tune.run(settings)}")
        return 0
    report = Report(settings)
    for family in FAMILIES:
        if set(family.OPS) & set(settings.ops):
            family.run(report)
    text, data = report.finish()
    print("\n" + text)
    whole = not (asked.quick or asked.op or asked.shape)
    if asked.out or whole:
        print("wrote", report.write(asked.out or ROOT / "bench" / "results", text, data))
    # A peer may be absent; ours may not.
    return int(any(name.startswith("ours") for name in report.absent))


if __name__ == "__main__":
    raise SystemExit(main())
