"""PEFT's files of adapters on experts, both ways: what PEFT computes with ours, and we with what PEFT wrote."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from mixtures import mixture
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import lowrank_ops as lo

peft = pytest.importorskip("peft")

IDS = torch.randint(1, 64, (2, 7), generator=torch.Generator().manual_seed(0))
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
# Family -> the Parameters of its experts: concatenated; transposed with biases; transposed without saying so; no gate.
PARAMETERS = {
    "mixtral": ["experts.gate_up_proj", "experts.down_proj"],
    "qwen3_moe": ["experts.gate_up_proj", "experts.down_proj"],
    "gpt_oss": ["experts.gate_up_proj", "experts.down_proj"],
    "llama4_text": ["experts.gate_up_proj", "experts.down_proj"],
    "nemotron_h": ["experts.up_proj", "experts.down_proj"],
    "jetmoe": ["input_linear.weight", "output_linear.weight"],
}
# None means both Parameters; one alone has other keys.
CASES = [
    *((family, None) for family in PARAMETERS),
    ("mixtral", 0),
    ("mixtral", 1),
    ("llama4_text", 0),
    ("llama4_text", 1),
]


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        y: Tensor = model(input_ids=IDS, use_cache=False).logits
    return y


def assert_close(got: Tensor, expected: Tensor) -> None:
    assert (got - expected).abs().max() <= 2e-5 * expected.abs().max()


def perturb(parameters: Any) -> None:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in parameters:
            p += 0.05 * torch.randn(p.shape, generator=generator)


def decoded(family: str) -> nn.Module:
    """The dense model whose weights are what 4 bits leave of them."""
    model: nn.Module = lo.merge(lo.adapt(mixture(family), None))
    return model


@pytest.mark.parametrize("family, targets", CASES)
def test_peft_computes_what_we_do(family: str, targets: int | None, tmp_path: Path) -> None:
    chosen = PARAMETERS[family] if targets is None else [PARAMETERS[family][targets]]
    kind = lo.LoRA(4, alpha=6, rslora=True) if targets is None else lo.LoRA(4, alpha=6, dropout=0.25)
    model = lo.adapt(mixture(family), None)
    lo.adapt(model, kind, [*(ATTENTION if targets is None and family != "jetmoe" else []), *chosen])
    perturb(lo.adapter_parameters(model))
    expected = logits(model)
    lo.save_adapter(model, tmp_path)
    theirs = peft.PeftModel.from_pretrained(decoded(family), tmp_path)
    assert_close(logits(theirs), expected)
    assert (logits(decoded(family)) - expected).abs().max() > 1e-2 * expected.abs().max()
    again = lo.load_adapter(lo.adapt(mixture(family), None), tmp_path)
    assert torch.equal(logits(again), expected)
    assert next(m.adapter for m in again.modules() if getattr(m, "adapter", None)).dropout == kind.dropout


@pytest.mark.parametrize("family, targets", CASES)
def test_we_compute_what_peft_does(family: str, targets: int | None, tmp_path: Path) -> None:
    chosen = PARAMETERS[family] if targets is None else [PARAMETERS[family][targets]]
    patterns = {rf".*\.{re.escape(chosen[0])}": 6} if targets is None else {}
    config = peft.LoraConfig(
        r=3, lora_alpha=5, target_modules=[] if family == "jetmoe" else ATTENTION, target_parameters=chosen,
        rank_pattern=patterns, alpha_pattern=patterns,
    )  # fmt: skip
    theirs = peft.get_peft_model(decoded(family), config)
    perturb(p for name, p in theirs.named_parameters() if "lora_" in name)
    expected = logits(theirs)
    theirs.save_pretrained(tmp_path)
    assert_close(logits(lo.load_adapter(decoded(family), tmp_path)), expected)
    quantised = lo.load_adapter(lo.adapt(mixture(family), None), tmp_path)
    assert_close(logits(quantised), expected)


def test_adapters_of_single_experts_are_put_together(tmp_path: Path) -> None:
    # What PEFT wrote for Mixtral with transformers 4, w1 and w3 being gate and up; expert 2's gate has a scale of its own.
    import json

    generator = torch.Generator().manual_seed(2)
    model = mixture("mixtral")
    tensors, delta = {}, {}
    for layer in range(2):
        for e in range(4):
            for part, (N, K) in {"w1": (96, 64), "w3": (96, 64), "w2": (64, 96)}.items():
                a, b = torch.randn(2, K, generator=generator), torch.randn(N, 2, generator=generator) * 0.1
                name = f"model.layers.{layer}.block_sparse_moe.experts.{e}.{part}"
                tensors |= {f"base_model.model.{name}.lora_A.weight": a, f"base_model.model.{name}.lora_B.weight": b}
                delta[layer, e, part] = (12 if (e, part) == (2, "w1") else 4) / 2 * b @ a
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    config = {
        "peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["w1", "w2", "w3"],
        "alpha_pattern": {"experts.2.w1": 12},
    }  # fmt: skip
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    got = logits(lo.load_adapter(mixture("mixtral"), tmp_path))
    with torch.no_grad():
        for layer in range(2):
            experts = model.model.layers[layer].mlp.experts
            for e in range(4):
                experts.gate_up_proj[e] += torch.cat([delta[layer, e, "w1"], delta[layer, e, "w3"]])
                experts.down_proj[e] += delta[layer, e, "w2"]
    assert_close(got, logits(model))
    del tensors["base_model.model.model.layers.1.block_sparse_moe.experts.3.w2.lora_A.weight"]
    del tensors["base_model.model.model.layers.1.block_sparse_moe.experts.3.w2.lora_B.weight"]
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    with pytest.raises(ValueError, match=r"layers\.1\.mlp\.experts\.down_proj.*none for 'w2' of expert 3"):
        lo.load_adapter(mixture("mixtral"), tmp_path)


def test_files_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    model = lo.adapt(mixture("qwen3_moe"), None)
    perturb(lo.adapter_parameters(lo.adapt(model, lo.LoRA(4), PARAMETERS["qwen3_moe"])))
    lo.save_adapter(model, tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    tensors = load_file(file)
    base = lo.adapt(mixture("qwen3_moe"), None)
    before = logits(base)
    key = "base_model.model.model.layers.1.mlp.experts.lora_B.weight"
    for changed, message in (
        (
            {key: tensors[key][:, :12].contiguous()},
            r"layers\.1\.mlp\.experts\.down_proj.*4 experts must be \[4 · R, 48\]",
        ),
        ({key: tensors[key].T.contiguous()}, r"layers\.1\.mlp\.experts\.down_proj.*got \[16, 48\] and \[16, 64\]"),
    ):
        save_file(tensors | changed, file)
        with pytest.raises(ValueError, match=message):
            lo.load_adapter(base, tmp_path)
    save_file({name: t for name, t in tensors.items() if ".layers.1.mlp.experts.base_layer" not in name}, file)
    with pytest.raises(ValueError, match=r"layers\.1\.mlp\.experts\.gate_up_proj.*lacks .*base_layer\.lora_A"):
        lo.load_adapter(base, tmp_path)
    save_file(tensors, file)
    with pytest.raises(
        ValueError, match=r"layers\.0\.mlp\.experts\.gate_up_proj.*4 experts must be \[4 · R, 64\] and \[192"
    ):
        lo.load_adapter(mixture("gpt_oss"), tmp_path)
    assert torch.equal(logits(base), before)
