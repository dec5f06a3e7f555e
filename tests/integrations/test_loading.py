"""Whole models: quantised while transformers reads them, saved for bitsandbytes' users, read back without bitsandbytes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import models
import pytest
import torch
from helpers import assert_bits_equal
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, Trainer, TrainingArguments

import lowrank_ops as lo

IDS = torch.arange(12).view(2, 6)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama in float32, in several files."""
    directory = tmp_path_factory.mktemp("llama")
    models.llama().save_pretrained(directory, max_shard_size="100KB")
    assert (directory / "model.safetensors.index.json").is_file()
    return directory


def load(directory: Path, config: Any = None, **options: Any) -> Any:
    if config is not None:  # None would hide the quantization_config of the directory
        options["quantization_config"] = config
    return AutoModelForCausalLM.from_pretrained(directory, **options)


def logits(model: nn.Module) -> torch.Tensor:
    # Without gradients bitsandbytes computes in bfloat16 on a CPU.
    return model(IDS).logits.detach()


def same(first: nn.Module, second: nn.Module) -> None:
    """The same state and the same logits, to the bit."""
    ours, theirs = first.state_dict(), second.state_dict()
    assert ours.keys() == theirs.keys()
    for key, tensor in ours.items():
        assert tensor.dtype == theirs[key].dtype
        assert_bits_equal(tensor, theirs[key])
    assert_bits_equal(logits(first), logits(second))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_quantised_while_it_is_read_is_the_adapted_one(llama: Path, dtype: torch.dtype) -> None:
    model = load(llama, lo.NF4Config(), dtype=dtype)
    same(model, lo.adapt(load(llama, dtype=dtype), None))
    assert isinstance(model.model.layers[0].mlp.up_proj, lo.Linear) and type(model.lm_head) is nn.Linear
    assert not hasattr(model, "hf_quantizer") and not hasattr(model.config, "quantization_config")


def test_layers_of_gpt2_are_transposed_and_its_head_is_tied(tmp_path: Path) -> None:
    models.gpt2().save_pretrained(tmp_path)
    same(load(tmp_path, lo.NF4Config()), lo.adapt(load(tmp_path), None))


def test_choices_of_the_configuration(llama: Path) -> None:
    model = load(llama, lo.NF4Config(block_size=128, double_quant=False, skip=["o_proj"], head="nf4"))
    weight = model.model.layers[1].mlp.up_proj.weight
    assert weight.block_size == 128 and not weight.double_quant
    assert type(model.model.layers[0].self_attn.o_proj) is nn.Linear and isinstance(model.lm_head.weight, lo.NF4Weight)
    dense = load(llama)
    assert_bits_equal(model.lm_head.weight.packed, lo.NF4Weight.quantize(dense.lm_head.weight, 128, False).packed)
    by_pattern = load(llama, lo.NF4Config(skip=r".*layers\.0\..*"))
    assert len(models.adapted(by_pattern)) == 7
    assert isinstance(load(llama, lo.MXFP4Config()).model.layers[0].mlp.up_proj.weight, lo.MXFP4Weight)


def test_an_adapter_on_a_loaded_model_trains_with_trainer(llama: Path, tmp_path: Path) -> None:
    model = lo.adapt(load(llama, lo.NF4Config()), lo.LoRA(4))
    before = logits(model)
    rows = [{"input_ids": row, "labels": row} for row in IDS]
    options = TrainingArguments(
        tmp_path, max_steps=2, learning_rate=0.1, report_to=[], save_strategy="no", use_cpu=True
    )
    Trainer(model, options, train_dataset=rows).train()
    assert not torch.equal(logits(model), before)


@pytest.mark.parametrize("config", [lo.NF4Config(), lo.FP4Config(double_quant=False)])
@pytest.mark.parametrize("head", [False, True])
def test_bitsandbytes_loads_what_is_saved_here(llama: Path, tmp_path: Path, config: lo.NF4Config, head: bool) -> None:
    from bitsandbytes.nn import Linear4bit

    kind = type(config)
    config = kind(config.block_size, config.double_quant, skip=["k_proj"], head=config.format if head else None)
    model = load(llama, config)
    model.save_pretrained(tmp_path, max_shard_size="50KB")
    theirs = load(tmp_path, BitsAndBytesConfig(load_in_4bit=True))
    assert type(theirs.model.layers[0].mlp.up_proj) is Linear4bit and isinstance(theirs.lm_head, Linear4bit) == head
    assert type(theirs.model.layers[0].self_attn.k_proj) is nn.Linear
    torch.testing.assert_close(logits(theirs), logits(model), rtol=0, atol=1e-6)
    same(load(tmp_path), model)
    # What lowrank_ops takes over from bitsandbytes' layers.
    same(lo.adapt(theirs, None, ".*(q|v|o|up|down|gate)_proj" + "|lm_head" * head), model)


@pytest.mark.parametrize(
    "options",
    [
        {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
        {"bnb_4bit_quant_type": "fp4"},
        {
            "bnb_4bit_quant_type": "nf4",
            "bnb_4bit_quant_storage": torch.bfloat16,
            "bnb_4bit_compute_dtype": torch.bfloat16,
        },
    ],
)
def test_bitsandbytes_directories_are_read(
    llama: Path, tmp_path: Path, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    theirs = load(llama, BitsAndBytesConfig(load_in_4bit=True, **options), dtype=torch.bfloat16)
    theirs.save_pretrained(tmp_path)
    model = load(tmp_path, lo.NF4Config())
    assert len(models.adapted(model)) == 14 and model.dtype == torch.bfloat16
    same(model, lo.adapt(theirs, None))
    monkeypatch.setattr("lowrank_ops.integrations.transformers_loading.is_bitsandbytes_available", lambda: False)
    same(load(tmp_path), model)


def test_bitsandbytes_is_not_needed_and_transformers_is_imported_late(llama: Path, tmp_path: Path) -> None:
    load(llama, BitsAndBytesConfig(load_in_4bit=True)).save_pretrained(tmp_path / "theirs")
    load(llama, lo.NF4Config()).save_pretrained(tmp_path / "ours")
    script = """
import sys
sys.modules["bitsandbytes"] = None
import lowrank_ops
assert "transformers" not in sys.modules
from transformers import AutoModelForCausalLM
for path in sys.argv[1:]:
    model = AutoModelForCausalLM.from_pretrained(path)
    assert isinstance(model.model.layers[1].mlp.up_proj, lowrank_ops.Linear), path
"""
    command = [sys.executable, "-c", script, str(tmp_path / "theirs"), str(tmp_path / "ours")]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "HF_HUB_OFFLINE": "1"})
    assert done.returncode == 0, done.stderr
