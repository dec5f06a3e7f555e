"""Branches of whole models: fitted while a model is read or adapted, saved beside the weights, read by PEFT and by us."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import assert_bits_equal, assert_within_baseline
from mixtures import mixture
from models import gemma, gpt2, llama
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModel, AutoModelForCausalLM

import lowrank_ops as lo
from lowrank_ops.adapters.branch_files import branched
from lowrank_ops.adapters.config import branch_bytes
from lowrank_ops.adapters.linear import AdaptedLayer
from lowrank_ops.adapters.targets import shape_of, target_weight
from lowrank_ops.formats import Moment, Moments
from lowrank_ops.formats.moments import fingerprint
from lowrank_ops.svd.weighted import weighted_norm

IDS = torch.arange(1, 13).view(2, 6)
FAMILIES: dict[str, Any] = {"llama": llama, "gemma": gemma, "gpt2": gpt2, "mixtral": lambda: mixture("mixtral")}


def moments_for(model: nn.Module, seed: int = 0) -> Moments:
    """Moments of correlated inputs, made up, of every layer that NF4Config chooses."""
    generator = torch.Generator().manual_seed(seed)
    made = {}
    for name, target in lo.NF4Config().choose(model).items():
        *stack, _, K = shape_of(target)
        x = torch.randn(*stack, 300, K, generator=generator) * torch.exp(-3 * torch.arange(K) / K)
        x = x @ torch.linalg.qr(torch.randn(K, K, generator=generator))[0]
        count = torch.full(stack, 300) if stack else torch.tensor(300)
        weight = target_weight(target)
        second = (x.mT @ x / 300).contiguous()
        made[name] = Moment(second, x.mean(-2), count, tuple(weight.shape), fingerprint(weight))
    return Moments(made)


@pytest.fixture(scope="module", params=FAMILIES)
def dense(request: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Moments]:
    model = FAMILIES[request.param]()
    directory = tmp_path_factory.mktemp(request.param)
    model.save_pretrained(directory)
    return directory, moments_for(model)


def load(directory: Path, config: Any = None, kind: Any = AutoModelForCausalLM, **options: Any) -> Any:
    if config is not None:
        options["quantization_config"] = config
    return kind.from_pretrained(directory, dtype=torch.float32, **options).eval()


def logits(model: nn.Module) -> Tensor:
    return model(IDS).logits.detach()


def same(first: nn.Module, second: nn.Module) -> None:
    ours, theirs = first.state_dict(), second.state_dict()
    assert ours.keys() == theirs.keys()
    for key, tensor in ours.items():
        assert_bits_equal(tensor, theirs[key])
    assert_bits_equal(logits(first), logits(second))


def error(layer: AdaptedLayer, weight: Tensor, moment: Moment, branch: bool = True) -> float:
    """‖(W − base) H^½‖² of a layer, of all experts together."""
    base = layer.base if branch else layer.base._replace(branch=None)
    return float(weighted_norm(weight.float() - base.dense(), moment.second).sum())


def test_a_model_is_read_with_branches_saved_and_read_back(dense: tuple[Path, Moments], tmp_path: Path) -> None:
    directory, moments = dense
    moments.save(tmp_path / "moments.safetensors")
    config = lo.NF4Config(calibration=tmp_path / "moments.safetensors", compensate=4)
    model = load(directory, config)
    original = load(directory)
    layers = branched(model)
    assert layers.keys() == moments.keys()
    # What remains falls with each step: to nearest, looking at data, with a branch.
    nearest = lo.adapt(load(directory), None)
    targets = lo.NF4Config().choose(original)
    for name, layer in layers.items():
        weight, plain = target_weight(targets[name]), nearest.get_submodule(name)
        assert isinstance(weight, Tensor) and isinstance(plain, AdaptedLayer) and layer.loss is not None
        left = error(layer, weight, moments[name])
        assert left < layer.loss.rounding**2 * float(weighted_norm(weight, moments[name].second).sum())
        assert error(layer, weight, moments[name], branch=False) < error(plain, weight, moments[name])
        assert layer.branch is not None and layer.branch.rank == 4 and layer.branch.down.dtype == torch.bfloat16
    # The same model by adapt, to the bit.
    adapted = lo.adapt(load(directory), None, quantize=lo.NF4Config(calibration=moments, compensate=4))
    same(model, adapted)
    # Saved: bitsandbytes' files and a plain LoRA; read back by themselves.
    model.save_pretrained(tmp_path / "out")
    entries = load_file(tmp_path / "out" / "model.safetensors")
    assert not any("branch" in key for key in entries)
    config_json = json.loads((tmp_path / "out" / "branch" / "adapter_config.json").read_text())
    assert config_json["r"] == config_json["lora_alpha"] == 4
    back = load(tmp_path / "out")
    assert_bits_equal(logits(back), logits(model))
    for name, layer in branched(back).items():
        assert layer.branch is not None and layers[name].branch is not None
        assert_bits_equal(layer.branch.down, layers[name].branch.down)  # type: ignore[union-attr, arg-type]
    back.save_pretrained(tmp_path / "again")
    assert (
        load_file(tmp_path / "again" / "branch" / "adapter_model.safetensors").keys()
        == load_file(tmp_path / "out" / "branch" / "adapter_model.safetensors").keys()
    )
    assert_bits_equal(logits(load(tmp_path / "again")), logits(model))
    # A model without branches in the same place leaves none behind.
    nearest.save_pretrained(tmp_path / "again")
    assert not branched(load(tmp_path / "again"))


def test_adapters_over_it_come_back(dense: tuple[Path, Moments], tmp_path: Path) -> None:
    directory, moments = dense
    load(directory, lo.NF4Config(calibration=moments, compensate=3)).save_pretrained(tmp_path / "base")
    model = lo.adapt(load(tmp_path / "base"), lo.LoRA(2))
    generator = torch.Generator().manual_seed(4)
    for parameter in lo.adapter_parameters(model):
        parameter.data += torch.randn(parameter.shape, generator=generator) / 20
    lo.save_adapter(model, tmp_path / "adapter")
    assert_bits_equal(logits(lo.load_adapter(load(tmp_path / "base"), tmp_path / "adapter")), logits(model))
    model.save_pretrained(tmp_path / "whole")  # the base, the branch and the adapters
    assert_bits_equal(logits(load(tmp_path / "whole")), logits(model))
    with lo.disabled(model):
        assert_bits_equal(logits(model), logits(load(tmp_path / "base")))
    merged = lo.merge(copy.deepcopy(model))
    assert torch.allclose(logits(merged), logits(model), atol=1e-4)


def test_another_base_is_refused_and_a_missing_folder_too(tmp_path: Path) -> None:
    llama().save_pretrained(tmp_path / "dense")
    moments = moments_for(llama())
    config = lo.NF4Config(calibration=moments, compensate=2)
    load(tmp_path / "dense", config).save_pretrained(tmp_path / "out")
    shutil.copytree(tmp_path / "out", tmp_path / "mixed")
    lo.adapt(llama(), None).save_pretrained(tmp_path / "nearest")
    shutil.copy(tmp_path / "nearest" / "model.safetensors", tmp_path / "mixed" / "model.safetensors")
    with pytest.raises(ValueError, match="was fitted to other 4-bit numbers than layer 'model.layers.0"):
        load(tmp_path / "mixed")
    shutil.rmtree(tmp_path / "mixed" / "branch")
    with pytest.raises(ValueError, match="branch is missing: the model was saved with branches"):
        load(tmp_path / "mixed")
    with pytest.raises(ValueError, match="have 4 bits already"):
        load(tmp_path / "out", config)
    # A model without the head reads the same branches.
    inner = load(tmp_path / "out", kind=AutoModel)
    assert len(branched(inner)) == len(moments)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_peft_adds_the_branch_to_bitsandbytes_layers(family: str, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    from peft import PeftModel

    FAMILIES[family]().save_pretrained(tmp_path / "dense")
    moments = moments_for(FAMILIES[family]())
    budget = 2 * sum(branch_bytes(moment.shape) for moment in moments.values())
    model = load(tmp_path / "dense", lo.NF4Config(calibration=moments, compensate_bytes=budget))
    ranks = {layer.branch.rank for layer in branched(model).values() if layer.branch}
    assert len(ranks) > 1  # so that the file has patterns of ranks and alphas
    model.save_pretrained(tmp_path / "out")
    stored = json.loads((tmp_path / "out" / "config.json").read_text())
    stored["quantization_config"] = {k: v for k, v in stored["quantization_config"].items() if "lowrank" not in k}
    (tmp_path / "out" / "config.json").write_text(json.dumps(stored))
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
    assert any(type(m).__name__ == "Linear4bit" for m in theirs.modules())
    peft = PeftModel.from_pretrained(theirs, tmp_path / "out" / "branch").eval()
    theirs.get_input_embeddings().weight.requires_grad_()
    exact = lo.merge(copy.deepcopy(model)).double()(IDS).logits
    # With a gradient to x bitsandbytes computes in float32 on a CPU.
    got = peft(IDS).logits.detach()
    for ours in (logits(model), got):
        assert_within_baseline(
            ours.flatten(0, 1), exact.detach().flatten(0, 1), logits(lo.merge(copy.deepcopy(model))).flatten(0, 1)
        )
    with peft.disable_adapter():
        assert (peft(IDS).logits - exact).abs().max() > 10 * (got - exact).abs().max()


def test_serve_takes_the_branch(causal_model: str, tmp_path: Path) -> None:
    pytest.importorskip("prometheus_client")
    from lowrank_ops.serving.load import load as serve

    moments = moments_for(load(Path(causal_model)))
    model = load(Path(causal_model), lo.NF4Config(calibration=moments, compensate=2))
    shutil.copytree(causal_model, tmp_path / "out")
    model.save_pretrained(tmp_path / "out")
    service = serve(tmp_path / "out", None, device="cpu")
    try:
        served = service.engine.pool._layers
        assert len(served) == len(moments)
        for name, layer in branched(model).items():
            branch = served[name].branch
            assert branch is not None and layer.branch is not None
            assert_bits_equal(branch.up, layer.branch.up)  # type: ignore[arg-type]
    finally:
        service.engine.close()


def test_a_budget_of_bytes_is_kept() -> None:
    moments = moments_for(llama())
    each = sum(branch_bytes(moment.shape) for moment in moments.values())
    made = {}
    for budget in (each, 3 * each):
        model = lo.adapt(llama(), lo.LoRA(2), quantize=lo.NF4Config(calibration=moments, compensate_bytes=budget))
        layers = {n: m for n, m in model.named_modules() if isinstance(m, lo.Linear) and n in moments}
        used = sum(layer.branch.down.nbytes + layer.branch.up.nbytes for layer in layers.values() if layer.branch)
        assert budget - max(branch_bytes(m.shape) for m in moments.values()) < used <= budget
        made[budget] = sum(layer.loss.left**2 for layer in layers.values() if layer.loss)
        for layer in layers.values():
            assert layer.loss is not None and layer.loss.left <= layer.loss.rounding
            assert len(layer.loss.gains) == (layer.branch.rank if layer.branch else 0)
    assert made[3 * each] < made[each]
    equal = lo.adapt(llama(), None, quantize=lo.NF4Config(calibration=moments, compensate=1))
    assert made[each] < sum(m.loss.left**2 for m in branched(equal).values() if m.loss)


@pytest.mark.parametrize("config", [lo.FP4Config, lo.MXFP4Config])
def test_other_formats_have_branches(config: Any, tmp_path: Path) -> None:
    moments = moments_for(llama())
    model = lo.adapt(llama(), None, quantize=config(calibration=moments, compensate=2))
    assert len(branched(model)) == len(moments)
    model.save_pretrained(tmp_path)
    same(load(tmp_path), model)


def test_starts_over_a_config() -> None:
    """Kinds that change the base round what is left of W, and eora starts as what the branch leaves."""
    moments = moments_for(llama())
    config = lo.NF4Config(calibration=moments, compensate=2)
    dense = llama()
    for kind in (lo.LoRA(4, init="pissa"), lo.LoRA(4, init="eora"), lo.LoRA(4, dora=True)):
        name = "model.layers.1.mlp.down_proj"
        model = lo.adapt(llama(), kind, [name], quantize=config)
        layer, weight = model.get_submodule(name), dense.get_submodule(name).weight.detach()
        assert isinstance(layer, lo.Linear) and layer.branch is not None
        rest = float(weighted_norm(weight - layer.merged_weight(torch.float32), moments[name].second))
        bare = lo.adapt(llama(), None, [name], quantize=config).get_submodule(name)
        assert isinstance(bare, lo.Linear)
        if kind.init == "eora":
            assert rest < 0.95 * error(bare, weight, moments[name])
        elif kind.dora:
            assert rest == pytest.approx(error(bare, weight, moments[name]), rel=1e-3)
        assert rest < 1.2 * error(bare, weight, moments[name])


def test_layers_that_stay_dense_and_bad_input(tmp_path: Path) -> None:
    moments = moments_for(llama())
    model = lo.adapt(
        llama(),
        lo.LoRA(2),
        ["o_proj", "down_proj"],
        lo.NF4Config(calibration=moments, compensate=2, skip=["down_proj"]),
    )
    skipped = model.get_submodule("model.layers.0.mlp.down_proj")
    assert isinstance(skipped, lo.Linear) and isinstance(skipped.weight, nn.Parameter) and skipped.branch is None

    def refused(match: str, make: Any = llama, **options: Any) -> None:
        model = make()
        before = {key: value.clone() for key, value in model.state_dict().items()}
        with pytest.raises(ValueError, match=match):
            lo.adapt(model, None, quantize=lo.NF4Config(**options))
        after = model.state_dict()
        assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)

    first = "model.layers.0.self_attn.k_proj"
    refused(rf"{first}: compensate must be at most min\(N, K\) = 32", calibration=moments, compensate=33)
    lacking = Moments({n: m for n, m in moments.items() if n != first})
    refused(f"{first}: the calibration has no moments of it; unseen='plain'", calibration=lacking)
    unseen = Moments({**moments, first: Moment(**{**vars(moments[first]), "count": torch.tensor(0)})})
    refused(f"{first}: it saw no token", calibration=unseen, compensate=2)
    damaged = moments[first].second.clone()
    damaged[0, 0] = torch.nan
    broken = Moments({**moments, first: Moment(**{**vars(moments[first]), "second": damaged})})
    refused(f"{first}: second must be finite", calibration=broken)
    negative = Moments({**moments, first: Moment(**{**vars(moments[first]), "second": -moments[first].second})})
    refused(f"{first}: second must be positive", calibration=negative)

    def other() -> nn.Module:
        model = llama()
        torch.manual_seed(5)
        for parameter in model.parameters():
            nn.init.normal_(parameter, std=0.02)
        return model

    refused("gathered beside another weight", other, calibration=moments)
    refused(
        "its moments are of a weight", calibration=Moments({**moments, first: moments["model.layers.0.mlp.up_proj"]})
    )
    for unknown in (unseen, lacking):
        config = lo.NF4Config(calibration=unknown, compensate=2, unseen="plain")
        layer = lo.adapt(llama(), None, [first], quantize=config).get_submodule(first)
        plain = lo.NF4Weight.quantize(llama().get_submodule(first).weight.detach())
        assert isinstance(layer, lo.Linear) and layer.branch is None and isinstance(layer.weight, lo.NF4Weight)
        assert_bits_equal(layer.weight.packed, plain.packed)
    other().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="gathered beside another weight"):
        load(tmp_path, lo.NF4Config(calibration=moments))
    with pytest.raises(ValueError, match="compensate needs calibration"):
        lo.NF4Config(compensate=4)
    with pytest.raises(ValueError, match="not both"):
        lo.NF4Config(calibration=moments, compensate=4, compensate_bytes=10)
    with pytest.raises(ValueError, match="unseen must be 'refuse' or 'plain', got 'skip'"):
        lo.NF4Config(unseen="skip")
    with pytest.raises(FileNotFoundError):
        lo.adapt(llama(), None, quantize=lo.NF4Config(calibration=tmp_path / "none.safetensors"))
    json.dumps(lo.NF4Config(calibration=moments, compensate=4).to_dict())
