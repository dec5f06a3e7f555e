"""all-linear leaves out layers that are too small for the kind or whose weight the model reads."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import transformers
from models import adapted
from torch import Tensor, nn

import lowrank_ops as lo
from lowrank_ops.adapters import targets

COMMON: dict[str, Any] = {"vocab_size": 99, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
IDS = torch.arange(10).view(2, 5)


def qwen2_moe() -> nn.Module:
    torch.manual_seed(0)
    config = transformers.Qwen2MoeConfig(
        **COMMON, intermediate_size=48, moe_intermediate_size=16, shared_expert_intermediate_size=48, num_experts=2,
        num_experts_per_tok=1, num_key_value_heads=1,
    )  # fmt: skip
    return transformers.Qwen2MoeForCausalLM(config).eval()


def mamba() -> nn.Module:
    torch.manual_seed(0)
    return transformers.MambaForCausalLM(transformers.MambaConfig(**COMMON, state_size=4, time_step_rank=8)).eval()


class Reader(nn.Module):
    """Multiplies by the weight of one of its layers itself."""

    def __init__(self) -> None:
        super().__init__()
        self.called, self.read, self.asked, self.both = (nn.Linear(16, 16) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        y = torch.nn.functional.linear(self.called(x), self.read.weight)
        y = self.asked(y.to(self.asked.weight.dtype))
        return self.both(y) if y.dim() == 2 else y @ self.both.weight


class Called(nn.Module):
    """As in diffusers: another object calls the layers, and a method that joins them reads their weights."""

    def __init__(self) -> None:
        super().__init__()
        self.to_q, self.to_k = nn.Linear(16, 16), nn.Linear(16, 16)
        self.processor = lambda layers, x: layers.to_q(x) + layers.to_k(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.processor(self, x)

    def fuse_projections(self) -> Tensor:
        return torch.cat([self.to_q.weight.data, self.to_k.weight.data])


class Hidden(Reader):
    """The same, where the source does not show it."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.nn.functional.linear(self.called(x), self.get_submodule("read").weight)


def said(recwarn: pytest.WarningsRecorder) -> list[str]:
    return [str(w.message) for w in recwarn if "adapt" in str(w.message)]


def test_a_layer_that_is_too_small_is_quantised_without_an_adapter(recwarn: pytest.WarningsRecorder) -> None:
    model = lo.adapt(qwen2_moe(), lo.LoRA(4))
    gate = model.get_submodule("model.layers.0.mlp.shared_expert_gate")
    assert isinstance(gate, lo.Linear) and gate.adapter is None
    assert "1 layer (model.layers.0.mlp.shared_expert_gate): they are too small for LoRA(4" in said(recwarn)[-1]
    # The base is the one of a model without adapters, whatever the rank of an adapter that is trained over it.
    assert torch.equal(model(IDS).logits, lo.adapt(qwen2_moe(), None)(IDS).logits)
    again = lo.adapt(lo.adapt(qwen2_moe(), None), lo.SVFT(bandwidth=2))
    assert again.get_submodule("model.layers.0.mlp.shared_expert_gate").adapter is None


def test_a_layer_that_is_too_small_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match="layer 'model.layers.0.mlp.shared_expert_gate': rank must be at most"):
        lo.adapt(qwen2_moe(), lo.LoRA(4), ["q_proj", "shared_expert_gate"])


def test_a_layer_whose_weight_the_model_reads_stays(recwarn: pytest.WarningsRecorder) -> None:
    model = lo.adapt(mamba(), lo.LoRA(4))
    assert [n.rpartition(".")[2] for n in adapted(model)] == ["in_proj", "x_proj", "out_proj"]
    assert "1 layer (backbone.layers.0.mixer.dt_proj): the model reads their weight" in said(recwarn)[-1]
    model.train()(IDS).logits.sum().backward()
    with pytest.raises(ValueError, match=r"targets match .*dt_proj', whose weight MambaMixer reads without calling"):
        lo.adapt(mamba(), lo.LoRA(4), ["dt_proj"])


def test_kernels_read_more_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(targets, "_is_installed", lambda package: True)
    assert [n.rpartition(".")[2] for n in adapted(lo.adapt(mamba(), lo.LoRA(4)))] == ["in_proj"]
    monkeypatch.undo()
    model: Any = mamba()
    model._use_kernels = True
    assert [n.rpartition(".")[2] for n in adapted(lo.adapt(model, lo.LoRA(4)))] == ["in_proj"]


def test_falcons_own_class_is_a_linear_layer() -> None:
    torch.manual_seed(0)
    model: Any = transformers.FalconForCausalLM(transformers.FalconConfig(**COMMON)).eval()
    before = model(IDS).logits
    names = [n.rpartition(".")[2] for n in adapted(lo.adapt(model, lo.LoRA(4), quantize=None))]
    assert names == ["query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"]
    torch.testing.assert_close(model(IDS).logits, before)
    torch.testing.assert_close(lo.merge(model)(IDS).logits, before)


def test_the_source_of_a_class_shows_that_it_reads_a_weight(recwarn: pytest.WarningsRecorder) -> None:
    model = lo.adapt(nn.Sequential(Reader()), lo.LoRA(4))
    assert adapted(model) == ["0.called", "0.asked", "0.both"]
    assert "1 layer (0.read): the model reads their weight" in said(recwarn)[-1]
    model(torch.randn(3, 16)).sum().backward()
    with pytest.raises(ValueError, match="targets match 'read', whose weight Reader reads without calling the layer"):
        lo.adapt(Reader(), lo.LoRA(4), ["called", "read"])


def test_a_method_that_joins_layers_before_use_keeps_none_back() -> None:
    model: Any = lo.adapt(Called(), lo.LoRA(4), ["to_q", "to_k"])
    model(torch.randn(3, 16)).sum().backward()
    with pytest.raises(
        ValueError, match="'to_q' is a layer of lowrank_ops, and fusing projections would read its weight"
    ):
        model.fuse_projections()


@pytest.mark.parametrize("make", [lambda m: m, copy.deepcopy])
def test_reading_a_4_bit_weight_names_the_layer(make) -> None:  # type: ignore[no-untyped-def]
    model = make(lo.adapt(nn.Sequential(Hidden()), lo.LoRA(4), ["read"]))
    with pytest.raises(
        TypeError, match=r"linear cannot take .* weight of layer '0.read', .* leave this layer out of the"
    ):
        model(torch.randn(3, 16))
    with pytest.raises(AttributeError, match=r"no 'mul_': .* weight of layer '0.read'"):
        model[0].read.weight.mul_(2)


@pytest.mark.parametrize("kind", [None, lo.LoRA(4), lo.LoRA(4, dropout=0.5), lo.LoRA(4, init="pissa"), lo.SVF()])
def test_a_forward_finds_the_weights_that_are_read(kind: Any) -> None:
    model: nn.Module = nn.Sequential(Hidden())
    if kind is not None:
        lo.adapt(model, kind, quantize=None)
    assert list(lo.find_reads(model, torch.randn(3, 16))) == ["0.read"]
    with pytest.raises((ValueError, RuntimeError)):
        lo.find_reads(model, torch.randn(3, 15))
    assert torch.utils._python_dispatch._len_torch_dispatch_stack() == 0
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_a_forward_finds_what_the_table_says() -> None:
    assert list(lo.find_reads(mamba(), IDS)) == ["backbone.layers.0.mixer.dt_proj"]
    assert not lo.find_reads(qwen2_moe(), IDS)


def test_a_tied_weight_may_be_read_by_its_other_owner() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding, self.head = nn.Embedding(9, 8), nn.Linear(8, 9, bias=False)
            self.head.weight = self.embedding.weight

        def forward(self, ids: Tensor) -> Tensor:
            found: Tensor = self.head(self.embedding(ids))
            return found

    assert not lo.find_reads(Tied(), torch.tensor([1, 2]))
    assert not lo.find_reads(lo.adapt(Tied(), lo.LoRA(4), quantize=None), torch.tensor([1, 2]))
