"""Frozen factors in files: stored, or a recipe for them; by default what loads wherever the same weights are."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import assert_bits_equal
from models import llama, plain
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

import lowrank_ops as lo

TOKENS = torch.arange(14).view(2, 7)
SPECTRAL = [
    lo.LoRAXS(6, alpha=9),
    lo.SVF(rank=20, factors="float32"),
    lo.SVF(),
    lo.SVFT(bandwidth=2),
    lo.SVFT("random", entries=3, seed=4, rank=16),
]
CHANGING = [lo.LoRA(4, init="pissa", iterations=2), lo.LoRA(2, init="milora")]
REPLACING = [lo.SVF(form="replace"), lo.SVFT("random", entries=3, form="replace", rank=30, factors="bfloat16")]
KINDS: list[Any] = [lo.LoRA(4, init="nystrom"), *SPECTRAL, *CHANGING, *REPLACING]


def randomised(model: nn.Module) -> nn.Module:
    torch.manual_seed(1)
    for p in lo.adapter_parameters(model):
        nn.init.normal_(p, std=0.1)
    return model.eval()


def keys(path: Path) -> set[str]:
    return {key.partition(".lowrank_ops.")[2] for key in load_file(path / "adapter_model.safetensors")}


@pytest.mark.filterwarnings("ignore:.* of frozen factors are stored")
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_the_default_loads_into_a_fresh_quantised_model_and_a_pool(kind: Any, tmp_path: Path) -> None:
    model = randomised(lo.adapt(llama(), kind))
    expected = model(TOKENS).logits
    lo.save_adapter(model, tmp_path)
    assert_bits_equal(lo.load_adapter(lo.adapt(llama(), kind), tmp_path).eval()(TOKENS).logits, expected)
    bare = lo.adapt(llama(), None)
    if kind in CHANGING:  # the base is of this adapter alone
        with pytest.raises(ValueError, match="layer 'model.layers.0.*dense model"):
            lo.load_adapter(bare, tmp_path)
        return
    assert_bits_equal(lo.load_adapter(bare, tmp_path).eval()(TOKENS).logits, expected)
    # What was loaded can be saved and loaded again.
    lo.save_adapter(bare, tmp_path / "again")
    assert_bits_equal(lo.load_adapter(lo.adapt(llama(), None), tmp_path / "again").eval()(TOKENS).logits, expected)
    served = lo.adapt(llama(), None)
    pool = lo.AdapterPool(served, 1 << 22)
    if kind in REPLACING:
        with pytest.raises(ValueError, match="stands in place of W"):
            pool.load("a", tmp_path)
        return
    pool.load("a", tmp_path)
    with torch.no_grad(), pool.route(["a", "a"]):
        torch.testing.assert_close(served(TOKENS).logits, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", [*SPECTRAL, *REPLACING], ids=str)
def test_a_recipe_needs_the_weight_from_before(kind: Any, tmp_path: Path) -> None:
    model = randomised(lo.adapt(llama(), kind))
    lo.save_adapter(model, tmp_path, "recipe")
    assert keys(tmp_path) <= {"core", "pairs"}
    fresh = lo.load_adapter(lo.adapt(llama(), kind), tmp_path)
    assert_bits_equal(fresh.eval()(TOKENS).logits, model(TOKENS).logits)
    lo.load_adapter(llama(), tmp_path)
    for load in (lambda: lo.load_adapter(lo.adapt(llama(), None), tmp_path), lambda: pool().load("a", tmp_path)):
        with pytest.raises(ValueError, match="factors='auto'|another weight|in place of W"):
            load()


def pool() -> lo.AdapterPool:
    return lo.AdapterPool(lo.adapt(llama(), None), 1 << 22)


def test_by_size(tmp_path: Path) -> None:
    """Factors larger than the weight that the layer holds are left out where this weight makes them again."""
    for i, (kind, stored) in enumerate([(lo.LoRAXS(8), True), (lo.SVF(rank=8), True), (lo.SVF(), False)]):
        model = randomised(lo.adapt(lo.adapt(llama(), None), kind))
        with warnings.catch_warnings(action="error"):
            lo.save_adapter(model, tmp_path / str(i))
        assert ("down.absmax" in keys(tmp_path / str(i))) == stored
        again = lo.load_adapter(lo.adapt(llama(), None), tmp_path / str(i))
        torch.testing.assert_close(again.eval()(TOKENS).logits, model(TOKENS).logits, rtol=1e-4, atol=1e-4)
        pool().load("a", tmp_path / str(i))
    before = randomised(lo.adapt(llama(), lo.SVF()))  # factors of the dense W
    with pytest.warns(UserWarning, match="MB of frozen factors are stored"):
        lo.save_adapter(before, tmp_path / "large")
    assert "down.absmax" in keys(tmp_path / "large")


def test_a_small_file(tmp_path: Path) -> None:
    model = randomised(lo.adapt(llama(), lo.LoRAXS(8)))
    lo.save_adapter(model, tmp_path, factors="recipe")
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    assert sum(t.numel() for t in tensors.values()) == 14 * 64 and len(tensors) == 14
    assert json.loads((tmp_path / "adapter_config.json").read_text())["peft_type"] == "LOWRANK_OPS"
    with pytest.raises(ValueError, match="factors must be 'auto', 'recipe' or 'stored', got 'all'"):
        lo.save_adapter(model, tmp_path, factors="all")


def test_a_replace_form_of_another_weight_is_refused(tmp_path: Path) -> None:
    """Its file has no hash of the quantised weight, so the numbers are compared."""
    with warnings.catch_warnings(action="error"):
        lo.save_adapter(randomised(lo.adapt(plain(), lo.SVF(rank=8, form="replace"))), tmp_path)
    other = plain()
    nn.init.normal_(other[2][0].weight)
    with pytest.raises(ValueError, match="layer '2.0': the adapter was made for another weight"):
        lo.load_adapter(lo.adapt(other, None), tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    with safe_open(file, "pt") as opened:
        metadata = opened.metadata()
    tensors = {key: t for key, t in load_file(file).items() if "core_offset" not in key}
    save_file(tensors, file, metadata)
    with pytest.raises(ValueError, match="layer '0': the stored core_offset must be .8. .* got nothing"):
        lo.load_adapter(lo.adapt(plain(), None), tmp_path)
