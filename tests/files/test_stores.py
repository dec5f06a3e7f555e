"""Factors in a store are checked for what they claim to be, and no name in a file leads out of its folder."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import lowrank_ops as lo
from lowrank_ops.adapters.precompute import linear_layers
from lowrank_ops.adapters.state_files import open_state
from lowrank_ops.calibration.state import State
from lowrank_ops.svd import decompose
from lowrank_ops.svd.store import FactorStore


def swap(t: dict[str, Tensor]) -> None:
    t["U"] = t["U"].flip(1)


def scale(t: dict[str, Tensor]) -> None:
    t["Vt"] *= 1.1


def other(t: dict[str, Tensor]) -> None:
    t["U"], t["S"], t["Vt"] = decompose.truncated_svd(torch.randn(9, 7), 5)


def halve(t: dict[str, Tensor]) -> None:
    t["S"] *= 0.5


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda t: t["U"].__setitem__((3, 2), float("nan")), "a number is NaN or infinite"),
        (lambda t: t["S"].neg_(), "S does not descend to 0 or above"),
        (lambda t: t.update(S=t["S"].flip(0)), "S does not descend"),
        (scale, "vectors of Vt are not orthonormal"),
        (swap, "uᵀ W v is not the singular value"),
        (other, "uᵀ W v is not the singular value"),
        (halve, "uᵀ W v is not the singular value"),
        (lambda t: t.update(S=t["S"].double()), "holds F32, F64, and singular vectors are F32"),
        (lambda t: t.update(U=t["U"].to(torch.int32)), "holds F32, I32"),
    ],
)
@pytest.mark.parametrize("quantised", [False, True])
def test_changed_factors_are_refused(
    quantised: bool, change: Callable[[dict[str, Tensor]], Any], words: str, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    dense = torch.randn(9, 7)
    weight = lo.NF4Weight.quantize(dense) if quantised else dense
    store = FactorStore(tmp_path)
    key = store.save(weight, decompose.truncated_svd(weight, 5))
    assert store.find(weight, 5) is not None and store.find(weight, 2) is not None
    tensors = load_file(store.file(key))
    change(tensors)
    save_file({name: t.contiguous() for name, t in tensors.items()}, store.file(key))
    with pytest.raises(ValueError, match=words) as error:
        store.find(weight, 5)
    assert str(store.file(key)) in str(error.value)


@pytest.mark.parametrize("name", ["../secret.safetensors", "/etc/passwd", 3])
def test_weight_maps_stay_in_their_folder(name: object, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    save_file({"layer.weight": torch.ones(4, 4)}, tmp_path / "secret.safetensors")
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"layer.weight": name}}))
    with pytest.raises(ValueError, match="which must be the name of a file beside it"):
        open_state(folder / "model.safetensors.index.json")
    with pytest.raises(ValueError, match="which must be the name of a file beside it"):
        linear_layers(folder)
    transformers_quantize = pytest.importorskip("lowrank_ops.integrations.transformers_quantize")
    with pytest.raises(ValueError, match=r"which must be the name of a file beside it|is damaged"):
        transformers_quantize._paths(folder)


def test_the_state_of_a_calibration_stays_in_its_folder(tmp_path: Path) -> None:
    (tmp_path / "kept.safetensors").write_text("x")
    folder = tmp_path / "moments"
    folder.mkdir()
    state = {"choices": {"a": 1}, "done": 1, "names": ["../kept"]}
    (folder / "state.json").write_text(json.dumps(state))
    with pytest.raises(ValueError, match="which must be the name of a file beside it"):
        State(folder, {"a": 2})
    assert (tmp_path / "kept.safetensors").exists()
