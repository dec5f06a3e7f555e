"""Every kind, saved as a plain LoRA with one alpha: what PEFT, readers of lora_alpha / r and load_adapter make of it."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from mixtures import mixture
from models import TOKENS, adapted, llama, perturb, plain, tiny
from safetensors.torch import load_file
from torch import nn

import lowrank_ops as lo
from lowrank_ops.adapters.linear import AdaptedLayer

PREFIX = "base_model.model."
KINDS = [
    lo.LoRA(4, alpha=8, rslora=True, dropout=0.1),
    lo.LoRA(4, init="pissa"),
    lo.LoRA(20, init="milora", rslora=True),  # 2 R = 40 is more than the key projection's 32 rows
    lo.LoRAXS(6, alpha=9),
    lo.SVF(),
    lo.SVF(form="replace", factors="float32"),
    lo.SVFT(bandwidth=2, rank=20, factors="nf4"),
    lo.SVFT("random", entries=3, seed=4, rank=16),
]


def moved(model: nn.Module) -> nn.Module:
    for module in model.modules():
        if isinstance(module, AdaptedLayer) and module.adapter is not None:
            perturb(module, 0.05)
    return model.eval()


def check_changes(model: nn.Module, base: nn.Module, product: Callable[[str], torch.Tensor]) -> None:
    """Compare W' − W of every adapted layer with what a reader makes of the file, up to the rounding of W' in float32."""
    for name, layer in model.named_modules():
        if isinstance(layer, lo.Linear) and layer.adapter is not None:
            w, merged = base.get_submodule(name).weight.double(), layer.merged_weight(torch.float32).double()
            change = merged - w
            assert (product(name) - change).norm() <= 1e-6 * change.norm() + 2**-23 * merged.norm()
            assert change.norm() >= 1e-3 * w.norm()


def files(path: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    return json.loads((path / "adapter_config.json").read_text()), load_file(path / "adapter_model.safetensors")


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.filterwarnings("ignore:.*(another rank|the adapter takes)")
def test_every_reader_has_the_same_change(kind, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    from peft import PeftModel

    model = moved(lo.adapt(llama(), kind, quantize=None))
    lo.save_adapter(model, tmp_path, as_lora=True)
    config, tensors = files(tmp_path)
    assert config["peft_type"] == "LORA" and not config["use_rslora"] and not config["alpha_pattern"]

    def product(name: str) -> torch.Tensor:  # as llama.cpp reads it
        down, up = (tensors[f"{PREFIX}{name}.lora_{part}.weight"].double() for part in "AB")
        assert down.shape[0] == min(config["r"], up.shape[0], down.shape[1])
        return config["lora_alpha"] / down.shape[0] * up @ down

    check_changes(model, llama(), product)
    expected = model(TOKENS).logits
    theirs = PeftModel.from_pretrained(llama(), str(tmp_path)).eval()
    torch.testing.assert_close(theirs(TOKENS).logits, expected, rtol=1e-4, atol=1e-5)
    again = lo.load_adapter(llama(), tmp_path).eval()
    torch.testing.assert_close(again(TOKENS).logits, expected, rtol=1e-4, atol=1e-5)


def test_different_ranks_and_scales_are_one_rank_and_one_alpha(tmp_path: Path) -> None:
    model = lo.adapt(llama(), lo.LoRA(4, alpha=2, dropout=0.1), ["q_proj", "o_proj"], quantize=None)
    lo.adapt(model, lo.LoRA(8, alpha=64), ["v_proj"], quantize=None)
    lo.adapt(model, lo.LoRAXS(3), ["up_proj"], quantize=None)
    moved(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        lo.save_adapter(model, tmp_path, as_lora=True)
    config, tensors = files(tmp_path)
    assert (config["r"], config["lora_alpha"], config["rank_pattern"]) == (8, 8, {})
    pairs = {name: [tensors[f"{PREFIX}{name}.lora_{part}.weight"].double() for part in "BA"] for name in adapted(model)}
    assert all(down.shape[0] == 8 for _, down in pairs.values())
    check_changes(model, llama(), lambda name: pairs[name][0] @ pairs[name][1])


def test_a_rank_that_does_not_fit_all_layers_is_told(tmp_path: Path) -> None:
    model = moved(lo.adapt(llama(), lo.SVF(), ["q_proj", "k_proj"], quantize=None))
    with pytest.warns(UserWarning, match=r"another rank than r = \d+, such as \d+ in 'model.layers.0"):
        lo.save_adapter(model, tmp_path, as_lora=True)
    config, _ = files(tmp_path)
    assert {config["r"], *config["rank_pattern"].values()} == {32, 64}


def test_over_a_base_in_four_bits_and_a_head_beside(tmp_path: Path) -> None:
    model = lo.adapt(tiny(classes=3), lo.SVFT(bandwidth=1, rank=8))
    model.score.requires_grad_()
    torch.nn.init.normal_(moved(model).score.weight)
    lo.save_adapter(model, tmp_path, as_lora=True)
    again = lo.load_adapter(lo.adapt(tiny(classes=3), None), tmp_path).eval()
    torch.testing.assert_close(again(TOKENS).logits, model(TOKENS).logits, rtol=1e-4, atol=1e-5)
    assert again.model.layers[0].self_attn.q_proj.adapter == lo.LoRA(8, alpha=8)


def test_embeddings(tmp_path: Path) -> None:
    from peft import PeftModel

    model = lo.adapt(tiny(), lo.LoRA(4, alpha=2, rslora=True), ["embed_tokens", "q_proj"], quantize=None)
    moved(model)
    lo.save_adapter(model, tmp_path, as_lora=True)
    for loaded in (PeftModel.from_pretrained(tiny(), str(tmp_path)), lo.load_adapter(tiny(), tmp_path)):
        torch.testing.assert_close(loaded.eval()(TOKENS).logits, model(TOKENS).logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", [lo.LoRA(4, rslora=True, alpha=8), lo.LoRAXS(4)], ids=str)
def test_experts(kind, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    from peft import PeftModel

    model = moved(lo.adapt(mixture("qwen3_moe"), kind, r".*experts.*|.*q_proj", quantize=None))
    lo.save_adapter(model, tmp_path, as_lora=True)
    expected = model(TOKENS).logits
    base = mixture("qwen3_moe").eval()
    assert not torch.allclose(base(TOKENS).logits, expected, atol=1e-3)
    for loaded in (PeftModel.from_pretrained(base, str(tmp_path)), lo.load_adapter(mixture("qwen3_moe"), tmp_path)):
        torch.testing.assert_close(loaded.eval()(TOKENS).logits, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "kind, options, message",
    [
        (lo.LoRA(4, dora=True), {}, "layer '0': .*no low-rank update of W alone"),
        (lo.LoRA(4, lora_bias=True), {}, "layer '0': .*no low-rank update of W alone"),
        (lo.SVF(form="replace", rank=5), {}, r"layer '0': .*started \S+ · ‖W‖ away from W"),
        (lo.SVFT(bandwidth=1), {"max_bytes": 12000}, "rank 32 in '0', more than max_bytes"),
        (lo.LoRAXS(4), {"factors": "stored"}, "factors must be 'auto' for a plain LoRA"),
    ],
    ids=str,
)
def test_what_is_refused_writes_nothing(kind, options, message: str, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    model = lo.adapt(plain(), kind, quantize=None)
    with pytest.raises(ValueError, match=message):
        lo.save_adapter(model, tmp_path / "new", as_lora=True, **options)
    assert not (tmp_path / "new").exists()


def test_a_size_above_the_weights_is_told(tmp_path: Path) -> None:
    model = lo.adapt(plain(), lo.SVF(), quantize=None)
    with pytest.warns(UserWarning, match="the adapter takes .* with rank 32 in '0'; the weights take"):
        lo.save_adapter(model, tmp_path, as_lora=True)
