"""DoRA and lora_bias: against PEFT in forward, gradients and files; norms; whatever else is done with an adapter."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from helpers import assert_bits_equal
from models import gpt2, llama
from safetensors.torch import load_file
from torch import Tensor, nn

import lowrank_ops as lo
from lowrank_ops.adapters.dora import row_norms
from lowrank_ops.adapters.start import read_record, record_of

DORA, BIASED = lo.LoRA(4, alpha=6, dora=True), lo.LoRA(4, alpha=6, lora_bias=True)
KINDS = pytest.mark.parametrize("kind", [DORA, BIASED], ids=["dora", "lora_bias"])


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(48, 40), nn.Tanh(), nn.Linear(40, 33, bias=False))


def moved(model: Any) -> Any:
    """With trained values away from their start."""
    torch.manual_seed(1)
    with torch.no_grad():
        for p in (p for p in model.parameters() if p.requires_grad):
            p += 0.2 * torch.randn(p.shape)
    return model


def of_peft(kind: lo.LoRA, dropout: float = 0.0, model: Any = None, targets: Any = ("0", "2")) -> Any:
    config = peft.LoraConfig(
        r=kind.rank, lora_alpha=kind.alpha, use_dora=kind.dora, lora_bias=kind.lora_bias, lora_dropout=dropout,
        target_modules=list(targets),
    )  # fmt: skip
    return moved(peft.get_peft_model(net() if model is None else model, config))


NAMES = {"base_model.model.": "", ".default": "", "lora_magnitude_vector.weight": "magnitude", "lora_B.bias": "up_bias"}
NAMES |= {"lora_A.weight": "down", "lora_B.weight": "up"}


def plain_name(name: str) -> str:
    for theirs, ours in NAMES.items():
        name = name.replace(theirs, ours)
    return name


def gradients(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    names, parts = zip(*((plain_name(n), p) for n, p in model.named_parameters() if p.requires_grad), strict=True)
    torch.manual_seed(2)  # PEFT draws the same mask
    return dict(zip(("x", *names), torch.autograd.grad(model(x).square().sum(), (x, *parts)), strict=True))


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@KINDS
def test_training_is_as_in_peft(kind: lo.LoRA, dropout: float, tmp_path: Path) -> None:
    theirs = of_peft(kind, dropout)
    theirs.save_pretrained(tmp_path / "theirs")
    ours, x = lo.load_adapter(net(), tmp_path / "theirs"), torch.randn(7, 48, requires_grad=True)
    if kind.dora or not dropout:  # the op of a plain LoRA draws another mask
        expected, got = gradients(theirs, x), gradients(ours, x)
        assert got.keys() == expected.keys()
        for name in expected:
            torch.testing.assert_close(got[name], expected[name], rtol=1e-5, atol=1e-5, msg=name)
    torch.testing.assert_close(ours.eval()(x), theirs.eval()(x), rtol=1e-5, atol=1e-6)
    assert ours[0].adapter == lo.LoRA(4, 6, dropout=dropout, dora=kind.dora, lora_bias=kind.lora_bias)
    lo.save_adapter(ours, tmp_path / "ours")
    assert_bits_equal(peft.PeftModel.from_pretrained(net(), str(tmp_path / "ours")).eval()(x), theirs(x))
    theirs_merged, merged = theirs.merge_and_unload()(x) if kind.dora else theirs(x), lo.merge(ours)(x)
    torch.testing.assert_close(merged, theirs_merged, rtol=1e-5, atol=1e-6)


@KINDS
def test_it_starts_as_the_base_and_learns(kind: lo.LoRA) -> None:
    base, model = lo.adapt(llama(), None), lo.adapt(llama(), kind)
    ids = torch.randint(0, 99, (4, 12))
    torch.testing.assert_close(model(ids).logits, base(ids).logits, rtol=1e-5, atol=1e-5)
    layer = model.model.layers[0].mlp.up_proj
    assert layer.adapter.num_parameters(128, 64) == sum(p.numel() for p in layer.trained()) == 4 * 192 + 128
    with lo.disabled(moved(model)):
        assert_bits_equal(model(ids).logits, base(ids).logits)
    optimizer = torch.optim.AdamW(lo.adapter_parameters(model), lr=1e-2)
    losses = []
    for _ in range(6):
        losses.append(model(ids, labels=ids).loss)
        losses[-1].backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < losses[0] - 0.1
    assert all(p.requires_grad for p in layer.trained())


@pytest.mark.parametrize("make", [lo.NF4Weight.quantize, lo.MXFP4Weight.quantize, Tensor.bfloat16, torch.clone])
def test_norms_are_right_where_the_update_cancels_the_weight(make: Any) -> None:
    torch.manual_seed(0)
    N, K, s = 70, 96, 1.5
    held = make(torch.randn(N, K) / 20)
    W = (held.dequantize(torch.float32) if isinstance(held, nn.Module) else held).double()
    down, up = torch.randn(5, K), torch.randn(N, 5) / 100
    for row in range(4):  # what stays of the row is 10⁻¹ … 10⁻⁴ of it
        up[row], up[row, row], down[row] = 0, 1, -(W[row] / s) * (1 - 10.0 ** -(row + 1))
    up[4] = 0
    expected = (W + s * up.double() @ down.double()).norm(dim=1)
    got = row_norms(held, lo.LowRankUpdate(down, up, None, s))
    torch.testing.assert_close(got.double(), expected, rtol=2e-7, atol=0)


def test_a_row_of_zeros_stays_one() -> None:
    model = net()
    nn.init.zeros_(model[0].weight[3:5])
    model, x = lo.adapt(model, DORA, quantize=None), torch.randn(6, 48)
    assert torch.equal(model[0](x)[:, 3], model[0].bias[3].expand(6))
    model(x).sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in lo.adapter_parameters(model))


def test_the_scale_follows_every_part() -> None:
    """In eval the norm is kept, until a factor, the weight or the layer's place changes."""
    layer, x = moved(lo.adapt(net(), DORA))[0].eval(), torch.randn(3, 48)

    def is_right() -> bool:
        wanted = torch.nn.functional.linear(x.to(layer.down.dtype), layer.merged_weight(), layer.bias)
        return torch.allclose(layer(x), wanted, rtol=1e-4, atol=1e-5)

    with torch.no_grad():
        assert is_right() and layer.row_scale() is not layer.row_scale()
        kept = layer._norms._kept[1]
        layer(x)
        assert layer._norms._kept[1] is kept
        for part in layer.trained():
            part.mul_(1.3)
            assert is_right()
        layer.up = nn.Parameter(layer.up * 2)
        assert is_right()
        layer.weight = lo.NF4Weight.quantize(torch.randn(40, 48))
        assert is_right()
        layer.load_state_dict(moved(lo.adapt(net(), DORA))[0].state_dict())
        assert is_right() and is_right_copy(copy.deepcopy(layer), layer, x)
        layer.float()
        assert is_right()
        layer.up.data.mul_(2)  # which leaves no trace
        assert layer.eval() is layer and is_right()


def is_right_copy(made: nn.Module, layer: nn.Module, x: Tensor) -> bool:
    return torch.equal(made(x), layer(x)) and made._norms is not layer._norms


@KINDS
def test_a_compiled_model(kind: lo.LoRA) -> None:
    model, x = moved(lo.adapt(net(), kind)), torch.randn(5, 48)
    run = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(run(x), model(x))
    run(x).sum().backward()
    got = [p.grad.clone() for p in lo.adapter_parameters(model)]
    model.zero_grad()
    model(x).sum().backward()
    torch.testing.assert_close(got, [p.grad for p in lo.adapter_parameters(model)], rtol=1e-4, atol=1e-5)


@KINDS
def test_states_copies_and_references(kind: lo.LoRA, tmp_path: Path) -> None:
    model, ids = moved(lo.adapt(llama(), kind)), torch.arange(14).view(2, 7)
    expected = model(ids).logits
    fresh = lo.adapt(llama(), kind)
    fresh.load_state_dict(model.state_dict())
    assert_bits_equal(fresh(ids).logits, expected)
    assert_bits_equal(lo.reference(model)(ids).logits, expected)
    assert_bits_equal(lo.reference(model, adapter=False)(ids).logits, lo.adapt(llama(), None)(ids).logits)
    model.save_pretrained(tmp_path / "whole")
    assert_bits_equal(lo.load_adapter(lo.adapt(llama(), None), tmp_path / "whole").eval()(ids).logits, expected)
    lo.save_adapter(model, tmp_path / "adapter")
    assert_bits_equal(lo.load_adapter(lo.adapt(llama(), None), tmp_path / "adapter").eval()(ids).logits, expected)
    with pytest.raises(RuntimeError, match=r"model: LoRA\(4, alpha=6\)"):
        lo.adapt(llama(), lo.LoRA(4, alpha=6)).load_state_dict(model.state_dict())
    with pytest.raises(ValueError, match="the layer has the adapter .* and the file one of"):
        lo.load_adapter(lo.adapt(llama(), lo.LoRA(4, alpha=6)), tmp_path / "adapter")
    lo.merge(model)
    torch.testing.assert_close(model(ids).logits, expected, rtol=1e-4, atol=1e-4)


def test_over_a_changed_base(tmp_path: Path) -> None:
    kind, x = lo.LoRA(4, alpha=6, init="pissa", dora=True), torch.randn(6, 48)
    model = lo.adapt(net(), kind, quantize=None)
    torch.testing.assert_close(model(x), net()(x), rtol=1e-4, atol=1e-5)
    moved(model)
    lo.save_adapter(model, tmp_path)  # as a DoRA of rank 2R over the original weight
    torch.testing.assert_close(peft.PeftModel.from_pretrained(net(), str(tmp_path))(x), model(x), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(lo.load_adapter(net(), tmp_path)(x), model(x), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(lo.reference(model, adapter=False)(x), net()(x), rtol=1e-4, atol=1e-5)
    with lo.disabled(model):
        torch.testing.assert_close(model(x), net()(x), rtol=1e-4, atol=1e-5)


def test_a_conv1d_as_in_peft(tmp_path: Path) -> None:
    theirs, ids = of_peft(DORA, model=gpt2(), targets=["c_attn", "c_fc"]).eval(), torch.arange(12).view(2, 6)
    theirs.save_pretrained(tmp_path)
    ours = lo.load_adapter(gpt2(), tmp_path).eval()
    torch.testing.assert_close(ours(ids).logits, theirs(ids).logits, rtol=1e-4, atol=1e-5)


def test_half_precision_and_autocast() -> None:
    exact, x = moved(lo.adapt(net(), DORA)), torch.randn(6, 48)
    model = copy.deepcopy(exact)
    for layer in (model[0], model[2]):  # trained parts stay float32
        if layer.bias is not None:
            layer.bias.data = layer.bias.data.bfloat16()
    y = model(x.bfloat16())
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), exact(x), rtol=0.05, atol=0.05)
    with torch.autocast("cpu", torch.bfloat16):
        assert_bits_equal(exact(x), exact(x.bfloat16()))
    assert torch.equal(exact[0].row_scale(), model[0].row_scale())


@pytest.mark.parametrize(
    "error, message, call",
    [
        (TypeError, "dora must be True or False, got 1", lambda: lo.LoRA(4, dora=1)),
        (ValueError, "lora_bias must be False with dora", lambda: lo.LoRA(4, dora=True, lora_bias=True)),
        (ValueError, "no low-rank update of W alone", lambda: lo.convert(lo.adapt(net(), DORA)[0])),
        (ValueError, "no low-rank update of W alone", lambda: lo.combine([(lo.adapt(net(), BIASED)[0], 1.0)])),
        (
            ValueError,
            "LoRA.*dora=True.* reads W, which is on the meta device",
            lambda: lo.Linear.from_weight(lo.NF4Weight.quantize(torch.randn(64, 64)).to("meta"), adapter=DORA),
        ),
    ],
)
def test_bad_input(error: type[Exception], message: str, call: Any) -> None:
    with pytest.raises(error, match=message):
        call()


@KINDS
def test_damaged_files(kind: lo.LoRA, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    model = lo.adapt(net(), kind)
    lo.save_adapter(model, tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    tensors = load_file(file)
    key = next(k for k in tensors if k.startswith("base_model.model.0") and tensors[k].dim() == 1)
    for message, damage in [
        ("the file lacks 0.lora_", {k: t for k, t in tensors.items() if k != key}),
        (r"0\.lora_.* must be \[40\]", tensors | {key: torch.ones(3)}),
        (r"0\.lora_.*must be finite", tensors | {key: torch.full((40,), torch.nan)}),
    ]:
        save_file(damage, file)
        with pytest.raises(ValueError, match=message):
            lo.load_adapter(net(), tmp_path)
    save_file(tensors, file)
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 4, "lora_alpha": 6}')
    with pytest.raises(ValueError, match=r"the file has 0\.lora_.*, and LoRA.* has no such part"):
        lo.load_adapter(net(), tmp_path)


def test_files_of_others_and_older_ones_know_nothing_of_them(tmp_path: Path) -> None:
    lo.save_adapter(lo.adapt(net(), lo.LoRA(4)), tmp_path)
    config = (tmp_path / "adapter_config.json").read_text()
    assert "dora" not in config and "lora_bias" not in config
    record = record_of(lo.LoRA(4), None)
    for name in ("dora", "lora_bias"):
        del record["kind"][name]
    assert read_record(record) == (lo.LoRA(4), None)


@KINDS
def test_it_cannot_be_split_over_processes(kind: lo.LoRA) -> None:
    from lowrank_ops.adapters.split import Split

    with pytest.raises(ValueError, match="a DoRA or a lora_bias cannot be split"):
        Split(None, 0, 2, 0, False, (40, 48)).check(lo.adapt(net(), kind)[0])


def test_explain() -> None:
    x = torch.randn(3, 48)
    assert "scale     g = m / ‖W + s U D‖" in lo.explain(lo.adapt(net(), DORA)[0], x)
    assert "bias      s b is added" in lo.explain(lo.adapt(net(), BIASED)[0], x)
