"""Starts that look at data: EVA, CorDA and LoRA-GA, against PEFT's given the same data."""

from __future__ import annotations

import dataclasses
from collections import Counter
from pathlib import Path
from typing import Any

import mixtures
import peft
import pytest
import torch
from peft.tuners.lora.config import CordaConfig
from peft.tuners.lora.corda import preprocess_corda
from peft.tuners.lora.loraga import preprocess_loraga
from torch import Tensor, nn

import lowrank_ops as lo
from lowrank_ops.adapters import data_starts
from lowrank_ops.formats import Moment, Moments


class Net(nn.Module):
    """q and v have one input, and another width follows."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.v, self.o = nn.Linear(48, 40), nn.Linear(48, 24), nn.Linear(40, 32)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.o(torch.tanh(self.q(x))) + self.v(x).repeat(1, 2)[:, :32]
        return y


def net() -> Net:
    torch.manual_seed(0)
    made = Net()
    with torch.no_grad():  # the inputs of o have few directions that matter
        made.q.weight.mul_(torch.logspace(0, -2, 40).unsqueeze(1))
    return made


def inputs(count: int = 600) -> Tensor:
    """Correlated, of very different lengths, and not around 0."""
    generator = torch.Generator().manual_seed(1)
    basis = torch.linalg.qr(torch.randn(48, 48, generator=generator))[0]
    return torch.randn(count, 48, generator=generator) * torch.logspace(0.5, -2, 48) @ basis + 0.7


def moments_of(model: Net, x: Tensor, gradients: bool = False) -> Moments:
    with torch.no_grad():
        hidden = torch.tanh(model.q(x))
    first = Moment.of(x, model.q.weight)
    found = {"q": first, "v": Moment.of(x, model.v.weight), "o": Moment.of(hidden, model.o.weight)}
    made = {}
    model(x).square().mean().backward()
    for name, moment in found.items():
        shared = first if name == "v" else moment
        weight = getattr(model, name).weight
        grad = weight.grad.clone() if gradients else None
        made[name] = Moment(shared.second, shared.mean, shared.count, moment.shape, moment.fingerprint, grad)
    model.zero_grad()
    return Moments(made)


def same_up_to_sign(got: Tensor, wanted: Tensor, dim: int, atol: float) -> None:
    """Rows (dim 1) or columns (dim 0), each up to its sign."""
    signs = (got * wanted).sum(dim, keepdim=True).sign()
    torch.testing.assert_close(got * signs, wanted, rtol=0, atol=atol * float(wanted.abs().max()))


def test_principal_inputs_are_those_of_centred_inputs() -> None:
    x, model = inputs(), net()
    directions, shares = data_starts.principal_inputs(Moment.of(x, model.q.weight), 6)
    centred = (x - x.mean(0)).double()
    _, S, Vt = torch.linalg.svd(centred, full_matrices=False)
    same_up_to_sign(directions.double(), Vt[:6], 1, 1e-4)
    torch.testing.assert_close(shares.double(), S[:6] ** 2 / (S**2).sum(), rtol=1e-5, atol=0)
    flat = Moment.of(torch.ones(9, 48), model.q.weight)
    assert not data_starts.principal_inputs(flat, 3)[1].any()


def test_eva_is_pefts(tmp_path: Path) -> None:
    x = inputs()
    config = peft.LoraConfig(
        r=4, lora_alpha=6, target_modules=["q", "v", "o"], init_lora_weights="eva", eva_config=peft.EvaConfig(rho=2.0)
    )
    theirs = peft.get_peft_model(net(), config)
    peft.initialize_lora_eva_weights(
        theirs, [x], forward_fn=lambda model, batch: model(batch),
        prepare_model_inputs_fn=None, prepare_layer_inputs_fn=None, show_progress_bar=False,
    )  # fmt: skip
    moments = moments_of(net(), x)
    kinds = dict.fromkeys(moments, lo.LoRA(4, alpha=6, init="eva"))
    ranks = {name: kind.rank if kind else 0 for name, kind in data_starts.share_ranks(kinds, moments).items()}
    layers: dict[str, Any] = {n: theirs.base_model.model.get_submodule(n) for n in moments}
    theirs_ranks = {n: m.r["default"] if hasattr(m, "r") else 0 for n, m in layers.items()}
    assert ranks == theirs_ranks and len(set(ranks.values())) > 1 and sum(ranks.values()) == 12
    for name, kind in data_starts.share_ranks(kinds, moments).items():
        if kind is not None:
            down = data_starts.principal_inputs(moments[name], kind.rank)[0]
            same_up_to_sign(down, layers[name].lora_A["default"].weight.detach(), 1, 1e-3)
            assert kind.scale == pytest.approx(layers[name].scaling["default"]) == 1.5


@pytest.mark.parametrize("method", ["ipm", "kpm"])
def test_corda_is_pefts_given_the_same_covariance(method: str, tmp_path: Path) -> None:
    moments, model = moments_of(net(), inputs()), net()
    covariances = {n: m.second / m.second.diagonal().mean() for n, m in moments.items()}
    torch.save(covariances, tmp_path / "covariance.pt")
    config = peft.LoraConfig(
        r=4, lora_alpha=6, target_modules=["q", "v", "o"], init_lora_weights="corda",
        corda_config=CordaConfig(covariance_file=str(tmp_path / "covariance.pt"), corda_method=method),
    )  # fmt: skip
    theirs = net()
    preprocess_corda(theirs, config)
    adapted = peft.get_peft_model(theirs, config)
    kind = lo.LoRA(4, alpha=6, init="corda", corda_method=method)
    for name, moment in moments.items():
        layer: Any = adapted.base_model.model.get_submodule(name)
        down, up = data_starts.corda_factors(kind, getattr(model, name).weight.detach(), moment)
        same_up_to_sign(down, layer.lora_A["default"].weight.detach(), 1, 2e-3)
        same_up_to_sign(up, layer.lora_B["default"].weight.detach(), 0, 2e-3)
        delta = (layer.lora_B["default"].weight @ layer.lora_A["default"].weight).detach()
        torch.testing.assert_close(up @ down, delta, rtol=0, atol=1e-3 * float(delta.abs().max()))


def test_loraga_has_pefts_directions_given_the_same_gradient() -> None:
    x, model = inputs(), net()
    moments = moments_of(model, x, gradients=True)
    config = peft.LoraConfig(
        r=4, lora_alpha=6, target_modules=["q", "v", "o"], init_lora_weights="lora_ga",
        lora_ga_config=peft.LoraGAConfig(direction="ArB2r", scale="stable", stable_gamma=16),
    )  # fmt: skip
    theirs = net()
    preprocess_loraga(theirs, config, lambda: theirs(x).square().mean().backward())
    gradients = {n: getattr(theirs, n)._peft_loraga_grad.clone() for n in moments}
    adapted = peft.get_peft_model(theirs, config)
    for name, moment in moments.items():
        assert moment.gradient is not None
        torch.testing.assert_close(moment.gradient, gradients[name])
        down, up = data_starts.loraga_factors(lo.LoRA(4, alpha=6, init="loraga"), moment, torch.device("cpu"))
        layer: Any = adapted.base_model.model.get_submodule(name)
        length = moment.shape[0] ** 0.25 / 4
        A, B = layer.lora_A["default"].weight.detach(), layer.lora_B["default"].weight.detach()
        same_up_to_sign(down, length * A, 1, 1e-3)  # PEFT leaves the factor c out of A
        same_up_to_sign(up, length * nn.functional.normalize(B, dim=0), 0, 1e-3)  # and multiplies B by S


def test_ranks_of_eva_keep_their_sum_and_their_bounds() -> None:
    moments = moments_of(net(), inputs())
    kinds = dict.fromkeys(moments, lo.LoRA(4, alpha=8, init="eva", rslora=True, rho=1.25))
    shared = data_starts.share_ranks(kinds, moments)
    ranks = Counter({name: kind.rank for name, kind in shared.items() if kind is not None})
    assert ranks.total() == 12 and max(ranks.values()) == 5
    assert all(kind is None or kind.scale == pytest.approx(4) for kind in shared.values())
    wide = data_starts.share_ranks(dict.fromkeys(moments, lo.LoRA(20, init="eva", rho=9)), moments)
    assert all(kind is None or kind.rank <= min(moments[name].shape) for name, kind in wide.items())


# ---- in a model


KINDS: dict[str, dict[str, Any]] = {
    "eva": {"init": "eva"},
    "eva-rs": {"init": "eva", "rslora": True, "rho": 1.0},
    "ipm": {"init": "corda"},
    "kpm": {"init": "corda", "corda_method": "kpm"},
    "loraga": {"init": "loraga"},
}


def adapted(kind: str, quantize: Any = None, **options: Any) -> nn.Module:
    moments = moments_of(net(), inputs(), gradients=kind == "loraga")
    return lo.adapt(net(), lo.LoRA(4, alpha=6, **KINDS[kind], **options), quantize=quantize, calibration=moments)


def train(model: nn.Module) -> nn.Module:
    optimizer = torch.optim.SGD(lo.adapter_parameters(model), lr=0.05)
    for _ in range(3):
        optimizer.zero_grad()
        (model(inputs(32)) - 1).square().mean().backward()
        optimizer.step()
    return model


@pytest.mark.parametrize("kind", KINDS)
def test_a_dense_model_starts_as_it_was_and_goes_through_peft(kind: str, tmp_path: Path) -> None:
    x, model = inputs(16), adapted(kind)
    before = model(x).detach()
    torch.testing.assert_close(before, net()(x).detach(), atol=1e-5, rtol=1e-4)
    train(model)
    after = model(x).detach()
    assert not torch.allclose(after, before, atol=1e-3)
    lo.save_adapter(model, tmp_path)
    torch.testing.assert_close(lo.load_adapter(net(), tmp_path)(x), after, atol=1e-5, rtol=1e-4)
    theirs = peft.PeftModel.from_pretrained(net(), str(tmp_path))
    torch.testing.assert_close(theirs(x), after, atol=1e-5, rtol=1e-4)
    state = adapted(kind)
    state.load_state_dict(model.state_dict())
    torch.testing.assert_close(state(x), after, atol=0, rtol=0)
    with lo.disabled(model):
        torch.testing.assert_close(model(x), net()(x), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(lo.merge(model)(x), after, atol=1e-5, rtol=1e-4)
    lo.adapt(model, lo.LoRA(2), quantize=None)  # again, over what was merged
    torch.testing.assert_close(model(x), after, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_over_nf4_the_base_is_rounded_after_what_was_taken_out(kind: str) -> None:
    x, model = inputs(16), adapted(kind, "nf4")
    for name in ("q", "v", "o"):
        layer: Any = model.get_submodule(name)
        w = getattr(net(), name).weight.detach()
        if layer.base_down is not None:
            w = w - layer.adapter.scale * layer.base_up @ layer.base_down
        torch.testing.assert_close(layer.weight.dequantize(), lo.NF4Weight.quantize(w).dequantize(), atol=1e-6, rtol=0)
    close = (model(x) - net()(x)).norm() / net()(x).norm()
    assert close < 0.1
    again = lo.adapt(net(), None)
    moments = moments_of(net(), inputs(), gradients=True)
    if kind.startswith("eva"):  # it leaves the base as it is, so it stands over one in 4 bits too
        lo.adapt(again, lo.LoRA(4, alpha=6, **KINDS[kind]), calibration=moments)
        torch.testing.assert_close(again(x), model(x), atol=0, rtol=0)
    else:
        with pytest.raises(ValueError, match="'q': init='.*' changes the base and needs W before it was quantised"):
            lo.adapt(again, lo.LoRA(4, alpha=6, **KINDS[kind]), calibration=moments)


def test_a_kind_of_another_method_is_another_base() -> None:
    state = adapted("ipm").state_dict()
    with pytest.raises(RuntimeError, match="corda_method='kpm'"):
        adapted("kpm").load_state_dict(state)


def test_eva_moves_ranks_in_a_model() -> None:
    model: Any = adapted("eva")
    shared = {name: getattr(model, name).adapter for name in ("q", "v", "o")}
    assert sum(kind.rank for kind in shared.values()) == 12 and len({kind.rank for kind in shared.values()}) > 1
    assert {kind.scale for kind in shared.values()} == {1.5}
    same: Any = adapted("eva-rs")
    assert {getattr(same, name).adapter.rank for name in ("q", "v", "o")} == {4}


def test_a_layer_without_a_rank_has_no_adapter() -> None:
    moments = dict(moments_of(net(), inputs()))
    even = torch.eye(40) + moments["o"].mean.outer(moments["o"].mean)  # each direction explains a fortieth
    moments["o"] = dataclasses.replace(moments["o"], second=even)
    model: Any = lo.adapt(net(), lo.LoRA(1, alpha=2, init="eva", rho=2), calibration=Moments(moments))
    kinds = [getattr(model, name).adapter for name in ("q", "v", "o")]
    assert kinds[2] is None and sum(kind.rank for kind in kinds[:2]) == 3
    assert model(inputs(3)).shape == (3, 32)


@pytest.mark.parametrize("kind", ["eva", "ipm", "loraga"])
def test_experts_have_a_start_each(kind: str) -> None:
    model = mixtures.mixture("mixtral")
    ids = torch.arange(1, 41).view(2, 20)
    moments = lo.calibrate(model, [ids], gradients=kind == "loraga")
    before = model(ids).logits.detach()
    stack = next(name for name in moments if len(moments[name].shape) == 3)
    lo.adapt(model, lo.LoRA(4, alpha=6, **KINDS[kind]), targets=[stack], quantize=None, calibration=moments)
    torch.testing.assert_close(model(ids).logits, before, atol=1e-4, rtol=1e-3)
    layer: Any = model.get_submodule(stack)
    assert layer.down.shape[:2] == (moments[stack].shape[0], 4) and not torch.equal(layer.down[0], layer.down[1])


@pytest.mark.parametrize(
    "kind, calibration, message",
    [
        ("eva", None, "'q': init='eva' needs the moments of the layer's inputs: .*calibrate\\(model, batches\\)\\)"),
        ("loraga", None, "gradients=True"),
        ("loraga", "plain", "'q': init='loraga' needs gradients, and the calibration has none"),
        ("ipm", "other", "moments were gathered beside another weight"),
        ("eva", "missing", "'v': init='eva' needs the moments"),
    ],
)
def test_what_is_missing_is_named_and_the_model_stays(kind: str, calibration: str | None, message: str) -> None:
    moments: Any = moments_of(net(), inputs())
    if calibration == "other":
        torch.manual_seed(9)
        moments = moments_of(Net(), inputs())
    if calibration == "missing":
        moments = Moments({name: moment for name, moment in moments.items() if name != "v"})
    model = net()
    with pytest.raises(ValueError, match=message):
        lo.adapt(model, lo.LoRA(4, **KINDS[kind]), calibration=None if calibration is None else moments)
    assert all(type(m) is nn.Linear for m in (model.q, model.v, model.o))


@pytest.mark.parametrize(
    "options, message",
    [
        ({"rho": 0.5}, "rho must be finite and at least 1"),
        ({"corda_method": "both"}, "corda_method must be one of ipm, kpm"),
        ({"init": "corda", "alpha": 0}, "alpha must be above 0"),
    ],
)
def test_bad_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        lo.LoRA(4, **options)


def test_loraga_needs_twice_its_rank() -> None:
    with pytest.raises(ValueError, match=r"2 · rank must be at most 24 for a layer 24 x 48, got rank 13"):
        lo.adapt(net(), lo.LoRA(13, init="loraga"), targets=["v"], calibration=moments_of(net(), inputs(), True))
    zero = moments_of(net(), inputs(), True)
    none = {n: dataclasses.replace(m, gradient=torch.zeros(m.shape)) for n, m in zero.items()}
    with pytest.raises(ValueError, match="'q': the gradient is 0"):
        lo.adapt(net(), lo.LoRA(4, init="loraga"), calibration=Moments(none))
