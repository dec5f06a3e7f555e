"""The frozen low-rank branch of a layer: a part of the base, whatever the layer does."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from helpers import assert_bits_equal, assert_within_baseline
from mixtures import mixture
from models import linear, perturb, plain, random_branch, with_branches
from torch import Tensor, nn

import lowrank_ops as lo
from lowrank_ops.adapters.linear import AdaptedLayer
from lowrank_ops.adapters.rounding import Share, share_out
from lowrank_ops.formats import Moment
from lowrank_ops.svd.weighted import weighted_norm

KINDS: dict[str, Any] = {
    "none": None,
    "lora": lo.LoRA(4),
    "nystrom": lo.LoRA(4, init="nystrom"),
    "dora": lo.LoRA(4, dora=True),
    "lora_bias": lo.LoRA(4, lora_bias=True),
    "xs": lo.LoRAXS(4),
    "svf": lo.SVF(),
    "svft": lo.SVFT(bandwidth=1),
    "replace": lo.SVF(form="replace", factors="float32"),
}


def branched(adapter: Any = None, **options: Any) -> lo.Linear:
    weight = lo.NF4Weight.quantize(linear().weight.detach())
    return lo.Linear.from_weight(weight, linear().bias, adapter, random_branch(48, 64), **options)


def exact(layer: lo.Linear, x: Tensor, dtype: torch.dtype) -> Tensor:
    """What a layer without a row scale computes, from its parts."""
    assert layer.weight is not None and layer.branch is not None and layer.bias is not None
    w = layer.weight.dequantize(torch.float32).to(dtype) + layer.branch.delta().to(dtype)
    if layer.update is not None:
        w = w + layer.update.delta().to(dtype)
    return x.to(dtype) @ w.T + layer.bias.to(dtype)


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_stands_on_the_branch(kind: str) -> None:
    layer = branched(KINDS[kind])
    whole = branched().base.dense()
    x = torch.randn(5, 64, generator=torch.Generator().manual_seed(2))
    # Before training the layer computes W + U_b D_b; the replace form has put the branch into its own factors.
    assert (layer.branch is None) == (kind == "replace")
    assert torch.allclose(layer.merged_weight(torch.float32), whole, atol=1e-5)
    with torch.no_grad():
        assert torch.allclose(layer(x), x @ whole.T + layer.bias, atol=1e-4)
    perturb(layer)
    after = layer(x).detach()
    assert torch.allclose(after, x @ layer.merged_weight(torch.float32).T + layer.full_bias(), atol=1e-4)
    if kind != "none":
        assert not torch.allclose(after, x @ whole.T + layer.bias, atol=1e-2)
        with lo.disabled(nn.Sequential(layer)), torch.no_grad():
            assert torch.allclose(layer(x), x @ whole.T + layer.bias, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_forward_is_right_and_the_branch_is_frozen(dtype: torch.dtype) -> None:
    layer = perturb(branched(lo.LoRA(5)))
    x = torch.randn(2, 3, 64, generator=torch.Generator().manual_seed(3)).to(dtype).requires_grad_()
    y = layer(x)
    y.float().square().sum().backward()
    assert_within_baseline(
        y.flatten(0, 1), exact(layer, x, torch.float64).flatten(0, 1), exact(layer, x, dtype).flatten(0, 1)
    )
    assert x.grad is not None and layer.down.grad is not None
    assert not any("branch" in name for name, _ in layer.named_parameters())
    wide = x.detach().double().requires_grad_()
    exact(layer, wide, torch.float64).square().sum().backward()
    assert wide.grad is not None and torch.allclose(x.grad.double(), wide.grad, rtol=0.05, atol=0.05)


def test_a_copy_has_a_branch_of_its_own() -> None:
    layer = branched(lo.LoRA(2))
    x = torch.randn(2, 64)
    for made in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert_bits_equal(made(x), layer(x))
        made.branch_up.zero_()
        assert not torch.equal(made(x), layer(x))
    assert layer.half().branch_up.dtype == torch.float16
    assert layer.to("meta").branch.up.is_meta
    layer = branched(lo.LoRA(2))
    shared = lo.reference(nn.Sequential(layer), adapter=False)[0]
    assert shared.branch_up is layer.branch_up and shared.adapter is None
    assert_bits_equal(shared(x), branched()(x))


def test_a_state_dict_brings_its_branch() -> None:
    layer = branched(lo.LoRA(2))
    state = layer.state_dict()
    assert {"branch_down", "branch_up"} <= state.keys()
    x = torch.randn(2, 64)
    other = lo.Linear(64, 48, adapter=lo.LoRA(2))
    other.load_state_dict(state)
    assert_bits_equal(other(x), layer(x))
    with torch.device("meta"):
        empty = lo.Linear(64, 48, adapter=lo.LoRA(2))
    empty.load_state_dict(state, assign=True)
    assert_bits_equal(empty(x), layer(x))
    # Another rank; and a base without a branch.
    wider = lo.Linear.from_weight(layer.weight, None, lo.LoRA(2), random_branch(48, 64, rank=7))
    wider.register_parameter("bias", nn.Parameter(torch.zeros(48)))
    wider.load_state_dict(state)
    assert wider.branch.rank == 3
    # A file of the same weights alone lacks the branch; another base has none.
    without = {key: value for key, value in state.items() if "branch" not in key}
    with pytest.raises(RuntimeError, match="branch_down"):
        wider.load_state_dict(without)
    wider.load_state_dict(without, strict=False)
    assert_bits_equal(wider(x), layer(x))
    nearest = lo.Linear.from_weight(lo.NF4Weight.quantize(torch.randn(48, 64)), layer.bias, lo.LoRA(2))
    wider.load_state_dict(nearest.state_dict())
    assert wider.branch is None
    assert_bits_equal(wider(x), nearest(x))
    with pytest.raises(RuntimeError, match="branch_up"):
        other.load_state_dict({**without, "branch_down": state["branch_down"]})
    with pytest.raises(RuntimeError, match=r"size mismatch for branch_down"):
        other.load_state_dict({**state, "branch_down": state["branch_down"][:, :5]})


def test_set_adapter_and_adapt_keep_it() -> None:
    model = with_branches(plain())
    before = [layer.base.dense() for layer in model.modules() if isinstance(layer, lo.Linear)]
    lo.adapt(model, lo.LoRAXS(4))
    layers = [layer for layer in model.modules() if isinstance(layer, lo.Linear)]
    layers[0].set_adapter(lo.LoRA(2))
    for layer, whole in zip(layers, before, strict=True):
        assert torch.equal(layer.base.dense(), whole) and layer.adapter is not None
    x = torch.randn(3, 64)
    y = model(x)
    assert torch.allclose(lo.merge(model)(x), y, atol=1e-5)


def test_adapters_come_back_over_the_same_branch_alone(tmp_path: Any) -> None:
    model = lo.adapt(with_branches(plain()), lo.LoRAXS(4))
    for layer in model.modules():
        if isinstance(layer, lo.Linear):
            perturb(layer)
    lo.save_adapter(model, tmp_path / "xs")
    x = torch.randn(3, 64)
    assert_bits_equal(lo.load_adapter(with_branches(plain()), tmp_path / "xs")(x), model(x))
    with pytest.raises(ValueError, match="made for another weight"):  # the factors are of W + U_b D_b
        lo.load_adapter(lo.adapt(plain(), None), tmp_path / "xs")


def test_experts_have_branches() -> None:
    model = with_branches(mixture("mixtral"))
    ids = torch.arange(12).view(2, 6)
    y = model(ids).logits
    assert torch.allclose(lo.merge(copy.deepcopy(model))(ids).logits, y, atol=1e-4)
    lo.adapt(model, lo.LoRAXS(2))
    assert torch.allclose(model(ids).logits, y, atol=1e-4)
    with lo.disabled(model):
        assert torch.allclose(model(ids).logits, y, atol=1e-4)


@pytest.mark.parametrize("make", [plain, lambda: mixture("mixtral")], ids=["linear", "experts"])
def test_a_pool_serves_rows_over_the_branch(make: Any, tmp_path: Any) -> None:
    ids = torch.randn(3, 64) if make is plain else torch.arange(18).view(3, 6)

    def run(model: nn.Module) -> Tensor:
        y = model(ids)
        return (y if isinstance(y, Tensor) else y.logits).detach()

    kinds = {"a": lo.LoRA(4), "b": lo.LoRAXS(2)} | ({"c": lo.LoRA(2, dora=True)} if make is plain else {})
    expected = {None: run(with_branches(make()))}
    for name, kind in kinds.items():
        model = lo.adapt(with_branches(make()), kind)
        for layer in model.modules():
            if isinstance(layer, AdaptedLayer):
                perturb(layer, 0.02)  # type: ignore[arg-type]
        lo.save_adapter(model, tmp_path / name)
        expected[name] = run(model)
    pool = lo.AdapterPool(served := with_branches(make()), 1 << 22)
    for name in kinds:
        pool.load(name, tmp_path / name)
    names = ["a", "b", "c" if make is plain else None]
    with torch.no_grad(), pool.route(names):
        got = run(served)
    for row, name in enumerate(names):
        assert torch.allclose(got[row], expected[name][row], atol=1e-4), name
    assert not torch.allclose(got[0], expected[None][0], atol=1e-3)


def test_a_wrong_branch_is_refused() -> None:
    weight = lo.NF4Weight.quantize(torch.randn(48, 64))
    with pytest.raises(ValueError, match=r"branch must be \[48, 64\] on cpu, got \[47, 64\]"):
        lo.Linear.from_weight(weight, branch=random_branch(47, 64))
    with pytest.raises(ValueError, match="scale 1"):
        lo.Linear.from_weight(weight, branch=lo.LowRankUpdate(torch.ones(2, 64), torch.ones(48, 2), None, 2.0))
    with pytest.raises(ValueError, match=r"rank of at most min\(N, K\) = 48, got 50"):
        lo.Linear.from_weight(weight, branch=random_branch(48, 64, rank=50))
    with pytest.raises(TypeError, match="branch must be a LowRankUpdate with dense factors"):
        lo.Linear.from_weight(weight, branch=torch.ones(48, 64))  # type: ignore[arg-type]


# ---- the start "eora"


def moment_for(weight: Tensor, seed: int = 0) -> Moment:
    generator = torch.Generator().manual_seed(seed)
    K = weight.shape[-1]
    mixing = torch.randn(K, K, generator=generator) * torch.exp(-3 * torch.arange(K) / K)
    return Moment.of(torch.randn(500, K, generator=generator) @ mixing.T, weight)


def test_eora_starts_as_what_rounding_loses() -> None:
    dense = linear()
    moment, weight = moment_for(dense.weight), dense.weight.detach()
    kind = lo.LoRA(6, alpha=24, init="eora")
    layer = lo.Linear.from_linear(dense, kind, moment=moment)
    plain_base = lo.NF4Weight.quantize(weight)
    assert_bits_equal(layer.weight.dequantize(), plain_base.dequantize())
    lost = weight - plain_base.dequantize(torch.float32)
    root = torch.linalg.eigh(moment.second.double())
    values = torch.linalg.svdvals(lost.double() @ (root.eigenvectors * root.eigenvalues.clamp(min=0).sqrt()))
    left = weighted_norm(weight - layer.merged_weight(torch.float32).detach(), moment.second)
    assert float(left) == pytest.approx(float(values[6:].square().sum()), rel=1e-4)
    assert float(left) < 0.8 * float(weighted_norm(lost, moment.second))


def test_eora_over_a_model_and_its_bad_input(tmp_path: Any) -> None:
    model = plain()
    moments = lo.formats.Moments(
        {n: moment_for(m.weight) for n, m in model.named_modules() if isinstance(m, nn.Linear)}
    )
    made = lo.adapt(plain(), lo.LoRA(3, init="eora"), calibration=moments)
    x = torch.randn(4, 64)
    lo.save_adapter(made, tmp_path)  # an ordinary LoRA over the plain base
    assert_bits_equal(lo.load_adapter(lo.adapt(plain(), None), tmp_path)(x), made(x))
    with pytest.raises(ValueError, match="'0'.*needs the moments"):
        lo.adapt(plain(), lo.LoRA(3, init="eora"))
    with pytest.raises(ValueError, match="'0'.*needs the dense W.*got quantize=None"):
        lo.adapt(plain(), lo.LoRA(3, init="eora"), quantize=None, calibration=moments)
    with pytest.raises(ValueError, match="'0'.*needs the dense W.*got an NF4 weight"):
        lo.adapt(lo.adapt(plain(), None), lo.LoRA(3, init="eora"), calibration=moments)
    torch.manual_seed(9)
    other = nn.Sequential(
        *[nn.Linear(m.in_features, m.out_features) for m in plain().modules() if isinstance(m, nn.Linear)]
    )
    with pytest.raises(ValueError, match="gathered beside another weight"):
        lo.adapt(other, lo.LoRA(3, init="eora"), targets=["0"], calibration=moments)
    assert type(other[0]) is nn.Linear


# ---- a budget of bytes


def test_a_budget_goes_to_the_ranks_that_gain_most() -> None:
    shares = {"a": Share((9.0, 4.0, 1.0), 10), "b": Share((8.0, 7.0), 10), "c": Share((90.0,), 100), "d": Share((), 5)}
    assert share_out(shares, 30) == {"a": 1, "b": 2, "c": 0, "d": 0}
    assert share_out(shares, 9) == {"a": 0, "b": 0, "c": 0, "d": 0}
    assert share_out(shares, 1000) == {"a": 3, "b": 2, "c": 1, "d": 0}
    assert share_out({"a": Share((0.0, 0.0), 1)}, 10) == {"a": 0}


def test_explain_tells_of_it() -> None:
    text = lo.explain(branched(lo.LoRA(2)), torch.empty(1, 64, device="meta"))
    assert "R=2 + 3 of the branch" in text
    assert "branch=3" in repr(branched())


def test_rows_of_single_tokens_start_from_the_whole_base() -> None:
    from models import tiny

    model = lo.adapt(tiny(), None, ["lm_head"])
    head = model.lm_head
    head.set_branch(random_branch(*head.shape))
    ids = torch.arange(8).view(1, 8)
    before = model(ids).logits.detach()
    lo.train_tokens(model, [3, 5])
    assert torch.allclose(model(ids).logits, before, atol=1e-4)


def test_peft_layers_of_ours_stand_on_it(tmp_path: Any) -> None:
    from models import tiny
    from peft import get_peft_model

    model = with_branches(tiny())
    ids = torch.arange(8).view(1, 8)
    before = model(ids).logits.detach()
    made = get_peft_model(model, lo.peft.LoraConfig(r=2, target_modules=["q_proj", "down_proj"]))
    assert_bits_equal(made(ids).logits.detach(), before)
    for name, parameter in made.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1)
    y = made(ids).logits.detach()
    assert not torch.allclose(y, before, atol=1e-2)
    made.save_pretrained(tmp_path)
    assert torch.allclose(lo.load_adapter(with_branches(tiny()), tmp_path)(ids).logits, y, atol=1e-4)
    with pytest.raises(ValueError, match="PEFT starts a DoRA from W alone"):
        get_peft_model(with_branches(tiny()), lo.peft.LoraConfig(r=2, use_dora=True, target_modules=["q_proj"]))


def test_it_goes_where_layers_go() -> None:
    """Through a compiled graph, offloading and conversions."""
    import accelerate

    model = lo.adapt(with_branches(plain()), lo.LoRA(2))
    layers = [perturb(layer) for layer in model.modules() if isinstance(layer, lo.Linear)]
    x = torch.randn(3, 64)
    y = model(x).detach()
    assert_bits_equal(torch.compile(model, fullgraph=True, backend="eager")(x).detach(), y)
    offloaded = copy.deepcopy(model)
    accelerate.cpu_offload(offloaded, torch.device("cpu"))
    assert_bits_equal(offloaded(x).detach(), y)
    # The update is relative to the base, of which the branch is a part.
    assert layers[0].update is not None
    assert torch.allclose(lo.convert(layers[0]).update.delta(), layers[0].update.delta(), atol=1e-6)
