"""Reports on adapters in files: keys with foreign beginnings, alphas that say nothing, options that nobody knows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from models import plain, randomised, snapshot
from safetensors.torch import load_file, save_file

import lowrank_ops as lo
from lowrank_ops.adapters.peft_files import CONFIG, PREFIX, TENSORS

X = torch.linspace(-1, 1, 128).view(2, 64)


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    lo.save_adapter(randomised(lo.adapt(plain(), lo.LoRA(4), quantize=None)), tmp_path)
    return tmp_path


def configure(path: Path, **changes: Any) -> None:
    (path / CONFIG).write_text(json.dumps(json.loads((path / CONFIG).read_text()) | changes))


def refused(path: Path, message: str) -> None:
    """By a model, which stays as it was, and by a pool."""
    model = lo.adapt(plain(), None)
    before, _, _ = snapshot(model)
    with pytest.raises((TypeError, ValueError), match=message):
        lo.load_adapter(model, path)
    assert snapshot(model)[0] == before
    with pytest.raises((TypeError, ValueError), match=message):
        lo.AdapterPool(lo.adapt(plain(), None), 1 << 20).load("a", path)


@pytest.mark.parametrize(
    "rename",
    [
        lambda key: key.replace(PREFIX, PREFIX + "language_model."),
        lambda key: key.replace(PREFIX, PREFIX + "_orig_mod."),
        lambda key: key.removeprefix(PREFIX),
        lambda key: key.replace(".weight", ".default.weight"),
    ],
    ids=["language_model", "_orig_mod", "none", "default"],
)
def test_keys_with_another_beginning_are_named(rename: Any, saved: Path) -> None:
    tensors = {rename(key): tensor for key, tensor in load_file(saved / TENSORS).items()}
    save_file(tensors, saved / TENSORS)
    refused(saved, "language_model.0|_orig_mod.0|'0.lora_A.weight|default.weight")


def test_alpha_is_what_the_file_says(saved: Path) -> None:
    for alpha, message in ((None, "layer '0': alpha must be a number, got None"), ("32", "got '32'|got str")):
        configure(saved, lora_alpha=alpha)
        refused(saved, message)
    dense = plain()(X)
    for alpha in (0, -8):
        configure(saved, lora_alpha=alpha)
        model = lo.load_adapter(plain(), saved)
        assert model[0].adapter.scale == alpha / 4
        assert torch.allclose(model(X), dense) == (alpha == 0)


@pytest.mark.parametrize("start", ["eva", "gaussian", "orthogonal"])
def test_starts_that_leave_the_base_are_plain_loras(start: str, saved: Path) -> None:
    expected = lo.load_adapter(plain(), saved)(X)
    configure(saved, init_lora_weights=start, **({"eva_config": {"rho": 2.0}} if start == "eva" else {}))
    assert torch.equal(lo.load_adapter(plain(), saved)(X), expected)


def test_unknown_variants_are_named(saved: Path) -> None:
    configure(saved, use_sparse_update=False, other_config=None, loftq_config={}, peft_version="9")
    lo.load_adapter(plain(), saved)
    for option, value in (("use_sparse_update", True), ("other_config", {"a": 1})):
        configure(saved, **{option: value})
        refused(saved, f"{option}=.*not known here")
        configure(saved, **{option: None})
