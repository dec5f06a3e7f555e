"""Tied weights of transformers' models after a tied layer was adapted: tie_weights(), saving and loading."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import (
    BertConfig,
    BertForMaskedLM,
    LlamaConfig,
    LlamaForCausalLM,
    PretrainedConfig,
    PreTrainedModel,
    UMT5Config,
    UMT5ForConditionalGeneration,
)

import lowrank_ops as lo

IDS = torch.arange(12).view(2, 6) + 3


def llama() -> Any:
    config = LlamaConfig(
        vocab_size=96, hidden_size=64, intermediate_size=96, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, tie_word_embeddings=True,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def bert() -> Any:
    config = BertConfig(vocab_size=96, hidden_size=64, num_hidden_layers=1, num_attention_heads=2, intermediate_size=96)
    return BertForMaskedLM(config).eval()


def umt5() -> Any:  # its forward asks the configuration whether the head is tied
    config = UMT5Config(
        vocab_size=96, d_model=64, d_kv=16, d_ff=96, num_layers=1, num_heads=4, tie_word_embeddings=True
    )
    return UMT5ForConditionalGeneration(config).eval()


def logits(model: Any) -> torch.Tensor:
    more = {"decoder_input_ids": IDS} if model.config.is_encoder_decoder else {}
    with torch.no_grad():
        return model(input_ids=IDS, **more).logits


def adapted_head(model: Any, quantize: str | None = "nf4") -> str:
    name = next(name for name, m in model.named_modules() if m is model.get_output_embeddings())
    lo.adapt(model, lo.LoRA(4), targets=[name], quantize=quantize)
    nn.init.normal_(model.get_submodule(name).up, std=0.1)
    return name


@pytest.mark.parametrize("make", [llama, bert, umt5])
def test_an_adapted_head_stays_when_weights_are_tied_again(make: Any, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = make()
    name = adapted_head(model)
    before, twin = logits(model), copy.deepcopy(model)
    for tied in (model, twin):
        tied.tie_weights()
        tied.tie_weights(recompute_mapping=False)
        tied.resize_token_embeddings(96)  # as many as there are: scripts ask for it without need
        assert isinstance(tied.get_submodule(name).weight, lo.NF4Weight)
        torch.testing.assert_close(logits(tied), before, rtol=0, atol=0)
    # What else is tied stays so: biases in BERT, the embeddings of the two stacks in UMT5.
    if make is bert:
        assert model.cls.predictions.decoder.bias is model.cls.predictions.bias
    if make is umt5:
        assert model.encoder.embed_tokens.weight is model.shared.weight
    lo.save_adapter(model, tmp_path / "adapter")
    torch.manual_seed(0)
    again = lo.load_adapter(make(), tmp_path / "adapter")
    again.tie_weights()
    assert torch.equal(again.get_submodule(name).up, model.get_submodule(name).up)
    lo.merge(model)
    model.tie_weights()
    torch.testing.assert_close(logits(model), before, rtol=1e-4, atol=1e-4)
    model.save_pretrained(tmp_path / "merged")
    torch.testing.assert_close(
        logits(type(model).from_pretrained(tmp_path / "merged").eval()), before, rtol=1e-4, atol=1e-4
    )


def test_a_dense_head_stays_tied_and_can_be_saved(tmp_path: Path) -> None:
    model = llama()
    adapted_head(model, quantize=None)
    before = logits(model)
    model.tie_weights()
    torch.testing.assert_close(logits(model), before, rtol=0, atol=0)
    model.save_pretrained(tmp_path)
    lo.merge(model).tie_weights()
    torch.testing.assert_close(logits(model), before, rtol=1e-4, atol=1e-4)


def test_a_tied_head_that_is_quantised_while_it_is_read(tmp_path: Path) -> None:
    dense = llama()
    dense.save_pretrained(tmp_path / "dense")
    model = LlamaForCausalLM.from_pretrained(tmp_path / "dense", quantization_config=lo.NF4Config(head="nf4"))
    expected = lo.NF4Weight.quantize(dense.lm_head.weight).dequantize()
    model.tie_weights()
    model.save_pretrained(tmp_path / "packed")
    again = LlamaForCausalLM.from_pretrained(tmp_path / "packed")
    again.tie_weights()
    for loaded in (model, again):
        assert torch.equal(loaded.lm_head.weight.dequantize(), expected)
        assert torch.equal(loaded.model.embed_tokens.weight, dense.model.embed_tokens.weight)
    torch.testing.assert_close(logits(again), logits(model), rtol=0, atol=0)


class Boxes(PreTrainedModel):
    """Ties by a pattern, as models of object detection have them."""

    config_class = PretrainedConfig
    _tied_weights_keys = {r"heads.(?![0])\d+": "heads.0"}

    def __init__(self, config: PretrainedConfig) -> None:
        super().__init__(config)
        self.heads = nn.ModuleList(nn.Linear(32, 32) for _ in range(3))
        self.post_init()


def test_ties_by_a_pattern() -> None:
    model = Boxes(PretrainedConfig(tie_word_embeddings=True))
    assert model.heads[2].weight is model.heads[0].weight
    lo.adapt(model, lo.LoRA(4), targets=["heads.1"])
    model.tie_weights()
    assert isinstance(model.heads[1].weight, lo.NF4Weight) and model.heads[1].bias is model.heads[0].bias
    assert model.heads[2].weight is model.heads[0].weight
