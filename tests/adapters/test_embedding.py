"""lowrank_ops.Embedding: against the dense equation, its training, and what it refuses."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import assert_bits_equal
from models import TOKENS, gemma, llama, tiny
from torch import nn

import lowrank_ops as lo


def table(dtype: torch.dtype = torch.float32) -> nn.Embedding:
    torch.manual_seed(0)
    return nn.Embedding(37, 19, padding_idx=3, dtype=dtype).requires_grad_(False)


def moved(layer: lo.Embedding) -> lo.Embedding:
    torch.manual_seed(1)
    for p in layer.trained():
        nn.init.normal_(p)
    return layer


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(5,), (2, 3), (0,), (1, 1, 2)])
def test_the_equation_and_its_gradients(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    layer = moved(lo.Embedding.from_embedding(table(dtype), lo.LoRA(5, alpha=7)))
    ids = torch.randint(37, shape)
    y = layer(ids)
    assert y.shape == (*shape, 19) and y.dtype == dtype
    wide = [p.detach().double().requires_grad_() for p in (layer.down, layer.up)]
    exact = (layer.weight.double() + 7 / 5 * (wide[1] @ wide[0]).T)[ids]
    torch.testing.assert_close(y, exact.to(dtype))
    g = torch.randn(*shape, 19).to(dtype)
    y.backward(g)
    mine = g.double().clone()
    mine[ids == 3] = 0  # the padding token's column of D is not trained
    (exact * g.double()).sum().backward()
    down = wide[0].grad.clone()
    down[:, 3] = 0
    torch.testing.assert_close(layer.down.grad.double(), down, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(layer.up.grad.double(), wide[1].grad, rtol=1e-5, atol=1e-5)
    assert layer.weight.grad is None
    merged = layer.merged_weight()
    torch.testing.assert_close(merged[ids], y.detach())


def test_it_starts_as_the_embedding_and_shares_its_weight() -> None:
    embedding = table()
    layer = lo.Embedding.from_embedding(embedding, lo.LoRA(4))
    ids = torch.arange(37)
    assert layer.weight is embedding.weight
    assert_bits_equal(layer(ids), embedding(ids))
    assert not layer.down.any() and layer.up.std() > 0.5
    layer.set_adapter(None)
    assert_bits_equal(layer(ids), embedding(ids))
    layer.set_adapter(lo.LoRA(2))
    assert layer.down.shape == (2, 37) and "37, 19, adapter=LoRA(rank=2" in repr(layer)


def test_in_a_model(tmp_path: Path) -> None:
    model = lo.adapt(gemma(), lo.LoRA(4), ["q_proj", "embed_tokens"])
    embedding = model.model.embed_tokens
    assert isinstance(embedding, lo.Embedding) and embedding.weight is model.lm_head.weight
    plain = gemma()
    lo.adapt(plain, lo.LoRA(4), ["q_proj"])
    assert_bits_equal(model(TOKENS).logits, plain(TOKENS).logits)
    before = model(TOKENS).logits
    optimizer = torch.optim.SGD(lo.adapter_parameters(model), 0.1)
    for _ in range(2):
        optimizer.zero_grad()
        model(TOKENS, labels=TOKENS).loss.backward()
        optimizer.step()
    assert embedding.down.any() and embedding.down.grad.any()
    expected = model(TOKENS).logits.detach()
    assert not torch.equal(expected, before)
    with lo.disabled(model):
        assert_bits_equal(model(TOKENS).logits, before)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), lo.reference(model)):
        assert_bits_equal(other(TOKENS).logits, expected)
    again = lo.adapt(gemma(), lo.LoRA(4), ["q_proj", "embed_tokens"])
    again.load_state_dict(model.state_dict())
    assert_bits_equal(again(TOKENS).logits, expected)
    model.save_pretrained(tmp_path)
    taken = lo.load_adapter(lo.adapt(gemma(), None, ["q_proj"]), tmp_path)
    assert_bits_equal(taken(TOKENS).logits, expected)
    assert_bits_equal(type(model).from_pretrained(tmp_path).eval()(TOKENS).logits, expected)
    groups = lo.parameter_groups(model, lr=1.0, lr_up=2.0)
    assert any(p is embedding.up for p in groups[1]["params"])
    merged = lo.merge(model)
    assert type(merged.model.embed_tokens) is type(gemma().model.embed_tokens)
    assert merged.model.embed_tokens.weight is not merged.lm_head.weight
    torch.testing.assert_close(merged(TOKENS).logits, expected, rtol=1e-5, atol=1e-5)


def test_it_compiles_and_checkpoints() -> None:
    layer = moved(lo.Embedding.from_embedding(table(), lo.LoRA(4)))
    ids = torch.arange(12).view(3, 4)
    assert_bits_equal(torch.compile(layer, backend="aot_eager", fullgraph=True)(ids), layer(ids))


@pytest.mark.parametrize(
    "error, message, make",
    [
        (TypeError, "must be an nn.Embedding, got Linear", lambda: (nn.Linear(4, 4), lo.LoRA(2))),
        (TypeError, "adapter must be a LoRA", lambda: (table(), "lora")),
        (
            ValueError,
            "init='kaiming' or 'gaussian', .*got LoRA\\(2, .*'pissa'",
            lambda: (table(), lo.LoRA(2, init="pissa")),
        ),
        (ValueError, "can have a LoRA .* got SVF", lambda: (table(), lo.SVF())),
        (ValueError, "rank must be at most .* = 19", lambda: (table(), lo.LoRA(20))),
        (ValueError, "max_norm=1", lambda: (nn.Embedding(8, 8, max_norm=1.0), lo.LoRA(2))),
        (ValueError, "meta device", lambda: (nn.Embedding(8, 8, device="meta"), lo.LoRA(2))),
    ],
)
def test_what_is_refused(error: type[Exception], message: str, make: Any) -> None:
    embedding, adapter = make()
    with pytest.raises(error, match=message):
        lo.Embedding.from_embedding(embedding, adapter)


def test_patterns_leave_small_tables_and_other_kinds_name_the_embedding() -> None:
    model = nn.ModuleDict({"layer": nn.Linear(8, 8), "large": nn.Embedding(16, 8), "small": nn.Embedding(2, 8)})
    lo.adapt(model, lo.LoRA(4), ".*")
    assert isinstance(model["large"], lo.Embedding) and type(model["small"]) is nn.Embedding
    with pytest.raises(ValueError, match="layer 'small': rank must be at most"):
        lo.adapt(model, lo.LoRA(4), ["small"])
    with pytest.raises(ValueError, match="'large' has an adapter already"):
        lo.adapt(model, lo.LoRA(4), ["large"])
    whole = lo.adapt(llama(), lo.LoRA(2))
    assert type(whole.model.embed_tokens) is nn.Embedding  # "all-linear" leaves embeddings


def test_a_file_for_another_kind_of_layer_is_refused(tmp_path: Path) -> None:
    model = lo.adapt(tiny(), lo.LoRA(4), ["q_proj", "embed_tokens"])
    lo.save_adapter(model, tmp_path)
    other = tiny()
    other.model.embed_tokens = nn.Linear(40, 32, bias=False)
    with pytest.raises(ValueError, match="tensors of an embedding for 'model.embed_tokens', which is a linear layer"):
        lo.load_adapter(other, tmp_path)
    shorter = tiny()
    shorter.resize_token_embeddings(39)
    with pytest.raises(ValueError, match=r"embed_tokens.lora_embedding_A must be \[4, 39\] .*got \[4, 40\]"):
        lo.load_adapter(shorter, tmp_path)


@pytest.mark.parametrize("kind", [lo.NF4Weight, lo.FP4Weight, lo.MXFP4Weight])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rows_of_a_4_bit_weight(kind: Any, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    dense = torch.randn(300, 128, dtype=dtype)  # 600 blocks of 64 are in three groups of double quantisation
    for options in [{}] if kind is lo.MXFP4Weight else [{}, {"double_quant": False}, {"block_size": 32}]:
        weight = kind.quantize(dense, **options)
        for shape in [(50,), (3, 4), (), (0,), (2, 0)]:
            index = torch.randint(300, shape)
            assert_bits_equal(weight.dequantize_rows(index), weight.dequantize()[index])
        assert_bits_equal(weight.dequantize_rows(torch.arange(300, dtype=torch.int32)), weight.dequantize())
        for wrong in (300, -1):
            with pytest.raises(IndexError):
                weight.dequantize_rows(torch.tensor([0, wrong]))
    with pytest.raises(ValueError, match=r"whole blocks of .*\[2, 300, 128\]"):
        kind.quantize(torch.stack([dense, dense])).dequantize_rows(torch.tensor([0]))


def test_a_lora_over_a_4_bit_weight() -> None:
    torch.manual_seed(0)
    embedding = nn.Embedding(40, 64, padding_idx=3)
    weight = lo.NF4Weight.quantize(embedding.weight)
    plain = lo.Embedding.from_weight(weight, embedding)
    layer = moved(lo.Embedding.from_embedding(plain, lo.LoRA(4)))
    other = nn.Embedding(40, 64, padding_idx=3, _weight=weight.dequantize()).requires_grad_(False)
    dense = lo.Embedding.from_embedding(other, lo.LoRA(4))
    dense.load_state_dict({"down": layer.down, "up": layer.up}, strict=False)
    ids = torch.arange(12).view(3, 4)
    assert layer.weight is weight and layer.padding_idx == 3
    assert_bits_equal(plain(ids), other(ids))
    assert_bits_equal(layer(ids), dense(ids))
    for one in (layer, dense):
        one(ids).square().sum().backward()
    assert_bits_equal(layer.down.grad, dense.down.grad)
    assert not layer.down.grad[:, 3].any()
    assert_bits_equal(layer.merged_weight(), dense.merged_weight())
    for copied in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert_bits_equal(copied(ids), layer(ids))
    assert_bits_equal(torch.compile(layer, backend="aot_eager", fullgraph=True)(ids), layer(ids))
    layer.set_adapter(None)
    assert_bits_equal(layer(ids), other(ids))
    layer.to(torch.bfloat16)
    assert_bits_equal(layer(ids), other.to(torch.bfloat16)(ids))
    assert_bits_equal(lo.Embedding.from_embedding(layer, lo.LoRA(4))(ids), other(ids))
    assert layer(ids[:0]).dtype == torch.bfloat16 and layer.weight.dtype == torch.float32


@pytest.mark.parametrize(
    "error, message, weight, embedding",
    [
        (TypeError, "weight must be an NF4Weight.* got Tensor", torch.ones(8, 64), nn.Embedding(8, 64)),
        (ValueError, "must be .8, 64. as the embedding, got .9, 64.", torch.ones(9, 64), nn.Embedding(8, 64)),
        (ValueError, "whole blocks of 64 weights.*.8, 96.", torch.ones(8, 96), nn.Embedding(8, 96)),
        (ValueError, "max_norm=1", torch.ones(8, 64), nn.Embedding(8, 64, max_norm=1.0)),
        (TypeError, "must be an nn.Embedding, got Linear", torch.ones(8, 64), nn.Linear(64, 8)),
    ],
)
def test_a_4_bit_weight_that_is_refused(
    error: type[Exception], message: str, weight: torch.Tensor, embedding: nn.Module
) -> None:
    made: Any = weight if error is TypeError and isinstance(embedding, nn.Embedding) else lo.NF4Weight.quantize(weight)
    with pytest.raises(error, match=message):
        lo.Embedding.from_weight(made, embedding)
