"""adapt, adapter_parameters and merge on plain modules and on Hugging Face models."""

from __future__ import annotations

import copy
import importlib
import pickle
import warnings
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import assert_bits_equal
from models import adapted, gpt2, llama, plain, snapshot
from torch import nn

import lowrank_ops as lo
from lowrank_ops.adapters import model as model_module
from lowrank_ops.adapters.frozen import is_plain_linear
from lowrank_ops.svd.store import FactorStore


def test_plain_module() -> None:
    model = plain()
    assert lo.adapt(model, lo.LoRA(4)) is model
    assert adapted(model) == ["0", "2.0", "2.1"]
    trained = {id(p) for p in lo.adapter_parameters(model)}
    assert len(trained) == 6
    assert {id(p) for p in model.parameters() if p.requires_grad} == trained


@pytest.mark.parametrize("make", [llama, gpt2])
def test_hugging_face_model(make) -> None:  # type: ignore[no-untyped-def]
    model = make()
    tokens = torch.randint(0, 99, (2, 7))
    expected = model(tokens).logits
    lo.adapt(model, lo.LoRA(4), quantize=None)
    assert "lm_head" not in adapted(model) and len(adapted(model)) == (14 if make is llama else 4)
    torch.testing.assert_close(model(tokens).logits, expected, rtol=1e-4, atol=1e-5)
    loss = model(tokens, labels=tokens).loss
    loss.backward()
    assert all(p.grad is not None for p in lo.adapter_parameters(model))
    assert model.get_input_embeddings().weight.grad is None


def test_quantised_llama_trains_and_generates() -> None:
    model = lo.adapt(llama(), lo.LoRA(4))
    tokens = torch.randint(0, 99, (4, 12))
    optimizer = torch.optim.AdamW(lo.adapter_parameters(model), lr=1e-2)
    losses = []
    for _ in range(8):
        loss = model(tokens, labels=tokens).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.1
    assert model.generate(tokens[:1, :4], max_new_tokens=3, min_new_tokens=3, do_sample=False).shape == (1, 7)


@pytest.mark.parametrize(
    "targets, expected",
    [
        (["q_proj", "v_proj"], {f"model.layers.{i}.self_attn.{p}_proj" for i in (0, 1) for p in "qv"}),
        (["layers.1.mlp.up_proj"], {"model.layers.1.mlp.up_proj"}),
        (r".*\.0\..*(gate|up)_proj", {f"model.layers.0.mlp.{p}_proj" for p in ("gate", "up")}),
        (["lm_head"], {"lm_head"}),
        ({"layers.0.mlp.up_proj"}, {"model.layers.0.mlp.up_proj"}),  # as PEFT keeps them
    ],
)
def test_targets(targets, expected: set[str]) -> None:  # type: ignore[no-untyped-def]
    assert set(adapted(lo.adapt(llama(), lo.LoRA(2), targets=targets))) == expected


def test_quantise_only() -> None:
    model = lo.adapt(plain(), None)
    assert not any(p.requires_grad for p in model.parameters())
    with pytest.raises(ValueError, match="no adapter"):
        lo.adapter_parameters(model)


def test_shared_layers_stay_shared() -> None:
    shared = nn.Linear(32, 32)
    model = nn.ModuleDict({"a": shared, "b": nn.Sequential(shared)})
    lo.adapt(model, lo.LoRA(4))
    assert isinstance(model["a"], lo.Linear) and model["a"] is model["b"][0]


def test_merge_gives_back_plain_linears() -> None:
    model = lo.adapt(llama().bfloat16(), lo.LoRA(4))
    for p in lo.adapter_parameters(model):
        nn.init.normal_(p, std=0.1)
    tokens = torch.randint(0, 99, (2, 7))
    before = model(tokens).logits.float()
    wanted = {n: m.merged_weight() for n, m in model.named_modules() if isinstance(m, lo.Linear)}
    assert lo.merge(model) is model
    assert not adapted(model)
    for name, weight in wanted.items():
        module = model.get_submodule(name)
        assert type(module) is nn.Linear and module.weight.dtype == torch.bfloat16
        assert_bits_equal(module.weight.detach(), weight)
    torch.testing.assert_close(model(tokens).logits.float(), before, rtol=0.1, atol=0.05)
    with pytest.raises(ValueError, match="no lowrank_ops.Linear"):
        lo.merge(model)


def test_merging_gives_back_a_conv1d(tmp_path: Path) -> None:
    # GPT-2 stores [K, N]: a square weight of an nn.Linear would load the wrong way round without a word.
    model = lo.adapt(gpt2(), lo.LoRA(4))
    for p in lo.adapter_parameters(model):
        nn.init.normal_(p, std=0.1)
    tokens = torch.randint(0, 99, (2, 7))
    expected = model(tokens).logits
    lo.merge(model).save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path).eval()
    torch.testing.assert_close(again(tokens).logits, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("quantize", ["nf4", None])
@pytest.mark.parametrize("targets", ["all-linear", ["layers.1.linear1"]])
def test_torch_transformer_encoder_uses_the_adapter_in_eval(quantize: str | None, targets: str | list[str]) -> None:
    # Its fused eval paths read the weights themselves and must not be taken while adapters are in.
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(32, 4, 64, dropout=0.0, batch_first=True)
    encoder = nn.TransformerEncoder(layer, 2)
    lo.adapt(encoder, lo.LoRA(4), targets, quantize)
    everywhere = [f"layers.{i}.linear{j}" for i in (0, 1) for j in (1, 2)]
    assert adapted(encoder) == (everywhere if targets == "all-linear" else targets)
    for p in lo.adapter_parameters(encoder):
        nn.init.normal_(p)
    x, mask = torch.randn(3, 6, 32), torch.zeros(3, 6, dtype=torch.bool)
    mask[0, 4:] = True
    with torch.no_grad():
        expected = encoder.train()(x, src_key_padding_mask=mask)
        got = encoder.eval()(x, src_key_padding_mask=mask)
        torch.testing.assert_close(got[~mask], expected[~mask])
        lo.merge(encoder)
        assert encoder.use_nested_tensor and all(layer.activation_relu_or_gelu == 1 for layer in encoder.layers)
        merged = encoder.eval()(x, src_key_padding_mask=mask)
        torch.testing.assert_close(merged[~mask], expected[~mask], rtol=1e-4, atol=1e-4)


def test_a_classification_head_is_left_alone() -> None:
    from transformers import BertConfig, BertForSequenceClassification

    config = BertConfig(
        vocab_size=99, hidden_size=64, num_hidden_layers=1, num_attention_heads=2, intermediate_size=128
    )
    model = lo.adapt(BertForSequenceClassification(config), lo.LoRA(16))
    assert is_plain_linear(model.classifier) and len(adapted(model)) == 7


def test_the_layers_of_a_classification_head_are_left_alone() -> None:
    from transformers import (
        DistilBertConfig,
        DistilBertForSequenceClassification,
        RobertaConfig,
        RobertaForSequenceClassification,
    )

    roberta = RobertaForSequenceClassification(
        RobertaConfig(vocab_size=99, hidden_size=64, num_hidden_layers=1, num_attention_heads=2, intermediate_size=128)
    )
    assert not any(name.startswith("classifier") for name in adapted(lo.adapt(roberta, lo.LoRA(16))))
    distilbert = DistilBertForSequenceClassification(
        DistilBertConfig(vocab_size=99, dim=64, n_layers=1, n_heads=2, hidden_dim=128)
    )
    assert "pre_classifier" not in adapted(lo.adapt(distilbert, lo.LoRA(16)))


def bert(**more: Any) -> Any:
    from transformers import BertConfig

    return BertConfig(
        vocab_size=99, hidden_size=64, num_hidden_layers=1, num_attention_heads=2, intermediate_size=128, **more
    )


class Wrapper(nn.Module):
    """A user's module around a Hugging Face model, with a head of its own."""

    def __init__(self, encoder: nn.Module, name: str, head: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder
        setattr(self, name, head)


@pytest.mark.parametrize("name", ["classifier", "value_head"])
def test_a_head_beside_a_wrapped_model_is_left_alone_and_named(name: str) -> None:
    from transformers import BertModel

    head = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 3))
    model = nn.ModuleDict({"net": Wrapper(BertModel(bert()), name, head)})
    with pytest.warns(UserWarning, match=rf"leaves out net\.{name}\.0, net\.{name}\.2 beside the Hugging Face model"):
        lo.adapt(model, lo.LoRA(2))
    names = adapted(model)
    assert len(names) == 7 and all(n.startswith("net.encoder.") for n in names)
    lo.adapt(Wrapper(BertModel(bert()), name, head), lo.LoRA(2), [f"{name}.0"])  # where it is named, it is meant


def test_a_head_inside_a_wrapped_model_is_left_alone(recwarn) -> None:  # type: ignore[no-untyped-def]
    from transformers import BertForSequenceClassification

    model = nn.Sequential(BertForSequenceClassification(bert()))
    assert len(adapted(lo.adapt(model, lo.LoRA(2)))) == 7
    assert not [w for w in recwarn if "leaves out" in str(w.message)]
    assert len(adapted(lo.adapt(nn.Sequential(llama(), nn.ReLU()), lo.LoRA(2)))) == 14  # not 0.lm_head


def test_what_only_looks_linear_is_left_alone() -> None:
    class Scaled(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return 10 * super().forward(x)

    model = nn.Sequential(Scaled(32, 32), nn.Linear(32, 32))
    x = torch.randn(4, 32)
    expected = model(x)
    torch.testing.assert_close(lo.adapt(model, lo.LoRA(4), quantize=None)(x), expected)
    with pytest.raises(ValueError, match="match no linear layer"):
        lo.adapt(nn.Sequential(Scaled(32, 32), nn.Linear(32, 32)), lo.LoRA(4), ["0"])


def test_an_embedding_in_4_bits_is_left_alone() -> None:
    import bitsandbytes as bnb

    model = nn.Sequential(bnb.nn.Embedding4bit(99, 64, quant_type="nf4"), nn.Linear(64, 64)).to("cpu")
    assert adapted(lo.adapt(model, lo.LoRA(4))) == ["1"]
    assert model(torch.randint(0, 99, (2, 3))).shape == (2, 3, 64)


def check_plain(model: Any) -> None:
    """Nothing says that a model is quantised."""
    assert model.is_quantized is False
    for name in ("hf_quantizer", "quantization_method", "is_loaded_in_4bit", "is_4bit_serializable"):
        assert not hasattr(model, name), name
    assert not hasattr(model.config, "quantization_config") and not hasattr(model.config, "_is_quantized")


def test_a_model_that_transformers_loaded_in_4_bits(tmp_path: Path) -> None:
    import bitsandbytes
    from transformers import BitsAndBytesConfig, LlamaForCausalLM
    from transformers.trainer_utils import validate_quantization_for_training

    llama().save_pretrained(tmp_path / "base")
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    model = LlamaForCausalLM.from_pretrained(tmp_path / "base", quantization_config=config, device_map="cpu")
    with pytest.warns(
        UserWarning, match=r"12 layers stay bitsandbytes' .* call lowrank_ops.adapt\(model, None, "
    ) as seen:
        lo.adapt(model, lo.LoRA(4), ["q_proj"])
    assert model.is_quantized  # transformers must still know about the other layers' bytes
    code = str(seen[0].message).partition("call ")[2]
    exec(code, {"lowrank_ops": lo, "bitsandbytes": bitsandbytes, "model": model})
    check_plain(model)
    validate_quantization_for_training(model)  # as Trainer asks
    model.to(torch.float32)
    lo.merge(model).save_pretrained(tmp_path / "merged")
    again = LlamaForCausalLM.from_pretrained(tmp_path / "merged")
    tokens = torch.randint(0, 99, (2, 7))
    torch.testing.assert_close(again(tokens).logits, model.eval()(tokens).logits)


def test_a_model_that_transformers_read_from_gguf(tmp_path: Path) -> None:
    gguf = pytest.importorskip("transformers.quantizers.quantizer_gguf")
    from transformers import GgufConfig, LlamaForCausalLM
    from transformers.trainer_utils import validate_quantization_for_training

    model = llama()
    quantizer = gguf.GgufHfQuantizer.__new__(gguf.GgufHfQuantizer)  # without the kernels that it looks for
    quantizer.quantization_config = GgufConfig(dequantize=True)
    quantizer.pre_quantized = False
    model.is_quantized, model.quantization_method = True, quantizer.quantization_config.quant_method
    model.hf_quantizer, model.config.quantization_config = quantizer, quantizer.quantization_config
    model.config._is_quantized = True
    with pytest.raises(ValueError, match="purely quantized"):
        validate_quantization_for_training(model)
    model.model.rotary_emb.packed = nn.Parameter(torch.zeros(2, dtype=torch.uint8), requires_grad=False)
    lo.adapt(model, lo.LoRA(4), ["q_proj"])
    assert model.is_quantized and model.hf_quantizer is quantizer  # a layer is still packed
    del model.model.rotary_emb.packed
    lo.adapt(model, lo.LoRA(4), ["v_proj"])
    check_plain(model)
    validate_quantization_for_training(model)
    lo.merge(model).save_pretrained(tmp_path)
    LlamaForCausalLM.from_pretrained(tmp_path)


def test_a_model_that_diffusers_loaded_in_4_bits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    diffusers = pytest.importorskip("diffusers")
    quantizer = importlib.import_module("diffusers.quantizers.bitsandbytes.bnb_quantizer").BnB4BitDiffusersQuantizer
    # It asks for a GPU, which bitsandbytes does not need.
    monkeypatch.setattr(quantizer, "validate_environment", lambda self, *args, **kwargs: None)
    monkeypatch.setattr(quantizer, "update_device_map", lambda self, device_map: {"": "cpu"})
    options = {
        "num_attention_heads": 2,
        "attention_head_dim": 32,
        "in_channels": 64,
        "num_layers": 1,
        "norm_num_groups": 32,
    }
    diffusers.Transformer2DModel(**options).save_pretrained(tmp_path / "base")
    config = diffusers.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    model = diffusers.Transformer2DModel.from_pretrained(tmp_path / "base", quantization_config=config)
    assert model.is_quantized and "quantization_config" in model.config
    lo.adapt(model, lo.LoRA(4))
    check_plain(model)
    assert "quantization_config" not in model.config and model.config.num_layers == 1
    lo.merge(model).to(torch.float32).save_pretrained(tmp_path / "merged")
    assert "quantization_config" not in (tmp_path / "merged" / "config.json").read_text()
    again = diffusers.Transformer2DModel.from_pretrained(tmp_path / "merged")
    x = torch.randn(1, 64, 8, 8)
    torch.testing.assert_close(again(x).sample, model.eval()(x).sample)


def peft_model() -> nn.Module:
    from peft import LoraConfig, get_peft_model

    return get_peft_model(llama(), LoraConfig(r=4, target_modules=["q_proj"]))


def test_progress_on_a_large_model(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(model_module, "_PROGRESS_FROM", 1)
    lo.adapt(plain(), lo.LoRA(4))
    assert "adapting" in capsys.readouterr().err


class Scaled(nn.Linear):
    """A linear layer with its own forward, as the quantised layers of other packages are."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 10 * super().forward(x)


def with_nan() -> nn.Module:
    model = plain()
    with torch.no_grad():
        model[2][1].weight[0, 0] = float("nan")
    return model


@pytest.mark.parametrize(
    "error, message, make, arguments",
    [
        (ValueError, r"\['query'\] match no linear layer.*q_proj", llama, (lo.LoRA(2), ["query"])),
        (ValueError, r"\['zz'\] match no", llama, (lo.LoRA(2), ["q_proj", "zz"])),
        (ValueError, "match no linear layer", llama, (lo.LoRA(2), "q_proj")),
        (ValueError, "regular expression", llama, (lo.LoRA(2), "(")),
        (ValueError, "targets must not be empty", llama, (lo.LoRA(2), [])),
        (TypeError, "targets must be", llama, (lo.LoRA(2), [0])),
        (TypeError, "targets must be.*got None", llama, (lo.LoRA(2), None)),
        (TypeError, "targets must be.*got {'q_proj': 2}", llama, (lo.LoRA(2), {"q_proj": 2})),
        (ValueError, "'model.embed_tokens' is of class Embedding, which", llama, (lo.SVF(), ["embed_tokens"])),
        (
            ValueError,
            "no linear layer; '0' is of class Scaled, which",
            lambda: nn.Sequential(Scaled(8, 8)),
            (lo.LoRA(2),),
        ),
        (TypeError, "adapter must be a LoRA", llama, ("lora",)),
        (ValueError, "q_proj' is adapted by PEFT already", peft_model, (lo.LoRA(2),)),
        (ValueError, "layer '2.1': rank must be at most", plain, (lo.LoRA(9), ["0", "2.1"])),
        (ValueError, "layer '0': rank must be at most", plain, (lo.LoRA(33),)),
        (ValueError, "layer '2.1': weight must be finite", with_nan, (lo.LoRA(4),)),
        (ValueError, "layer '2.1': weight must be finite", with_nan, (lo.LoRA(4), "all-linear", None)),
        (ValueError, "quantize must be", plain, (lo.LoRA(4), "all-linear", "int4")),
        (ValueError, r"layer '0' has an adapter already", lambda: lo.adapt(plain(), lo.LoRA(4)), (lo.LoRA(4),)),
        (ValueError, "itself a linear layer", lambda: nn.Linear(4, 4), (lo.LoRA(2),)),
        (ValueError, "no linear layer", lambda: nn.Sequential(nn.ReLU()), (lo.LoRA(2),)),
        (ValueError, "layer '0': .*meta device", lambda: nn.Sequential(nn.Linear(8, 8, device="meta")), (lo.LoRA(2),)),
        (TypeError, "layer '0': .*float64", lambda: nn.Sequential(nn.Linear(8, 8).double()), (lo.LoRA(2),)),
        (
            ValueError,
            "MultiheadAttention",
            lambda: nn.ModuleDict({"attention": nn.MultiheadAttention(8, 2)}),
            (lo.LoRA(2), ["out_proj"]),
        ),
    ],
)
def test_a_failed_adapt_changes_nothing(error: type[Exception], message: str, make, arguments: tuple) -> None:  # type: ignore[no-untyped-def]
    model = make()
    description, state, trained = snapshot(model)
    with pytest.raises(error, match=message):
        lo.adapt(model, *arguments)
    assert repr(model) == description
    assert {name: p.requires_grad for name, p in model.named_parameters()} == trained
    for key, value in model.state_dict().items():
        if value.device.type != "meta":
            assert_bits_equal(value, state[key])


def test_each_dense_weight_is_freed_before_the_next_is_quantised(monkeypatch: pytest.MonkeyPatch) -> None:
    model, alive = plain(), []
    weights = [weakref.ref(p) for p in model.parameters() if p.dim() == 2]
    original = lo.Linear.from_linear.__func__

    def from_linear(cls: type, *arguments):  # type: ignore[no-untyped-def]
        alive.append(sum(weight() is not None for weight in weights))
        return original(cls, *arguments)

    monkeypatch.setattr(lo.Linear, "from_linear", classmethod(from_linear))
    lo.adapt(model, lo.LoRA(4))
    assert alive == [3, 2, 1]


def test_a_damaged_file_of_factors_is_found_before_a_layer_is_replaced(tmp_path: Path) -> None:
    model = plain()
    store = FactorStore(tmp_path)
    last = model[2][1].weight.detach()
    store.save(last, lo.truncated_svd(last, 4))
    (file,) = tmp_path.glob("*.safetensors")
    file.write_bytes(file.read_bytes()[:-8])
    before = snapshot(model)
    with pytest.raises(ValueError, match="layer '2.1': .*damaged"):
        lo.adapt(model, lo.SVF(rank=4), factors=tmp_path)
    assert repr(snapshot(model)) == repr(before)


def test_layers_without_an_adapter_may_stay_dense() -> None:
    model = plain()
    x = torch.randn(3, model[0].in_features)
    before = model(x)
    lo.adapt(model, None, quantize=None)
    assert isinstance(model[0], lo.Linear) and model[0].adapter is None
    torch.testing.assert_close(model(x), before)


def test_a_deep_copy_is_independent() -> None:
    model = lo.adapt(plain(), lo.LoRA(4))
    twin = copy.deepcopy(model)
    nn.init.normal_(lo.adapter_parameters(twin)[1])
    assert not model[0].up.any()


# ---- what is covered and cannot be adapted


class OwnLinear(nn.Linear):
    """A linear layer with another forward, such as Linear8bitLt or GGUFLinear."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) * 2


class PackedLinear(nn.Module):
    """A layer such as AWQ's or GPTQ's: not an nn.Linear, with buffers instead of a weight."""

    def __init__(self) -> None:
        super().__init__()
        self.in_features = self.out_features = 32
        self.register_buffer("packed", torch.zeros(32, 4, dtype=torch.int32))


class Experts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.act = nn.SiLU()
        self.up_proj = nn.Parameter(torch.zeros(4, 32, 16))


class Mixed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.token = nn.Parameter(torch.zeros(1, 1, 32))
        self.embed, self.norm = nn.Embedding(10, 32), nn.LayerNorm(32)
        self.patch = nn.ModuleDict({"proj": nn.Conv2d(3, 32, 4), "norm": nn.GroupNorm(4, 32)})
        self.audio = nn.ModuleDict({"proj": nn.Conv1d(3, 32, 3)})
        self.wrapped = nn.ModuleDict({"proj": nn.Sequential(nn.Linear(32, 32), nn.Dropout())})
        self.mlp = nn.ModuleDict({"proj": nn.Linear(32, 32), "own": nn.ModuleList(OwnLinear(32, 32) for _ in range(5))})
        self.packed, self.experts = PackedLinear(), Experts()
        self.attention = nn.MultiheadAttention(32, 4)


OWN = "5 layers of class OwnLinear (mlp.own.0, mlp.own.1, mlp.own.2, …)"
PACKED, EXPERTS = "1 layer of class PackedLinear (packed)", "1 layer of class Experts (experts)"
CONV2D, CONV1D = "1 layer of class Conv2d (patch.proj)", "1 layer of class Conv1d (audio.proj)"


@pytest.mark.parametrize(
    "targets, left",
    [
        ("all-linear", [CONV2D, CONV1D, OWN, PACKED, EXPERTS, "1 layer of class MultiheadAttention (attention)"]),
        (["proj"], ["1 layer of class Sequential (wrapped.proj)"]),
        (r".*\.proj", ["1 layer of class Sequential (wrapped.proj)"]),
        (r"(?!attention).*", [OWN, PACKED, EXPERTS]),
        (iter(["mlp.proj", "own.1", "own.0"]), None),  # names that match no linear layer are refused
        (iter(["mlp.proj"]), []),
        (r"(mlp|norm|patch\.norm).*proj|norm|patch", ["1 layer of class ModuleDict (patch)"]),
    ],
    ids=str,
)
def test_what_is_covered_and_left_out_is_said_once(targets, left, recwarn) -> None:  # type: ignore[no-untyped-def]
    model = Mixed()
    if left is None:
        with pytest.raises(ValueError, match="OwnLinear, which cannot be adapted"):
            lo.adapt(model, lo.LoRA(2), targets)
        return
    lo.adapt(model, lo.LoRA(2), targets)
    said = [str(w.message) for w in recwarn if "left out" in str(w.message)]
    assert len(said) == bool(left)
    if left:
        assert all(text in said[0] for text in left) and said[0].startswith(f"adapt left out {left[0]}")
        assert all(w.filename == __file__ for w in recwarn if "left out" in str(w.message))


@pytest.mark.parametrize("make", [plain, llama, gpt2])
@pytest.mark.parametrize("targets", ["all-linear", ["up_proj", "fc", "0"], r".*(proj|0|attn|mlp|norm).*"])
def test_ordinary_models_warn_of_nothing(make, targets, recwarn) -> None:  # type: ignore[no-untyped-def]
    model = make()
    known = {name.rpartition(".")[2] for name, m in model.named_modules() if not list(m.children())}
    targets = [t for t in targets if t in known] or ["c_attn"] if isinstance(targets, list) else targets
    lo.adapt(model, lo.LoRA(2), targets=targets)
    assert not [str(w.message) for w in recwarn if "left out" in str(w.message)]


def test_a_head_of_another_class_is_left_out_as_heads_are(recwarn) -> None:  # type: ignore[no-untyped-def]
    model = llama()
    model.lm_head = OwnLinear(64, 99, bias=False)
    lo.adapt(model, lo.LoRA(2))
    assert not [w for w in recwarn if "left out" in str(w.message)]


def test_where_the_warning_is_an_error_the_model_stays_as_it_was() -> None:
    model = Mixed()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UserWarning, match="left out"):
            lo.adapt(model, lo.LoRA(2))
    assert not adapted(model) and all(p.requires_grad for p in model.parameters())


def test_parameter_groups_of_lora_plus() -> None:
    model = lo.adapt(plain(), lo.LoRA(2), targets=["0", "2.0"])
    model[2][1].requires_grad_()  # a head that trains with the adapters
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    groups = lo.parameter_groups(model, lr=0.25, lr_up=4)
    assert [group["lr"] for group in groups] == [0.25, 4] and [len(group["params"]) for group in groups] == [4, 2]
    model(torch.randn(3, 64)).sum().backward()
    torch.optim.SGD(groups, lr=7.0).step()
    for name, p in model.named_parameters():
        rate = 0.0 if p.grad is None else 4 if name.endswith("up") else 0.25
        torch.testing.assert_close(p.detach(), before[name] - rate * (0 if p.grad is None else p.grad))
    model[0].up.requires_grad_(False)
    assert [len(group["params"]) for group in lo.parameter_groups(model, lr=1, lr_up=1)] == [4, 1]


@pytest.mark.parametrize(
    "kind, rates, message",
    [
        (lo.LoRAXS(2), (1, 1), "no layer of the model trains U"),
        (None, (1, 1), "no layer of the model trains U"),
        (lo.LoRA(2), (-1, 1), "lr must be finite and not negative, got -1"),
        (lo.LoRA(2), (1, float("nan")), "lr_up must be finite"),
        (lo.LoRA(2), (1, "1"), "lr_up must be a number, got '1'"),
    ],
)
def test_parameter_groups_refuse(kind, rates, message: str) -> None:  # type: ignore[no-untyped-def]
    model = lo.adapt(plain(), kind)
    with pytest.raises((TypeError, ValueError), match=message):
        lo.parameter_groups(model, lr=rates[0], lr_up=rates[1])


class Joined(nn.Module):
    """Joins its projections as diffusers' attention does."""

    def __init__(self) -> None:
        super().__init__()
        self.to_q, self.to_k = nn.Linear(32, 32), nn.Linear(32, 32)

    def fuse_projections(self) -> str:
        return "fused"


def test_projections_are_not_fused_over_our_layers() -> None:
    model = nn.ModuleDict({"attn": Joined(), "other": Joined()})
    lo.adapt(model, lo.LoRA(2), ["attn.to_q"])
    for one in (model, pickle.loads(pickle.dumps(model))):
        with pytest.raises(ValueError, match="'attn.to_q' is a layer of lowrank_ops, and fusing"):
            one["attn"].fuse_projections()
    assert model["other"].fuse_projections() == "fused"
    assert lo.merge(model)["attn"].fuse_projections() == "fused"


@pytest.mark.parametrize("mark", ["quantization_method", "is_loaded_in_8bit"])
def test_every_quantizer_is_disowned_once_nothing_is_packed(mark: str) -> None:
    model = llama()
    model.is_quantized = True
    setattr(model, mark, "torchao")
    model.model.layers[0].packed = nn.Module()
    model.model.layers[0].packed.register_buffer("qweight", torch.zeros(4, 4, dtype=torch.int32))
    lo.adapt(model, None, ["q_proj"])
    assert model.is_quantized and hasattr(model, mark)
    del model.model.layers[0].packed
    lo.adapt(model, None, ["v_proj"])
    assert not model.is_quantized and not hasattr(model, mark)
