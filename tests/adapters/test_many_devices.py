"""Adapted models over several processes and devices: torch's distributed checkpoints."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from helpers import assert_bits_equal
from models import plain
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict

import lowrank_ops as lo


@pytest.fixture
def process_group() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def moved(kind: Any, quantize: str | None) -> nn.Module:
    """An adapted model whose parameters differ from a fresh model's."""
    model = lo.adapt(plain(), kind, quantize=quantize)
    with torch.no_grad():
        for p in model.parameters():
            p += 0.1
    return model


KINDS = [
    (lo.LoRA(4), "nf4"),
    (lo.LoRAXS(6), "fp4"),
    (lo.LoRA(4), "mxfp4"),
    (lo.SVF(form="replace"), "nf4"),
    (None, None),
]


@pytest.mark.parametrize(("kind", "quantize"), KINDS, ids=str)
def test_torchs_distributed_checkpoint(kind: Any, quantize: str | None, tmp_path: Path) -> None:
    model, x = moved(kind, quantize), torch.randn(3, 64)
    state = get_model_state_dict(model)
    assert state.keys() == model.state_dict().keys()
    dcp.save(state, checkpoint_id=tmp_path)
    fresh = lo.adapt(plain(), kind, quantize=quantize)
    state = get_model_state_dict(fresh)
    dcp.load(state, checkpoint_id=tmp_path)
    set_model_state_dict(fresh, state)
    assert_bits_equal(fresh(x), model(x))
    trained = get_model_state_dict(model, options=StateDictOptions(ignore_frozen_params=True))
    frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
    assert trained.keys() == state.keys() - frozen


@pytest.mark.usefixtures("process_group")
@pytest.mark.parametrize(("kind", "quantize"), KINDS, ids=str)
def test_a_full_state_for_every_process(kind: Any, quantize: str | None) -> None:
    model, x = moved(kind, quantize), torch.randn(3, 64)
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    fresh = lo.adapt(plain(), kind, quantize=quantize)
    result = set_model_state_dict(fresh, get_model_state_dict(model, options=options), options=options)
    assert not result.missing_keys and not result.unexpected_keys
    assert_bits_equal(fresh(x), model(x))
