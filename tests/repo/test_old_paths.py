"""Pickles from when the package was one flat folder still load, and the import paths of that time still work.

tests/data/before_folders.pt.xz was made by that code (commit 9fa70c1) with torch.save: layers of every kind of adapter with
their state dict, and the other classes that people pickle, with inputs and the outputs that they gave.
"""

from __future__ import annotations

import importlib
import io
import json
import lzma
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import lowrank_ops as lo

DATA = Path(__file__).parents[1] / "data"
PUBLIC = json.loads((DATA / "public_names_before_folders.json").read_text())


@pytest.fixture(scope="module")
def saved() -> dict[str, Any]:
    content: dict[str, Any] = torch.load(
        io.BytesIO(lzma.decompress((DATA / "before_folders.pt.xz").read_bytes())), weights_only=False
    )
    return content


def test_pickled_layers_compute_what_they_did(saved: dict[str, Any]) -> None:
    assert len(saved["layers"]) == 8
    for name, layer in saved["layers"].items():
        assert type(layer) is lo.Linear
        torch.testing.assert_close(layer(saved["x"]), saved["y"][name])


def test_other_pickled_objects_do_too(saved: dict[str, Any]) -> None:
    y = saved["y"]
    assert type(saved["weight"]) is lo.NF4Weight and type(saved["update"]) is lo.LowRankUpdate
    torch.testing.assert_close(saved["weight"].dequantize(torch.float32), y["weight"], rtol=0, atol=0)
    torch.testing.assert_close(saved["update"].delta(), y["delta"])
    reward = saved["reward"]
    assert type(reward) is lo.preference.RewardModel and type(reward.head) is lo.preference.RewardHead
    torch.testing.assert_close(reward.head(saved["hidden"], saved["mask"]), y["reward"])
    core_types = [lo.cores.Diagonal, lo.cores.Dense, lo.cores.Banded, lo.cores.Sparse]
    assert [type(core) for core in saved["cores"]] == core_types
    torch.testing.assert_close(torch.stack([core.values.sum() for core in saved["cores"]]), y["core"].flatten())
    adapters = [lo.LoRA, lo.LoRA, type(None), lo.LoRAXS, lo.SVF, lo.SVFT, lo.SVFT, lo.SVF]
    assert [type(kind) for kind in saved["kinds"]] == adapters and saved["kinds"][1] == lo.LoRA(3, init="pissa")
    assert saved["law"] == lo.scaling_laws.PUBLISHED["epoch"]
    assert type(saved["strengths"]) is lo.preference.Strengths and saved["strengths"].probability(0, 1) > 0.5


def test_a_state_dict_loads(saved: dict[str, Any]) -> None:
    for name, layer in saved["layers"].items():
        if layer.base_down is not None:
            continue  # a kind that changes the base starts from the dense weight, which the layer does not have
        dense = nn.Linear(layer.in_features, layer.out_features, layer.bias is not None)
        quantize = None if name == "svft-random" else "nf4"
        fresh = lo.Linear.from_linear(dense, layer.adapter, quantize)
        entries = {k.partition(".")[2]: v for k, v in saved["state_dict"].items() if k.partition(".")[0] == name}
        fresh.load_state_dict(entries, strict=True)
        torch.testing.assert_close(fresh(saved["x"]), saved["y"][name])


@pytest.mark.parametrize("module", PUBLIC)
def test_old_import_paths(module: str) -> None:
    if module in ("server", "serve"):
        pytest.importorskip("fastapi")
    found = importlib.import_module(f"lowrank_ops.{module}")
    missing = [name for name in PUBLIC[module] if not hasattr(found, name)]
    assert not missing, f"lowrank_ops.{module} has not {missing}"
    assert callable(lo.combine), "the module of this name must not stand where the function does"
