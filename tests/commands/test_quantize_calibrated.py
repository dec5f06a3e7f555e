"""lowrank-ops quantize --calibrate: rounding by a text, with branches, going on after a stop."""

from __future__ import annotations

import io
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import assert_bits_equal
from safetensors.torch import load_file
from serving_helpers import text_of, tokenizer_of
from transformers import AutoModelForCausalLM, MixtralConfig, MixtralForCausalLM

import lowrank_ops as lo
from lowrank_ops.__main__ import main
from lowrank_ops.calibration import state
from lowrank_ops.commands import quantize
from lowrank_ops.integrations import transformers_quantize

LENGTH = 16


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("words") / "text.txt"
    path.write_text("\n".join(map(text_of, range(12))))
    return path


@pytest.fixture(scope="module")
def experts(causal_model: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small Mixtral with the tokenizer of the other model, in shards that part the matrices of an expert."""
    directory = tmp_path_factory.mktemp("mixtral")
    tokenizer = tokenizer_of(causal_model)
    config = MixtralConfig(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, num_local_experts=2,
    )  # fmt: skip
    torch.manual_seed(0)
    MixtralForCausalLM(config).save_pretrained(directory, max_shard_size="60KB")
    tokenizer.save_pretrained(directory)
    return directory


def files(directory: Path) -> dict[str, torch.Tensor]:
    return {
        f"{file.parent.name * (file.parent != directory)}{key}": tensor
        for file in directory.rglob("*.safetensors")
        for key, tensor in load_file(file).items()
    }


def run(source: Any, out: Path, text: Path | str, *options: str) -> int:
    command = ["quantize", str(source), "--out", str(out), "--calibrate", str(text), "--length", str(LENGTH)]
    return main([*command, "--tokens", "96", "--device", "cpu", *options])


@pytest.mark.parametrize(
    "kind, options, config",
    [("dense", [], {}), ("experts", ["--sequential", "--compensate", "2"], {"compensate": 2})],
)
def test_it_writes_what_a_model_that_is_read_with_the_moments_saves(
    kind: str, options: list[str], config: dict[str, Any], causal_model: str, experts: Path, words: Path, tmp_path: Path
) -> None:
    source = causal_model if kind == "dense" else experts
    assert run(source, tmp_path / "out", words, "--moments", str(tmp_path / "moments"), *options) == 0
    moments = lo.Moments.load(tmp_path / "moments")
    read = AutoModelForCausalLM.from_pretrained(source, quantization_config=lo.NF4Config(calibration=moments, **config))
    read.save_pretrained(tmp_path / "saved")
    ours, theirs = files(tmp_path / "out"), files(tmp_path / "saved")
    assert ours.keys() == theirs.keys() and any("branch" in key for key in ours) is bool(config)
    for key, tensor in ours.items():
        assert_bits_equal(tensor, theirs[key])
    assert json.loads((tmp_path / "out" / "config.json").read_text()) == json.loads(
        (tmp_path / "saved" / "config.json").read_text()
    )
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    ids = torch.arange(1, 13).view(2, 6)
    assert_bits_equal(again(ids).logits, read(ids).logits)
    plain = AutoModelForCausalLM.from_pretrained(source, quantization_config=lo.NF4Config()).state_dict()
    assert not all(torch.equal(plain[key], tensor) for key, tensor in read.state_dict().items() if key in plain)
    errors = json.loads((tmp_path / "out" / "quantization.json").read_text())["files"]
    errors = {name: lost for file in errors.values() for name, lost in file["errors"].items()}
    for name, layer in read.named_modules():
        if isinstance(layer, lo.Linear):
            assert errors[name] == pytest.approx(layer.loss.left, rel=1e-4)


def test_standard_input_and_a_folder_that_is_not_kept(
    causal_model: str, words: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Input:
        buffer = io.BytesIO(words.read_bytes())

    monkeypatch.setattr(sys, "stdin", Input)
    (tmp_path / "branch").mkdir()  # of an earlier call with other choices
    assert run(causal_model, tmp_path, "-") == 0
    said = capsys.readouterr()
    assert "calibrating with 6 sequences of 16 tokens" in said.err and "H = E[x xᵀ]" in said.out
    assert not (tmp_path / "calibration.new").exists() and not (tmp_path / "branch").exists()


class StoppedError(KeyboardInterrupt):
    pass


@pytest.mark.parametrize("when", ["calibrating", "writing"])
def test_it_goes_on_after_a_stop(
    when: str, causal_model: str, words: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options, source = ["--compensate", "2"], tmp_path / "shards"
    AutoModelForCausalLM.from_pretrained(causal_model).save_pretrained(source, max_shard_size="30KB")
    tokenizer_of(causal_model).save_pretrained(source)
    assert run(source, tmp_path / "at once", words, *options) == 0
    complete, save = state.State.complete, transformers_quantize._save
    calls: list[Any] = []

    def stopping(original: Any, after: int) -> Any:
        def call(*arguments: Any) -> None:
            original(*arguments)
            calls.append(arguments)
            if len(calls) == after:
                raise StoppedError

        return call

    with monkeypatch.context() as patch:
        if when == "calibrating":
            patch.setattr(state.State, "complete", stopping(complete, 1))
        else:
            patch.setattr(transformers_quantize, "_save", stopping(save, 3))
        assert run(source, tmp_path / "stopped", words, *options) == 130
    calls.clear()
    monkeypatch.setattr(state.State, "complete", stopping(complete, 99))
    assert run(source, tmp_path / "stopped", words, *options) == 0
    assert len(calls) == (1 if when == "calibrating" else 0)
    ours, expected = files(tmp_path / "stopped"), files(tmp_path / "at once")
    assert ours.keys() == expected.keys()
    for key, tensor in ours.items():
        assert_bits_equal(tensor, expected[key])
    names = sorted(path.name for path in (tmp_path / "stopped").iterdir())
    assert names == sorted(path.name for path in (tmp_path / "at once").iterdir())
    # Nothing is left to do, and another text begins again.
    calls.clear()
    assert run(source, tmp_path / "stopped", words, *options) == 0 and not calls
    assert run(source, tmp_path / "stopped", words, *options, "--length", "8") == 0 and len(calls) == 2


def test_a_layer_that_saw_no_token_is_refused_by_name(
    causal_model: str, words: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A calibration that forgets the tokens of one layer."""
    calibrate = quantize.calibrate

    def forgetful(*arguments: Any, folder: str, **options: Any) -> lo.Moments:
        moments = calibrate(*arguments, folder=folder, **options)
        name = next(name for name in moments if name.endswith("down_proj"))
        for file in Path(folder).glob("*.safetensors"):
            part = dict(lo.Moments.load(file))
            if name in part:
                moment = part[name]
                part[name] = type(moment)(
                    0 * moment.second, 0 * moment.mean, 0 * moment.count, moment.shape, moment.fingerprint
                )
                lo.Moments(part).save(file)
        return moments

    monkeypatch.setattr(quantize, "calibrate", forgetful)
    assert run(causal_model, tmp_path / "out", words) == 1
    assert "model.layers.0.mlp.down_proj: it saw no token" in capsys.readouterr().err
    assert run(causal_model, tmp_path / "out", words, "--unseen", "plain") == 0
    assert "14 layers" in capsys.readouterr().out


def test_bad_options_are_refused(
    causal_model: str, words: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def said(*options: str, text: Path = words, source: Any = causal_model) -> str:
        assert run(source, tmp_path / "out", text, *options) == 1
        return capsys.readouterr().err

    (tmp_path / "short.txt").write_text("one two")
    assert f"--calibrate: {tmp_path / 'short.txt'} has" in said(text=tmp_path / "short.txt")
    assert "cannot read" in said(text=tmp_path / "none.txt")
    assert "compensate must be at most min(N, K)" in said("--compensate", "4000")
    assert "compensate must be an int of at least 1" in said("--compensate", "0")
    assert not (tmp_path / "out").exists()  # they are refused before anything is calibrated
    same = Path(shutil.copytree(causal_model, tmp_path / "same"))
    assert run(same, same, words) == 1 and "out must be another directory" in capsys.readouterr().err
    assert not (same / "calibration.new").exists()
    with_none = tmp_path / "no tokenizer"
    AutoModelForCausalLM.from_pretrained(causal_model).save_pretrained(with_none)
    assert "--calibrate needs the model's tokenizer" in said(source=with_none)
    for option in (["--compensate", "2"], ["--sequential"], ["--moments", str(tmp_path)]):
        assert main(["quantize", causal_model, "--out", str(tmp_path / "out"), *option]) == 1
        assert "--calibrate" in capsys.readouterr().err
