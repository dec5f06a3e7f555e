"""lowrank_ops.Linear as a stand-in for nn.Linear."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path

import pytest
import torch
from helpers import assert_bits_equal, assert_within_baseline
from torch import nn

import lowrank_ops as lo
from lowrank_ops import reference


def layer(bias: bool = True, **options) -> lo.Linear:  # type: ignore[no-untyped-def]
    torch.manual_seed(0)
    made = lo.Linear(70, 48, bias, adapter=lo.LoRA(rank=4, alpha=8), **options)
    nn.init.normal_(made.up)
    return made


@pytest.mark.parametrize("quantize", ["nf4", None])
@pytest.mark.parametrize("bias", [True, False])
def test_forward_is_the_equation(quantize: str | None, bias: bool) -> None:
    made = layer(bias, quantize=quantize)
    x = torch.randn(2, 3, 70)
    exact = torch.nn.functional.linear(
        x.double(), made.merged_weight(torch.float32).double(), None if not bias else made.bias.double()
    )
    y = made(x)
    assert y.shape == (2, 3, 48)
    w = made.weight.dequantize() if quantize else made.weight
    baseline = reference.adapted_linear(x.reshape(-1, 70), w, made.down, made.up, made.bias, made.adapter.scale)
    # merged_weight rounds W' to float32, which the baseline does not: half a float32 ulp of W' for each product.
    rounding = 2**-24 * (x.reshape(-1, 70).abs() @ made.merged_weight(torch.float32).abs().T).double()
    shifted = exact.view(-1, 48) + (y.detach().double().view(-1, 48) - exact.view(-1, 48)).clamp(-rounding, rounding)
    assert_within_baseline(y.detach().view(-1, 48), shifted, baseline.detach())


def test_a_single_vector() -> None:
    made = layer()
    x = torch.randn(70)
    torch.testing.assert_close(made(x), made(x.unsqueeze(0))[0], rtol=0, atol=0)


def test_starts_as_the_weight_it_was_made_from() -> None:
    linear = nn.Linear(64, 32)
    for init in ("kaiming", "gaussian", "orthogonal"):
        for quantize in ("nf4", None):
            made = lo.Linear.from_linear(linear, lo.LoRA(4, init=init), quantize)
            w = lo.NF4Weight.quantize(linear.weight.detach()).dequantize() if quantize else linear.weight
            torch.testing.assert_close(made.merged_weight(), w.detach(), rtol=0, atol=1e-7)
            assert_bits_equal(made.bias.detach(), linear.bias.detach())
    assert linear.weight.requires_grad  # the original does not change


def test_inits() -> None:
    torch.manual_seed(0)
    down, up = lo.LoRA(8).factors(100, 400)
    assert not up.any() and down.abs().max() <= 400**-0.5 and down.std() == pytest.approx((3 * 400) ** -0.5, rel=0.05)
    down, up = lo.LoRA(8, init="gaussian").factors(100, 400)
    assert not up.any() and down.std() == pytest.approx(1 / 8, rel=0.05)
    down, up = lo.LoRA(8, init="orthogonal").factors(100, 400)
    assert up.any() and down.any() and (up @ down).abs().max() < 1e-6


def test_scale() -> None:
    assert lo.LoRA(16, alpha=32).scale == 2 and lo.LoRA(16, alpha=32, rslora=True).scale == 8


@pytest.mark.parametrize(
    "N, K, rank, layers, published",
    [(4096, 4096, 64, 1, 64 * 8192), (14336, 4096, 64, 1, 64 * 18432)],
)
def test_num_parameters(N: int, K: int, rank: int, layers: int, published: int) -> None:
    assert layers * lo.LoRA(rank).num_parameters(out_features=N, in_features=K) == published


def test_num_parameters_of_a_whole_model() -> None:
    # Mistral-7B, all seven projections of 32 layers, rank 64: the "168M" of the LoRA-XS table.
    shapes = [(4096, 4096)] * 2 + [(1024, 4096)] * 2 + [(14336, 4096)] * 2 + [(4096, 14336)]
    assert 32 * sum(lo.LoRA(64).num_parameters(*shape) for shape in shapes) == 167_772_160


def test_names_of_papers_and_of_peft() -> None:
    # W + A Bᵀ: A = up, Bᵀ = down. PEFT's lora_B (lora_A x): lora_B = up, lora_A = down.
    x, A, B = torch.randn(5, 12), torch.randn(7, 3), torch.randn(12, 3)
    y = lo.functional.adapted_linear(x, torch.zeros(7, 12), lo.LowRankUpdate(down=B.T, up=A))
    torch.testing.assert_close(y, x @ (A @ B.T).T)


def test_only_the_adapter_trains() -> None:
    made = layer()
    assert {n for n, p in made.named_parameters() if p.requires_grad} == {"down", "up"}
    made(torch.randn(3, 70)).sum().backward()
    assert made.down.grad is not None and made.bias.grad is None


def test_dropout_only_in_training() -> None:
    made = lo.Linear(70, 48, adapter=lo.LoRA(4, dropout=0.5))
    nn.init.normal_(made.up)
    x = torch.randn(3, 70)
    assert not torch.equal(made(x), made(x))
    made.eval()
    assert_bits_equal(made(x), made(x))


@pytest.mark.parametrize("quantize", ["nf4", None])
def test_state_dict(quantize: str | None) -> None:
    made = layer(quantize=quantize)
    state = made.state_dict()
    assert {"weight", "bias", "down", "up"} <= set(state)
    other = lo.Linear(70, 48, adapter=lo.LoRA(rank=4, alpha=8), quantize=quantize)
    assert str(other.load_state_dict(state)) == "<All keys matched successfully>"
    for key, value in other.state_dict().items():
        assert_bits_equal(value, state[key])
    x = torch.randn(3, 70)
    assert_bits_equal(other(x), made(x))
    # inside another module, and with keys missing or strange
    parent, fresh = nn.Sequential(nn.ReLU(), made), nn.Sequential(nn.ReLU(), other)
    fresh.load_state_dict(parent.state_dict())
    broken = dict(parent.state_dict())
    broken["1.extra"] = broken.pop("1.weight")
    with pytest.raises(RuntimeError, match=r"(?s)Missing.*1\.weight.*Unexpected.*1\.extra"):
        fresh.load_state_dict(broken)


@pytest.mark.parametrize("quantize", ["nf4", "fp4", "mxfp4"])
@pytest.mark.parametrize("double_quant", [True, False])
def test_entries_of_one_weight_in_several_shards(quantize: str, double_quant: bool) -> None:
    def made() -> lo.Linear:
        linear = nn.Linear(96, 48)
        layer = lo.Linear.from_linear(linear, lo.LoRA(4, alpha=8), quantize)
        if not double_quant and quantize != "mxfp4":
            layer.weight = type(layer.weight).quantize(linear.weight, double_quant=False)
        nn.init.normal_(layer.up)
        return layer

    layer, x = made(), torch.randn(3, 96)
    state = layer.state_dict()
    for order in (list(state), list(reversed(state))):
        other = made()
        assert not torch.equal(other(x), layer(x))
        for key in order:
            other.load_state_dict({key: state[key]}, strict=False)
        assert_bits_equal(other(x), layer(x))
        for key, value in other.state_dict().items():
            assert_bits_equal(value, state[key])
    for key in state:
        if key != "adapter":
            with pytest.raises(RuntimeError, match=f'Missing key.*"{key}"'):
                made().load_state_dict({name: value for name, value in state.items() if name != key})


def test_shards_of_a_weight_of_another_shape_are_refused() -> None:
    state = lo.Linear(128, 48, adapter=None).state_dict()
    for key in state:
        if key in ("weight", "weight.absmax", "weight.quant_state.bitsandbytes__nf4"):
            layer = lo.Linear(64, 48, adapter=None)
            before = {name: value.clone() for name, value in layer.state_dict().items()}
            with pytest.raises(RuntimeError, match="must be torch|in the state dict and"):
                layer.load_state_dict({key: state[key]}, strict=False)
            for name, value in layer.state_dict().items():
                assert_bits_equal(value, before[name])


def test_meta_then_load() -> None:
    made = layer()
    empty = copy.deepcopy(made).to("meta")
    assert empty.weight.device.type == "meta"
    empty.load_state_dict(made.state_dict(), assign=True)
    x = torch.randn(3, 70)
    assert_bits_equal(empty(x), made(x))


def test_casting_the_layer_keeps_the_packed_bytes() -> None:
    made = layer()
    before = {k: v.clone() for k, v in made.weight.to_bitsandbytes().items()}
    made.to(torch.bfloat16)
    assert made.down.dtype == made.bias.dtype == torch.bfloat16
    for key, value in made.weight.to_bitsandbytes().items():
        assert_bits_equal(value, before[key])
    assert made(torch.randn(3, 70, dtype=torch.bfloat16)).dtype == torch.bfloat16
    dense = layer(quantize=None).to(torch.bfloat16)
    assert dense.merged_weight().dtype == torch.bfloat16


def test_computing_never_changes_the_bytes() -> None:
    made = layer()
    before = {k: v.clone() for k, v in made.state_dict().items()}
    for M in (1, 64):
        for dtype in (torch.float32, torch.bfloat16):
            made(torch.randn(M, 70, dtype=dtype)).float().sum().backward()
            with torch.no_grad():
                made.eval()(torch.randn(M, 70, dtype=dtype))
    for key, value in made.state_dict().items():
        assert_bits_equal(value, before[key])


def test_takes_over_a_bitsandbytes_layer() -> None:
    import bitsandbytes as bnb

    dense = nn.Linear(64, 32)
    theirs = bnb.nn.Linear4bit(64, 32, quant_type="nf4", compress_statistics=True, compute_dtype=torch.float32)
    theirs.load_state_dict(dense.state_dict())
    theirs = theirs.to("cpu")
    x = torch.randn(5, 64)
    expected = theirs(x.clone().requires_grad_()).detach()
    made = lo.Linear.from_linear(theirs, lo.LoRA(4))
    for key, value in theirs.state_dict().items():
        assert_bits_equal(made.state_dict()[key], value)
    torch.testing.assert_close(made(x), expected)


def test_conv1d_of_transformers() -> None:
    from transformers.pytorch_utils import Conv1D

    conv = Conv1D(48, 64)
    x = torch.randn(3, 64)
    made = lo.Linear.from_linear(conv, lo.LoRA(4), quantize=None)
    torch.testing.assert_close(made(x), conv(x))


def test_repr_and_explain() -> None:
    made = layer()
    assert "in_features=70, out_features=48, bias=True, weight=nf4" in repr(made) and "rank=4" in repr(made)
    few, many = lo.explain(made, torch.randn(1, 70)), lo.explain(made, torch.randn(2, 500, 70))
    assert "M=1 N=48 K=70 R=4" in few and "few tokens" in few and "M=1000" in many and "many tokens" in many
    assert "C++" in few and "because" in few
    with lo.implementation("reference"):
        assert "plain PyTorch" in lo.explain(made, torch.randn(1, 70))
    assert "few" in lo.explain(made, torch.empty(1, 70, device="meta"))
    assert "switched off" not in few
    with lo.disabled(made):
        assert "switched off by lowrank_ops.disabled" in lo.explain(made, torch.randn(1, 70))


class Scaled(nn.Linear):
    """Derives from nn.Linear, but computes something else."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 10 * super().forward(x)


def hooked() -> nn.Module:
    linear = nn.Linear(8, 8)
    linear.register_forward_hook(lambda module, inputs, output: output + 1)
    return linear


def unquantised_4bit() -> nn.Module:
    import bitsandbytes as bnb

    return bnb.nn.Linear4bit(64, 32, quant_type="nf4")


@pytest.mark.parametrize(
    "error, message, call",
    [
        (ValueError, "rank must be at least 1, got 0", lambda: lo.LoRA(0)),
        (TypeError, "rank must be an int, got 1.5", lambda: lo.LoRA(1.5)),
        (ValueError, "alpha must be finite", lambda: lo.LoRA(4, alpha=float("inf"))),
        (ValueError, "dropout must be in", lambda: lo.LoRA(4, dropout=-0.1)),
        (ValueError, "init must be one of kaiming.*'zeros'", lambda: lo.LoRA(4, init="zeros")),
        (ValueError, "even rank, got 3", lambda: lo.LoRA(3, init="orthogonal")),
        (ValueError, "rank must be at most .* = 8 .*got 9", lambda: lo.Linear(8, 16, adapter=lo.LoRA(9))),
        (ValueError, "quantize must be 'nf4', .* or None, got 'int4'", lambda: lo.Linear(8, 8, quantize="int4")),
        (ValueError, "at least 1, got 0 and 8", lambda: lo.Linear(0, 8)),
        (TypeError, "linear must be an nn.Linear.*got ReLU", lambda: lo.Linear.from_linear(nn.ReLU())),
        (TypeError, "linear must be an nn.Linear.*got Scaled", lambda: lo.Linear.from_linear(Scaled(8, 8))),
        (ValueError, "hooks", lambda: lo.Linear.from_linear(hooked())),
        (
            TypeError,
            "adapter must be a LoRA, LoRAXS, SVF, SVFT or None, got 4",
            lambda: lo.Linear.from_linear(nn.Linear(8, 8), 4),
        ),
        (TypeError, "adapter must be a LoRA.* or None, got 16", lambda: lo.Linear(8, 8, adapter=16)),
        (TypeError, "alpha must be a number, got 'x'", lambda: lo.LoRA(4, alpha="x")),
        (TypeError, "dropout must be a number, got None", lambda: lo.LoRA(4, dropout=None)),
        (TypeError, "rslora must be True or False", lambda: lo.LoRA(4, rslora="no")),
        (ValueError, "not quantised yet", lambda: lo.Linear.from_linear(unquantised_4bit())),
        (
            TypeError,
            "x must be a float32.*int64",
            lambda: lo.explain(lo.Linear(8, 8, adapter=None), torch.ones(1, 8).long()),
        ),
        (ValueError, r"has the adapter LoRA", lambda: lo.Linear.from_linear(lo.Linear(8, 8, adapter=lo.LoRA(2)))),
        (ValueError, "meta device", lambda: lo.Linear.from_linear(nn.Linear(8, 8, device="meta"))),
        (TypeError, "float64", lambda: lo.Linear.from_linear(nn.Linear(8, 8, dtype=torch.float64))),
        (TypeError, "layer must be a lowrank_ops.Linear", lambda: lo.explain(nn.Linear(2, 2), torch.ones(1, 2))),
        (ValueError, r"x must be \[..., K=8\]", lambda: lo.explain(lo.Linear(8, 8, adapter=None), torch.ones(1, 2))),
    ],
)
def test_bad_input(error: type[Exception], message: str, call) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(error, match=message):
        call()


def test_dropout_is_a_module_that_can_be_found_and_switched_off(tmp_path: Path) -> None:
    model = nn.Sequential(lo.Linear(32, 16, adapter=lo.LoRA(4, dropout=0.5))).train()
    layer = model[0]
    with torch.no_grad():
        layer.up.normal_()
    x = torch.randn(9, 32)
    assert layer.update.dropout == 0.5 and not torch.equal(model(x), model(x))
    found = [m for m in model.modules() if isinstance(m, nn.Dropout)]
    assert len(found) == 1
    found[0].eval()
    assert layer.update.dropout == 0
    found[0].train().p = 0.0
    assert torch.equal(model(x), model(x))
    # The dropout rate in the file belongs to the kind and is restored with it.
    lo.save_adapter(model, tmp_path)
    other = nn.Sequential(lo.Linear(32, 16, adapter=lo.LoRA(4))).train()
    assert other[0].dropout is None
    assert lo.load_adapter(other, tmp_path)[0].update.dropout == 0.5
    layer.set_adapter(None)
    assert layer.dropout is None
    # A pickle without the dropout module, as older versions wrote it.
    del other[0]._modules["dropout"]
    assert pickle.loads(pickle.dumps(other))[0].update.dropout == 0.5


def test_a_four_bit_layer_answers_as_a_linear_layer_or_refuses() -> None:
    layer = lo.adapt(nn.Sequential(nn.Linear(64, 32)), None)[0]
    assert isinstance(layer, nn.Linear)
    assert (layer.in_features, layer.out_features) == (64, 32)
    weight = layer.weight
    assert weight.dtype == torch.float32 and weight.device.type == "cpu" and weight.shape == (32, 64) == weight.size()
    for call in (
        lambda: weight.data,
        lambda: weight.normal_(),
        lambda: weight.copy_(torch.zeros(32, 64)),
        lambda: nn.functional.linear(torch.zeros(1, 64), weight),
        lambda: layer.reset_parameters(),
    ):
        with pytest.raises((AttributeError, TypeError), match="packed|cannot be drawn again"):
            call()
    assert not hasattr(weight, "data")


@pytest.mark.parametrize("kind", [None, lo.LoRA(4), lo.LoRAXS(4)])
def test_a_layer_over_a_four_bit_weight_equals_one_that_was_quantised(kind) -> None:  # type: ignore[no-untyped-def]
    dense = nn.Linear(70, 48)
    weight = lo.NF4Weight.quantize(dense.weight.detach())
    torch.manual_seed(0)
    made = lo.Linear.from_weight(weight, dense.bias, kind)
    torch.manual_seed(0)
    expected = lo.Linear.from_linear(dense)
    expected.set_adapter(kind)
    assert made.weight is weight and made.bias is dense.bias
    x = torch.randn(3, 70)
    assert_bits_equal(made(x).detach(), expected(x).detach())
    assert {key: t.shape for key, t in made.state_dict().items()} == {
        key: t.shape for key, t in expected.state_dict().items()
    }


def test_a_layer_over_a_weight_on_the_meta_device_is_filled_by_a_state_dict() -> None:
    full = layer()
    weight = copy.deepcopy(full.weight).to("meta")
    empty = lo.Linear.from_weight(weight, torch.empty(48, device="meta"), full.adapter)
    assert {p.device.type for p in [*empty.parameters(), *empty.buffers()]} == {"meta"}
    empty.load_state_dict(full.state_dict(), assign=True)
    x = torch.randn(3, 70)
    assert_bits_equal(empty(x).detach(), full(x).detach())
    with pytest.raises(ValueError, match="reads W, which is on the meta device"):
        lo.Linear.from_weight(full.weight.to("meta"), adapter=lo.SVF(4))


@pytest.mark.parametrize(
    "error, message, arguments",
    [
        (TypeError, "got Tensor; .* made by Linear.from_linear", (torch.zeros(8, 64),)),
        (TypeError, "bias must be a Tensor or None, got int", (None, 3)),
        (ValueError, r"bias must be \[8\] on cpu, got \[7\] on cpu", (None, torch.zeros(7))),
        (ValueError, "on meta", (None, torch.zeros(8, device="meta"))),
        (ValueError, "rank must be at most", (None, None, lo.LoRA(9))),
        (ValueError, "changes the base", (None, None, lo.LoRA(4, init="pissa"))),
    ],
)
def test_from_weight_refuses(error: type[Exception], message: str, arguments) -> None:  # type: ignore[no-untyped-def]
    weight = lo.NF4Weight.quantize(torch.randn(8, 64))
    with pytest.raises(error, match=message):
        lo.Linear.from_weight(weight if arguments[0] is None else arguments[0], *arguments[1:])
