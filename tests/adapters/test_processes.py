"""Two processes that share one model: what they compute is what one process computes."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from models import llama
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.testing import assert_close

import lowrank_ops as lo

IDS = torch.arange(28).view(4, 7)
SIZE = 2


def make(kind: Any, **options: Any) -> Any:
    torch.manual_seed(0)
    return lo.adapt(llama(), kind, **options)


def train(model: nn.Module, ids: Tensor, steps: int = 3) -> None:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-2)
    for _ in range(steps):
        optimizer.zero_grad()
        model(ids, labels=ids).loss.backward()
        optimizer.step()


def half(rank: int) -> Tensor:
    """The process's part of the batch; the mean of the two losses is the loss of the whole."""
    return IDS.chunk(SIZE)[rank]


def trained(model: nn.Module) -> dict[str, Tensor]:
    whole = ((name, p.full_tensor() if hasattr(p, "full_tensor") else p) for name, p in model.named_parameters())
    return {name.removeprefix("module."): p.detach() for name, p in whole if p.requires_grad}


def logits(model: nn.Module, ids: Tensor = IDS) -> Tensor:
    with torch.no_grad():
        return model(ids, use_cache=False).logits


def shard(model: Any, **options: Any) -> Any:
    lo.make_shardable(model)
    for layer in model.model.layers:
        fully_shard(layer, **options)
    return fully_shard(model, **options)


def check_ddp(rank: int, path: Path) -> None:
    alone, model = make(lo.LoRA(4)), make(lo.LoRA(4))
    train(alone, IDS)
    train(DistributedDataParallel(model), half(rank))
    assert_close(trained(model), trained(alone), rtol=0, atol=1e-5)


def check_fsdp(rank: int, path: Path, kind: Any, quantize: str, **options: Any) -> None:
    alone, model = make(kind, quantize=quantize), make(kind, quantize=quantize)
    before = sum(buffer.nbytes for buffer in model.buffers())
    model.gradient_checkpointing_enable()
    shard(model.train(), **options)
    packed = [p for name, p in model.named_parameters() if name.endswith(("packed", "absmax", "exponents"))]
    whole = sum(p.numel() for p in packed)
    assert sum(p.to_local().numel() for p in packed) <= whole / SIZE + len(packed)
    assert (
        sum(buffer.nbytes for buffer in model.buffers()) < before / 4
    )  # the second level of scales, tables of positions
    train(alone.train(), IDS)
    train(model, half(rank))
    assert_close(trained(model), trained(alone), rtol=0, atol=1e-5)
    assert_close(logits(model), logits(alone), rtol=0, atol=1e-4)
    with pytest.raises(ValueError, match="layer 'model.layers.0.*': (down|core) is sharded over"):
        lo.merge(model)
    lo.save_adapter(model, path / f"{type(kind).__name__}{quantize}")
    dist.barrier()
    fresh = lo.load_adapter(lo.adapt(llama(), None, quantize=quantize), path / f"{type(kind).__name__}{quantize}")
    assert_close(logits(fresh), logits(alone), rtol=0, atol=1e-4)
    full = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    state = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))
    assert not any(hasattr(t, "full_tensor") for t in state.values())
    other = shard(make(kind, quantize=quantize), **options)
    set_model_state_dict(other, state if rank == 0 else {}, options=full)
    assert_close(trained(other), trained(model), rtol=0, atol=0)
    assert_close(logits(other), logits(model), rtol=0, atol=0)


def check_fsdp_lora(rank: int, path: Path) -> None:
    check_fsdp(rank, path, lo.LoRA(4), "nf4")


def check_fsdp_dora(rank: int, path: Path) -> None:
    check_fsdp(rank, path, lo.LoRA(2, dora=True), "fp4")


def check_fsdp_xs(rank: int, path: Path) -> None:
    check_fsdp(rank, path, lo.LoRAXS(6), "mxfp4")


def check_fsdp_policies(rank: int, path: Path) -> None:
    half_precision = shard(make(lo.LoRA(4)), mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16))
    assert_close(logits(half_precision).float(), logits(make(lo.LoRA(4))), rtol=0, atol=5e-3)
    offloaded = shard(make(lo.LoRA(4)), offload_policy=CPUOffloadPolicy(pin_memory=False))
    assert_close(logits(offloaded), logits(make(lo.LoRA(4))), rtol=0, atol=1e-5)


CHECKS: dict[str, Callable[[int, Path], None]] = {
    name.removeprefix("check_"): function
    for name, function in list(globals().items())
    if name.startswith("check_") and name != "check_fsdp"
}


def work(rank: int, path: Path) -> None:
    """Run every check in one process of two; a check that fails leaves its traceback in a file."""
    torch.set_num_threads(1)
    store = dist.FileStore(str(path / "store"), SIZE)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=SIZE)
    for name, check in CHECKS.items():
        try:
            check(rank, path)
        except BaseException:
            (path / f"{name}.{rank}.failed").write_text(traceback.format_exc())
            raise
        (path / f"{name}.{rank}.passed").touch()
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    path = tmp_path_factory.mktemp("processes")
    torch.multiprocessing.spawn(work, (path,), SIZE, join=False).join(300)
    yield path


@pytest.mark.parametrize("name", CHECKS)
def test_two_processes(name: str, results: Path) -> None:
    failed = [file.read_text() for file in results.glob(f"{name}.*.failed")]
    assert not failed, "\n".join(failed)
    assert len(list(results.glob(f"{name}.*.passed"))) == SIZE, "a check before it failed"
