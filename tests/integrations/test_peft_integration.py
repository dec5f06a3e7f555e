"""lowrank_ops.peft: PEFT's LoRA in our op, against PEFT's own path over the same decoded weights."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from helpers import assert_bits_equal, assert_within_baseline
from models import gpt2, llama
from torch import Tensor, nn

import lowrank_ops as lo
from lowrank_ops import functional, reference
from lowrank_ops.adapters.foreign import weight_of

peft = pytest.importorskip("peft")
from peft import PeftModel, get_peft_model  # noqa: E402
from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict  # noqa: E402

IDS = torch.arange(10).reshape(2, 5) * 9
BASES = ["nf4", "dense", "linear", "bitsandbytes"]
FORMATS = ["nf4", "fp4", "mxfp4"]
PLAIN = dict(r=4, lora_alpha=6, target_modules="all-linear", init_lora_weights=False)


def base_of(kind: str) -> nn.Module:
    """The model to give to PEFT: dense, in 4 bits of ours, or in bitsandbytes' layers."""
    model = llama()
    if kind in ("dense", *FORMATS):
        return lo.adapt(model, None, quantize=None if kind == "dense" else kind)
    if kind == "bitsandbytes":
        nn_4bit = pytest.importorskip("bitsandbytes").nn
        for name, dense in list(model.named_modules()):
            if type(dense) is nn.Linear and name != "lm_head":
                packed = nn_4bit.Linear4bit(dense.in_features, dense.out_features, bias=False, quant_type="nf4")
                packed.load_state_dict(dense.state_dict())
                parent, _, child = name.rpartition(".")
                setattr(model.get_submodule(parent), child, packed.to("cpu"))
        model.is_loaded_in_4bit = True
    return model


def decoded(kind: str) -> nn.Module:
    """The same model with decoded weights."""
    if kind in ("dense", "linear"):
        return llama()
    return lo.merge(lo.adapt(llama(), None, quantize=kind if kind in FORMATS else "nf4"))


def pair(kind: str, **options) -> tuple[nn.Module, nn.Module, nn.Module]:  # type: ignore[no-untyped-def]
    """Our model, PEFT's in float32 over the decoded weights, and the same in float64."""
    torch.manual_seed(1)
    options = PLAIN | options
    ours = get_peft_model(base_of(kind), lo.peft.LoraConfig(**options))
    return ours, *theirs_of(kind, ours, **options)


def theirs_of(kind: str, ours: nn.Module, **options) -> tuple[nn.Module, nn.Module]:  # type: ignore[no-untyped-def]
    options["target_modules"] = ours.peft_config["default"].target_modules  # PEFT has replaced "all-linear" by names
    theirs = get_peft_model(decoded(kind), peft.LoraConfig(**options))
    set_peft_model_state_dict(theirs, get_peft_model_state_dict(ours))
    return theirs.train(ours.training), copy.deepcopy(theirs).double().train(ours.training)


def layers(model: nn.Module) -> list[nn.Module]:
    return [m for m in model.modules() if type(m).__module__ == "lowrank_ops.integrations.peft"]


def gradients(model: nn.Module) -> dict[str, Tensor]:
    model.zero_grad()
    model(IDS, labels=IDS).loss.backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def check(ours: nn.Module, theirs: nn.Module, exact: nn.Module, **call) -> None:  # type: ignore[no-untyped-def]
    """Outputs, and the gradients that exist."""
    with torch.no_grad():
        logits = [m(IDS, **call).logits.flatten(0, 1) for m in (ours, exact, theirs)]
    assert_within_baseline(*logits)
    if not call and any(p.requires_grad for p in ours.parameters()):
        got, expected, plain = (gradients(m) for m in (ours, exact, theirs))
        assert got.keys() == expected.keys() and got
        for name, gradient in got.items():
            assert_within_baseline(gradient, expected[name], plain[name])


@pytest.fixture
def fused(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Ranks of the updates that the op received."""
    ranks: list[int] = []
    op = functional.adapted_linear

    def counted(x, weight, update=None, bias=None, **options):  # type: ignore[no-untyped-def]
        if update is not None:
            ranks.append(update.rank)
        return op(x, weight, update, bias, **options)

    monkeypatch.setattr(functional, "adapted_linear", counted)
    yield ranks


# ---- one adapter ----


@pytest.mark.parametrize("kind", [*BASES, "fp4", "mxfp4"])
def test_outputs_and_gradients_are_those_of_peft(kind: str, fused: list[int]) -> None:
    ours, theirs, exact = pair(kind)
    assert len(layers(ours)) == 14 == sum(hasattr(m, "lora_A") for m in ours.modules())
    ours(IDS)
    assert fused == [4] * 14
    check(ours, theirs, exact)
    assert len(gradients(ours)) == 28


@pytest.mark.parametrize(
    "options",
    [
        {"use_rslora": True},
        {"rank_pattern": {"q_proj": 7}, "alpha_pattern": {"v_proj": 3}},
        {"target_modules": r".*layers\.1.*(q_proj|up_proj)"},
        {"target_modules": ["down_proj"], "layers_to_transform": [0]},
        {"init_lora_weights": "gaussian"},
        {"init_lora_weights": "orthogonal"},
        {"init_lora_weights": True},
        {"modules_to_save": ["lm_head"]},
        {"trainable_token_indices": {"embed_tokens": [3, 9]}},
    ],
    ids=lambda options: next(iter(options)) + str(next(iter(options.values())))[:12],
)
@pytest.mark.parametrize("kind", ["nf4", "linear"])
def test_options(kind: str, options: dict, fused: list[int]) -> None:
    ours, theirs, exact = pair(kind, **options)
    ours(IDS)
    assert len(fused) == len(layers(ours)) > 0
    check(ours, theirs, exact)


@pytest.mark.parametrize("kind", BASES)
def test_lora_bias_and_trained_biases_of_the_base(kind: str, fused: list[int]) -> None:
    if kind == "bitsandbytes":
        pytest.skip("the small model has no biases, and lora_bias alone is tested over the other bases")
    torch.manual_seed(2)
    make = lambda: nn.Sequential(nn.Linear(64, 32), nn.Linear(32, 24))  # noqa: E731
    dense = make()
    if kind != "linear":
        base = lo.adapt(copy.deepcopy(dense), None, ["0", "1"], "nf4" if kind == "nf4" else None)
        dense = lo.merge(copy.deepcopy(base))
    else:
        base = copy.deepcopy(dense)
    options = dict(r=3, target_modules=["0", "1"], lora_bias=True, bias="all", init_lora_weights=False)
    ours = get_peft_model(base, lo.peft.LoraConfig(**options))
    theirs = get_peft_model(dense, peft.LoraConfig(**options))
    set_peft_model_state_dict(theirs, get_peft_model_state_dict(ours))
    exact, x = copy.deepcopy(theirs).double(), torch.randn(7, 64)
    outputs = [ours(x), exact(x.double()), theirs(x)]
    assert fused == [3, 3]
    assert_within_baseline(*outputs)
    for y in outputs:
        y.square().sum().backward()
    names = [name for name, p in ours.named_parameters() if p.grad is not None]
    assert len(names) == 8
    parameters = [dict(m.named_parameters()) for m in (ours, exact, theirs)]
    for name in names:
        assert_within_baseline(*(p[name].grad for p in parameters))


def test_dropout_is_dropped_in_the_op(fused: list[int]) -> None:
    torch.manual_seed(3)
    layer = get_peft_model(
        lo.adapt(nn.Sequential(nn.Linear(64, 48)), None),
        lo.peft.LoraConfig(r=4, target_modules=["0"], lora_dropout=0.4, init_lora_weights=False),
    ).base_model.model[0]
    x = torch.randn(9, 64)
    torch.manual_seed(5)
    y = layer(x)
    torch.manual_seed(5)
    mask = reference.dropout_mask(torch.randint(2**63 - 1, (1,)), 9, 64, 0.4)
    weight, down, up = (
        layer.base_layer.weight.dequantize(),
        layer.lora_A["default"].weight,
        layer.lora_B["default"].weight,
    )
    dropped = [
        t.to(d) for d in (torch.float64, torch.float32) for t in (x, mask, weight, layer.base_layer.bias, down, up)
    ]
    made = [
        nn.functional.linear(x, w, b) + 2 * (x * m / 0.6 @ d.T @ u.T) for x, m, w, b, d, u in (dropped[:6], dropped[6:])
    ]
    assert fused == [4] and 0 < mask.float().mean() < 1
    assert_within_baseline(y, *made)
    assert_bits_equal(layer.eval()(x), layer(x))


def test_bfloat16_and_autocast() -> None:
    ours, _, exact = pair("nf4")
    theirs, ours = copy.deepcopy(exact).bfloat16(), ours.bfloat16()
    with torch.no_grad():
        assert_within_baseline(*(m(IDS).logits.flatten(0, 1) for m in (ours, exact, theirs)))
    ours, theirs, exact = pair("nf4")
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        got, plain = (m(IDS).logits.flatten(0, 1) for m in (ours, theirs))
    with torch.no_grad():
        assert_within_baseline(got, exact(IDS).logits.flatten(0, 1), plain)


def test_the_bytes_of_bitsandbytes_are_read_in_place() -> None:
    ours, _, _ = pair("bitsandbytes")
    for layer in layers(ours):
        assert layer._weight().packed.data_ptr() == layer.base_layer.weight.data_ptr()
    layer = copy.deepcopy(layers(ours)[0])
    assert layer._weight().packed.data_ptr() == layer.base_layer.weight.data_ptr()


def test_compute_dtype_of_bitsandbytes_is_kept() -> None:
    ours, theirs, exact = pair("bitsandbytes")
    for layer in layers(ours):
        layer.base_layer.compute_dtype, layer.base_layer.compute_type_is_set = torch.bfloat16, True
    layer = layers(ours)[0]
    x = torch.randn(9, 64)
    y, update = layer(x), layer._update(["default"])
    assert y.dtype == torch.float32
    assert_bits_equal(y, functional.adapted_linear(x.bfloat16(), layer._weight(), update).float())


# ---- several adapters ----


def several(kind: str, **options) -> tuple[nn.Module, nn.Module, nn.Module]:  # type: ignore[no-untyped-def]
    ours, theirs, exact = pair(kind, **options)
    for name, rank in (("b", 3), ("c", 5)):
        config = dict(r=rank, lora_alpha=2, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
        ours.add_adapter(name, lo.peft.LoraConfig(**config))
        for model in (theirs, exact):
            model.add_adapter(name, peft.LoraConfig(**config))
            set_peft_model_state_dict(model, get_peft_model_state_dict(ours, adapter_name=name), adapter_name=name)
    exact.double()
    return ours, theirs, exact


@pytest.mark.parametrize("kind", BASES)
def test_several_active_adapters_are_one_update(kind: str, fused: list[int]) -> None:
    models = several(kind)
    for model in models:
        model.base_model.set_adapter(["default", "b", "c"])
    models[0](IDS)
    assert sorted(fused) == [4] * 10 + [12] * 4
    check(*models)
    assert len(gradients(models[0])) == 28 + 16


@pytest.mark.parametrize("kind", BASES)
def test_a_batch_of_mixed_adapters(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    models = [m.eval() for m in several(kind)]
    routed, op = [], functional.routed_linear
    monkeypatch.setattr(functional, "routed_linear", lambda *a, **o: routed.append(len(a[2])) or op(*a, **o))
    for names in (["b", "c"], ["default", "__base__"], ["__base__", "__base__"], ["c", "c"]):
        check(*models, adapter_names=names)
    assert sorted(set(routed)) == [0, 1, 2] and len(routed) == 4 * 14
    if kind == "bitsandbytes":  # then PEFT's own layer runs, which in eval multiplies in bfloat16 on some CPUs
        return
    routed.clear()
    for model in models:
        for name, p in model.named_parameters():
            p.requires_grad_(".b." in name)
    logits = [m(IDS, adapter_names=["b", "c"]).logits.flatten(0, 1) for m in (models[0], models[2], models[1])]
    assert len(routed) < 14 and logits[0].requires_grad, "with gradients each adapter by itself"
    assert_within_baseline(*logits)


def test_names_that_are_not_there_or_twice() -> None:
    ours, _, _ = several("nf4")
    for call in (
        lambda: ours.eval()(IDS, adapter_names=["b", "nobody"]),
        lambda: ours.set_adapter("nobody"),
        lambda: ours.base_model.set_adapter(["b", "b"]),
        lambda: ours.delete_adapter("nobody"),
        lambda: ours.eval()(IDS, adapter_names=["b"]),
    ):
        with pytest.raises((ValueError, KeyError), match="nobody|more than once|[Ll]ength"):
            call()


def test_disabling_setting_deleting() -> None:
    ours, theirs, exact = several("nf4")
    with ours.disable_adapter():
        assert_bits_equal(ours(IDS).logits, base_of("nf4")(IDS).logits)
    for model in (ours, theirs, exact):
        model.set_adapter("c")
    check(ours, theirs, exact)
    for model in (ours, theirs, exact):
        model.delete_adapter("b")
        model.delete_adapter("default")
    check(ours, theirs, exact)
    assert_bits_equal(ours.unload()(IDS).logits, base_of("nf4")(IDS).logits)


@pytest.mark.parametrize("method", ["cat", "svd", "linear"])
def test_weighted_adapters(method: str) -> None:
    models = several("nf4")
    config = dict(r=3, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    models[0].add_adapter("d", lo.peft.LoraConfig(**config))
    for model in models[1:]:
        model.add_adapter("d", peft.LoraConfig(**config))
        set_peft_model_state_dict(model, get_peft_model_state_dict(models[0], adapter_name="d"), adapter_name="d")
    models[2].double()
    for model in models:
        model.add_weighted_adapter(["b", "d"], [0.5, -2.0], "e", method)
        model.set_adapter("e")
    assert len(layers(models[0])) == 14
    models[2].double()
    with torch.no_grad():
        ours, exact, theirs = (m(IDS).logits for m in (models[0], models[2], models[1]))
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


# ---- merging ----


@pytest.mark.parametrize("kind", ["dense", "linear"])
def test_merging_into_dense_weights(kind: str) -> None:
    ours, theirs, exact = pair(kind)
    for model in (ours, theirs, exact):
        model.merge_adapter(safe_merge=True)
    with torch.no_grad():
        assert_within_baseline(*(m(IDS).logits.flatten(0, 1) for m in (ours, exact, theirs)))
    for model in (ours, theirs, exact):
        model.unmerge_adapter()
    check(ours, theirs, exact)
    with torch.no_grad():
        expected = ours(IDS).logits
        merged = ours.merge_and_unload()
    assert not layers(merged)
    torch.testing.assert_close(merged(IDS).logits, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore:.*(erge|4-bit)")
@pytest.mark.parametrize("kind", [*FORMATS, "bitsandbytes"])
def test_merging_into_four_bits_quantises_again(kind: str) -> None:
    ours, theirs, _ = pair(kind)
    before = copy.deepcopy(ours.state_dict())
    with torch.no_grad():
        adapted = ours(IDS).logits
    ours.merge_adapter()
    expected = theirs.merge_and_unload()
    for layer, dense in zip(layers(ours), (m for m in expected.modules() if type(m) is nn.Linear), strict=False):
        packed = weight_of(layer.base_layer)
        assert_bits_equal(packed.packed, type(packed).quantize(dense.weight.detach()).packed)
    merged_state = ours.state_dict()
    ours.unmerge_adapter()
    if kind in FORMATS:
        after = ours.state_dict()
        assert any(not torch.equal(merged_state[key], tensor) for key, tensor in before.items())
        for key, tensor in before.items():
            assert_bits_equal(after[key], tensor)
        assert_bits_equal(ours(IDS).logits.detach(), adapted)
        merged = ours.merge_and_unload()
        assert not layers(merged) and sum(isinstance(m, lo.Linear) for m in merged.modules()) == 14


@pytest.mark.filterwarnings("ignore:the adapter is merged")
def test_merging_into_four_bits_with_biases_several_adapters_and_nan() -> None:
    torch.manual_seed(4)
    options = dict(r=3, target_modules=["0"], lora_bias=True, init_lora_weights=False)
    base = lo.adapt(nn.Sequential(nn.Linear(64, 48)), None, ["0"])
    bytes_before, bias_before = base[0].weight.packed.clone(), base[0].bias.detach().clone()
    model = get_peft_model(base, lo.peft.LoraConfig(**options))
    model.add_adapter("b", lo.peft.LoraConfig(**options))
    layer, x = model.base_model.model[0], torch.randn(5, 64)
    with torch.no_grad():
        layer.lora_B["default"].bias += 3.0
    model.merge_adapter(["default", "b"])
    merged = lo.merge(copy.deepcopy(nn.Sequential(layer.base_layer)))
    assert_bits_equal(model(x).detach(), layer.base_layer(x).detach())
    assert (merged[0].bias - bias_before).mean() > 2
    model.unmerge_adapter()
    assert_bits_equal(layer.base_layer.weight.packed, bytes_before)
    assert_bits_equal(layer.base_layer.bias.detach(), bias_before)
    with torch.no_grad():
        layer.lora_B["b"].weight.fill_(float("nan"))
    with pytest.raises(ValueError, match="finite"):
        model.merge_adapter(["b"])
    assert_bits_equal(layer.base_layer.weight.packed, bytes_before)
    assert not layer.merged


# ---- starts and variants ----


def parts_of_loftq(weight: Tensor, num_bits: int, reduced_rank: int, num_iter: int) -> tuple[Tensor, Tensor, Tensor]:
    base = lo.NF4Weight.quantize(weight).dequantize()
    U, S, Vt = torch.linalg.svd(weight - base)
    return base, Vt[:reduced_rank].contiguous(), (U[:, :reduced_rank] * S[:reduced_rank]).contiguous()


@pytest.mark.parametrize("kind", ["dense", "linear"])
@pytest.mark.parametrize("init", ["pissa", "pissa_niter_4", "olora", "loftq"])
def test_starts_that_change_the_base(kind: str, init: str, fused: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    if init == "loftq":
        pytest.importorskip("scipy")
        # loftq_init of PEFT needs a GPU; its layers use these parts in the same way.
        monkeypatch.setattr("peft.tuners.lora.layer.loftq_init", parts_of_loftq)
    options = (
        PLAIN
        | {"init_lora_weights": init}
        | ({"loftq_config": {"loftq_bits": 4, "loftq_iter": 1}} if init == "loftq" else {})
    )
    torch.manual_seed(0)
    ours = get_peft_model(base_of(kind), lo.peft.LoraConfig(**options))
    torch.manual_seed(0)
    theirs = get_peft_model(
        llama(), peft.LoraConfig(**options | {"target_modules": ours.peft_config["default"].target_modules})
    )
    state = {name.replace(".base_layer.", "."): tensor for name, tensor in theirs.state_dict().items()}
    for name, tensor in ours.state_dict().items():
        torch.testing.assert_close(tensor, state[name.replace(".base_layer.", ".")])
    ours(IDS)
    assert len(fused) == 14
    check(ours, theirs, copy.deepcopy(theirs).double())


@pytest.mark.parametrize("init", ["pissa", "pissa_niter_4", "olora", "loftq", "corda"])
@pytest.mark.filterwarnings("ignore:`init_lora_weights` is 'corda'")
def test_starts_that_need_the_dense_weight_are_refused_over_four_bits(init: str) -> None:
    options = {"loftq_config": {"loftq_bits": 4, "loftq_iter": 1}} if init == "loftq" else {}
    with pytest.raises(ValueError, match=f"'{init}' puts another W.*before it was quantised"):
        get_peft_model(base_of("nf4"), lo.peft.LoraConfig(**PLAIN | {"init_lora_weights": init} | options))


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("kind", BASES)
def test_dora_in_one_op(kind: str, dropout: float, fused: list[int]) -> None:
    ours, theirs, exact = pair(kind, use_dora=True, lora_dropout=dropout)
    if dropout:
        torch.manual_seed(7)
        y = ours(IDS).logits.flatten(0, 1)
        torch.manual_seed(7)
        torch.testing.assert_close(y, theirs(IDS).logits.flatten(0, 1), rtol=1e-4, atol=1e-5)
        return
    check(ours, theirs, exact)
    assert fused[:14] == [4] * 14 and len(gradients(ours)) == 42
    layer = layers(ours)[0]
    assert "in one op with its active adapter, default, and its rows scaled" in lo.explain(layer, torch.zeros(3, 64))
    with torch.no_grad():  # in eval the norm is kept until a part changes
        for part in (layer.lora_B["default"].weight, layer.lora_magnitude_vector["default"].weight):
            ours.eval()(IDS)
            part += 0.1
            theirs.load_state_dict(theirs.state_dict() | get_lora(ours))
            torch.testing.assert_close(ours(IDS).logits, theirs.eval()(IDS).logits, rtol=1e-4, atol=1e-5)


def get_lora(model: nn.Module) -> dict[str, Tensor]:
    return {key: value for key, value in model.state_dict().items() if "lora_" in key}


def test_two_doras_go_by_pefts_own_path(fused: list[int]) -> None:
    ours, _, _ = pair("nf4", use_dora=True)
    ours.add_adapter("other", lo.peft.LoraConfig(**PLAIN, use_dora=True))
    ours.base_model.set_adapter(["default", "other"])
    ours(IDS)
    assert not fused
    text = lo.explain(layers(ours)[0], torch.zeros(3, 64))
    assert "PEFT's own path" in text and "'default' is not plain LoRA (DoraLinearVariant)" in text


@pytest.mark.filterwarnings("ignore:the adapter is merged")
def test_dora_merges_into_four_bits() -> None:
    ours, theirs, _ = pair("nf4", use_dora=True)
    bytes_before = [layer.base_layer.weight.packed.clone() for layer in layers(ours)]
    dense = theirs.merge_and_unload()
    ours.merge_adapter()
    for layer, other in zip(layers(ours), (m for m in dense.modules() if type(m) is nn.Linear), strict=False):
        assert_bits_equal(layer.base_layer.weight.packed, lo.NF4Weight.quantize(other.weight).packed)
    ours.unmerge_adapter()
    for layer, packed in zip(layers(ours), bytes_before, strict=True):
        assert_bits_equal(layer.base_layer.weight.packed, packed)


def test_options_that_a_layer_would_ignore_are_refused() -> None:
    with pytest.raises(ValueError, match="use_qalora"):
        get_peft_model(base_of("nf4"), lo.peft.LoraConfig(**PLAIN, use_qalora=True))
    with pytest.raises(ValueError, match="has an adapter of lowrank_ops already"):
        get_peft_model(lo.adapt(llama(), lo.LoRA(2)), lo.peft.LoraConfig(**PLAIN))
    if "kasa_config" not in vars(lo.peft.LoraConfig()):
        return
    kasa = {"kasa_config": {}, "init_lora_weights": True}
    with pytest.raises(ValueError, match="kasa_config puts another W"):
        get_peft_model(base_of("nf4"), lo.peft.LoraConfig(**PLAIN | kasa))
    with pytest.raises(ValueError, match="no kasa_config over bitsandbytes"):
        get_peft_model(base_of("bitsandbytes"), lo.peft.LoraConfig(**PLAIN | kasa))


@pytest.mark.parametrize("kind", ["nf4", "dense", "bitsandbytes"])
@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"modules_to_save": ["1.mlp.down_proj"]}, "down_proj'"),
        ({"modules_to_save": ["lm_head", "mlp"]}, "0.mlp'"),
        ({"trainable_token_indices": {"down_proj": [1]}}, "down_proj'"),
    ],
    ids=str,
)
def test_training_the_weight_of_a_frozen_layer_is_refused(kind: str, options: dict, named: str) -> None:
    options, refused = PLAIN | {"target_modules": ["q_proj"]}, options
    model = base_of(kind)
    before = [name for name, _ in model.named_modules()]
    for _ in range(2):  # not the first time only
        with pytest.raises(ValueError, match=f"{next(iter(refused))} names .*{named}, and the weight of .* is frozen"):
            get_peft_model(model, lo.peft.LoraConfig(**options, **refused))
    assert [name for name, _ in model.named_modules()] == before
    peft_model = get_peft_model(base_of(kind), lo.peft.LoraConfig(**options, modules_to_save=["lm_head"]))
    with pytest.raises(ValueError, match=f"{next(iter(refused))} names"):
        peft_model.add_adapter("b", lo.peft.LoraConfig(**options, **refused))
    assert set(peft_model.peft_config) == {"default"}
    assert peft_model.lm_head.modules_to_save["default"].weight.requires_grad


def test_explain_says_what_runs() -> None:
    ours, _, _ = several("nf4")
    ours.base_model.set_adapter(["default", "b"])
    text = lo.explain(layers(ours)[0], torch.zeros(3, 64))
    assert "R=7" in text and "in one op with its active adapters: default, b" in text
    with ours.disable_adapter():
        assert "switched off" in lo.explain(layers(ours)[0], torch.zeros(3, 64))


# ---- files ----


@pytest.mark.parametrize("kind", BASES)
def test_saved_adapters_are_pefts_and_load_everywhere(kind: str, tmp_path: Path) -> None:
    ours, theirs, _ = pair(kind, modules_to_save=["lm_head"])
    ours.eval()
    ours.save_pretrained(tmp_path / "ours")
    theirs.save_pretrained(tmp_path / "theirs")
    configs = [json.loads((tmp_path / d / "adapter_config.json").read_text()) for d in ("ours", "theirs")]
    for config in configs:
        config["target_modules"].sort()
    assert configs[0] == configs[1]
    with torch.no_grad():
        expected = ours(IDS).logits
        for directory in ("ours", "theirs"):
            config = lo.peft.LoraConfig.from_pretrained(tmp_path / directory)
            again = PeftModel.from_pretrained(base_of(kind), tmp_path / directory, config=config).eval()
            assert len(layers(again)) == 14
            assert_bits_equal(again(IDS).logits, expected)
        plain = PeftModel.from_pretrained(decoded(kind), tmp_path / "ours").eval()
        torch.testing.assert_close(plain(IDS).logits, expected, rtol=1e-4, atol=1e-5)
        # A second adapter that PEFT loads goes into the same layers.
        again.load_adapter(tmp_path / "ours", "b")
        again.set_adapter("b")
        assert len(layers(again)) == 14
        assert_bits_equal(again(IDS).logits, expected)


def test_our_own_functions_read_it_and_it_reads_ours(tmp_path: Path) -> None:
    ours, _, _ = pair("nf4")
    ours.eval().save_pretrained(tmp_path / "peft")
    adapted = lo.load_adapter(base_of("nf4"), tmp_path / "peft").eval()
    with torch.no_grad():
        expected = ours(IDS).logits
        assert_bits_equal(adapted(IDS).logits, expected)
        lo.save_adapter(adapted, tmp_path / "lo")
        config = lo.peft.LoraConfig.from_pretrained(tmp_path / "lo")
        again = PeftModel.from_pretrained(base_of("nf4"), tmp_path / "lo", config=config).eval()
        assert_bits_equal(again(IDS).logits, expected)
    lo.save_adapter(lo.adapt(llama(), lo.LoRAXS(4)), tmp_path / "xs")
    with pytest.raises(ValueError, match=r"peft_type LORA, got LOWRANK_OPS.*lowrank_ops\.load_adapter"):
        lo.peft.LoraConfig.from_pretrained(tmp_path / "xs")


def test_plain_peft_works_over_our_layers_too(tmp_path: Path) -> None:
    ours, _, _ = pair("nf4")
    ours.eval().save_pretrained(tmp_path)
    plain = PeftModel.from_pretrained(base_of("nf4"), tmp_path).eval()
    torch.testing.assert_close(plain(IDS).logits, ours(IDS).logits, rtol=1e-4, atol=1e-5)
    with pytest.raises(AttributeError, match="no 'data': its numbers are packed"):
        plain.merge_adapter()


def test_hot_swapping(tmp_path: Path) -> None:
    from peft.utils.hotswap import hotswap_adapter, prepare_model_for_compiled_hotswap

    first, _, _ = pair("nf4")
    second, _, _ = pair("nf4", r=3, lora_alpha=5)
    second.eval().save_pretrained(tmp_path)
    prepare_model_for_compiled_hotswap(first, target_rank=8)
    hotswap_adapter(first.eval(), tmp_path, "default")
    with torch.no_grad():
        assert layers(first)[0]._hindrance() is None
        torch.testing.assert_close(first(IDS).logits, second(IDS).logits, rtol=1e-4, atol=1e-5)


def test_conv1d_of_gpt2(tmp_path: Path) -> None:
    """Our layer stores W as [N, K]; a plain Conv1D gets PEFT's own layer."""
    config = dict(r=4, target_modules=["c_attn", "c_proj"], fan_in_fan_out=True, init_lora_weights=False)
    ours = get_peft_model(lo.adapt(gpt2(), None, quantize=None), lo.peft.LoraConfig(**config)).eval()
    ours.save_pretrained(tmp_path)
    assert len(layers(ours)) == 3
    theirs = PeftModel.from_pretrained(gpt2(), tmp_path).eval()
    with torch.no_grad():
        torch.testing.assert_close(ours(IDS).logits, theirs(IDS).logits, rtol=1e-4, atol=1e-5)
        ours.merge_adapter()
        torch.testing.assert_close(ours(IDS).logits, theirs(IDS).logits, rtol=1e-4, atol=1e-5)
    assert not layers(get_peft_model(gpt2(), lo.peft.LoraConfig(**config)))


# ---- in a program ----


def test_gradient_checkpointing_and_hooks(fused: list[int]) -> None:
    ours, _, _ = pair("nf4")
    expected = gradients(ours)
    ours.train()
    ours.base_model.model.gradient_checkpointing_enable({"use_reentrant": False})
    got = gradients(ours)
    for name, gradient in expected.items():
        assert_bits_equal(got[name], gradient)
    seen: list[object] = []
    layers(ours)[0].base_layer.register_forward_hook(lambda *a: seen.append(a[0]))
    fused.clear()
    ours.eval()(IDS)
    assert len(seen) == 1 and len(fused) == 13, "a hook of the base layer is called"


@pytest.mark.parametrize("kind", ["nf4", "linear", "bitsandbytes"])
def test_compilation(kind: str) -> None:
    ours, _, _ = pair(kind)
    layer, x = layers(ours)[0], torch.randn(9, 64)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    y, expected = compiled(x), layer(x)
    torch.testing.assert_close(y, expected)
    got, wanted = (torch.autograd.grad(out.sum(), layer.lora_A["default"].weight)[0] for out in (y, expected))
    torch.testing.assert_close(got, wanted)


def test_copies_and_pickles() -> None:
    ours, _, _ = pair("nf4", use_dora=True)
    x = torch.randn(3, 64)
    layer = layers(ours)[0]
    assert_bits_equal(copy.deepcopy(layer)(x), layer(x))


def test_it_is_loaded_when_it_is_asked_for() -> None:
    code = "import sys, lowrank_ops as lo; assert 'peft' not in sys.modules; lo.peft.LoraConfig"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_missing_or_other_peft_is_said() -> None:
    for code in (
        "import sys; sys.modules['peft'] = None",
        "import peft; del peft.LoraConfig._register_custom_module",
    ):
        code += "\nimport lowrank_ops as lo\ntry: lo.peft\n"
        code += "except ImportError as e: assert 'lowrank_ops.peft needs peft' in str(e), e\nelse: raise SystemExit(1)"
        subprocess.run([sys.executable, "-c", code], check=True)
