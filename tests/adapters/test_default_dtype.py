"""Another default dtype or device changes nothing: adapters are float32 and stand where the weight does."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lowrank_ops as lo
from lowrank_ops.preference import RewardHead

CPU_FLOAT32: Any = {"device": "cpu", "dtype": torch.float32}
KINDS = {
    **{init: lo.LoRA(4, init=init) for init in ("kaiming", "gaussian", "orthogonal", "nystrom", "pissa", "milora")},
    "loftq": lo.LoRA(4, init="loftq", iterations=2),
    "dropout": lo.LoRA(4, dropout=0.3),
    "xs": lo.LoRAXS(4),
    "svf": lo.SVF(rank=12),
    "banded": lo.SVFT(bandwidth=2),
    "random": lo.SVFT("random", entries=3),
    "replace": lo.SVFT("random", entries=3, form="replace", factors="float32"),
}
PARTS = ("second", "mean", "count", "fingerprint")


@contextmanager
def default(dtype: torch.dtype | None, device: str | None) -> Iterator[None]:
    torch.set_default_dtype(dtype or torch.float32)
    torch.set_default_device(device)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)
        torch.set_default_device(None)


def model() -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(64, 32, **CPU_FLOAT32), nn.ReLU(), nn.Linear(32, 48, **CPU_FLOAT32))


def results(kind: Any, folder: Path) -> dict[str, Tensor]:
    """What an adapter is when it starts, its gradients, and its outputs by every way."""
    made: dict[str, Tensor] = {}
    x = torch.linspace(-1, 1, 6 * 64, **CPU_FLOAT32).view(6, 64)
    torch.manual_seed(1)
    adapted = lo.adapt(model(), kind)
    made |= {name: tensor.detach().clone() for name, tensor in adapted.state_dict().items()}
    torch.manual_seed(2)
    adapted(x).square().sum().backward()
    made |= {f"gradient of {name}": p.grad for name, p in adapted.named_parameters() if p.grad is not None}
    with torch.no_grad():
        for p in lo.adapter_parameters(adapted):
            p += 0.01
        made["y"] = adapted.eval()(x)
        with lo.disabled(adapted):
            made["disabled"] = adapted(x)
        made["reference"] = lo.reference(adapted, adapter=False)(x)
        made["converted"] = lo.convert(adapted[0], rank=2).update.delta()
        lo.save_adapter(adapted, folder)
        made["loaded"] = lo.load_adapter(lo.adapt(model(), kind), folder).eval()(x)
        if kind not in (KINDS["pissa"], KINDS["milora"], KINDS["loftq"], KINDS["replace"]):
            base = lo.adapt(model(), None)
            pool = lo.AdapterPool(base, 1 << 20)
            pool.load("a", folder)
            with pool.route(["a", None] * 3):
                made["pool"] = base(x)
            torch.manual_seed(3)
            base = lo.adapt(lo.adapt(model(), None), kind)
            made["again"] = base(x)
        made["merged"] = lo.merge(adapted)(x)
    torch.manual_seed(4)
    if torch.get_default_device().type == "cpu":
        made["head"] = RewardHead(8).weight.detach()
    return made


@pytest.mark.parametrize("name", KINDS)
def test_adapters_are_the_same_under_every_default(name: str, tmp_path: Path) -> None:
    expected = results(KINDS[name], tmp_path)
    assert all(t.dtype in (torch.float32, torch.uint8, torch.int8, torch.int32) for t in expected.values())
    for dtype, device in ((torch.bfloat16, None), (torch.float64, None), (None, "meta")):
        with default(dtype, device):
            got = results(KINDS[name], tmp_path)
        assert got.keys() | {"head"} == expected.keys()
        for key, value in got.items():
            assert value.dtype == expected[key].dtype and value.device == expected[key].device, (key, dtype, device)
            assert torch.equal(value, expected[key]), (key, dtype, device)


def calibrated(init: str) -> dict[str, Tensor]:
    """Moments, the rounding by them, a branch, and rows that are decoded alone."""
    x = torch.linspace(-1, 1, 6 * 64, **CPU_FLOAT32).view(6, 64)
    moments = lo.calibrate(model(), [{"input": x}])
    made = {f"{name} of {layer}": getattr(moments[layer], name) for layer in moments for name in PARTS}
    torch.manual_seed(1)
    config = lo.NF4Config(calibration=moments, compensate=3)
    adapted = lo.adapt(model(), lo.LoRA(4, init=init), quantize=config)
    made |= {name: tensor.detach().clone() for name, tensor in adapted.state_dict().items()}
    weight = lo.NF4Weight.quantize(torch.linspace(-1, 1, 256 * 64, **CPU_FLOAT32).view(256, 64), scales="search")
    return made | {"y": adapted(x), "rows": weight.dequantize_rows(torch.tensor([3, 255], device="cpu"))}


@pytest.mark.parametrize("init", ["kaiming", "eva", "corda", "eora"])
def test_calibration_is_the_same_under_every_default(init: str) -> None:
    expected = calibrated(init)
    for dtype, device in ((torch.float64, None), (torch.bfloat16, None), (None, "meta")):
        with default(dtype, device):
            got = calibrated(init)
        for key, value in got.items():
            assert value.dtype == expected[key].dtype and value.device == expected[key].device, (key, dtype, device)
            assert torch.equal(value, expected[key]), (key, dtype, device)
