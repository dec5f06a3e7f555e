"""Embeddings in 4 bits: loaded with a model, tied to its head, saved, adapted, merged and routed."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import models
import pytest
import torch
from helpers import assert_bits_equal
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM, Gemma3ForCausalLM, Gemma3TextConfig, LlamaConfig, LlamaForCausalLM

import lowrank_ops as lo

IDS = torch.arange(12).view(2, 6)
SIZES: dict[str, Any] = {
    "vocab_size": 99, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1, "num_attention_heads": 4,
    "num_key_value_heads": 1, "pad_token_id": 0,
}  # fmt: skip
MAKES = {
    "untied": lambda: LlamaForCausalLM(LlamaConfig(**SIZES)),
    "tied": lambda: LlamaForCausalLM(LlamaConfig(**SIZES, tie_word_embeddings=True)),
    "scaled": lambda: Gemma3ForCausalLM(Gemma3TextConfig(**SIZES, head_dim=16)),
}


@pytest.fixture(scope="module", params=MAKES)
def directory(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp(request.param)
    MAKES[request.param]().save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def tied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("tied")
    MAKES["tied"]().save_pretrained(path)
    return path


def load(path: Path, config: Any = None, **options: Any) -> Any:
    if config is not None:
        options["quantization_config"] = config
    return AutoModelForCausalLM.from_pretrained(path, **options).eval()


def in_4_bits(path: Path, **options: Any) -> Any:
    return load(path, lo.NF4Config(embeddings="nf4"), **options)


def logits(model: nn.Module) -> torch.Tensor:
    return model(IDS).logits.detach()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_with_its_embedding_in_4_bits(directory: Path, tmp_path: Path, dtype: torch.dtype) -> None:
    model, dense = in_4_bits(directory, dtype=dtype), lo.adapt(load(directory, dtype=dtype), None)
    table, plain, head = model.get_input_embeddings(), dense.get_input_embeddings(), dense.lm_head
    is_tied = head.weight is plain.weight
    assert isinstance(table, lo.Embedding) and isinstance(table.weight, lo.NF4Weight)
    assert is_tied == (model.lm_head.weight is table.weight)
    weight = lo.NF4Weight.quantize(plain.weight)
    assert_bits_equal(table.weight.packed, weight.packed)
    plain.weight = nn.Parameter(weight.dequantize(), requires_grad=False)
    if is_tied:
        dense.lm_head = lo.Linear.from_weight(weight)
    assert_bits_equal(logits(model), logits(dense))
    model.tie_weights()
    model.save_pretrained(tmp_path)
    keys = load_file(tmp_path / "model.safetensors").keys()
    assert is_tied == all("lm_head" not in key for key in keys)
    # bitsandbytes has no such layer in transformers.
    assert json.loads((tmp_path / "config.json").read_text())["quantization_config"]["quant_method"] == "lowrank_ops"
    again = load(tmp_path)
    assert is_tied == (again.lm_head.weight is again.get_input_embeddings().weight)
    assert_bits_equal(logits(again), logits(model))


def test_a_lora_on_it(directory: Path, tmp_path: Path) -> None:
    model = lo.adapt(in_4_bits(directory), lo.LoRA(4), ["q_proj", "embed_tokens"])
    before = logits(model)
    optimizer = torch.optim.SGD(lo.adapter_parameters(model), 0.1)
    for _ in range(2):
        optimizer.zero_grad()
        model(IDS, labels=IDS).loss.backward()
        optimizer.step()
    assert model.model.embed_tokens.down.any()
    expected = logits(model)
    assert not torch.equal(expected, before)
    with lo.disabled(model):
        assert_bits_equal(logits(model), before)
    again = lo.adapt(in_4_bits(directory), lo.LoRA(4), ["q_proj", "embed_tokens"])
    again.load_state_dict(model.state_dict())
    assert_bits_equal(logits(again), expected)
    model.save_pretrained(tmp_path / "whole")
    assert_bits_equal(logits(load(tmp_path / "whole")), expected)
    lo.save_adapter(model, tmp_path / "adapter")
    assert_bits_equal(logits(lo.load_adapter(in_4_bits(directory), tmp_path / "adapter")), expected)
    pool = lo.AdapterPool(base := in_4_bits(directory), capacity_bytes=1 << 20)
    pool.load("one", tmp_path / "adapter")
    with torch.no_grad(), pool.route(["one", None]):
        routed = base(IDS).logits
    torch.testing.assert_close(routed, torch.stack([expected[0], before[1]]), rtol=1e-5, atol=1e-5)
    merged = lo.merge(model)
    table = merged.get_input_embeddings()
    assert type(table) is type(load(directory).get_input_embeddings())
    torch.testing.assert_close(logits(merged), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("options", [{"modules_to_save": ["embed_tokens"]}, {"trainable_token_indices": [3, 5]}])
def test_adapters_of_peft_that_have_an_embedding_of_their_own(
    tied: Path, tmp_path: Path, options: dict[str, Any]
) -> None:
    def base() -> Any:  # the dense model with the same numbers
        made = load(tied)
        made.load_state_dict(lo.merge(in_4_bits(tied)).state_dict())
        return made

    expected, _ = models.write_peft(base, tmp_path, IDS, **options)
    model = in_4_bits(tied)
    before = logits(model)
    pool = lo.AdapterPool(model, capacity_bytes=1 << 20)
    pool.load("one", tmp_path)
    with torch.no_grad(), pool.route(["one", None]):
        routed = model(IDS).logits
    torch.testing.assert_close(routed, torch.stack([expected[0], before[1]]), rtol=1e-5, atol=1e-5)
    assert not torch.equal(expected, before)
    loaded = lo.load_adapter(in_4_bits(tied), tmp_path)
    torch.testing.assert_close(logits(loaded), expected, rtol=1e-5, atol=1e-5)
    loaded(IDS, labels=IDS).loss.backward()
    assert any("embed_tokens" in name and p.grad is not None for name, p in loaded.named_parameters())


@pytest.mark.parametrize(
    "config",
    [
        lo.FP4Config(embeddings="fp4", double_quant=False),
        lo.MXFP4Config(embeddings="mxfp4"),
        lo.NF4Config(embeddings="int8"),
        lo.MXFP4Config(embeddings="int8"),
    ],
)
def test_other_formats(tied: Path, tmp_path: Path, config: Any) -> None:
    model = load(tied, config)
    assert model.model.embed_tokens.weight.format.name == config.embeddings
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model.model.layers[0].self_attn.q_proj.weight.format.name == config.format
    model.save_pretrained(tmp_path)
    assert_bits_equal(logits(load(tmp_path)), logits(model))


def test_a_head_in_int8_alone(directory: Path, tmp_path: Path) -> None:
    model, dense = load(directory, lo.NF4Config(head="int8", block_size=32)), load(directory)
    weight = lo.Int8Weight.quantize(dense.lm_head.weight.detach(), 32)
    assert_bits_equal(model.lm_head.weight.packed, weight.packed)
    assert isinstance(model.get_input_embeddings(), nn.Embedding)
    assert not isinstance(model.get_input_embeddings(), lo.Embedding)
    model.save_pretrained(tmp_path)
    stored = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert (stored["quant_method"], stored["format"]) == ("lowrank_ops", "nf4")  # bitsandbytes has no such format
    again = load(tmp_path)
    assert isinstance(again.lm_head.weight, lo.Int8Weight)
    assert_bits_equal(logits(again), logits(model))


def test_files_that_have_the_tied_head_alone(tied: Path, tmp_path: Path) -> None:
    state = load_file(tied / "model.safetensors")
    state["lm_head.weight"] = state.pop("model.embed_tokens.weight")
    save_file(state, tmp_path / "model.safetensors", {"format": "pt"})
    (tmp_path / "config.json").write_text((tied / "config.json").read_text())
    model = in_4_bits(tmp_path)
    assert model.model.embed_tokens.weight is model.lm_head.weight
    assert_bits_equal(logits(model), logits(in_4_bits(tied)))


def test_what_is_refused(tied: Path) -> None:
    with pytest.raises(ValueError, match="embeddings must be 'nf4', 'int8' or None, got True"):
        lo.NF4Config(embeddings=True)
    with pytest.raises(
        ValueError, match=r"safetensors: 'model.embed_tokens.weight': a row .* whole blocks of 128 .*\[99, 64\]"
    ):
        load(tied, lo.NF4Config(block_size=128, embeddings="nf4"))
    with pytest.raises(ValueError, match="a ModuleDict, has no nn.Embedding"):
        lo.NF4Config(embeddings="nf4").choose(nn.ModuleDict({"layer": nn.Linear(8, 8)}))


@pytest.mark.parametrize("places", ["cpu", {"": "cpu"}, {"model": "cpu", "lm_head": "cpu"}])
@pytest.mark.parametrize("embeddings", [None, "nf4"])
def test_device_map(directory: Path, places: Any, embeddings: str | None) -> None:
    model = load(directory, lo.NF4Config(embeddings=embeddings), device_map=places)
    assert_bits_equal(logits(model), logits(load(directory, lo.NF4Config(embeddings=embeddings))))
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # an embedding is not left out: it was not asked for
        lo.adapt(model, lo.LoRA(4))
    model(IDS, labels=IDS).loss.backward()
    assert all(p.grad is not None for p in lo.adapter_parameters(model))
