"""Scaling laws: published ones at their constants, fits of known laws, and the command on good and on bad files."""

from __future__ import annotations

import csv
import json
import os
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import lowrank_ops as lo
from lowrank_ops import scaling_laws
from lowrank_ops.__main__ import main
from lowrank_ops.commands.scaling.run import from_json
from lowrank_ops.scaling_laws import (
    PF_DAY,
    PUBLISHED,
    Chinchilla,
    FineTuning,
    Frontier,
    Kaplan,
    Runs,
    fit,
    fitting,
    huber,
)
from lowrank_ops.scaling_laws.runs import ScalingError, read_runs

ROOT = Path(__file__).resolve().parents[2]
TRUE = Chinchilla(E=1.8, A=480.0, B=2100.0, alpha=0.35, beta=0.37)
FEW = scaling_laws.chinchilla_starts()[::97]  # every value of every coordinate is among them


def chinchilla_csv() -> Path:
    """The paper's 245 points, which we may not distribute."""
    folder = Path(os.environ.get("LOWRANK_OPS_SCALING_DATA", ROOT.parent / "shared" / "data"))
    path = folder / "chinchilla_runs.csv"
    if not path.is_file():
        pytest.skip(f"no {path}; LOWRANK_OPS_SCALING_DATA names the folder that has chinchilla_runs.csv")
    return path


def grid(noise: float = 0.0, seed: int = 0, law: Chinchilla = TRUE, n: int = 12) -> Runs:
    """Sizes from 50 M to 10 B, each trained for 12 lengths from 2 to 200 tokens a parameter."""
    N, ratio = (v.ravel() for v in np.meshgrid(np.geomspace(5e7, 1e10, n), np.geomspace(2, 200, n)))
    factor = np.exp(noise * np.random.default_rng(seed).standard_normal(N.size))
    return Runs(N, N * ratio, law.predict(N, N * ratio) * factor)


# ---- published laws ----


def test_the_grid_of_few_starts_is_representative() -> None:
    every = scaling_laws.chinchilla_starts()
    assert every.shape == (4500, 5) and len({tuple(row) for row in every.tolist()}) == 4500
    for column in range(5):
        assert set(FEW[:, column].tolist()) == set(every[:, column].tolist())


def test_240_chinchilla_points() -> None:
    runs, _ = read_runs([chinchilla_csv()])
    assert len(runs) == 245
    runs = runs.select(np.argsort(runs.loss)[:240])
    found = fit(runs)
    assert found.objective <= 1.01828e-3 and found.law.a == pytest.approx(0.514, abs=0.002)
    assert found.starts is not None and found.starts[0] == 4500 and found.starts[1] > 1000
    # The published constants do not minimise the loss on these points; the replication's constants nearly do.
    terms = huber.Problem(
        [torch.from_numpy(np.stack([np.ones(240), -np.log(v)], 1)) for v in (runs.parameters, runs.tokens)]
        + [torch.ones(240, 1, dtype=torch.float64)],
        torch.from_numpy(np.log(runs.loss)),
        1e-3,
    )
    expected = {"chinchilla": 4.121e-3, "chinchilla-unrounded": 1.2312e-3, "epoch": 1.018645e-3}
    for name, value in expected.items():
        law = PUBLISHED[name]
        theta = torch.tensor([[np.log(law.A), law.alpha, np.log(law.B), law.beta, np.log(law.E)]])
        assert float(huber.objective(terms, theta)) == pytest.approx(value, rel=5e-3), name


def test_chinchilla_table_of_optimal_tokens() -> None:
    """Table 3 of the paper: from approach 1, 400 M to 280 B parameters."""
    table = {4e8: 8.0e9, 1e9: 20.2e9, 1e10: 205.1e9, 67e9: 1.5e12, 175e9: 3.7e12, 280e9: 5.9e12}
    flops = {4e8: 1.92e19, 1e9: 1.21e20, 1e10: 1.23e22, 67e9: 5.76e23, 175e9: 3.85e24, 280e9: 9.90e24}
    law = PUBLISHED["chinchilla-approach-1"]
    for parameters, tokens in table.items():
        assert law.optimal_tokens(parameters) == pytest.approx(tokens, rel=0.05)
        assert law.optimal(flops[parameters]).parameters == pytest.approx(parameters, rel=0.05)
    assert round(law.a, 2) == 0.50 == round(law.b, 2)


def test_kaplan_at_the_papers_constants() -> None:
    law = Kaplan()
    assert law.predict(parameters=8.8e13) == law.predict(tokens=5.4e13) == 1
    assert law.predict(compute=3.1e8 * PF_DAY) == pytest.approx(1)
    # GPT-3's size and data, and one PF-day, worked out by hand with logarithms.
    assert law.predict(parameters=1.75e11) == pytest.approx(1.604, abs=1e-3)
    assert law.predict(tokens=3e11) == pytest.approx(1.638, abs=1e-3)
    assert law.predict(compute=8.64e19) == pytest.approx(2.658, abs=1e-3)
    assert law.predict(parameters=np.array([1e9, 1e10])).shape == (2,)
    ten, hundred = law.optimal(10 * PF_DAY), law.optimal(100 * PF_DAY)
    assert hundred.parameters / ten.parameters == pytest.approx(10**0.73)
    assert hundred.tokens / ten.tokens == pytest.approx(10**0.27)
    assert 6 * ten.parameters * ten.tokens == pytest.approx(2 * 10 * PF_DAY, rel=0.15)
    for wrong in ({}, {"parameters": 1e9, "tokens": 1e9}, {"tokens": 0.0}, {"compute": float("nan")}):
        with pytest.raises(ValueError, match="parameters, tokens and compute|finite and above 0"):
            law.predict(**wrong)


@pytest.mark.parametrize("law", [TRUE, Chinchilla(), Chinchilla(0.0, 3.0, 5e4, 0.2, 0.6)])
def test_the_optimum_is_the_lowest_point_of_the_budget(law: Chinchilla) -> None:
    for compute in (1e18, 5.76e23):
        best = law.optimal(compute)
        assert 6 * best.parameters * best.tokens == pytest.approx(compute)
        assert best.loss == pytest.approx(law.predict(best.parameters, best.tokens))
        around = best.parameters * np.exp(np.linspace(-1, 1, 2001))
        losses = law.predict(around, compute / 6 / around)
        assert around[losses.argmin()] == pytest.approx(best.parameters, rel=1e-9)
        assert law.optimal_tokens(best.parameters) == pytest.approx(best.tokens)
    assert law.a + law.b == pytest.approx(1)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Chinchilla(alpha=0.0), "alpha must be a finite number above 0, got 0.0"),
        (lambda: Chinchilla(E=-1.0), "E must be a finite number of at least 0, got -1.0"),
        (lambda: Chinchilla(counting="some"), "counting must be one of all, non-embedding, trained, got 'some'"),
        (lambda: FineTuning(0.0, float("inf"), 1.0, 1.0), "A must be"),
        (lambda: Frontier(0.5, -2.0), "G must be"),
        (lambda: Chinchilla().optimal(-1.0), "compute must be finite and above 0, got -1.0"),
        (lambda: Chinchilla().predict(1e9, 0.0), "tokens must be"),
        (lambda: Frontier(0.5, 1.0).optimal_tokens(float("nan")), "parameters must be"),
    ],
)
def test_laws_refuse(make, message: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ValueError, match=message):
        make()


def test_parameters_are_counted_by_a_rule() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding, self.positions = nn.Embedding(100, 64), nn.Embedding(10, 64)
            self.layer, self.norm, self.head = nn.Linear(64, 96), nn.LayerNorm(96), nn.Linear(64, 100, bias=False)
            self.head.weight = self.embedding.weight  # tied

    model = Model()
    inner = 64 * 96 + 96 + 2 * 96
    assert scaling_laws.count_parameters(model) == 110 * 64 + inner
    assert scaling_laws.count_parameters(model, "non-embedding") == inner
    lo.adapt(model, lo.LoRA(4), targets=["layer"])
    trained = 4 * (64 + 96)
    assert scaling_laws.count_parameters(model, "trained") == trained
    assert scaling_laws.count_parameters(model) == 110 * 64 + inner + trained
    assert scaling_laws.count_parameters(model, "non-embedding") == inner + trained
    with pytest.raises(ValueError, match="counting must be one of"):
        scaling_laws.count_parameters(model, "most")


# ---- the objective ----


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("delta", [1e-3, 0.05, 10.0])
def test_derivatives_against_autograd(weighted: bool, delta: float) -> None:
    torch.manual_seed(0)
    n = 17
    X = [torch.cat([torch.ones(n, 1), torch.randn(n, k)], 1).double() for k in (1, 2, 0)]
    problem = huber.Problem(X, torch.randn(n).double(), delta)
    theta = torch.randn(3, 6, dtype=torch.float64) / 2
    weights = torch.randint(0, 4, (3, n)).double() if weighted else None
    got = huber.derivatives(problem, theta, weights)
    for s in range(3):

        def value(t: torch.Tensor, s: int = s) -> torch.Tensor:
            return huber.objective(problem, t.unsqueeze(0), None if weights is None else weights[s : s + 1])[0]

        assert torch.allclose(got.value[s], value(theta[s]))
        gradient = torch.autograd.functional.jacobian(value, theta[s])
        hessian = torch.autograd.functional.hessian(value, theta[s])
        assert torch.allclose(got.gradient[s], gradient, rtol=1e-9, atol=1e-12)
        assert got.hessian is not None and torch.allclose(got.hessian[s], hessian, rtol=1e-8, atol=1e-11)
        # The bound is never below the curvature of the cost along a straight residual, and never indefinite.
        assert torch.linalg.eigvalsh(got.gauss_newton[s]).min() > -1e-10
    assert huber.derivatives(problem, theta, weights, newton=False).hessian is None


def test_minimise_finds_where_the_gradient_vanishes() -> None:
    runs = grid(0.01)
    one = np.ones(len(runs))
    designs = [torch.from_numpy(np.stack([one, -np.log(v)], 1)) for v in (runs.parameters, runs.tokens)]
    problem = huber.Problem([*designs, torch.from_numpy(one[:, None])], torch.from_numpy(np.log(runs.loss)), 1e-2)
    theta, value = huber.minimise(problem, FEW, newton=False, steps=100, tolerance=1e-6)
    theta, value = huber.minimise(problem, theta[value < 2 * value.min()], newton=True, steps=300)
    best = huber.derivatives(problem, theta[value.argmin()].unsqueeze(0))
    scale = best.gauss_newton.diagonal(dim1=1, dim2=2).sqrt() * best.value.sqrt()
    assert (best.gradient.abs() / scale).max() < 1e-6
    assert (value / value.min() < 1 + 1e-9).double().mean() > 0.5
    # Each start is alone: neither its neighbours nor their number matter.
    alone, _ = huber.minimise(problem, FEW[3:4], newton=False, steps=20)
    together, _ = huber.minimise(problem, FEW[:9], newton=False, steps=20)
    assert torch.allclose(alone[0], together[3], rtol=1e-6)


# ---- fits of known laws ----


def test_a_law_without_noise_is_found() -> None:
    found = fit(grid(), starts=FEW)
    assert isinstance(found.law, Chinchilla) and found.objective < 1e-12 and not found.notes
    for name in ("E", "A", "B", "alpha", "beta"):
        assert getattr(found.law, name) == pytest.approx(getattr(TRUE, name), rel=1e-4), name


def test_a_law_with_noise_is_within_its_intervals() -> None:
    hits = {"E": 0, "a": 0, "N": 0, "L": 0}
    for seed in range(12):
        found = fit(grid(0.004, seed), starts=FEW[::4], bootstrap=150, seed=seed)
        told = {
            "E": lambda law: law.E,
            "a": lambda law: law.a,
            "N": lambda law: law.optimal(1e24).parameters,
            "L": lambda law: law.predict(7e10, 1.4e12),
        }
        for name, of in told.items():
            low, high = found.interval(of, 0.9)
            assert low < of(found.law) < high
            hits[name] += low <= of(TRUE) <= high
    # 12 tries at 90 %: fewer than 8 has a chance of 0.4 %, and intervals of half the width fail it nearly always.
    assert min(hits.values()) >= 8, hits


def test_intervals_follow_the_seed_and_the_noise() -> None:
    def width(noise: float, seed: int) -> tuple[float, float]:
        return fit(grid(noise), starts=FEW[::4], bootstrap=100, seed=seed).interval(lambda law: law.a)

    first = width(0.004, 0)
    assert first == width(0.004, 0) != width(0.004, 1)
    low, high = width(0.0005, 0)
    assert high - low < (first[1] - first[0]) / 3
    found = fit(grid(0.004), starts=FEW[::4])
    with pytest.raises(ValueError, match="no replicates"):
        found.interval(lambda law: law.a)
    found = fit(grid(0.004), starts=FEW[::4], bootstrap=10)
    with pytest.raises(ValueError, match="level must be in"):
        found.interval(lambda law: law.a, 95)


def test_units_do_not_matter() -> None:
    runs = grid(0.004)
    found = fit(runs, starts=FEW).law
    bits = Runs(runs.parameters / 1e6, runs.tokens / 1e9, runs.loss / np.log(2))
    other = fit(bits, starts=FEW).law
    assert other.alpha == pytest.approx(found.alpha, rel=1e-5) and other.beta == pytest.approx(found.beta, rel=1e-5)
    assert other.E == pytest.approx(found.E / np.log(2), rel=1e-5)
    assert other.A == pytest.approx(found.A / np.log(2) / 1e6**found.alpha, rel=1e-4)
    assert other.optimal(6e22 / 1e15).tokens == pytest.approx(found.optimal(6e22).tokens / 1e9, rel=1e-5)
    order = np.random.default_rng(1).permutation(len(runs))
    assert fit(runs.select(order), starts=FEW).law.alpha == pytest.approx(found.alpha, rel=1e-6)


def test_one_wild_run_moves_little() -> None:
    runs = grid(0.002)
    wild = runs.loss.copy()
    wild[7] *= 1.5
    found, least_squares = (
        fit(Runs(runs.parameters, runs.tokens, wild), starts=FEW, delta=delta).law.a for delta in (1e-3, 10.0)
    )
    assert abs(found - TRUE.a) < 0.01 < abs(least_squares - TRUE.a)


def curves(noise: float = 0.0) -> Runs:
    """Training curves of 17 sizes, 200 points each from 1 to 400 tokens a parameter."""
    sizes, random = np.geomspace(5e7, 2e10, 17), np.random.default_rng(0)
    N = np.repeat(sizes, 200)
    D = np.concatenate([s * np.geomspace(1, 400, 200) for s in sizes])
    names = [f"{s:.3g}" for s in N]
    return Runs(N, D, TRUE.predict(N, D) * np.exp(noise * random.standard_normal(N.size)), names)


def test_approach_1_finds_the_frontier_of_training_curves() -> None:
    found = fit(curves(2e-4), "envelope", bootstrap=100)
    assert isinstance(found.law, Frontier) and found.points is not None and found.points.shape[1] > 700
    assert found.law.a == pytest.approx(TRUE.a, abs=0.015)
    for compute in (1e20, 1e22):
        assert found.law.optimal(compute).parameters == pytest.approx(TRUE.optimal(compute).parameters, rel=0.1)
    low, high = found.interval(lambda law: law.a, 0.99)
    assert low < TRUE.a < high and high - low < 0.2
    assert "of 1500 budgets are not used" in found.notes[0]


def isoflop(noise: float = 0.0) -> Runs:
    budgets, random = np.geomspace(6e18, 3e21, 9), np.random.default_rng(0)
    C = np.repeat(budgets, 9)
    N = TRUE.optimal(C).parameters * np.tile(np.geomspace(0.3, 3, 9), 9)
    return Runs(N, C / 6 / N, TRUE.predict(N, C / 6 / N) * np.exp(noise * random.standard_normal(N.size)))


def test_approach_2_finds_the_frontier_of_isoflop_parabolas() -> None:
    found = fit(isoflop(5e-4), "isoflop", bootstrap=200)
    assert isinstance(found.law, Frontier) and found.points is not None and found.points.shape == (2, 9)
    assert found.law.a == pytest.approx(TRUE.a, abs=0.02)
    low, high = found.interval(lambda law: law.a, 0.99)
    assert low < TRUE.a < high
    assert found.law.optimal(1e21).parameters == pytest.approx(TRUE.optimal(1e21).parameters, rel=0.1)
    given = fit(isoflop(5e-4), "isoflop", budgets=np.geomspace(6e18, 3e21, 9).tolist())
    assert given.law.a == pytest.approx(found.law.a, rel=1e-9)


def test_approach_2_says_what_it_leaves_out() -> None:
    runs = isoflop()
    budgets = np.geomspace(6e18, 3e21, 9)
    found = fit(runs, "isoflop", budgets=budgets[:8].tolist())
    assert found.notes == ("within 10% of no budget: rows 73; 74; 75; 76; 77; 78; 79; 80; 81",)
    small = runs.select(np.r_[0:72, 78:81])  # of the last budget only sizes above the best
    found = fit(small, "isoflop")
    assert found.points is not None and found.points.shape == (2, 8)
    assert "outside the sizes that were trained (rows 79; 80; 81)" not in found.notes  # rows keep their numbers
    assert "left out: the minimum of its parabola is outside" in found.notes[0] and "rows 79; 80; 81" in found.notes[0]


# ---- fine-tuning ----

TUNED = FineTuning(E=0.9, A=40.0, alpha=0.05, beta=0.25)


def tuning(law: FineTuning = TUNED, noise: float = 0.0, seed: int = 0) -> Runs:
    P, D = (v.ravel() for v in np.meshgrid(np.geomspace(1e4, 1e8, 6), np.geomspace(1e5, 1e8, 6)))
    factor = np.exp(noise * np.random.default_rng(seed).standard_normal(P.size))
    if law.ceiling is None:
        return Runs(P, D, law.predict(P, D) * factor, counting="trained")
    return Runs(P, D, law.ceiling - (law.ceiling - law.predict(P, D)) * factor, counting="trained")


@pytest.mark.parametrize("law", [TUNED, FineTuning(0.2, 3.0, 0.04, 0.15, ceiling=1.0)])
def test_a_fine_tuning_law_is_found(law: FineTuning) -> None:
    found = fit(tuning(law), law=FineTuning, ceiling=law.ceiling).law
    assert isinstance(found, FineTuning) and found.ceiling == law.ceiling and found.counting == "trained"
    for name in ("E", "A", "alpha", "beta"):
        assert getattr(found, name) == pytest.approx(getattr(law, name), rel=1e-3), name
    noisy = fit(tuning(law, 0.01), law=FineTuning, ceiling=law.ceiling, bootstrap=200)
    low, high = noisy.interval(lambda law: law.predict(1e8, 1e9), 0.99)
    assert low < law.predict(1e8, 1e9) < high
    assert noisy.law.predict(1e9, 1e9) > noisy.law.predict(1e4, 1e5) if law.ceiling else True


def test_a_fine_tuning_law_has_no_units_either() -> None:
    runs = tuning(noise=0.01)
    found = fit(runs, law=FineTuning).law
    other = fit(Runs(runs.parameters / 1e3, runs.tokens / 1e6, 100 * runs.loss), law=FineTuning).law
    assert other.alpha == pytest.approx(found.alpha, rel=1e-4) and other.beta == pytest.approx(found.beta, rel=1e-4)
    assert other.E == pytest.approx(100 * found.E, rel=1e-4)


# ---- what is refused ----


def some(N: object, D: object, L: object) -> Runs:
    return Runs(np.array(N), np.array(D), np.array(L))


def with_losses(*losses: float) -> Runs:
    N, D = (v.ravel() for v in np.meshgrid([1e7, 3e7, 1e8, 3e8], [1e9, 3e9, 1e10], indexing="ij"))
    return Runs(N, D, np.resize(losses, N.size))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: fit(grid().select(list(range(5)))), "a law of 5 constants needs more than 5 runs, got 5"),
        (lambda: fit(tuning().select([0, 7, 14, 21]), law=FineTuning), "of 4 constants needs more than 4 runs, got 4"),
        (
            lambda: fit(some([1e9] * 9, np.geomspace(1e9, 1e11, 9), np.linspace(3, 2, 9))),
            "3 values of parameters that differ",
        ),
        (
            lambda: fit(some(np.geomspace(1e8, 1e9, 9), [1e10] * 9, np.linspace(3, 2, 9))),
            "3 values of tokens that differ",
        ),
        (
            lambda: fit(some(np.geomspace(1e8, 1e9, 9), np.geomspace(2e9, 2e10, 9), np.linspace(3, 2, 9))),
            "tokens follow from parameters",
        ),
        (lambda: fit(Runs(grid().parameters, grid().tokens, 1 / grid().loss), starts=FEW), "does not fall with both"),
        (lambda: fit(with_losses(2.5)), "have one loss, 2.5"),
        (lambda: fit(with_losses(2.6, 2.5)), "does not fall with both parameters and tokens, or hardly"),
        (lambda: fit(grid(), "isoflop"), "at least 2 budgets with a minimum"),
        (lambda: fit(isoflop(), "envelope"), "curves of at least 3 sizes are needed, got 0"),
        (lambda: fit(grid(), "guess"), "approach must be parametric, isoflop or envelope, got 'guess'"),
        (lambda: fit(grid(), "isoflop", law=FineTuning), "law must be Chinchilla, or FineTuning"),
        (lambda: fit(grid(), "isoflop", budgets=[-1.0]), "budgets must be finite and above 0"),
        (lambda: fit(grid(), starts=torch.zeros(3, 4)), r"starts must be finite and of shape \[S, 5\], got \(3, 4\)"),
        (lambda: fit(grid(), delta=0.0), "delta above 0, got"),
        (lambda: fit(grid(), bootstrap=-1), "bootstrap must be an integer of at least 0"),
        (lambda: fit(grid(), "isoflop", tolerance=2.0), "tolerance must be in"),
        (lambda: fit(tuning(), law=FineTuning, ceiling=1.0), "scores below 1; row 1: "),
        (lambda: some([1.0, 2.0], [1.0], [1.0, 2.0]), "of one length above 0"),
        (lambda: some([], [], []), "of one length above 0"),
        (
            lambda: some([1.0, 0.0], [1.0, float("nan")], [1.0, -2.0]),
            "row 2: parameters is 0; row 2: tokens is nan; row 2: loss",
        ),
        (
            lambda: fit(Runs([1e8, 2e8] * 3, range(1, 7), [1.0] * 6, list("aabbcc")), "envelope"),
            "'a' has several sizes",
        ),
        (lambda: fit(Runs([1e8] * 4, [1, 1, 2, 3], [1.0] * 4), "envelope"), "one token count twice"),
    ],
)
def test_fits_refuse(make, message: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ValueError, match=message):
        make()


# ---- the command ----


@pytest.fixture
def few_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fitting, "chinchilla_starts", lambda: FEW[::4])


def write(path: Path, runs: Runs, flops: bool = False) -> Path:
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["Model Size", "Training FLOP" if flops else "tokens", "loss"])
        for row in zip(runs.parameters, runs.compute if flops else runs.tokens, runs.loss, strict=True):
            writer.writerow([repr(float(v)) for v in row])
    return path


def png(path: Path) -> bool:
    from matplotlib.image import imread

    image = imread(path)
    colours = {tuple(pixel) for pixel in image[::3, ::3].reshape(-1, image.shape[2]).round(1).tolist()}
    return min(image.shape[:2]) >= 400 and len(colours) > 8


def run(*options: object) -> int:
    return main(["scaling", *(str(option) for option in options)])


@pytest.mark.parametrize("approach", ["parametric", "isoflop"])
def test_fit_then_plan(approach: str, few_starts: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    runs = write(tmp_path / "runs.csv", grid(0.002) if approach == "parametric" else isoflop(2e-4), flops=True)
    law, plot = tmp_path / "law.json", tmp_path / "fit.png"
    options = ("--approach", approach, "--bootstrap", 60, "--json", law, "--plot", plot)
    assert run("fit", runs, *options) == 0 and png(plot)
    shown = capsys.readouterr().out
    assert "95% interval" in shown and "parameters counted: all" in shown
    content = json.loads(law.read_text())
    low, high = content["intervals"]["a"]
    assert (
        low < TRUE.a < high
        and content["plot"] == str(plot)
        and len(content["replicates"]["G" if approach == "isoflop" else "A"]) == 60
    )
    stored, replicates = from_json(law)
    plot = tmp_path / "plan.png"
    assert run("plan", "--compute", "1e21,1e23", "--law", law, "--plot", plot, "--json") == 0 and png(plot)
    captured = capsys.readouterr()
    plans = json.loads(captured.out)["plans"]
    assert [plan["compute"] for plan in plans] == [1e21, 1e23] and "1e+23" in captured.err
    for plan in plans:
        best = stored.optimal(plan["compute"])  # type: ignore[union-attr]
        assert plan["parameters"] == pytest.approx(float(best.parameters))
        low, high = plan["tokens_interval"]
        assert low < plan["tokens"] < high and ("loss" in plan) == (approach == "parametric")
    assert np.quantile(replicates.optimal(1e23).tokens, 0.975) == pytest.approx(plans[1]["tokens_interval"][1])
    assert plans[0]["published"]["chinchilla-approach-1"]["tokens"] == pytest.approx(5.92e10, rel=0.01)


def test_plan_by_a_published_law(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in PUBLISHED:
        assert run("plan", "--compute", "1e21", "--law", name, "--plot", "none") == 0
    shown = capsys.readouterr().out
    assert "no intervals" in shown and "2.82 B" in shown
    assert run("plan", "--parameters", "7e10", "--tokens", "1.4e12", "--law", "chinchilla", "--plot", "none") == 0
    assert f"{Chinchilla().predict(7e10, 1.4e12):.4g}" in capsys.readouterr().out
    assert run("plan", "--parameters", "4e8", "--law", "chinchilla-approach-1", "--plot", "none", "--json") == 0
    assert json.loads(capsys.readouterr().out)["tokens"] == pytest.approx(8e9, rel=0.05)
    with pytest.raises(SystemExit):
        run("plan", "--compute", "1e21,x")
    assert "needs numbers above 0, separated by commas, got '1e21,x'" in capsys.readouterr().err


def test_fine_tuning_from_tables_of_scores(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Tables as `demo --compare` writes them, one for each length of training."""
    pytest.importorskip("matplotlib")
    from lowrank_ops.commands.demo.compare import write_table

    law = FineTuning(0.15, 3.0, 0.04, 0.15, ceiling=1.0)
    random, files = np.random.default_rng(0), []
    for k, tokens in enumerate((20_000, 40_000, 80_000, 160_000)):
        rows = [
            {"name": "lora", "kind": "LoRA(rank=4, alpha=4)", "parameters": P, "tokens": tokens, "final_loss": 0.5}
            | {"mrr_after": float(law.predict(P, tokens) + 0.001 * random.standard_normal())}
            for P in (50_000, 200_000, 800_000)
        ] + [{"name": "svf", "kind": "SVF()", "parameters": 9, "tokens": 9, "final_loss": 9, "mrr_after": 0.1}]
        files.append(tmp_path / f"{k}.csv")
        write_table(rows, files[-1])
    out, plot = tmp_path / "law.json", tmp_path / "fit.png"
    tuned = ("--law", "fine-tuning", "--metric", "score", "--name", "lora")
    assert run("fit", *files, *tuned, "--bootstrap", 100, "--json", out, "--plot", plot) == 0 and png(plot)
    shown = capsys.readouterr().out
    assert "parameters counted: trained" in shown and "runs    12" in shown
    assert run("plan", "--law", out, "--parameters", 1e6, "--tokens", 1e6, "--plot", "none", "--json") == 0
    result = json.loads(capsys.readouterr().out)
    low, high = result["interval"]
    assert low < result["score"] < high and result["score"] == pytest.approx(law.predict(1e6, 1e6), abs=0.03)
    assert run("plan", "--law", out, "--compute", "1e20", "--plot", "none") == 2
    assert "no best split" in capsys.readouterr().err
    # A single table has a single length of training, so it is refused.
    assert run("fit", files[0], *tuned, "--plot", "none") == 2
    assert "needs more than 4 runs, got 3" in capsys.readouterr().err
    assert run("fit", *files, *tuned[:-1], "milora", "--plot", "none") == 2
    assert "by the name milora" in capsys.readouterr().err


def test_columns_and_counting(tmp_path: Path) -> None:
    path = tmp_path / "runs.jsonl"
    rows = [{"run": f"r{i // 2}", "size": 100 + i, "embedding_params": 40, "flop": 6e4, "val": 2} for i in range(4)]
    path.write_text("\n".join(json.dumps(row) for row in rows) + "\n\n")
    named = {"parameters": "size", "loss": "val"}
    with pytest.raises(ScalingError, match="say --counting all or --counting non-embedding"):
        read_runs([path], columns=named)
    runs, _ = read_runs([path], columns=named, counting="all")
    assert runs.parameters.tolist() == [100, 101, 102, 103] and runs.names == ["r0", "r0", "r1", "r1"]
    assert runs.tokens == pytest.approx(1e4 / runs.parameters) and list(runs.numbers) == [1, 2, 3, 4]
    inner, _ = read_runs([path], columns=named, counting="non-embedding")
    assert inner.parameters.tolist() == [60, 61, 62, 63] and inner.counting == "non-embedding"
    assert inner.tokens.tolist() == runs.tokens.tolist()  # FLOPs count all parameters
    both = tmp_path / "both.csv"
    both.write_text("\ufeffN,tokens,FLOPs,loss\n10,5,330,2\n10,5,300,2\n")
    runs, said = read_runs([both])
    assert runs.tokens.tolist() == [5, 5] and "by up to 10.0%" in said[0]
    runs, said = read_runs([both, both])
    assert list(runs.numbers) == [2, 3, 5, 6] and f"{both} from 1; {both} from 4" in said[-1]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.csv", "parameters,tokens\n1,2\n", "no column for loss; its columns are parameters, tokens"),
        ("a.csv", "parameters,loss\n1,2\n", "no column for tokens or flops"),
        ("a.csv", "N,params,tokens,loss\n1,1,2,3\n", "several columns for parameters, N, params; choose by --columns"),
        ("a.csv", "N,tokens,loss,loss\n1,2,3,4\n", "more than one column 'loss'"),
        ("a.csv", "N,tokens,loss\n1,2,3\n1,2\n", "row 3 has 2 values for 3 columns"),
        ("a.csv", "N,tokens,loss\n1,2,x\n1,-2,3\n1,2,\n0,inf,3\n", "row 2: loss is not a number: 'x'; row 3: tokens must"),
        ("a.csv", "N,tokens,loss\n1,2,x\n1,-2,3\n1,2,\n0,inf,3\n", "row 4: loss is missing; row 5: N must be"),
        ("a.csv", "N,tokens,loss\n1,nan,3\n", "1 bad values; row 2: tokens must be finite and above 0, got nan"),
        ("a.csv", 'N,tokens,loss\n1,2,"3\n', "row"),
        ("a.csv", "N,tokens,loss\n", "has no rows"),
        ("a.csv", " \n", "is empty"),
        ("a.csv", "N,tokens,loss\n1,2,3\n", "a law of 5 constants needs more than 5 runs, got 1"),
        ("a.jsonl", '{"N": 1}\nx\n', "row 2 is not JSON"),
        ("a.jsonl", "[1]\n", "row 1 must be a JSON object, got list"),
        ("a.jsonl", '{"N": true, "tokens": 1, "loss": 2}\n{"N": 1, "loss": 2}\n', "row 1: N is not a number: True; row 2: "),
        ("a.jsonl", '{"N": 1, "embedding_params": 1, "tokens": 1, "loss": 2}\n', "say --counting"),
        ("a.txt", "N,tokens,loss\n1,2,3\n", "must be a .csv or a .jsonl file"),
    ],
)  # fmt: skip
def test_bad_files(name: str, text: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / name
    path.write_text(text)
    before = sorted(tmp_path.iterdir())
    assert run("fit", path, "--plot", "none", "--json", tmp_path / "law.json") == 2
    error = capsys.readouterr().err
    assert message in error and "Traceback" not in error and sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("fit", "/nowhere.csv"), "cannot be read"),
        (("fit", "RUNS", "--columns", "lost=a"), "--columns takes KEY=NAME"),
        (("fit", "RUNS", "--columns", "loss=a"), "has no column 'a'"),
        (("fit", "RUNS", "--drop-largest", "144"), "--drop-largest must be in 0 … 143, got 144"),
        (("fit", "RUNS", "--metric", "score"), "needs --law fine-tuning"),
        (("fit", "RUNS", "--name", "a"), "no runs in"),
        (("fit", "RUNS", "--delta", "-1"), "delta above 0"),
        (("fit", "RUNS", "--plot", "plot.svg"), "--plot must name a .png file"),
        (("fit", "RUNS", "--json", "/nowhere/at/all.json"), "--json must name a file"),
        (("plan",), "plan needs either --compute, or --parameters with or"),
        (("plan", "--compute", "1e21", "--tokens", "1"), "plan needs either"),
        (("plan", "--tokens", "1"), "plan needs either"),
        (("plan", "--parameters", "1e9", "--law", "kaplan"), "tells no best tokens for a size"),
        (("plan", "--tokens", "1", "--parameters", "-1"), "parameters must be finite and above 0"),
        (("plan", "--tokens", "1", "--parameters", "1", "--law", "kaplan"), "tells no loss for parameters and tokens"),
        (("plan", "--compute", "1e21", "--law", "gopher"), "--law must be one of chinchilla, "),
        (("plan", "--compute", "1e21", "--law", "RUNS"), "holds no law"),
    ],
)
def test_bad_options(
    options: tuple[str, ...], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = str(write(tmp_path / "runs.csv", grid()))
    plot = () if "--plot" in options else ("--plot", "none")
    assert run(*(runs if option == "RUNS" else option for option in options), *plot) == 2
    error = capsys.readouterr().err
    assert message in error and "Traceback" not in error


def test_largest_losses_are_left_out_by_row(
    few_starts: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = grid(0.001)
    wild = runs.loss.copy()
    wild[[3, 40]] = 50
    path = write(tmp_path / "runs.csv", Runs(runs.parameters, runs.tokens, wild))
    assert run("fit", path, "--drop-largest", 2, "--bootstrap", 0, "--plot", "none", "--json") == 0
    captured = capsys.readouterr()
    assert "left out, the 2 largest losses: rows 5; 42" in captured.err
    result = json.loads(captured.out)
    assert result["runs"] == 142 and result["intervals"] is None and result["said"]


def test_without_matplotlib(
    few_starts: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("matplotlib", "matplotlib.figure", "matplotlib.backends.backend_agg"):
        monkeypatch.setitem(sys.modules, name, None)
    path = write(tmp_path / "runs.csv", grid())
    assert run("fit", path) == 2
    error = capsys.readouterr().err
    assert "matplotlib" in error and 'pip install "lowrank-ops[scaling]"' in error and "--plot none" in error
    assert run("fit", path, "--plot", "none", "--bootstrap", 0) == 0
