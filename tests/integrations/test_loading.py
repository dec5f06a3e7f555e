"""Whole models: quantised while transformers reads them, saved for bitsandbytes' users, read back without bitsandbytes."""

from __future__ import annotations

import json
import os
import re
import resource
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import models
import pytest
import torch
from helpers import assert_bits_equal
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, Trainer, TrainingArguments

import lowrank_ops as lo
from lowrank_ops.adapters.frozen import is_plain_linear

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
    assert isinstance(model.model.layers[0].mlp.up_proj, lo.Linear) and is_plain_linear(model.lm_head)
    assert not hasattr(model, "hf_quantizer") and not hasattr(model.config, "quantization_config")


def test_layers_of_gpt2_are_transposed_and_its_head_is_tied(tmp_path: Path) -> None:
    models.gpt2().save_pretrained(tmp_path)
    same(load(tmp_path, lo.NF4Config()), lo.adapt(load(tmp_path), None))


@pytest.mark.parametrize(
    "kind, targets", [(lo.LoRA(4), "all-linear"), (lo.SVFT(bandwidth=1), ["attn.c_proj"]), (None, "all-linear")]
)
def test_dense_layers_of_gpt2_come_back(kind: Any, targets: Any, tmp_path: Path) -> None:
    model = lo.adapt(models.gpt2(), kind, targets=targets, quantize=None)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.1)
    model.save_pretrained(tmp_path)
    again = load(tmp_path)
    torch.testing.assert_close(logits(again), logits(model))
    if kind is not None:
        again.load_state_dict(load_file(tmp_path / "model.safetensors"), strict=False)  # as trainers resume
        torch.testing.assert_close(logits(again), logits(model))
        model.transformer.save_pretrained(tmp_path / "inner")  # whose names lack a prefix
        torch.testing.assert_close(logits(load(tmp_path / "inner")), logits(model))


def test_choices_of_the_configuration(llama: Path) -> None:
    model = load(llama, lo.NF4Config(block_size=128, double_quant=False, skip=["o_proj"], head="nf4"))
    weight = model.model.layers[1].mlp.up_proj.weight
    assert weight.block_size == 128 and not weight.double_quant
    assert is_plain_linear(model.model.layers[0].self_attn.o_proj) and isinstance(model.lm_head.weight, lo.NF4Weight)
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
    assert is_plain_linear(theirs.model.layers[0].self_attn.k_proj)
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


@pytest.mark.parametrize("kind", [lo.LoRA(4), lo.LoRAXS(4), lo.SVF(), lo.LoRA(4, init="pissa"), lo.SVF(form="replace")])
def test_adapters_are_saved_and_read_with_the_model(llama: Path, tmp_path: Path, kind: Any) -> None:
    model = lo.adapt(load(llama), kind)
    for name in models.adapted(model):
        models.perturb(model.get_submodule(name))
    model.save_pretrained(tmp_path)
    same(load(tmp_path), model)


@pytest.fixture(scope="module")
def saved(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The Llama in NF4, in one file."""
    directory = tmp_path_factory.mktemp("saved")
    load(llama, lo.NF4Config()).save_pretrained(directory)
    return directory


def change(directory: Path, edit: Any) -> None:
    """Edit the tensors of a directory with one file."""
    tensors = load_file(directory / "model.safetensors")
    edit(tensors)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})


def change_config(directory: Path, **values: Any) -> None:
    file = directory / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def dense(directory: Path, **values: Any) -> None:
    """Put the dense Llama into a directory."""
    models.llama().save_pretrained(directory)
    change(directory, lambda tensors: tensors.update(values))


UP = "model.layers.1.mlp.up_proj.weight"


@pytest.mark.parametrize(
    "edit, message",
    [
        (
            lambda d: os.truncate(d / "model.safetensors", 50_000),
            r"model.safetensors is damaged: it should have .* again",
        ),
        (lambda d: (d / "model.safetensors").write_bytes(b"not a shard"), r"model.safetensors is damaged: its header"),
        (lambda d: change(d, lambda t: t.pop(UP + ".absmax")), r"model.safetensors: '.*1.mlp.up_proj.*lacks .*absmax"),
        (
            lambda d: change(d, lambda t: [t.pop(k) for k in list(t) if k.startswith(UP + ".")]),
            "up_proj.*has no quantised weight",
        ),
        (
            lambda d: change(d, lambda t: [t.pop(k) for k in list(t) if k.startswith(UP)]),
            r"lack 1 weights .*up_proj.*skip=",
        ),
        (lambda d: change(d, lambda t: t.update({UP + ".SCB": torch.zeros(1)})), "up_proj.weight.SCB' is no entry"),
        (lambda d: change(d, lambda t: t.update({UP + ".quant_map": torch.zeros(16)})), "up_proj.*standard table"),
        (lambda d: change_config(d, intermediate_size=64), r"model.safetensors: '.*_proj.*it is \[.*\] and the model"),
        (
            lambda d: change_config(d, quantization_config={"quant_method": "gptq", "bits": 4}),
            "quant_method 'gptq'.*dense original",
        ),
        (lambda d: change_config(d, quantization_config={"load_in_8bit": True}), "with load_in_8bit"),
        (lambda d: dense(d) or change_config(d, quantization_config={"load_in_4bit": True}), "hold no 4-bit weight"),
        (
            lambda d: dense(d, **{UP: torch.zeros(128, 64, dtype=torch.int8)}),
            "up_proj.weight' is stored as I8, which another",
        ),
        (
            lambda d: dense(d, **{UP: torch.full((128, 64), torch.nan)}),
            r"model.safetensors: '.*up_proj.*must be finite",
        ),
        (lambda d: dense(d, **{UP: torch.zeros(64, 64)}), r"model.safetensors: '.*up_proj.*another model"),
        (lambda d: dense(d) or change(d, lambda t: t.pop(UP)), "lack 1 weights .*up_proj.*skip="),
    ],
)
def test_a_bad_directory_is_refused_by_file_and_tensor(saved: Path, tmp_path: Path, edit: Any, message: str) -> None:
    directory = Path(shutil.copytree(saved, tmp_path / "model"))
    edit(directory)
    with pytest.raises(ValueError, match=message):
        load(directory, lo.NF4Config())


def test_a_layer_that_the_files_lack_may_be_left_to_transformers(llama: Path, tmp_path: Path) -> None:
    dense(tmp_path)
    change(tmp_path, lambda tensors: tensors.pop(UP))
    model = load(tmp_path, lo.NF4Config(skip=["layers.1.mlp.up_proj"]))
    assert is_plain_linear(model.model.layers[1].mlp.up_proj) and len(models.adapted(model)) == 13


@pytest.mark.parametrize(
    "error, message, options",
    [
        (ValueError, "block_size must be one of", {"block_size": 100}),
        (TypeError, "double_quant must be True or False", {"double_quant": 1}),
        (ValueError, "head must be 'nf4', 'int8' or None, got 'fp4'", {"head": "fp4"}),
        (TypeError, "skip must be a list of names", {"skip": [3]}),
        (ValueError, r"skip \['z_proj'\] matches no layer; .*up_proj", {"skip": ["z_proj"]}),
        (ValueError, "list or a regular expression", {"skip": "("}),
        (ValueError, "dtype must be float32, bfloat16 or float16 .* got torch.float64", {"dtype": torch.float64}),
        (ValueError, "device_map puts layers on disk", {"device_map": {"": "disk"}, "offload_folder": "none"}),
    ],
)
def test_bad_choices(llama: Path, error: type[Exception], message: str, options: dict[str, Any]) -> None:
    choices = {key: value for key, value in options.items() if key in lo.NF4Config.__dataclass_fields__}
    with pytest.raises(error, match=message):
        load(llama, lo.NF4Config(**choices), **{key: value for key, value in options.items() if key not in choices})


def test_a_failed_save_leaves_a_directory_as_it_was(llama: Path, saved: Path, tmp_path: Path) -> None:
    directory = Path(shutil.copytree(saved, tmp_path / "model"))
    before = {path.name: path.read_bytes() for path in directory.iterdir()}
    model = load(llama, lo.NF4Config(block_size=128))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, limits[1]))  # fails as a full disk does
    try:
        with pytest.raises(OSError, match=rf"{re.escape(str(directory))} was not written and is as it was"):
            model.save_pretrained(directory)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert before == {path.name: path.read_bytes() for path in directory.iterdir()}
    assert list(tmp_path.iterdir()) == [directory]
    # Shards take the place of the single file, which would be read first.
    model.save_pretrained(directory, max_shard_size="50KB")
    assert not (directory / "model.safetensors").exists()
    same(load(directory), model)
