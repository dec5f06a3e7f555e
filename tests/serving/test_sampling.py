"""Drawing tokens and finding stops, without a model."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch

from lowrank_ops.serving.sampling import Sampler
from lowrank_ops.serving.stops import Stops

P = torch.tensor([0.05, 0.3, 0.4, 0.05, 0.2])


@pytest.mark.parametrize(
    ("options", "left"),
    [
        ({}, [0, 1, 2, 3, 4]),
        ({"top_k": 2}, [1, 2]),
        ({"top_p": 0.75}, [1, 2, 4]),
        ({"min_p": 0.6}, [1, 2]),
        ({"top_k": 3, "top_p": 0.7}, [1, 2]),  # 0.4 and 0.3 are 0.78 of the three
        ({"top_p": 0.75, "min_p": 0.6}, [1, 2]),
        ({"logit_bias": {2: -100.0}}, [0, 1, 3, 4]),
        ({"top_k": 9}, [0, 1, 2, 3, 4]),
    ],
    ids=str,
)
def test_cuts_keep_shares(options: dict[str, Any], left: list[int]) -> None:
    sampler = Sampler(seed=0, **options)
    shares = torch.bincount(torch.tensor([sampler.choose(P.log()) for _ in range(2000)]), minlength=5) / 2000
    expected = torch.zeros(5)
    expected[left] = P[left] / P[left].sum()
    assert torch.allclose(shares, expected, atol=0.06) and not shares[expected == 0].any()  # five standard deviations


@pytest.mark.parametrize("top_p", [0.3, 0.9999])
def test_top_p_of_a_flat_distribution(top_p: float) -> None:
    """Its fewest tokens are more than those that are looked at first."""
    sampler = Sampler(seed=0, top_p=top_p)
    z = torch.linspace(0, 1, 5000)
    p = z.softmax(0).flip(0)
    least = 5000 - int((p.double().cumsum(0) - p < top_p).sum())
    assert min(sampler.choose(z) for _ in range(300)) >= least


@pytest.mark.parametrize(
    "options",
    [
        *({"temperature": t} for t in (0, 5e-324, 1e-45, 1e-38, 1e-5)),
        {"top_p": 5e-324},
        {"min_p": 1.0},
        {"top_k": 1},
        {"temperature": 1e-5, "top_p": 5e-324, "min_p": 5e-324},
    ],
    ids=str,
)
def test_limits_are_the_most_probable_token(options: dict[str, Any]) -> None:
    assert {Sampler(seed=n, **options).choose(torch.tensor([1.0, 5, 2])) for n in range(20)} == {1}


def test_logits_that_are_no_numbers() -> None:
    with pytest.raises(RuntimeError, match="not finite"):
        Sampler(seed=0).choose(torch.tensor([1.0, float("nan")]))


def test_stops_of_any_text_in_any_pieces() -> None:
    for seed in range(500):
        draw = random.Random(seed)
        letters = "ab" if seed % 2 else "abc"

        def text(most: int, letters: str = letters, draw: random.Random = draw) -> str:
            return "".join(draw.choice(letters) for _ in range(draw.randrange(1, most)))

        whole, stops = text(30), [text(6) for _ in range(draw.randrange(4))]
        expected, ended = whole, False
        for end in range(1, len(whole) + 1):
            if met := [len(stop) for stop in stops if whole[:end].endswith(stop)]:
                expected, ended = whole[: end - max(met)], True
                break
        finder, got, found, at = Stops(stops), "", False, 0
        while at < len(whole) and not found:
            piece = whole[at : at + draw.randrange(1, 4)]
            at += len(piece)
            sure, found = finder.add(piece)
            got += sure
        assert (got + finder.held, found) == (expected, ended), (whole, stops)
