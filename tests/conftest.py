"""The devices that the same test bodies run on, and poisoned memory."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch

import lowrank_ops as lo

INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") not in ("", "0")
if INTERPRETED:
    DEVICES = ["interpret"]
else:
    DEVICES = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if "device" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.interpret)


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> Iterator[torch.device]:
    """cpu: the C++ kernels; cuda: Triton and CUDA on a GPU; interpret: Triton on CPU tensors, in its own process."""
    if request.param == "interpret":
        with lo.implementation("triton"):
            yield torch.device("cpu")
    else:
        yield torch.device(request.param)


@pytest.fixture
def dtypes() -> tuple[torch.dtype, ...]:
    """The dtypes to try beside float32; the interpreter gets bfloat16 wrong, and the launchers refuse it there."""
    return (torch.float16,) if INTERPRETED else (torch.bfloat16, torch.float16)


@pytest.fixture(autouse=True)
def poison(monkeypatch: pytest.MonkeyPatch) -> None:
    """Uninitialised memory of the package holds NaN, so that a value nobody wrote shows."""

    def fill(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.device.type == "meta" or torch.compiler.is_compiling():
            return tensor
        return tensor.fill_(float("nan")) if tensor.is_floating_point() else tensor.fill_(85)

    for owner, name in ((torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty")):
        original = getattr(owner, name)

        def poisoned(*args, _original=original, **kwargs):  # type: ignore[no-untyped-def]
            tensor = _original(*args, **kwargs)
            return fill(tensor) if type(tensor) is torch.Tensor else tensor

        monkeypatch.setattr(owner, name, poisoned)
