"""Adapters are combined from their files alone, and what is written is read by PEFT and by lowrank_ops."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

import lowrank_ops as lo
from lowrank_ops.__main__ import main
from lowrank_ops.adapters.combine_files import combine_files


def base() -> nn.ModuleDict:
    torch.manual_seed(0)
    return nn.ModuleDict({"a": nn.Linear(48, 32), "b": nn.Linear(32, 40)})


def adapted(
    kind: lo.LoRA | lo.LoRAXS | lo.SVF | lo.SVFT, seed: int, targets: tuple[str, ...] = ("a", "b")
) -> nn.ModuleDict:
    model = base()
    lo.adapt(model, kind, list(targets))
    generator = torch.Generator().manual_seed(seed)
    for parameter in lo.adapter_parameters(model):
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    return model


def change(model: nn.ModuleDict, name: str) -> torch.Tensor:
    layer = model[name]
    return lo.combine([(layer, 1.0)]).delta() if isinstance(layer, lo.Linear) else torch.zeros(layer.weight.shape)


def test_adapters_of_every_kind_become_one_that_peft_reads(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from peft import PeftModel

    kinds = (
        lo.LoRA(4, alpha=2),
        lo.LoRA(6, rslora=True),
        lo.LoRA(3, init="pissa"),
        lo.LoRAXS(4),
        lo.SVF(5),
        lo.SVFT(bandwidth=1, rank=6),
    )
    models = [adapted(kind, seed, ("a",) if seed == 1 else ("a", "b")) for seed, kind in enumerate(kinds)]
    folders = [str(tmp_path / str(number)) for number in range(len(models))]
    for model, folder, kind in zip(models, folders, kinds, strict=True):
        lo.save_adapter(model, folder, "auto" if isinstance(kind, lo.LoRA) else "stored")
    weights = [0.5, -1.0, 2.0, 0.25, 1.0, 1.5]
    out = tmp_path / "out"
    assert main(["combine", *folders, "--weights", *map(str, weights), "--out", str(out)]) == 0
    assert f"2 layers in {out}" in capsys.readouterr().out
    updates = lo.combine(list(zip(folders, weights, strict=True)))
    ours, theirs = base(), PeftModel.from_pretrained(base(), out).merge_and_unload()
    lo.load_adapter(ours, out)
    for name in ("a", "b"):
        wanted = sum(w * change(model, name) for model, w in zip(models, weights, strict=True))
        assert isinstance(wanted, torch.Tensor)
        read = theirs[name].weight.detach() - base()[name].weight.detach()
        for got in (updates[name].delta(), change(ours, name), read):
            assert (got - wanted).norm() <= 1e-5 * wanted.norm()


@pytest.mark.parametrize("method", ["sum", "ties", "dare"])
@pytest.mark.parametrize("factors", ["recipe", "stored"])
@pytest.mark.parametrize("kind", [lo.LoRAXS(4), lo.SVFT(rank=6, pattern="random", bandwidth=2), lo.SVF()], ids=str)
def test_cores_of_one_family_stay_of_their_kind(
    kind: lo.LoRAXS | lo.SVF | lo.SVFT, factors: str, method: str, tmp_path: Path
) -> None:
    models = [adapted(kind, seed) for seed in range(3)]
    folders = [tmp_path / str(number) for number in range(3)]
    for model, folder in zip(models, folders, strict=True):
        lo.save_adapter(model, folder, factors)
    density = [] if method == "sum" else ["--density", "0.5"]
    out = tmp_path / "out"
    arguments = ["combine", *map(str, folders), "--method", method, *density, "--out", str(out)]
    assert main(arguments) == 0
    assert json.loads((out / "adapter_config.json").read_text())["peft_type"] == "LOWRANK_OPS"
    read = base()
    lo.load_adapter(read, out)
    for name in ("a", "b"):
        layer = read[name]
        assert isinstance(layer, lo.Linear) and type(layer.adapter) is type(kind)
        if method != "dare":  # whose random numbers depend on the name
            wanted = lo.combine([(m[name], 1.0) for m in models], method=method, density=0.5 if density else None)
            assert (change(read, name) - wanted.delta()).norm() <= 1e-5 * wanted.delta().norm()


def test_a_stack_of_cores_is_merged_expert_by_expert(tmp_path: Path) -> None:
    for seed in range(2):
        made = adapted(lo.SVF(), seed, ("a",))
        lo.save_adapter(made, tmp_path / str(seed), "recipe")
        file = tmp_path / str(seed) / "adapter_model.safetensors"
        tensors = load_file(file)
        key = next(key for key in tensors if key.endswith("core"))
        core = torch.randn(3, 32, generator=torch.Generator().manual_seed(seed))
        core[0] *= 100  # the entries of this expert would be all that is kept of a stack
        with safe_open(file, framework="pt") as read:
            metadata = read.metadata()
        save_file(tensors | {key: core}, file, metadata)
    combine_files([tmp_path / "0", tmp_path / "1"], [1.0, 1.0], tmp_path / "out", method="magnitude", density=0.25)
    merged = load_file(tmp_path / "out" / "adapter_model.safetensors")[key]
    assert all(8 <= int((expert != 0).sum()) <= 16 for expert in merged)


def test_what_files_cannot_tell_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lo.save_adapter(adapted(lo.LoRA(2), 0), tmp_path / "lora")
    lo.save_adapter(adapted(lo.LoRAXS(4), 1), tmp_path / "recipe", "recipe")
    lo.save_adapter(adapted(lo.LoRA(2, dora=True), 1), tmp_path / "dora")
    trained = adapted(lo.LoRA(2), 0, ("a",))
    trained["b"].requires_grad_(True)
    lo.save_adapter(trained, tmp_path / "beside")
    for name, message in {
        "recipe": "layer 'a of .*recipe': the file lacks the stored down; load it into the model",
        "dora": "is more than a low-rank update",
        "beside": "has trained 'b.bias' beside its updates",
        "missing": "no adapter at",
    }.items():
        with pytest.raises((ValueError, FileNotFoundError), match=message):
            lo.combine([(tmp_path / "lora", 1.0), (tmp_path / name, 1.0)])
        assert main(["combine", str(tmp_path / "lora"), str(tmp_path / name), "--out", str(tmp_path / "out")]) == 1
        assert re.search(message, capsys.readouterr().err)
    with pytest.raises(TypeError, match="pairs"):
        lo.combine([(tmp_path / "lora", 1.0), (adapted(lo.LoRA(2), 0)["a"], 1.0)])  # type: ignore[list-item]
    with pytest.raises(ValueError, match="finite number, got nan"):
        lo.combine([(tmp_path / "lora", float("nan"))])
    assert main(["combine", str(tmp_path / "lora"), "--weights", "1", "2", "--out", str(tmp_path / "out")]) == 1
    assert "one finite number for each of 1 adapters" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
