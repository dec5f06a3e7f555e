"""The small dense problems of a truncated SVD on CUDA, executed on the host, against NumPy in float64."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
from helpers import run_driver as run

EPS = np.finfo(np.float64).eps
SIZES = (1, 2, 5, 32, 33, 64)


def ask(driver: Path, mode: str, gram: np.ndarray, seed: int = 0) -> list[np.ndarray]:
    """inverse, failed; or values, vectors, failed."""
    batch, q, _ = gram.shape
    result = run(driver, mode, data=np.array([batch, q, seed], dtype=np.int64).tobytes() + gram.tobytes())
    assert result.returncode == 0, result.stderr.decode()
    shapes = [(batch, q, q)] if mode == "cholesky" else [(batch, q), (batch, q, q)]
    answer, arrays = result.stdout, []
    for shape in shapes:
        count = int(np.prod(shape))
        arrays.append(np.frombuffer(answer, dtype=np.float64, count=count).reshape(shape))
        answer = answer[8 * count :]
    arrays.append(np.frombuffer(answer, dtype=np.int32))
    assert len(arrays[-1]) == batch
    return arrays


def with_spectrum(values: np.ndarray, seed: int) -> np.ndarray:
    """A symmetric matrix with these eigenvalues."""
    q = len(values)
    basis = np.linalg.qr(np.random.default_rng(seed).standard_normal((q, q)))[0]
    gram = (basis * values) @ basis.T
    return (gram + gram.T) / 2


def spectra(q: int) -> dict[str, np.ndarray]:
    index = np.arange(q)
    return {
        "decaying": 1.0 / (1 + index),
        "flat": np.ones(q),
        "graded": 10.0 ** (-14 * index / q),
        "pairs": 1.0 + index // 2,
        "deficient": np.where(index < (q + 1) // 2, 1.0 + index, 0.0),
        "large": 1e60 * (1.0 + index),
        "small": 1e-60 * (1.0 + index),
    }


@pytest.mark.parametrize("q", SIZES)
def test_inverse_cholesky(emulator: Path, q: int) -> None:
    kinds = [kind for kind in spectra(q) if kind != "deficient"]
    gram = np.stack([with_spectrum(spectra(q)[kind], seed) for seed, kind in enumerate(kinds)])
    inverse, failed = ask(emulator, "cholesky", gram, seed=q)
    assert not failed.any()
    for kind, ours, g in zip(kinds, inverse, gram, strict=True):
        assert not np.triu(ours, 1).any()
        # The distance of L⁻¹ G L⁻ᵀ from I grows with the condition of G, for NumPy too.
        identity, numpy = np.eye(q), np.linalg.inv(np.linalg.cholesky(g))
        error, baseline = (np.abs(inverse @ g @ inverse.T - identity).max() for inverse in (ours, numpy))
        assert error <= 2 * baseline + 4 * q * EPS, kind


def test_inverse_cholesky_reads_the_lower_triangle_and_reports_each_matrix(emulator: Path) -> None:
    q = 33
    good = with_spectrum(spectra(q)["decaying"], 0)
    garbage = np.tril(good) + np.triu(np.full((q, q), np.nan), 1)
    indefinite, nan, infinite = good.copy(), good.copy(), good.copy()
    indefinite[20, 20] = -1.0
    nan[7, 3] = np.nan
    infinite[32, 32] = np.inf
    inverse, failed = ask(emulator, "cholesky", np.stack([garbage, indefinite, np.zeros((q, q)), nan, infinite]))
    assert failed.tolist() == [0, 1, 1, 1, 1]
    assert not inverse[1:].any()
    alone, _ = ask(emulator, "cholesky", good[None], seed=3)
    assert np.array_equal(alone[0], inverse[0])


def test_inverse_cholesky_where_the_triangle_does_not_fit_in_shared_memory(emulator: Path) -> None:
    q = 157  # 156 is the largest q that fits
    gram = np.stack([with_spectrum(spectra(q)["decaying"], 0), np.zeros((q, q))])
    inverse, failed = ask(emulator, "cholesky", gram)
    assert failed.tolist() == [0, 1] and not inverse[1].any() and not np.triu(inverse[0], 1).any()
    assert np.abs(inverse[0] @ gram[0] @ inverse[0].T - np.eye(q)).max() <= q * EPS * np.linalg.cond(gram[0])
    largest, failed = ask(emulator, "cholesky", with_spectrum(spectra(156)["decaying"], 0)[None])
    assert not failed.any() and np.isfinite(largest).all()


@pytest.mark.parametrize("q", SIZES)
def test_eigenvectors(emulator: Path, q: int) -> None:
    kinds = list(spectra(q)) if q < 64 else ["decaying", "graded", "deficient"]
    gram = np.stack([with_spectrum(spectra(q)[kind], seed) for seed, kind in enumerate(kinds)])
    values, vectors, failed = ask(emulator, "eigen", gram, seed=q)
    assert not failed.any()
    for kind, w, v, g in zip(kinds, values, vectors, gram, strict=True):
        trace = np.trace(g)
        assert (np.diff(w) <= 0).all(), kind
        assert np.abs(w - np.linalg.eigvalsh(g)[::-1]).max() <= 4 * q * EPS * trace, kind
        assert np.abs(v @ v.T - np.eye(q)).max() <= 4 * q * EPS, kind
        assert np.abs((v.T * w) @ v - g).max() <= 4 * q * EPS * trace, kind


def test_eigenvectors_of_a_diagonal_of_zeros_and_of_what_is_not_finite(emulator: Path) -> None:
    q = 5
    diagonal = np.diag([1.0, 3.0, 0.0, 3.0, 2.0])
    nan, infinite = np.eye(q), np.eye(q)
    nan[4, 1] = np.nan
    infinite[2, 2] = np.inf
    values, vectors, failed = ask(emulator, "eigen", np.stack([diagonal, np.zeros((q, q)), nan, infinite]))
    assert failed.tolist() == [0, 0, 1, 1]
    assert values[0].tolist() == [3, 3, 2, 1, 0]  # among equal values, the first row stays first
    assert vectors[0].argmax(axis=1).tolist() == [1, 3, 4, 0, 2]
    assert not values[1].any() and np.array_equal(vectors[1], np.eye(q))


def test_results_do_not_depend_on_the_order_of_threads_or_on_the_batch(emulator: Path) -> None:
    gram = np.stack([with_spectrum(spectra(11)[kind], 1) for kind in ("decaying", "deficient", "graded")])
    for mode in ("cholesky", "eigen"):
        first = ask(emulator, mode, gram)
        for seed in range(1, 4):
            for ours, again in zip(first, ask(emulator, mode, gram, seed), strict=True):
                assert np.array_equal(ours, again)
        for ours, alone in zip(first, ask(emulator, mode, gram[2:], 7), strict=True):
            assert np.array_equal(ours[2:], alone)


@pytest.mark.parametrize("mode", ["cholesky", "eigen"])
@pytest.mark.parametrize(("batch", "q", "message"), [(1, 0, "q must be"), (0, 513, "q must be"), (0, 512, None)])
def test_sizes(emulator: Path, mode: str, batch: int, q: int, message: str | None) -> None:
    result = run(emulator, mode, data=np.array([batch, q, 0], dtype=np.int64).tobytes())
    assert result.returncode == (3 if message else 0) and result.stdout == b""
    assert not message or re.search(message, result.stderr.decode())
