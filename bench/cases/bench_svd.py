"""truncated_svd at rank 64 against torch's algorithms, in time and accuracy (overlap and singular values)."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from lowrank_ops import NF4Weight, truncated_svd

from ..common import Provider
from ..report import Report

OPS = ("truncated_svd",)
RANK = 64
# Above this size a full SVD takes too long to compare.
FULL_UP_TO = 1024
Route = Callable[[], tuple[Tensor, Tensor]]  # U [N, >= R], S [>= R]


def spectra(n: int) -> dict[str, Tensor]:
    i = torch.arange(1, n + 1, dtype=torch.float64)
    return {"decaying": i**-0.5, "flat": 1 - 0.5 * i / n}


def vectors(N: int, K: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Make left and right singular vectors, float32, as columns."""
    u, v = (torch.linalg.qr(torch.randn(size, min(N, K), device=device))[0] for size in (N, K))
    return u, v


def ours(w: Tensor | NF4Weight, rank: int) -> tuple[Tensor, Tensor]:
    return truncated_svd(w, rank)[:2]


def lowrank(w: Tensor, q: int) -> tuple[Tensor, Tensor]:
    return torch.svd_lowrank(w, q=q, niter=4)[:2]


def full(w: Tensor) -> tuple[Tensor, Tensor]:
    return torch.linalg.svd(w, full_matrices=False)[:2]


def decoded(w: NF4Weight, q: int) -> tuple[Tensor, Tensor]:
    return lowrank(w.dequantize(torch.float32), q)


def run(report: Report) -> None:
    if "truncated_svd" not in report.settings.ops:
        return
    device = report.settings.device
    for N, K in report.settings.shapes((1024, 1024), (4096, 4096)):
        if report.skip(f"truncated_svd, {N} x {K}"):
            return
        rank = min(RANK, min(N, K) // 4)
        exact, right = vectors(N, K, device)
        for kind, values in spectra(min(N, K)).items():
            dense = (exact * values.float().to(device)) @ right.T
            packed = NF4Weight.quantize(dense)
            # The call, its number of products with W, their rows, and the bytes of W in one product.
            routes: dict[str, tuple[Route, int, int, int]] = {
                "ours": (partial(ours, dense, rank), 9, 2 * rank, dense.nbytes),
                "svd_lowrank q=2r niter=4": (partial(lowrank, dense, 2 * rank), 10, 2 * rank, dense.nbytes),
                "svd_lowrank q=r niter=4": (partial(lowrank, dense, rank), 10, rank, dense.nbytes),
                "ours, NF4": (partial(ours, packed, rank), 9, 2 * rank, packed.nbytes),
                "svd_lowrank q=2r niter=4, NF4 decoded": (
                    partial(decoded, packed, 2 * rank),
                    10,
                    2 * rank,
                    dense.nbytes,
                ),
            }
            if min(N, K) <= FULL_UP_TO:
                routes["torch.linalg.svd"] = (partial(full, dense), 1, min(N, K), dense.nbytes)
            providers = {
                name: Provider([route], products * moved, products * 2 * N * K * rows)
                for name, (route, products, rows, moved) in routes.items()
            }
            report.case(f"truncated_svd r={rank}, {kind} spectrum", (N, K), 0, torch.float32, providers, graph=False)
            for name, (route, *_) in routes.items():
                if "NF4" not in name:  # a quantised matrix has other singular vectors
                    note(report, f"{N} x {K}, {kind}, {name}", *route(), exact[:, :rank], values[:rank])


def note(report: Report, what: str, U: Tensor, S: Tensor, exact: Tensor, values: Tensor) -> None:
    rank = len(values)
    overlap = (U[:, :rank].double().T @ exact.double()).square().sum().item() / rank
    error = ((S[:rank].double().cpu() - values).abs() / values).max().item()
    report.notes.append(f"- truncated_svd r={rank}, {what}: overlap {overlap:.6f}, worst singular value {error:.1e}.")
    print(report.notes[-1], flush=True)


SECTIONS = {30: run}
