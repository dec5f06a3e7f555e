"""bradley_terry_loss against TRL's formula and float64; reward models; strengths against choix."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from helpers import assert_within_baseline
from torch import Tensor, nn
from torch.library import opcheck

import lowrank_ops as lo
from lowrank_ops import ops, preference, reference
from lowrank_ops.preference import bradley_terry_loss, fit_bradley_terry, reward_model

SIZES = (1, 3, 63, 1024, 1025, 20011)


def pairs(n: int, dtype: torch.dtype, device: torch.device | str = "cpu", scale: float = 3.0) -> tuple[Tensor, ...]:
    """chosen, rejected, margin, labels; labels include 0, a half and 1."""
    generator = torch.Generator().manual_seed(n)
    c, r = (scale * torch.randn(2, n, generator=generator)).to(dtype).to(device)
    wide = torch.promote_types(dtype, torch.float32)
    margin, labels = torch.rand(2, n, generator=generator).to(wide).to(device)
    labels[::3] = (labels[::3] * 3).floor() / 2
    return c, r, margin, labels


def trl(c: Tensor, r: Tensor, margin: Tensor | float = 0.0, center: float = 0.0) -> Tensor:
    return -nn.functional.logsigmoid(c - r - margin).mean() + center * ((c + r) ** 2).mean()


def plain(c: Tensor, r: Tensor, margin: Tensor, labels: Tensor, center: float) -> Tensor:
    """The loss in plain torch: the baseline of the tolerance rule and, in float64, the judge."""
    d = c.to(margin.dtype) - r.to(margin.dtype) - margin
    both = c.to(margin.dtype) + r.to(margin.dtype)
    return nn.functional.binary_cross_entropy_with_logits(d, labels) + center * both.square().mean()


# ---- the op


@pytest.mark.parametrize("n", SIZES)
def test_loss_and_gradients_against_float64(device: torch.device, n: int, dtypes: tuple[torch.dtype, ...]) -> None:
    for dtype in (torch.float32, *dtypes):
        c, r, margin, labels = pairs(n, dtype, device)
        for arguments in ((margin, labels, 0.01), (margin, None, 0.0), (None, labels, 0.3), (None, None, 0.0)):
            m = torch.zeros_like(margin) if arguments[0] is None else margin
            y = torch.ones_like(labels) if arguments[1] is None else labels
            results = []
            for one, (a, b, *rest) in (
                (bradley_terry_loss, (c, r, *arguments)),
                (plain, (c.double(), r.double(), m.double(), y.double(), arguments[2])),
                (plain, (c, r, m, y, arguments[2])),
            ):
                a, b = a.clone().requires_grad_(), b.clone().requires_grad_()
                loss = one(a, b, *rest)
                results.append((loss.detach().reshape(1), *torch.autograd.grad(loss * n, (a, b))))
            for got, exact, baseline in zip(*results, strict=True):
                assert_within_baseline(got, exact, baseline)


def test_the_formula_is_trls(device: torch.device) -> None:
    c, r, margin, _ = pairs(100, torch.float32, device)
    torch.testing.assert_close(bradley_terry_loss(c, r), trl(c, r), rtol=1e-6, atol=0)
    for center in (0.0, 0.01):
        ours, theirs = bradley_terry_loss(c, r, margin, center=center), trl(c, r, margin, center)
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=0)
    torch.testing.assert_close(bradley_terry_loss(c, r, 0.5), trl(c, r, 0.5), rtol=1e-6, atol=0)


@pytest.mark.parametrize("implementation", ["cpp", "reference"])
def test_gradcheck_in_float64(implementation: str) -> None:
    c, r, margin, labels = pairs(17, torch.float64)
    c.requires_grad_(), r.requires_grad_()
    with lo.implementation(implementation):
        for arguments in ((None, None, 0.0), (margin, labels, 0.1)):
            assert torch.autograd.gradcheck(lambda a, b, rest=arguments: bradley_terry_loss(a, b, *rest), (c, r))
        exact = plain(c, r, margin, labels, 0.1)
        torch.testing.assert_close(bradley_terry_loss(c, r, margin, labels, 0.1), exact, rtol=1e-14, atol=0)


@pytest.mark.parametrize("gap", [17.0, 50.0, 86.0, 95.0, 1e4])
@pytest.mark.parametrize("label", [0.0, 0.5, 1.0])
def test_large_gaps(device: torch.device, gap: float, label: float) -> None:
    """Finite, and right to the last places where softplus is not rounded away."""
    for sign in (-1, 1):
        c = torch.tensor([sign * gap / 2], device=device).requires_grad_()
        r = (-c.detach()).requires_grad_()
        loss = bradley_terry_loss(c, r, labels=torch.tensor([label], device=device))
        d = torch.tensor(sign * gap, dtype=torch.float64)
        exact = nn.functional.softplus(-d.abs(), threshold=1e9) + (1 - label if sign > 0 else label) * gap
        assert loss.item() == pytest.approx(float(exact), rel=1e-6, abs=1e-37)
        loss.backward()
        slope = float((1 - label) * torch.sigmoid(d) - label * torch.sigmoid(-d))
        assert float(c.grad) == pytest.approx(slope, rel=1e-5, abs=1e-37)
        assert float(r.grad) == -float(c.grad)


def test_float16_gaps_that_float16_cannot_hold(device: torch.device) -> None:
    c = torch.full((5,), -60000.0, dtype=torch.float16, device=device)
    assert float(bradley_terry_loss(c, -c)) == 120000.0


def test_a_tie_pulls_together_and_a_label_of_0_swaps(device: torch.device) -> None:
    c, r, margin, _ = pairs(33, torch.float32, device)
    zero, half = torch.zeros_like(margin), torch.full_like(margin, 0.5)
    torch.testing.assert_close(bradley_terry_loss(c, r, labels=zero), bradley_terry_loss(r, c), rtol=1e-6, atol=0)
    c.requires_grad_()
    bradley_terry_loss(c, r, labels=half).backward()
    assert torch.equal(c.grad.sign(), (c - r).sign().detach())


def test_strided_and_shaped_rewards(device: torch.device) -> None:
    c, r, *_ = pairs(64, torch.float32, device)
    wide = torch.stack([c, r], 1)
    assert torch.equal(bradley_terry_loss(wide[:, 0], wide[:, 1]), bradley_terry_loss(c, r))
    assert torch.equal(bradley_terry_loss(c[:, None], r[:, None]), bradley_terry_loss(c, r))


def test_what_is_not_finite_shows(device: torch.device) -> None:
    for bad in (math.nan, math.inf, -math.inf):
        c = torch.tensor([0.0, bad], device=device).requires_grad_()
        loss = bradley_terry_loss(c, torch.zeros(2, device=device))
        assert not torch.isfinite(loss)
        loss.backward()
        assert torch.isfinite(c.grad).tolist() == [True, False]
    label = torch.tensor([0.5, 2.0], device=device)
    loss = torch.ops.lowrank_ops.bradley_terry_loss(c.detach(), label, None, label, 0.0)
    assert torch.isnan(loss)  # the op itself, which on a GPU is called without checks


def test_any_number_of_threads_gives_the_same_bits() -> None:
    c, r, margin, labels = pairs(50_000, torch.float32)
    threads, made = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            made.append(bradley_terry_loss(c, r, margin, labels, 0.01))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(made[0], made[1]) and torch.equal(made[0], made[2])


def test_every_instruction_set(isa: str) -> None:
    c, r, margin, labels = pairs(1030, torch.bfloat16)
    exact = plain(c.double(), r.double(), margin.double(), labels.double(), 0.1)
    got = bradley_terry_loss(c, r, margin, labels, 0.1)
    assert float(got) == pytest.approx(float(exact), rel=1e-6)


def test_opcheck_and_compile() -> None:
    c, r, margin, labels = pairs(9, torch.float32)
    opcheck(torch.ops.lowrank_ops.bradley_terry_loss.default, (c.requires_grad_(), r, margin, labels, 0.1))
    g = torch.ones(())
    opcheck(torch.ops.lowrank_ops.bradley_terry_loss_backward.default, (g, c.detach(), r, None, None, 0.0))
    compiled = torch.compile(bradley_terry_loss, fullgraph=True)
    torch.testing.assert_close(compiled(c, r, margin, labels), bradley_terry_loss(c, r, margin, labels))


def test_a_second_derivative_is_refused() -> None:
    c = torch.ones(3, requires_grad=True)
    (g,) = torch.autograd.grad(bradley_terry_loss(c, torch.zeros(3)), c, create_graph=True)
    with pytest.raises(RuntimeError, match="once"):
        g.sum().backward()


def test_reference_is_the_op() -> None:
    assert {"bradley_terry_loss", "bradley_terry_loss_backward"} <= set(ops.SCHEMAS)
    c, r, margin, labels = pairs(20, torch.float64)
    g = torch.tensor(2.0, dtype=torch.float64)
    c.requires_grad_(), r.requires_grad_()
    expected = torch.autograd.grad(2 * plain(c, r, margin, labels, 0.2), (c, r))
    for got, exact in zip(reference.bradley_terry_loss_backward(g, c, r, margin, labels, 0.2), expected, strict=True):
        torch.testing.assert_close(got, exact)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"chosen": [1.0]}, "chosen must be a Tensor"),
        ({"rejected": torch.zeros(2)}, r"one shape and device, got \[3\] on cpu and \[2\]"),
        ({"chosen": torch.zeros(0), "rejected": torch.zeros(0)}, "at least one pair"),
        ({"chosen": torch.zeros(3, dtype=torch.int64), "rejected": torch.zeros(3, dtype=torch.int64)}, "float32"),
        ({"margin": torch.zeros(2)}, "margin must hold 3 numbers"),
        ({"margin": torch.tensor([0.0, math.nan, 0.0])}, "margin must be finite, got nan for pair 1"),
        ({"labels": torch.tensor([0.0, 1.0, 1.5])}, r"labels must be in \[0, 1\], got 1.5 for pair 2"),
        ({"labels": [1.0, 1.0, 1.0]}, "labels must be a Tensor of 3 numbers"),
        ({"labels": torch.zeros(3, requires_grad=True)}, "labels gets no gradient"),
        ({"margin": torch.zeros(3, device="meta")}, "margin is on meta"),
        ({"center": -0.1}, "center must be a number of at least 0"),
        ({"center": math.nan}, "center must be a number of at least 0"),
    ],
)
def test_bad_input_is_refused(change: dict, message: str) -> None:
    arguments = {"chosen": torch.zeros(3), "rejected": torch.zeros(3)} | change
    with pytest.raises((TypeError, ValueError), match=message):
        bradley_terry_loss(**arguments)


# ---- strengths


def table(n: int, seed: int, density: float = 0.5) -> Tensor:
    """Random wins, strongly connected through a ring."""
    generator = torch.Generator().manual_seed(seed)
    wins = torch.poisson(3 * torch.rand(n, n, generator=generator), generator=generator)
    wins *= torch.rand(n, n, generator=generator) < density
    ring = torch.arange(n)
    wins[ring, (ring + 1) % n] += 1
    return wins.fill_diagonal_(0)


@pytest.mark.parametrize("n", [2, 3, 10, 40])
@pytest.mark.parametrize("density", [0.1, 0.6])
def test_strengths_equal_choix(n: int, density: float) -> None:
    choix = pytest.importorskip("choix")
    wins = table(n, seed=n, density=density)
    data = [(i, j) for i in range(n) for j in range(n) for _ in range(int(wins[i, j]))]
    ours = fit_bradley_terry(wins).strengths
    theirs = {
        "opt_pairwise": choix.opt_pairwise(n, data, alpha=0.0, tol=1e-10),
        "ilsr_pairwise": choix.ilsr_pairwise(n, data, tol=1e-11, max_iter=10_000),
        "mm_pairwise": choix.mm_pairwise(n, data, tol=1e-12, max_iter=1_000_000),
    }
    for name, values in theirs.items():
        torch.testing.assert_close(ours, torch.from_numpy(values), rtol=0, atol=1e-6, msg=name)


def test_a_prior_equals_choix() -> None:
    choix = pytest.importorskip("choix")
    wins = torch.triu(torch.ones(5, 5), 1)  # a perfect order: no finite maximum without a prior
    data = [(i, j) for i in range(5) for j in range(i + 1, 5)]
    theirs = choix.opt_pairwise(5, data, alpha=0.125, tol=1e-10)
    fits = [fit_bradley_terry(wins, prior=prior).strengths for prior in (2.0, math.sqrt(2) * 2)]
    assert any((fit - torch.from_numpy(theirs)).abs().max() < 1e-6 for fit in fits)


@pytest.mark.parametrize("noise", ["gumbel", "gaussian"])
@pytest.mark.parametrize("prior", [None, 1.5])
def test_the_maximum_and_its_curvature(noise: str, prior: float | None) -> None:
    """The gradient is 0, and the covariance is the inverse of the curvature that autograd sees."""
    wins = table(7, seed=1).double() + 0.5 * table(7, seed=2).double()
    fit = fit_bradley_terry(wins, prior, noise=noise)

    def objective(s: Tensor) -> Tensor:
        f = torch.sigmoid if noise == "gumbel" else torch.special.ndtr
        off = wins > 0
        penalty = 0 if prior is None else (s * s).sum() / (2 * prior**2)
        return penalty - (wins[off] * f(s[:, None] - s)[off].log()).sum()

    s = fit.strengths.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(objective(s), s)
    assert gradient.abs().max() < 1e-9 and abs(fit.strengths.mean()) < 1e-12
    centre = torch.eye(7, dtype=torch.float64) - 1 / 7
    exact = centre @ torch.linalg.pinv(torch.autograd.functional.hessian(objective, fit.strengths)) @ centre
    torch.testing.assert_close(fit.covariance, exact, rtol=1e-8, atol=1e-10)
    torch.testing.assert_close(fit.standard_errors, exact.diagonal().sqrt(), rtol=1e-8, atol=0)
    gap, error = fit.gap(2, 5)
    assert gap == float(fit.strengths[2] - fit.strengths[5])
    assert error == pytest.approx(float(exact[2, 2] + exact[5, 5] - 2 * exact[2, 5]) ** 0.5)
    assert fit.probability(2, 5) + fit.probability(5, 2) == pytest.approx(1)


def test_standard_errors_are_the_spread_of_repeated_tables() -> None:
    strengths, games = torch.tensor([-1.0, -0.2, 0.3, 0.9], dtype=torch.float64), 60
    p = torch.sigmoid(strengths[:, None] - strengths)
    generator = torch.Generator().manual_seed(0)
    fits, claimed = [], []
    for _ in range(300):
        upper = torch.triu(torch.binomial(torch.full_like(p, games), p, generator=generator), 1)
        wins = upper + torch.triu(games - upper, 1).T
        fit = fit_bradley_terry(wins)
        fits.append(fit.strengths)
        claimed.append(fit.standard_errors)
    spread = torch.stack(fits).std(0)
    torch.testing.assert_close(torch.stack(claimed).mean(0), spread, rtol=0.15, atol=0)


def test_uneven_tables_converge() -> None:
    wins = torch.tensor([[0, 1e6, 0], [1, 0, 1e6], [0, 1, 0]])
    fit = fit_bradley_terry(wins)
    assert fit.gap(0, 1)[0] == pytest.approx(math.log(1e6), rel=1e-9)
    assert fit.gap(0, 2)[0] == pytest.approx(2 * math.log(1e6), rel=1e-9)
    assert fit_bradley_terry(wins, noise="gaussian").gap(0, 1)[0] == pytest.approx(4.7534, rel=1e-4)


def test_win_probability_is_that_of_the_noise() -> None:
    generator = torch.Generator().manual_seed(0)
    gumbel = -(-torch.rand(2, 200_000, generator=generator).clamp(1e-9).log()).log()
    gaussian = torch.randn(2, 200_000, generator=generator) * 0.5**0.5
    for noise, (first, second) in (("gumbel", gumbel), ("gaussian", gaussian)):
        share = (0.7 + first > second).double().mean()
        assert float(preference.win_probability(torch.tensor(0.7), noise)) == pytest.approx(float(share), abs=0.005)
    with pytest.raises(ValueError, match="gumbel, gaussian"):
        preference.win_probability(torch.zeros(1), "laplace")


@pytest.mark.parametrize(
    ("wins", "message"),
    [
        ([[0, 1], [0, 0]], "items 0 never lost to items 1"),
        ([[0, 1, 0], [1, 0, 0], [1, 1, 0]], "items 2 never lost to items 0, 1"),
        ([[0, 0, 1], [0, 0, 1], [0, 0, 0]], "never lost to|does not compare"),
        ([[0, 1, 0, 0], [1, 0, 0, 0], [0, 0, 0, 1], [0, 0, 1, 0]], "does not compare items .* no common scale"),
        ([[0, 1, 1]], r"must be \[n, n\]"),
        ([[0]], "n >= 2"),
        ([[0, -1], [1, 0]], r"wins\[0, 1\] = -1"),
        ([[0, math.nan], [1, 0]], r"wins\[0, 1\] = nan"),
        ([[2, 1], [1, 0]], "cannot beat itself"),
        ("wins", "must be a table"),
    ],
)
def test_bad_tables_are_refused(wins: object, message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        fit_bradley_terry(wins)


def test_bad_options_are_refused() -> None:
    with pytest.raises(ValueError, match="prior must be"):
        fit_bradley_terry([[0, 1], [1, 0]], prior=0.0)
    with pytest.raises(ValueError, match="noise must be"):
        fit_bradley_terry([[0, 1], [1, 0]], noise="cauchy")


def test_an_item_without_games_has_the_prior() -> None:
    fit = fit_bradley_terry([[0, 3, 0], [1, 0, 0], [0, 0, 0]], prior=1.0)
    assert fit.strengths[2].abs() < 1e-9 and fit.strengths[0] > 0 > fit.strengths[1]


# ---- reward models


def encoder() -> nn.Module:
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    return BertModel(
        BertConfig(
            vocab_size=50,
            hidden_size=36,
            num_hidden_layers=2,
            num_attention_heads=3,
            intermediate_size=51,
            max_position_embeddings=40,
        )  # fmt: skip
    ).eval()


def decoder(kind: str = "llama") -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    if kind == "gpt2":
        return GPT2LMHeadModel(GPT2Config(vocab_size=50, n_embd=36, n_layer=2, n_head=3, n_positions=40)).eval()
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=50,
            hidden_size=36,
            num_hidden_layers=2,
            num_attention_heads=3,
            num_key_value_heads=3,
            intermediate_size=52,
            max_position_embeddings=40,
        )  # fmt: skip
    ).eval()


MAKERS = {"bert": encoder, "llama": decoder, "gpt2": lambda: decoder("gpt2")}


def trained(model: preference.RewardModel) -> preference.RewardModel:
    """Give the adapters, whose ``up`` starts at 0, numbers as training would."""
    with torch.no_grad():
        for parameter in lo.adapter_parameters(model):
            parameter.normal_(std=0.1)
    return model


@pytest.mark.parametrize("kind", MAKERS)
def test_rewards_do_not_depend_on_the_padding(kind: str) -> None:
    model = trained(reward_model(MAKERS[kind](), lo.LoRA(4)))
    assert model.head.pooling == ("mean" if kind == "bert" else "last")
    texts = [[3, 7, 9, 11, 4], [5], [8, 2, 6]]
    alone = torch.cat([model(torch.tensor([t]), torch.ones(1, len(t))) for t in texts])
    for side in ("left", "right", "both"):
        ids, mask = torch.full((3, 9), 1), torch.zeros(3, 9, dtype=torch.long)
        for row, text in enumerate(texts):
            at = {"left": 9 - len(text), "right": 0, "both": 2}[side]
            ids[row, at : at + len(text)], mask[row, at : at + len(text)] = torch.tensor(text), 1
        torch.testing.assert_close(model(ids, mask), alone, rtol=1e-5, atol=1e-6)
    assert alone.unique().numel() == 3


def test_the_last_real_token_is_what_the_head_reads() -> None:
    head = preference.RewardHead(4, "last")
    hidden, mask = torch.randn(2, 5, 4), torch.tensor([[0, 1, 1, 0, 0], [0, 0, 0, 1, 1]])
    torch.testing.assert_close(head(hidden, mask), torch.stack([hidden[0, 2], hidden[1, 4]]) @ head.weight)
    head.pooling = "first"
    torch.testing.assert_close(head(hidden, mask), torch.stack([hidden[0, 1], hidden[1, 3]]) @ head.weight)
    head.pooling = "mean"
    means = torch.stack([hidden[0, 1:3].mean(0), hidden[1, 3:].mean(0)])
    torch.testing.assert_close(head(hidden, mask), means @ head.weight)


@pytest.mark.parametrize("kind", MAKERS)
@pytest.mark.parametrize("quantize", ["nf4", None])
def test_saved_and_loaded_rewards_are_equal(kind: str, quantize: str | None, tmp_path: Path) -> None:
    model = trained(reward_model(MAKERS[kind](), lo.LoRA(4), quantize))
    ids, mask = torch.randint(50, (3, 7)), torch.ones(3, 7)
    preference.save_reward_model(model, tmp_path)
    torch.manual_seed(99)
    again = preference.load_reward_model(MAKERS[kind](), tmp_path)
    assert torch.equal(model(ids, mask), again(ids, mask))
    assert again.head.pooling == model.head.pooling and again.head.weight.requires_grad


@pytest.mark.parametrize("kind", [lo.LoRA(4, alpha=4, init="pissa"), lo.LoRAXS(4), lo.SVF()], ids=str)
def test_kinds_that_start_from_the_dense_weight(kind: lo.LoRA | lo.LoRAXS | lo.SVF, tmp_path: Path) -> None:
    model = trained(reward_model(encoder(), kind))
    preference.save_reward_model(model, tmp_path)
    ids = torch.randint(50, (3, 7))
    again = preference.load_reward_model(encoder(), tmp_path, kind)
    torch.testing.assert_close(model(ids, torch.ones(3, 7)), again(ids, torch.ones(3, 7)), rtol=1e-5, atol=1e-6)
    if isinstance(kind, lo.LoRA):
        with pytest.raises(ValueError, match="dense model"):
            preference.load_reward_model(encoder(), tmp_path)
    else:
        again = preference.load_reward_model(encoder(), tmp_path)
        torch.testing.assert_close(model(ids, torch.ones(3, 7)), again(ids, torch.ones(3, 7)), rtol=1e-5, atol=1e-6)


def test_training_moves_adapters_and_head_alone() -> None:
    model = reward_model(encoder(), lo.LoRA(4))
    names = {name for name, p in model.named_parameters() if p.requires_grad}
    assert "head.weight" in names and all(n == "head.weight" or n.endswith((".down", ".up")) for n in names)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    ids, mask = torch.randint(50, (16, 7), generator=torch.Generator().manual_seed(0)), torch.ones(16, 7)
    losses = []
    for _ in range(30):
        chosen, rejected = model(ids, mask).chunk(2)
        loss = bradley_terry_loss(chosen, rejected, center=0.01)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.2 < losses[0]


def test_a_head_alone(tmp_path: Path) -> None:
    model = reward_model(decoder(), None, None)
    assert [name for name, p in model.named_parameters() if p.requires_grad] == ["head.weight"]
    preference.save_reward_model(model, tmp_path)
    again = preference.load_reward_model(decoder(), tmp_path)
    ids = torch.randint(50, (2, 5))
    assert torch.equal(model(ids, torch.ones(2, 5)), again(ids, torch.ones(2, 5)))


def test_bad_models_and_inputs_are_refused(tmp_path: Path) -> None:
    from transformers import T5Config, T5Model

    with pytest.raises(TypeError, match="Hugging Face"):
        reward_model(nn.Linear(3, 3), lo.LoRA(1))
    with pytest.raises(TypeError, match="is both"):
        reward_model(T5Model(T5Config(vocab_size=9, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2)), lo.LoRA(1))
    with pytest.raises(ValueError, match="pooling must be"):
        reward_model(encoder(), lo.LoRA(1), pooling="max")
    model = reward_model(encoder(), lo.LoRA(2))
    with pytest.raises(ValueError, match="text 1 of the batch has no real token"):
        model(torch.ones(2, 3, dtype=torch.long), torch.tensor([[1, 1, 0], [0, 0, 0]]))
    with pytest.raises(ValueError, match=r"must be \[B, T\]"):
        model(torch.ones(2, 3, dtype=torch.long), torch.ones(2, 4))
    with pytest.raises(FileNotFoundError, match="reward_head.safetensors is missing"):
        preference.load_reward_model(encoder(), tmp_path)
    preference.save_reward_model(model, tmp_path)
    (tmp_path / preference.HEAD).write_bytes(b"no")
    with pytest.raises(ValueError, match="not a reward head"):
        preference.load_reward_model(encoder(), tmp_path)


def test_a_head_of_another_version_is_refused(tmp_path: Path) -> None:
    model = trained(reward_model(encoder(), lo.LoRA(2)))
    preference.save_reward_model(model, tmp_path)
    head = (tmp_path / preference.HEAD).read_bytes()
    with torch.no_grad():
        lo.adapter_parameters(model.model)[0].add_(1)
    preference.save_reward_model(model, tmp_path)
    (tmp_path / preference.HEAD).write_bytes(head)  # as a kill between the two files leaves it
    with pytest.raises(ValueError, match=f"{preference.HEAD} belongs to another version of the adapter"):
        preference.load_reward_model(encoder(), tmp_path)


def test_the_head_has_the_name_that_transformers_gives_it(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    preference.save_reward_model(reward_model(decoder(), lo.LoRA(2)), tmp_path)
    assert {k: tuple(v.shape) for k, v in load_file(tmp_path / preference.HEAD).items()} == {"score.weight": (1, 36)}
    assert json.loads((tmp_path / "adapter_config.json").read_text())["peft_type"] == "LORA"
