"""lo.calibrate over a model that runs as a whole: moments, sharing, experts, padding, gradients."""

from __future__ import annotations

import copy
from typing import Any

import mixtures
import models
import pytest
import torch
from torch import Tensor, nn

import lowrank_ops as lo
from lowrank_ops.adapters.targets import target_weight
from lowrank_ops.calibration.sums import ROWS, Sums
from lowrank_ops.formats import Moment

IDS = torch.randint(1, 39, (3, 9), generator=torch.Generator().manual_seed(0))
# The second sequence ends in padding, the third begins with it.
MASK = torch.tensor([[1] * 9, [1] * 6 + [0] * 3, [0] * 2 + [1] * 7])


def by_hand(model: nn.Module, batches: list[dict[str, Tensor]], keep: Tensor | None = None) -> dict[str, Tensor]:
    """The input rows of every linear layer, by plain hooks."""
    rows: dict[str, list[Tensor]] = {}
    hooks = [
        m.register_forward_pre_hook(lambda m, args, n=name: rows.setdefault(n, []).append(args[0]))
        for name, m in model.named_modules()
        if isinstance(m, nn.Linear) or type(m).__name__ == "Conv1D"
    ]
    with torch.no_grad():
        for batch in batches:
            model(**batch)
    for hook in hooks:
        hook.remove()
    found = {name: torch.cat([x.reshape(-1, x.shape[-1]) for x in parts]) for name, parts in rows.items()}
    return found if keep is None else {name: x[keep] for name, x in found.items()}


def assert_moments(moment: Moment, x: Tensor) -> None:
    x = x.double()
    assert int(moment.count) == len(x)
    slack = (ROWS + 1) * 2.0**-24 * (x.abs().T @ x.abs() / len(x))
    assert ((moment.second.double() - x.T @ x / len(x)).abs() <= slack).all()
    torch.testing.assert_close(moment.mean.double(), x.mean(0), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("make", [models.llama, models.gpt2, models.gemma])
def test_moments_are_those_of_the_inputs(make: Any) -> None:
    model = make()
    before = models.snapshot(model)
    ids = torch.randint(1, 39, (2, 5))
    moments = lo.calibrate(model, [IDS, ids])
    rows = by_hand(model, [{"input_ids": IDS}, {"input_ids": ids}])
    assert set(moments) == rows.keys() - {"lm_head"}
    for name, moment in moments.items():
        assert_moments(moment, rows[name])
        moment.check(target_weight(model.get_submodule(name)), name)
    repr_, state, grads = models.snapshot(model)
    assert (repr_, grads) == (before[0], before[2]) and all(torch.equal(t, before[1][k]) for k, t in state.items())


def test_layers_with_one_input_share_a_tensor() -> None:
    moments = lo.calibrate(models.llama().train(), [IDS, IDS])
    layer = "model.layers.0"
    q, k, v = (moments[f"{layer}.self_attn.{name}_proj"].second for name in "qkv")
    assert q is k is v
    assert moments[f"{layer}.mlp.gate_proj"].second is moments[f"{layer}.mlp.up_proj"].second
    assert moments[f"{layer}.self_attn.o_proj"].second is not q


class Uneven(nn.Module):
    """b has a's input in the first call of itself only."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.a(x) + self.b(x)
        self.c(y)
        if x.shape[0] > 3:
            self.b(y)
        return y


def test_a_layer_that_stops_sharing_gets_sums_of_its_own() -> None:
    model, x = Uneven(), torch.randn(2, 3, 4)
    moments = lo.calibrate(model, [{"x": x[0]}, {"x": torch.cat([x[1], x[1]])}])
    rows = by_hand(model, [{"x": x[0]}, {"x": torch.cat([x[1], x[1]])}])
    for name, moment in moments.items():
        assert_moments(moment, rows[name])
    assert int(moments["b"].count) == 15 and moments["a"].second is not moments["b"].second


def test_inputs_that_cannot_be_told_apart_are_refused() -> None:
    class Skips(Uneven):
        def forward(self, x: Tensor) -> Tensor:
            return self.a(x) + (self.b(x) if len(x) == 3 else 0)

    with pytest.raises(ValueError, match="b and a have the same input in one call"):
        lo.calibrate(Skips(), [{"x": torch.randn(3, 4)}, {"x": torch.randn(2, 4)}])


def test_an_input_that_was_written_to_is_another_input() -> None:
    class Writes(Uneven):
        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.a(x)
            x.mul_(2)
            return y + self.b(x)

    x = torch.randn(3, 4)
    moments = lo.calibrate(Writes(), [{"x": x.clone()}])
    assert_moments(moments["a"], x)
    assert_moments(moments["b"], 2 * x)


def test_padding_counts_for_nothing() -> None:
    model = models.llama()
    batch = {"input_ids": IDS, "attention_mask": MASK}
    rows = by_hand(model, [batch], MASK.flatten().bool())
    for name, moment in lo.calibrate(model, [batch]).items():
        assert_moments(moment, rows[name])


@pytest.mark.parametrize("shape", [(3, 9, 4), (27, 4), (3, 1, 9, 4), (9, 3, 4), (3, 9, 2, 4)])
def test_padding_is_found_in_every_order_of_rows(shape: tuple[int, ...]) -> None:
    class Reorders(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 4)

        def forward(self, x: Tensor, attention_mask: Tensor) -> Tensor:
            if shape == (9, 3, 4):
                return self.linear(x.transpose(0, 1))  # type: ignore[no-any-return]
            return self.linear((torch.stack([x, x], 2) if len(shape) == 4 and shape[1] == 9 else x).view(shape))  # type: ignore[no-any-return]

    x = torch.randn(3, 9, 4)
    moment = lo.calibrate(Reorders(), [{"x": x, "attention_mask": MASK}])["linear"]
    kept = x[MASK.bool()]
    torch.testing.assert_close(moment.second, kept.T @ kept / len(kept))
    assert int(moment.count) == len(kept) * (2 if shape == (3, 9, 2, 4) else 1)


def test_our_layers_count_too() -> None:
    model = lo.adapt(models.llama(), lo.LoRA(4))
    rows = by_hand(model, [{"input_ids": IDS}])
    moments = lo.calibrate(model, [IDS], head=True)
    assert moments.keys() == rows.keys()
    for name, moment in moments.items():
        assert_moments(moment, rows[name])
        moment.check(model.get_submodule(name).weight, name)
    assert model.get_submodule("model.layers.0.mlp.up_proj").down.requires_grad


def test_the_head_and_a_tied_embedding_share() -> None:
    model = models.gemma()
    moments = lo.calibrate(model, [IDS], head=True)
    assert_moments(moments["lm_head"], by_hand(model, [{"input_ids": IDS}])["lm_head"])
    assert moments["model.embed_tokens"] is moments["lm_head"]
    assert "model.embed_tokens" not in lo.calibrate(models.llama(), [IDS], head=True)
    with pytest.raises(ValueError, match="head=True: the model, a Sequential, has no output head"):
        lo.calibrate(models.plain(), [{"input": torch.randn(2, 64)}], head=True)


@pytest.mark.parametrize("quantize", [None, "nf4"])
@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
def test_experts_have_the_moments_of_their_own_rows(family: str, quantize: str | None) -> None:
    """By a loop over the experts; gpt_oss keeps its matrices transposed and has biases."""
    model = mixtures.mixture(family)
    if quantize:
        lo.adapt(model, None, quantize=quantize)
    plain = lo.merge(copy.deepcopy(model)) if quantize else model
    batch = {"input_ids": IDS, "attention_mask": MASK}
    moments = lo.calibrate(model, [batch])
    name = "model.layers.1.mlp.experts"
    block = plain.get_submodule(name)
    seen: list[tuple[Tensor, ...]] = []
    hook = block.register_forward_pre_hook(
        lambda m, args, kwargs: seen.append((*args, *kwargs.values())), with_kwargs=True
    )
    with torch.no_grad():
        plain(**batch)
    hook.remove()
    x, index, _ = (t.reshape(-1, t.shape[-1]) for t in seen[0])
    for e in range(4):
        own = x[(index == e).any(-1) & MASK.flatten().bool()]
        W = block.gate_up_proj[e].detach()
        h = own @ W + block.gate_up_proj_bias[e] if family == "gpt_oss" else own @ W.T
        h = block._apply_gate(h).detach()
        for what, rows in (("gate_up_proj", own), ("down_proj", h)):
            found = moments[f"{name}.{what}"][e]
            assert int(found.count) == len(own)
            if len(own):
                expected = rows.double().T @ rows.double() / len(own)
                torch.testing.assert_close(found.second.double(), expected, rtol=1e-4, atol=1e-5)
    assert int(moments[f"{name}.gate_up_proj"].count.sum()) == 2 * int(MASK.sum())
    assert isinstance(model.get_submodule(name), lo.Experts) is bool(quantize)


def test_experts_whose_tokens_are_unknown_refuse_padding() -> None:
    model = mixtures.mixture("jetmoe")
    lo.calibrate(model, [IDS])
    with pytest.raises(ValueError, match="which token a row of its experts is"):
        lo.calibrate(model, [{"input_ids": IDS, "attention_mask": MASK}])


def test_a_layer_without_a_token_is_refused_by_name_where_it_is_used() -> None:
    model = Uneven()
    model.unused = nn.Linear(4, 3)
    moments = lo.calibrate(model, [{"x": torch.randn(3, 4)}])
    assert int(moments["unused"].count) == 0
    with pytest.raises(ValueError, match="^unused saw no token"):
        moments["unused"].check(model.unused.weight, "unused")


@pytest.mark.parametrize("scale", [1.0, 1e3])
def test_the_error_of_the_sums_has_its_bound(scale: float) -> None:
    """Rows with a large mean, so that the sums grow; a last block of another size."""
    generator = torch.Generator().manual_seed(0)
    x = scale * (torch.randn(5 * ROWS + 77, 24, generator=generator) + 3)
    sums = Sums(24, 0, torch.device("cpu"))
    for rows in x.split(700):
        sums.add(rows)
    second, mean, count = sums.means()
    exact = x.double()
    products = -(-len(x) // 700)
    bound = (700 + products) * 2.0**-24 * (exact.abs().T @ exact.abs()) / len(x)
    error = (second.double() - exact.T @ exact / len(x)).abs()
    assert (error <= bound).all() and int(count) == len(x)
    assert float((error / bound).max()) < 0.1  # in practice far below
    torch.testing.assert_close(mean.double(), exact.mean(0), rtol=1e-7, atol=0)


class Changes(nn.Module):
    """Two layers, and the input of the first one is changed in place before the second takes it."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Any:
        x = x * 1
        self.first(x)
        return self.second(x.add_(1))


@pytest.mark.parametrize("inference", [False, True])
def test_an_input_that_is_changed_in_place_is_another_one(inference: bool) -> None:
    x = torch.randn(20, 8)
    with torch.inference_mode(inference):
        moments = lo.calibrate(Changes(), [{"x": x}])
    assert_moments(moments["first"], x)
    assert_moments(moments["second"], x + 1)


def test_low_precision_around_does_not_reach_the_sums() -> None:
    model, x = nn.Sequential(nn.Linear(64, 64)), torch.randn(500, 64)
    torch.set_float32_matmul_precision("medium")
    try:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            moments = lo.calibrate(model, [{"input": x}])
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision("highest")
    assert_moments(moments["0"], x)


@pytest.mark.parametrize("quantize", [None, "nf4"])
@pytest.mark.parametrize("make", [models.llama, lambda: mixtures.mixture("mixtral"), models.gpt2])
def test_gradients_are_those_of_autograd(make: Any, quantize: str | None) -> None:
    model = make()
    if quantize:
        lo.adapt(model, None, quantize=quantize)
    plain = lo.merge(copy.deepcopy(model)) if quantize else copy.deepcopy(model)
    plain.requires_grad_(True)
    batches = [{"input_ids": IDS, "attention_mask": MASK}, {"input_ids": IDS[:, :5], "labels": IDS[:, :5]}]
    moments = lo.calibrate(model, batches, gradients=True)
    labels = [IDS.masked_fill(MASK == 0, -100), IDS[:, :5]]
    for batch, label in zip(batches, labels, strict=True):
        plain(**{**batch, "labels": label}).loss.backward()
    for name, moment in moments.items():
        try:
            expected = plain.get_submodule(name).weight.grad
        except AttributeError:
            expected = plain.get_parameter(name).grad
        expected = expected.T if make is models.gpt2 else expected
        assert moment.gradient is not None
        torch.testing.assert_close(moment.gradient, expected / 2, rtol=1e-3, atol=1e-5 * float(expected.abs().max()))
    assert all(p.grad is None for p in model.parameters())


def test_gradients_need_a_loss_and_the_model_in_memory() -> None:
    with pytest.raises(ValueError, match="needs labels"):
        lo.calibrate(models.plain(), [{"input": torch.randn(2, 64)}], gradients=True)
    with pytest.raises(ValueError, match="needs a model that returns a loss"):
        lo.calibrate(models.llama().model, [IDS], gradients=True)
    with pytest.raises(ValueError, match="gradients need the model in memory"):
        lo.calibrate("directory", [IDS], gradients=True)


def test_bad_batches_are_refused() -> None:
    model = models.llama()
    with pytest.raises(ValueError, match="at least one batch"):
        lo.calibrate(model, [])
    with pytest.raises(TypeError, match=r"batch 1 must be a dictionary of tensors or ids \[B, T\], got str"):
        lo.calibrate(model, [IDS, "text"])  # type: ignore[list-item]
    with pytest.raises(ValueError, match=r"input_ids must be integers \[B, T\], got torch.int64 \[9\]"):
        lo.calibrate(model, [IDS[0]])
    with pytest.raises(ValueError, match=r"attention_mask must be \[B, T\]"):
        lo.calibrate(model, [{"input_ids": IDS, "attention_mask": MASK[:, None, None]}])
    with pytest.raises(ValueError, match=r"input_ids must be in \[0, 99\), got 1 to 138: another tokenizer's"):
        lo.calibrate(model, [torch.tensor([[1, 138]])])
    with pytest.raises(ValueError, match="leaves no token"):
        lo.calibrate(model, [{"input_ids": IDS, "attention_mask": 0 * MASK}])
    assert not model.training and not any(m._forward_pre_hooks for m in model.modules())
