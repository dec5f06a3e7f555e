"""accelerate's hooks before and after adapt: models over several devices, weights on the host or on disk."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import assert_bits_equal
from models import adapted, llama
from torch import Tensor, nn

import lowrank_ops as lo

pytest.importorskip("transformers")
hooks = pytest.importorskip("accelerate.hooks")
accelerate = pytest.importorskip("accelerate")

IDS = torch.arange(14).view(2, 7)
CPU = torch.device("cpu")
PARTS = ["model.embed_tokens", "model.layers.0", "model.layers.1", "model.norm", "model.rotary_emb", "lm_head"]
Dispatch = Callable[[nn.Module, Path], object]


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model(IDS, use_cache=False).logits


def perturbed(model: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in lo.adapter_parameters(model):
            p.copy_(torch.randn(p.shape, generator=generator) / 10)
    return model


def over_devices(model: nn.Module, path: Path) -> None:
    """The hooks of device_map over several devices, all of which are the CPU here."""
    hooks.attach_align_device_hook_on_blocks(model, {"": CPU, **dict.fromkeys(PARTS, CPU)}, dict.fromkeys(PARTS, False))


def map_of_cpu_and_disk(model: nn.Module, path: Path) -> None:
    places = dict.fromkeys(PARTS, "cpu") | {"model.layers.1": "disk"}
    accelerate.dispatch_model(model, places, offload_dir=path)


BEFORE: dict[str, Dispatch] = {
    "devices": over_devices,
    "device_map": map_of_cpu_and_disk,
    "cpu": lambda model, path: accelerate.cpu_offload(model, CPU),
    "disk": lambda model, path: accelerate.disk_offload(model, path, CPU),
}


@pytest.mark.parametrize("how", BEFORE)
def test_hooks_before_adapt_are_carried_over(how: str, tmp_path: Path) -> None:
    kind, model = lo.LoRA(4), llama()
    BEFORE[how](model, tmp_path / "weights")
    perturbed(lo.adapt(model, kind))
    right = perturbed(lo.adapt(llama(), kind))
    assert_bits_equal(logits(model), logits(right))
    layer = model.model.layers[1].self_attn.q_proj
    assert torch.device(layer._hf_hook.execution_device) == CPU
    assert layer.weight.packed.is_meta == (how != "devices") and layer.device == layer.down.device == CPU
    for trained in (model, right):
        optimizer = torch.optim.SGD(lo.adapter_parameters(trained), 0.1)
        trained(IDS, labels=IDS).loss.backward()
        optimizer.step()
    expected = logits(right)
    assert_bits_equal(logits(model), expected)
    lo.save_adapter(model, tmp_path / "adapter")
    assert_bits_equal(logits(lo.load_adapter(lo.adapt(llama(), None), tmp_path / "adapter")), expected)
    merged = logits(lo.merge(right))
    layer = lo.merge(model).model.layers[1].self_attn.q_proj
    assert type(layer) is nn.Linear and layer.weight.is_meta == (how != "devices")
    assert_bits_equal(logits(model), merged)


AFTER: dict[str, Callable[[nn.Module, Path, bool], object]] = {
    "cpu": lambda model, path, buffers: accelerate.cpu_offload(model, CPU, offload_buffers=buffers),
    "disk": lambda model, path, buffers: accelerate.disk_offload(model, path, CPU, offload_buffers=buffers),
    "no map": lambda model, path, buffers: hooks.attach_align_device_hook(
        model, CPU, offload=True, offload_buffers=buffers
    ),
}


@pytest.mark.parametrize("buffers", [False, True])
@pytest.mark.parametrize("how", AFTER)
@pytest.mark.parametrize(("kind", "quantize"), [(lo.LoRA(4), "mxfp4"), (lo.LoRAXS(4), "nf4")], ids=str)
def test_an_adapted_model_is_offloaded(kind: Any, quantize: str, how: str, buffers: bool, tmp_path: Path) -> None:
    model = perturbed(lo.adapt(llama(), kind, quantize=quantize))
    expected = logits(model)
    AFTER[how](model, tmp_path, buffers)
    layer = model.model.layers[1].self_attn.q_proj
    assert layer.weight.packed.is_meta == buffers
    for _ in range(2):
        assert_bits_equal(logits(model), expected)
    assert layer.weight.packed.is_meta == buffers
    if kind.__class__ is lo.LoRA:
        for call in (lambda: lo.save_adapter(model, tmp_path / "adapter"), lambda: lo.merge(model)):
            with pytest.raises(ValueError, match="down is on the meta device.*remove_hook_from_submodules"):
                call()
    hooks.remove_hook_from_submodules(model)
    assert not layer.weight.packed.is_meta
    assert_bits_equal(logits(model), expected)


def test_hooks_that_are_not_known_are_refused(tmp_path: Path) -> None:
    class Other(hooks.ModelHook):  # type: ignore[name-defined, misc]
        pass

    for hook in (Other(), hooks.SequentialHook(hooks.AlignDevicesHook(CPU), Other())):
        model = llama()
        hooks.add_hook_to_module(model.model.layers[0].mlp.up_proj, hook)
        with pytest.raises(ValueError, match=r"layer 'model.layers.0.mlp.up_proj': linear has hooks"):
            lo.adapt(model, lo.LoRA(4))
        assert not adapted(model)
    model = llama()
    over_devices(model, tmp_path)
    model.model.layers[0].mlp.up_proj.register_forward_hook(lambda *arguments: None)
    with pytest.raises(ValueError, match="linear has hooks"):
        lo.adapt(model, lo.LoRA(4))


def test_a_dense_weight_on_the_host_beside_trained_parameters_is_refused(tmp_path: Path) -> None:
    model = llama()
    map_of_cpu_and_disk(model, tmp_path)
    with pytest.raises(ValueError, match="layer 'model.layers.1.*offloaded.*quantise it"):
        lo.adapt(model, lo.LoRA(4), quantize=None)
    assert not adapted(model)
