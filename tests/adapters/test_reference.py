"""disabled, strength and reference: the model before it was adapted, between that and now, and at a chosen moment."""

from __future__ import annotations

import copy
import pickle
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import assert_bits_equal, assert_within_baseline
from mixtures import mixture
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import lowrank_ops as lo

KEEPING = [
    lo.LoRA(4),
    lo.LoRA(4, init="orthogonal"),
    lo.LoRA(4, dropout=0.5),
    lo.LoRAXS(5),
    lo.SVF(7),
    lo.SVFT("random", entries=3),
]
CHANGING = [lo.LoRA(4, init="pissa"), lo.LoRA(4, init="pissa", rslora=True), lo.LoRA(4, init="milora")]
QUANTIZING = [
    *CHANGING, lo.LoRA(4, init="pissa", iterations=3), lo.LoRA(4, init="loftq"), lo.LoRA(4, init="loftq", iterations=3)
]  # fmt: skip
REPLACING = [lo.SVF(form="replace", factors="float32"), lo.SVFT(bandwidth=2, form="replace", factors="float32")]


class Net(nn.Module):
    """Odd sizes, with and without bias."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(40, 33), nn.Linear(33, 40, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.tanh(self.first(x)))


def moved(model: nn.Module) -> nn.Module:
    """Change the adapters as some steps of training would."""
    with torch.no_grad():
        for p in lo.adapter_parameters(model):
            p.add_(torch.randn_like(p), alpha=0.3)
    return model


def trained(kind: object, quantize: str | None = "nf4") -> nn.Module:
    return moved(lo.adapt(Net(), kind, quantize=quantize))  # type: ignore[arg-type]


def pointers(model: nn.Module) -> set[int]:
    return {t.data_ptr() for t in (*model.parameters(), *model.buffers()) if t.numel()}


def llama(tied: bool = False) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=99, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, tie_word_embeddings=tied, initializer_range=0.2,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


@pytest.mark.parametrize("quantize", ["nf4", None])
@pytest.mark.parametrize("kind", KEEPING, ids=str)
def test_a_kind_that_keeps_the_base_is_switched_off_to_the_bit(kind, quantize) -> None:  # type: ignore[no-untyped-def]
    x = torch.randn(3, 40)
    base = lo.adapt(Net(), None, quantize=quantize)
    model = trained(kind, quantize)
    adapted = model.eval()(x)
    with lo.disabled(model):
        assert_bits_equal(model(x), base(x))
    assert not torch.equal(adapted, base(x))
    assert_bits_equal(model(x), adapted)
    assert_bits_equal(lo.reference(model, adapter=False)(x), base(x))


@pytest.mark.parametrize("kind", [*CHANGING, *REPLACING], ids=str)
def test_a_changed_or_replaced_base_is_given_back(kind) -> None:  # type: ignore[no-untyped-def]
    x = torch.randn(3, 40)
    model, expected = trained(kind, None), Net()(x)
    assert (model(x) - expected).abs().max() > 0.1
    with lo.disabled(model):
        torch.testing.assert_close(model(x), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(lo.reference(model, adapter=False)(x), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", QUANTIZING, ids=str)
def test_a_changed_base_in_4_bits_is_given_back_by_the_product_of_its_start(kind) -> None:  # type: ignore[no-untyped-def]
    layer = lo.Linear.from_linear(nn.Linear(64, 48), kind)
    model = nn.Sequential(layer)
    x = torch.randn(3, 64)
    start = layer(x)
    moved(model)
    assert layer.base_down is not None and layer.base_up is not None
    whole = (
        layer.weight.dequantize(torch.float32).double() + kind.scale * layer.base_up.double() @ layer.base_down.double()
    )
    expected = (x.double() @ whole.T + layer.bias.double()).float()
    for got in (lo.reference(model, adapter=False)(x), disabled_output(model, x)):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
        if kind.init != "loftq":  # its start compensates the quantisation error without training
            torch.testing.assert_close(got, start, rtol=1e-5, atol=1e-5)


def disabled_output(model: nn.Module, x: Tensor) -> Tensor:
    with lo.disabled(model):
        return model(x)


def test_contexts_nest_end_after_errors_and_overlap_between_threads() -> None:
    model, x = trained(lo.LoRA(4)), torch.randn(2, 40)
    adapted, base = model(x), disabled_output(model, x)
    with lo.disabled(model):
        with pytest.raises(KeyError), lo.disabled(model):
            raise KeyError
        assert_bits_equal(model(x), base)
    assert_bits_equal(model(x), adapted)
    entered, left = threading.Event(), threading.Event()

    def other() -> None:
        with lo.disabled(model):
            entered.set()
            left.wait(10)

    thread = threading.Thread(target=other)
    with lo.disabled(model):
        thread.start()
        entered.wait(10)
    assert_bits_equal(model(x), base)  # the other thread is inside
    left.set()
    thread.join()
    assert_bits_equal(model(x), adapted)


def test_a_part_of_a_model_is_switched_off_by_itself() -> None:
    model, x = trained(lo.LoRA(4)), torch.randn(2, 40)
    with lo.disabled(nn.ModuleList([model.first])):
        assert model.first.disabled and not model.second.disabled
        model(x)


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradients_flow_through_the_base_alone(reentrant: bool) -> None:
    x = torch.randn(3, 40, requires_grad=True)
    base, model = lo.adapt(Net(), None), trained(lo.LoRA(4))
    (expected,) = torch.autograd.grad(base(x).square().sum(), x)
    with lo.disabled(model):
        (got,) = torch.autograd.grad(model(x).square().sum(), x)
        assert_bits_equal(got, expected)
        checkpoint(model, x, use_reentrant=reentrant).square().sum().backward()
    assert_bits_equal(x.grad, expected)
    assert all(p.grad is None for p in lo.adapter_parameters(model))


def test_under_autocast() -> None:
    x, base, model = torch.randn(3, 40), lo.adapt(Net(), None), trained(lo.LoRA(4))
    with torch.autocast("cpu", torch.bfloat16), lo.disabled(model):
        assert model(x).dtype == torch.bfloat16
        assert_bits_equal(model(x), base(x))


@pytest.mark.parametrize(
    "kind", [lo.LoRA(4), lo.LoRA(4, init="pissa"), lo.SVF(form="replace", factors="float32")], ids=str
)
def test_a_compiled_model_takes_the_right_branch(kind) -> None:  # type: ignore[no-untyped-def]
    model, x = trained(kind, None), torch.randn(3, 40)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    adapted, base = model(x), disabled_output(model, x)
    for _ in range(2):
        assert_bits_equal(compiled(x), adapted)
        with lo.disabled(compiled):
            assert_bits_equal(compiled(x), base)
            with lo.disabled(model):
                assert_bits_equal(compiled(x), base)
    assert_bits_equal(lo.reference(compiled)(x), adapted)


def test_a_copy_made_inside_is_switched_on() -> None:
    model, x = trained(lo.LoRA(4)), torch.randn(2, 40)
    with lo.disabled(model):
        copies = [copy.deepcopy(model), pickle.loads(pickle.dumps(model)), lo.reference(model)]
    for made in copies:
        assert_bits_equal(made(x), model(x))


@pytest.mark.parametrize("use", [lambda m: lo.disabled(m).__enter__(), lo.reference])
def test_a_model_without_an_adapter_is_refused(use) -> None:  # type: ignore[no-untyped-def]
    for model in (Net(), lo.adapt(Net(), None)):
        with pytest.raises(ValueError, match="model, a Net, has no adapter"):
            use(model)
    with pytest.raises(TypeError, match="adapter must be True or False, got 'none'"):
        lo.reference(trained(lo.LoRA(4)), adapter="none")


@pytest.mark.parametrize("quantize", ["nf4", None])
@pytest.mark.parametrize("adapter", [True, False])
@pytest.mark.parametrize("kind", [lo.LoRA(4), lo.LoRAXS(5)], ids=str)
def test_a_reference_takes_no_memory_but_of_adapters(kind, adapter, quantize) -> None:  # type: ignore[no-untyped-def]
    model, tokens = lo.adapt(llama(), kind, quantize=quantize), torch.randint(0, 99, (2, 5))
    moved(model)
    before = model(tokens).logits.detach()
    made = lo.reference(model, adapter=adapter)
    assert not made.training and not any(p.requires_grad for p in made.parameters())
    own = [t for t in (*made.parameters(), *made.buffers()) if t.data_ptr() not in pointers(model)]
    size = sum(p.numel() for p in lo.adapter_parameters(model)) if adapter else 0
    assert sum(t.numel() for t in own) == size
    moved(model)
    if adapter:
        assert_bits_equal(made(tokens).logits, before)
    assert (made(tokens).logits - model(tokens).logits).abs().max() > 1e-3
    assert not adapter or made.state_dict().keys() == model.state_dict().keys()


def test_tied_weights_a_trained_head_and_the_generation_config() -> None:
    model = lo.adapt(llama(tied=True), lo.LoRA(4))
    model.generation_config.max_new_tokens = 3
    model.train()
    made = lo.reference(model)
    assert made.lm_head.weight is made.model.embed_tokens.weight is not model.lm_head.weight
    assert made.lm_head.weight.data_ptr() == model.lm_head.weight.data_ptr()
    assert made.generation_config.max_new_tokens == 3 and made.config is not model.config
    tokens = torch.randint(1, 99, (2, 5))
    assert torch.equal(made.generate(tokens, do_sample=False), model.eval().generate(tokens, do_sample=False))
    model.lm_head.weight.requires_grad_()  # and so the embedding
    made = lo.reference(model)
    assert made.lm_head.weight is made.model.embed_tokens.weight and not made.lm_head.weight.requires_grad
    assert made.lm_head.weight.data_ptr() != model.lm_head.weight.data_ptr()


def test_running_statistics_stand_still() -> None:
    model = lo.adapt(nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8)), lo.LoRA(2))
    x = torch.randn(5, 8)
    made = lo.reference(model)
    expected = made(x)
    model.train()(x)
    assert_bits_equal(made(x), expected)


def test_a_reference_is_cast_and_moved_by_itself() -> None:
    model = trained(lo.LoRA(4), None)
    made = lo.reference(model).to(torch.bfloat16)
    assert made.first.weight.dtype == torch.bfloat16 and model.first.weight.dtype == torch.float32
    made = lo.reference(trained(lo.LoRA(4))).to("meta")
    assert made.first.device.type == "meta" and model.first.device.type == "cpu"


def test_the_module_of_plain_implementations_keeps_its_name() -> None:
    import lowrank_ops.reference as module
    from lowrank_ops.reference import adapted_linear

    assert lo.reference is module and lo.reference.adapted_linear is adapted_linear


# ---- strength ----

SCALING = [lo.LoRA(4, dora=True), lo.LoRA(4, lora_bias=True)]
EVERY = [kind for kind in (*KEEPING, *CHANGING, *REPLACING, *SCALING) if not getattr(kind, "dropout", 0)]


def of(kind: Any) -> nn.Module:
    return trained(kind, None if kind in REPLACING else "nf4").eval()


def between(layer: Any, x: Tensor, w: float, dtype: torch.dtype) -> Tensor:
    """x (W₀ + w (W₁ - W₀))ᵀ + b₀ + w (b₁ - b₀), from the weights with the adapter and without it."""
    with lo.strength(layer, 0):
        before, bias = layer.merged_weight(torch.float32).to(dtype), layer.merged_bias()
    weight = before + w * (layer.merged_weight(torch.float32).to(dtype) - before)
    y = x.to(dtype) @ weight.T
    if bias is None:
        return y
    return y + bias.to(dtype) + w * (layer.merged_bias().to(dtype) - bias.to(dtype))


@pytest.mark.parametrize("w", [0.7, -0.5])
@pytest.mark.parametrize("kind", EVERY, ids=str)
def test_every_kind(kind: Any, w: float) -> None:
    model, x = of(kind), torch.randn(5, 40)
    layer = model.first
    with torch.no_grad():
        exact, baseline = (between(layer, x, w, dtype) for dtype in (torch.float64, torch.float32))
        full = model(x)
        with lo.disabled(model):
            without = model(x)
        with lo.strength(model, w):
            assert_within_baseline(layer(x), exact, baseline)
            weak = model(x)
            with lo.disabled(model), lo.strength(model, 3):
                assert_bits_equal(model(x), without)
            merged = lo.merge(copy.deepcopy(model))
            torch.testing.assert_close(merged(x), weak, rtol=1e-4, atol=1e-4)
        assert_bits_equal(model(x), full)
        lo.set_strength(model, 0)
        torch.testing.assert_close(model(x), without, rtol=1e-4, atol=1e-4)
        assert not torch.allclose(weak, full) and not torch.allclose(weak, without)


@pytest.mark.parametrize("kind", [EVERY[0], CHANGING[0], REPLACING[0], SCALING[0]], ids=str)
def test_gradients_are_of_the_equation(kind: Any) -> None:
    model, x = of(kind), torch.randn(5, 40)
    layer = model.first
    parameters = layer.trained()

    def gradients() -> tuple[Tensor, ...]:
        return torch.autograd.grad(layer(x).square().sum(), parameters)

    with lo.strength(layer, 0.25):
        got = gradients()
    with lo.disabled(layer), torch.no_grad():
        base = layer(x)
    expected = torch.autograd.grad((base + 0.25 * (layer(x) - base)).square().sum(), parameters)
    for g, e in zip(got, expected, strict=True):
        torch.testing.assert_close(g, e, rtol=1e-4, atol=1e-4 * e.abs().max().item())


def test_experts_embeddings_and_tokens() -> None:
    model = mixture("mixtral")
    ids = torch.randint(0, 64, (2, 6))
    lo.adapt(model, lo.LoRA(4), targets=["gate_up_proj", "down_proj", "q_proj", "embed_tokens"])
    model = moved(model).eval()
    name, layer = next((n, m) for n, m in model.named_modules() if type(m).__name__ == "ExpertsLinear")
    embedding = model.get_input_embeddings()
    with torch.no_grad():
        full = embedding(ids)
        with lo.disabled(model):
            base = embedding(ids)
        with lo.strength(model, 0.3):
            torch.testing.assert_close(embedding(ids), base + 0.3 * (full - base))
            assert layer.strength == 0.3, name
            weak = model(ids).logits
            torch.testing.assert_close(lo.merge(copy.deepcopy(model))(ids).logits, weak, rtol=1e-3, atol=1e-3)
        assert not torch.allclose(model(ids).logits, weak)


def test_a_strength_is_not_saved(tmp_path: Path) -> None:
    model, x = of(lo.LoRA(4)), torch.randn(3, 40)
    full = model(x)
    lo.set_strength(model, 0.1)
    lo.save_adapter(model, tmp_path / "a")
    copied = copy.deepcopy(model)
    assert_bits_equal(copied(x), model(x))
    other = lo.load_adapter(lo.adapt(Net(), None), tmp_path / "a")
    assert_bits_equal(other(x), full)
    lo.load_adapter(model, tmp_path / "a")
    lo.set_strength(model, 1)
    assert_bits_equal(model(x), full)


def test_bad_strengths() -> None:
    model = of(lo.LoRA(4))
    for wrong in (True, "1", None, torch.ones(2)):
        with pytest.raises(TypeError, match="strength must be a number, got"):
            lo.set_strength(model, wrong)  # type: ignore[arg-type]
    for wrong in (float("nan"), float("inf")):
        with pytest.raises(ValueError, match="strength must be finite, got"), lo.strength(model, wrong):
            pass
    with pytest.raises(ValueError, match="has no adapter"):
        lo.set_strength(Net(), 0.5)
    assert model.first.strength == 1
    with pytest.raises(KeyError), lo.strength(model, 0.5), lo.strength(model, 0.2):
        raise KeyError
    assert model.first.strength == 1
