"""lo.calibrate block by block: the same moments as of the whole model, sequential rounding, and going on after a stop."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mixtures
import models
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import lowrank_ops as lo
from lowrank_ops.calibration import blocks, state

IDS = torch.randint(1, 39, (3, 9), generator=torch.Generator().manual_seed(0))
MASK = torch.tensor([[1] * 9, [1] * 6 + [0] * 3, [0] * 2 + [1] * 7])
BATCHES = [{"input_ids": IDS, "attention_mask": MASK}, {"input_ids": IDS[:, :5]}]


def qwen3() -> Any:
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=99, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=16,
    )  # fmt: skip
    return Qwen3ForCausalLM(config).eval()


def opt() -> Any:
    from transformers import OPTConfig, OPTForCausalLM

    torch.manual_seed(0)
    config = OPTConfig(
        vocab_size=99, hidden_size=32, ffn_dim=48, num_hidden_layers=2, num_attention_heads=2, word_embed_proj_dim=32,
        max_position_embeddings=64,
    )  # fmt: skip
    return OPTForCausalLM(config).eval()


def gemma() -> Any:
    """One block attends to a window and the other to all, so the model calls them with other masks and angles."""
    model = models.gemma()
    model.config.layer_types = ["sliding_attention", "full_attention"]
    return type(model)(model.config).eval()


def assert_alike(got: lo.Moments, expected: lo.Moments, tolerance: float = 1e-5) -> None:
    assert set(got) == set(expected)
    for name, moment in expected.items():
        found = got[name]
        assert torch.equal(found.count, moment.count), name
        assert torch.equal(found.fingerprint, moment.fingerprint), name
        for what in ("second", "mean"):
            a, b = getattr(found, what), getattr(moment, what)
            torch.testing.assert_close(a, b, rtol=0, atol=tolerance * float(b.abs().max()), msg=f"{name} {what}")


def assert_shared_alike(got: lo.Moments, expected: lo.Moments) -> None:
    names = list(expected)
    for a in names:
        for b in names:
            assert (got[a].second is got[b].second) is (expected[a].second is expected[b].second), (a, b)


DENSE: list[Callable[[], Any]] = [models.llama, qwen3, gemma, models.gpt2, opt]


@pytest.mark.parametrize("make", DENSE)
def test_blocks_from_files_give_the_moments_of_the_whole_model(make: Callable[[], Any], tmp_path: Path) -> None:
    model = make()
    model.save_pretrained(tmp_path / "model", max_shard_size="60KB")
    whole = lo.calibrate(model, BATCHES, head=True)
    done: list[str] = []
    from_files = lo.calibrate(tmp_path / "model", BATCHES, head=True, progress=done.append)
    assert_alike(from_files, whole)
    assert_shared_alike(from_files, whole)
    assert len(done) == model.config.num_hidden_layers
    in_folder = lo.calibrate(model, BATCHES, head=True, folder=tmp_path / "kept")
    assert_alike(in_folder, whole)
    assert_alike(lo.Moments.load(tmp_path / "kept"), whole)
    assert not (tmp_path / "kept" / "activations").exists()


@pytest.mark.parametrize(
    "family",
    [
        name if name in ("mixtral", "qwen3_moe", "gpt_oss") else pytest.param(name, marks=pytest.mark.slow)
        for name in mixtures.FAMILIES
    ],
)
def test_blocks_of_experts_too(family: str, tmp_path: Path) -> None:
    model = mixtures.mixture(family)
    model.save_pretrained(tmp_path, max_shard_size="60KB")
    batches = BATCHES[1:] if family == "jetmoe" else BATCHES
    assert_alike(lo.calibrate(tmp_path, batches), lo.calibrate(model, batches))


def test_activations_may_be_kept_in_16_bits() -> None:
    model = models.llama()
    exact = lo.calibrate(model, BATCHES, sequential=lo.NF4Config(skip="model.*"))
    assert_alike(exact, lo.calibrate(model, BATCHES))
    rounded = lo.calibrate(model, BATCHES, sequential=lo.NF4Config(skip="model.*"), activations=torch.bfloat16)
    assert_alike(rounded, exact, 2e-2)
    with pytest.raises(AssertionError):
        assert_alike(rounded, exact)


@pytest.mark.parametrize("make", [models.llama, lambda: mixtures.mixture("mixtral")])
def test_sequential_blocks_see_the_rounded_ones_before_them(make: Callable[[], Any]) -> None:
    """By hand: the model is calibrated again after each block is rounded with its moments."""
    model, config = make(), lo.NF4Config()
    sequential = lo.calibrate(model, BATCHES, sequential=config)
    parallel = lo.calibrate(model, BATCHES)
    work, expected = copy.deepcopy(model), {}
    for number in range(2):
        own = {n: m for n, m in lo.calibrate(work, BATCHES).items() if n.startswith(f"model.layers.{number}.")}
        expected |= own
        lo.adapt(work, None, list(own), quantize=lo.NF4Config(calibration=lo.Moments(own)))
    second = "model.layers.1.self_attn.q_proj"
    assert not torch.allclose(sequential[second].second, parallel[second].second, rtol=1e-3)
    for name, moment in expected.items():
        torch.testing.assert_close(sequential[name].second, moment.second, rtol=1e-4, atol=1e-5)
    assert not any(isinstance(m, lo.Linear | lo.Experts) for m in model.modules())


def test_sequential_takes_the_configuration_that_reads_its_result(tmp_path: Path) -> None:
    model = models.llama()
    config = lo.NF4Config(calibration=tmp_path, compensate=2, skip=["k_proj"])
    moments = lo.calibrate(model, BATCHES, sequential=config, folder=tmp_path)
    assert len(moments) == 14
    adapted = lo.adapt(copy.deepcopy(model), None, quantize=config)
    name = "model.layers.1.self_attn.q_proj"  # which sees the first block as a whole
    torch.testing.assert_close(moments[name].second, lo.calibrate(adapted, BATCHES)[name].second, rtol=1e-4, atol=1e-6)
    plain = lo.calibrate(model, BATCHES)[name].second
    assert not torch.allclose(moments[name].second, plain, rtol=1e-3)
    with pytest.raises(ValueError, match="sequential takes a rank"):
        lo.calibrate(model, BATCHES, sequential=lo.NF4Config(calibration=tmp_path, compensate_bytes=10_000))


class StoppedError(Exception):
    pass


@pytest.mark.parametrize("at, sequential", [(1, None), (3, lo.NF4Config(32)), (5, None)])
def test_it_goes_on_after_a_stop_and_gives_the_same_files(
    at: int, sequential: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped while the activations of one of the blocks are written."""
    model = models.llama()
    lo.calibrate(model, BATCHES, head=True, sequential=sequential, folder=tmp_path / "at once")
    put, calls, ran = state.State.put, [0], []

    def failing(self: Any, *arguments: Any) -> None:
        calls[0] += 1
        if calls[0] > at:
            raise StoppedError
        put(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(state.State, "put", failing)
        with pytest.raises(StoppedError):
            lo.calibrate(model, BATCHES, head=True, sequential=sequential, folder=tmp_path / "stopped")
    block = blocks._Walk.block
    monkeypatch.setattr(
        blocks._Walk, "block", lambda self, number, *rest: ran.append(number) or block(self, number, *rest)
    )
    lo.calibrate(model, BATCHES, head=True, sequential=sequential, folder=tmp_path / "stopped")
    assert ran == {1: [0, 1], 3: [0, 1], 5: [1]}[at]
    files = sorted(path.name for path in (tmp_path / "at once").iterdir())
    assert files == sorted(path.name for path in (tmp_path / "stopped").iterdir()) and len(files) == 4
    for name in files:
        assert (tmp_path / "at once" / name).read_bytes() == (tmp_path / "stopped" / name).read_bytes()
    done: list[str] = []
    again = {"head": True, "sequential": sequential, "folder": tmp_path / "stopped", "progress": done.append}
    lo.calibrate(model, BATCHES, **again)
    assert len(ran) == {1: 2, 3: 2, 5: 1}[at] and len(done) == 2


def test_other_choices_begin_again(tmp_path: Path) -> None:
    model = models.llama()
    first = lo.calibrate(model, BATCHES, folder=tmp_path)["model.layers.0.mlp.up_proj"].second.clone()
    lo.calibrate(model, BATCHES, folder=tmp_path, head=True)
    assert "lm_head" in lo.Moments.load(tmp_path)
    again = lo.calibrate(model, BATCHES[:1], folder=tmp_path)
    assert "lm_head" not in lo.Moments.load(tmp_path)
    assert not torch.equal(again["model.layers.0.mlp.up_proj"].second, first)


def test_a_model_whose_blocks_are_not_found_is_refused(tmp_path: Path) -> None:
    class Outside(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks, self.last = nn.ModuleList([nn.Linear(4, 4)]), nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y: torch.Tensor = self.last(self.blocks[0](x))
            return y

    batch = [{"x": torch.randn(2, 4)}]
    with pytest.raises(ValueError, match="Outside cannot be .* last stands outside the blocks 'blocks'; load it"):
        lo.calibrate(Outside(), batch, folder=tmp_path)

    class Between(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList([nn.Sequential(nn.Linear(4, 4)), nn.Sequential(nn.Linear(4, 4))])

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y: torch.Tensor = self.blocks[1](2 * self.blocks[0](x))
            return y

    with pytest.raises(ValueError, match="blocks.1 does not take the output of the block before it alone"):
        lo.calibrate(Between(), batch, folder=tmp_path)
    with pytest.raises(ValueError, match="cannot be calibrated block by block"):
        lo.calibrate(models.bert(), BATCHES[1:], folder=tmp_path)


def test_bad_directories_are_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="has no config.json"):
        lo.calibrate(tmp_path, BATCHES)
    model = models.llama()
    model.save_pretrained(tmp_path / "dense")
    with pytest.raises(ValueError, match="at least one batch"):
        lo.calibrate(tmp_path / "dense", [])
    lo.adapt(models.llama(), None).save_pretrained(tmp_path / "four")
    with pytest.raises(ValueError, match="quantised already|has 4 bits already"):
        lo.calibrate(tmp_path / "four", BATCHES)
    file = tmp_path / "dense" / "model.safetensors"
    held = load_file(file)
    name = "model.layers.1.mlp.up_proj.weight"
    save_file({key: t for key, t in held.items() if key != name}, file, {"format": "pt"})
    with pytest.raises(ValueError, match=f"have no tensor '{name}'"):
        lo.calibrate(tmp_path / "dense", BATCHES)
    save_file(held | {name: held[name][:5]}, file, {"format": "pt"})
    with pytest.raises(ValueError, match=rf"'{name}' is \[5, 64\] and the model"):
        lo.calibrate(tmp_path / "dense", BATCHES)
    with torch.device("meta"):
        empty = models.llama()
    with pytest.raises(ValueError, match="meta device"):
        lo.calibrate(empty, BATCHES, folder=tmp_path / "kept")
    with pytest.raises(TypeError, match="sequential must be an NF4Config"):
        lo.calibrate(model, BATCHES, sequential="nf4")  # type: ignore[arg-type]


def test_moments_of_another_model_are_refused(tmp_path: Path) -> None:
    moments = lo.calibrate(models.llama(), BATCHES, folder=tmp_path)
    torch.manual_seed(1)
    other = type(models.llama())(models.llama().config)
    name = "model.layers.0.mlp.up_proj"
    with pytest.raises(ValueError, match=f"^{name}: its moments were gathered beside another weight"):
        moments[name].check(other.get_submodule(name).weight, name)
    known = json.loads((tmp_path / "state.json").read_text())
    assert known["done"] == 2
