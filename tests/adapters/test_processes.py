"""Two processes that share one model: what they compute is what one process computes."""

from __future__ import annotations

import copy
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from accelerate import PartialState
from accelerate.utils import FullyShardedDataParallelPlugin
from accelerate.utils.fsdp_utils import fsdp2_prepare_model
from models import llama, with_branches
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import parallel as style
from torch.nn.parallel import DistributedDataParallel
from torch.testing import assert_close

import lowrank_ops as lo
from lowrank_ops.adapters.peft_files import TENSORS
from lowrank_ops.adapters.sharded import is_sharded
from lowrank_ops.integrations import tensor_parallel

IDS = torch.arange(28).view(4, 7)
SIZE = 2


def make(kind: Any, **options: Any) -> Any:
    torch.manual_seed(0)
    return lo.adapt(llama(), kind, **options)


def train(model: nn.Module, ids: Tensor, steps: int = 3, kind: Any = torch.optim.AdamW, lr: float = 1e-2) -> None:
    optimizer = kind([p for p in model.parameters() if p.requires_grad], lr)
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
    state = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))
    with pytest.raises(RuntimeError, match=r"Missing key\(s\)") if rank else nullcontext():
        options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
        set_model_state_dict(alone, state if rank == 0 else {}, options=options)


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


def check_fsdp_by_accelerate(rank: int, path: Path) -> None:
    """What accelerate does to a model when FSDP2 is configured; its Accelerator itself wants a GPU."""
    PartialState(cpu=True)
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2, reshard_after_forward=True, auto_wrap_policy="transformer_based_wrap",
        transformer_cls_names_to_wrap=["LlamaDecoderLayer"], cpu_ram_efficient_loading=False,
    )  # fmt: skip
    accelerator = SimpleNamespace(
        state=SimpleNamespace(fsdp_plugin=plugin),
        mixed_precision="no",
        is_main_process=rank == 0,
        device=torch.device("cpu"),
    )
    alone, model = make(lo.LoRA(4)), lo.make_shardable(make(lo.LoRA(4)))
    fsdp2_prepare_model(accelerator, model)
    packed = model.model.layers[0].mlp.up_proj.weight.packed  # type: ignore[union-attr]
    assert packed.to_local().numel() * SIZE == packed.numel()
    train(alone, IDS)
    train(model, half(rank))
    assert_close(trained(model), trained(alone), rtol=0, atol=1e-5)


def check_fsdp_policies(rank: int, path: Path) -> None:
    half_precision = shard(make(lo.LoRA(4)), mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16))
    assert_close(logits(half_precision).float(), logits(make(lo.LoRA(4))), rtol=0, atol=5e-3)
    offloaded = shard(make(lo.LoRA(4)), offload_policy=CPUOffloadPolicy(pin_memory=False))
    assert_close(logits(offloaded), logits(make(lo.LoRA(4))), rtol=0, atol=1e-5)


def wide(kind: Any, **options: Any) -> Any:
    """A model whose halves are whole blocks of 64 weights; with biases."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=99, hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, use_cache=False,
    )  # fmt: skip
    model: Any = Qwen2ForCausalLM(config).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith("bias"):
                p.normal_(generator=generator)
    torch.manual_seed(0)
    return lo.adapt(model, kind, **options)


class Params4bit(nn.Parameter):
    """By its name, a weight of bitsandbytes."""


def mesh_of() -> Any:
    return init_device_mesh("cpu", (SIZE,), mesh_dim_names=("tp",))


def check_tensor_parallelism(rank: int, path: Path) -> None:
    kinds = [
        (lo.LoRA(4), "nf4"),
        (lo.LoRA(4, init="pissa"), "fp4"),
        (lo.LoRAXS(6), "mxfp4"),
        (lo.SVF(form="replace"), None),
    ]
    for number, (kind, quantize) in enumerate(kinds):
        alone, model = wide(kind, quantize=quantize), wide(kind, quantize=quantize)
        lo.parallelize(model, mesh_of())
        layer = model.model.layers[0]
        assert layer.self_attn.q_proj.out_features == layer.self_attn.o_proj.in_features == 128 / SIZE
        assert_close(logits(model), logits(alone), rtol=0, atol=1e-5)
        with lo.disabled(model), lo.disabled(alone):
            assert_close(logits(model), logits(alone), rtol=0, atol=1e-5)
        model.gradient_checkpointing_enable()
        before = logits(alone)
        for one in (model, alone):  # AdamW would divide the rounding of small gradients by them
            train(one.train(), IDS, kind=torch.optim.SGD, lr=0.3)
            one.eval()
        assert (logits(alone) - before).abs().max() > 0.01
        assert_close(logits(model), logits(alone), rtol=0, atol=1e-5)
        lo.save_adapter(model, path / f"tp{number}")
        dist.barrier()
        lo.save_adapter(alone, path / f"alone{number}{rank}")
        assert_close(
            *(load_file(path / name / TENSORS) for name in (f"tp{number}", f"alone{number}{rank}")), rtol=0, atol=1e-5
        )


def check_branches(rank: int, path: Path) -> None:
    """A branch is split as W is; fully_shard leaves the whole of it in every process."""
    alone, split, sharded = (with_branches(wide(lo.LoRA(4))) for _ in range(3))
    lo.parallelize(split, mesh_of())
    mlp = split.model.layers[0].mlp  # type: ignore[union-attr]
    assert mlp.up_proj.branch_up.shape[0] == mlp.down_proj.branch_down.shape[1] == 256 / SIZE
    shard(sharded)
    for model in (split, sharded):
        assert_close(logits(model), logits(alone), rtol=0, atol=1e-5)
        with lo.disabled(model), lo.disabled(alone):
            assert_close(logits(model), logits(alone), rtol=0, atol=1e-5)
    state = get_model_state_dict(sharded, options=StateDictOptions(full_state_dict=True))
    other = shard(wide(lo.LoRA(4)))  # without branches until the state brings them
    set_model_state_dict(other, state, options=StateDictOptions(full_state_dict=True))
    assert_close(logits(other), logits(alone), rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match="split over processes"):
        split.save_pretrained(path / "split")  # type: ignore[operator]


def check_states(rank: int, path: Path) -> None:
    """What would take a part of a split layer for the whole is refused, in every process and also in copies."""
    model = wide(lo.LoRA(4), targets=["q_proj"])  # q_proj is adapted, v_proj is dense
    state = model.state_dict()
    lo.parallelize(model, mesh_of())
    block, copied = model.model.layers[0], copy.deepcopy(model)
    trained = [p for p in model.parameters() if p.requires_grad]
    for call, name in (
        (model.state_dict, "layer 'model.layers.0.self_attn.q_proj': "),
        (copied.state_dict, "layer 'model.layers.0.self_attn.q_proj': "),
        (block.self_attn.v_proj.state_dict, ""), (lambda: get_model_state_dict(model), ""),
        (lambda: get_optimizer_state_dict(model, torch.optim.AdamW(trained)), ""),
        (lambda: model.save_pretrained(path / "whole"), "layer 'model.layers.0.self_attn.q_proj': "),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=f"^{name}the layer is split over processes.*lowrank_ops.save_adapter"):
            call()
    with pytest.raises(RuntimeError, match="q_proj"):
        model.load_state_dict(state)
    assert is_sharded(model)  # a trainer then saves in every process


def check_both(rank: int, path: Path) -> None:
    """Tensor parallelism, and fully_shard over the other dimension of a mesh."""
    mesh = init_device_mesh("cpu", (1, SIZE), mesh_dim_names=("dp", "tp"))
    alone, model = wide(lo.LoRA(4)), lo.make_shardable(lo.parallelize(wide(lo.LoRA(4)), mesh["tp"]))
    for layer in model.model.layers:  # type: ignore[union-attr]
        fully_shard(layer, mesh=mesh["dp"])
    fully_shard(model, mesh=mesh["dp"])
    with pytest.raises(ValueError, match="mesh must have one dimension"):
        lo.parallelize(alone, mesh)
    for one in (model, alone):
        train(one, IDS, kind=torch.optim.SGD, lr=0.3)
    assert_close(logits(model), logits(alone), rtol=0, atol=1e-5)
    lo.save_adapter(model, path / "both")
    dist.barrier()
    assert_close(logits(lo.load_adapter(wide(None), path / "both")), logits(alone), rtol=0, atol=1e-5)


def check_plans(rank: int, path: Path) -> None:
    mesh, subset = mesh_of(), ["q_proj", "v_proj", "down_proj"]  # the others are split as they are
    alone, model = wide(lo.LoRA(4), targets=subset), wide(lo.LoRA(4), targets=subset)
    lo.parallelize(model, mesh)
    assert model.model.layers[0].self_attn.o_proj.in_features == 128 / SIZE
    assert_close(logits(model), logits(alone), rtol=0, atol=1e-5)

    def pair() -> nn.Module:
        torch.manual_seed(0)
        return lo.adapt(nn.Sequential(nn.Linear(128, 256), nn.Tanh(), nn.Linear(256, 128)), lo.LoRA(4))

    def results(model: nn.Module) -> list[Tensor]:
        x = torch.linspace(-1, 1, 384).view(3, 128).requires_grad_()
        y = model(x)
        y.square().sum().backward()
        core = [p.grad for p in (model[0].down, model[2].up) if p.grad is not None]  # type: ignore[union-attr, operator]
        return [y.detach(), x.grad, *core]  # type: ignore[list-item]

    right = results(pair())
    for plan in (
        {"0": "colwise", "2": "rowwise"},
        {"0": "colwise_rep", "2": "rowwise_rep"},
        {"0": style.ColwiseParallel(), "2": style.RowwiseParallel()},
    ):
        assert_close(results(lo.parallelize(pair(), mesh, plan)), right, rtol=1e-5, atol=1e-5)
    styles = {"0": tensor_parallel.ColwiseParallel(), "2": tensor_parallel.RowwiseParallel()}
    assert_close(results(style.parallelize_module(pair(), mesh, styles)), right, rtol=1e-5, atol=1e-5)

    small = lo.adapt(llama(), lo.LoRA(4))
    before = small.state_dict()
    with pytest.raises(
        ValueError, match="'model.layers.0.self_attn.o_proj': columns 0 to 31 of a weight 64 x 64 are not"
    ):
        lo.parallelize(small, mesh)
    assert small.state_dict().keys() == before.keys() and small.model.layers[0].self_attn.q_proj.split is None
    for plan, match in (
        ({}, "the plan matches no linear"), ({"nothing": "colwise"}, "matches no module"),
        ({"0": "rows"}, "must be 'colwise'"), ({"1": "colwise"}, "'1' is no linear layer"),
        ({"0": style.ColwiseParallel(use_local_output=False)}, "local"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=match):
            lo.parallelize(pair(), mesh, plan)
    with pytest.raises(ValueError, match="3 heads cannot be split over 2"):
        odd = wide(lo.LoRA(4))
        odd.config.head_dim = 42
        lo.parallelize(odd, mesh)
    split = lo.parallelize(pair(), mesh, {"0": "colwise_rep"})
    for call in (
        lambda: lo.parallelize(split, mesh, {"0": "colwise_rep"}), lambda: lo.merge(split), lambda: lo.convert(split[0]),
        lambda: split[0].set_adapter(lo.LoRA(2)),
    ):  # fmt: skip
        with pytest.raises(ValueError, match="split over processes by lowrank_ops.parallelize"):
            call()
    bare = lo.parallelize(lo.adapt(nn.Sequential(nn.Linear(128, 256)), None), mesh, {"0": "colwise"})
    with pytest.raises(ValueError, match="layer '0': the layer is split over processes"):
        lo.AdapterPool(bare, 1 << 20)
    layers = {
        "4-bit": pair(), "without Parameters": lo.adapt(nn.Sequential(nn.Linear(128, 256, bias=False)), None),
        "dense": lo.adapt(nn.Sequential(nn.Linear(128, 256)), None, quantize=None),
    }  # fmt: skip
    for theirs in (style.ColwiseParallel(), style.RowwiseParallel()):
        for one in layers.values():
            before = one.state_dict()
            with pytest.raises(TypeError, match="use lowrank_ops.parallelize"):
                style.parallelize_module(one, mesh, {"0": theirs})
            assert one.state_dict().keys() == before.keys() and not one[0]._forward_hooks  # type: ignore[operator]
    plain: Any = nn.Sequential(nn.Linear(128, 256))
    with pytest.raises(ValueError, match="layer '0': a layer that is trained whole cannot be split"):
        lo.parallelize(plain, mesh, {"0": "colwise"})
    plain[0].weight = Params4bit(plain[0].weight.detach(), requires_grad=False)
    with pytest.raises(ValueError, match="layer '0': a bitsandbytes layer cannot be split"):
        lo.parallelize(plain, mesh, {"0": "colwise"})
    dense = nn.Sequential(nn.Linear(128, 256))
    with pytest.raises(ValueError, match="layer '0': weight is a DTensor.*lowrank_ops.parallelize"):
        lo.adapt(style.parallelize_module(dense, mesh, {"0": style.ColwiseParallel()}), lo.LoRA(4))


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
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(
            Path(__file__).parents[2]
        )  # the processes import this file as tests.adapters.test_processes
        context = torch.multiprocessing.spawn(work, (path,), SIZE, join=False)
    end = time.monotonic() + 600
    while not context.join(10):  # one call waits for one process
        assert time.monotonic() < end, "the processes wait for each other"
    yield path


@pytest.mark.parametrize("name", CHECKS)
def test_two_processes(name: str, results: Path) -> None:
    failed = [file.read_text() for file in results.glob(f"{name}.*.failed")]
    assert not failed, "\n".join(failed)
    assert len(list(results.glob(f"{name}.*.passed"))) == SIZE, "a check before it failed"
