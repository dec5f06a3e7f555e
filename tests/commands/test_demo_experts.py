"""``lowrank-ops demo --experts``: the whole command on a tiny mixture of experts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lowrank_ops.__main__ import main
from lowrank_ops.commands.demo import experts


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    shape = {"hidden_size": 64, "moe_intermediate_size": 32, "num_experts": 4, "num_hidden_layers": 1}
    monkeypatch.setattr(experts, "SHAPE", experts.SHAPE | shape)
    for name, value in (("PRETRAINING", 40), ("HELD_OUT", 8), ("TIMED", 2)):
        monkeypatch.setattr(experts, name, value)


@pytest.mark.usefixtures("tiny")
def test_command_end_to_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--steps", "30", "--rank", "4", "--batch-size", "4", "--json", str(tmp_path / "results.json")]
    assert main(["demo", "--experts", *options, "--out", str(tmp_path / "adapter")]) == 0
    results, shown = json.loads((tmp_path / "results.json").read_text()), capsys.readouterr().out
    loss = results["loss"]
    assert abs(loss["before"] - loss["dense"]) < 0.1
    assert loss["after"] < loss["before"] - 0.05 and f"{loss['after']:.3f}" in shown
    assert results["reloaded"]["agrees"] and "agrees" in shown
    assert results["memory_bytes"]["after"] < results["memory_bytes"]["before"]
    assert set(results["seconds"]["step"]) == {"lowrank_ops", "PEFT"}
    targets = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["target_parameters"]
    assert {name.rpartition(".")[2] for name in targets} == {"gate_up_proj", "down_proj"}


def test_held_out_prose_is_not_trained_on() -> None:
    trained, test = experts.read_prose()
    text = bytes(trained.tolist())
    assert test.shape == (experts.HELD_OUT, experts.TOKENS)
    assert not [row for row in test.tolist() if bytes(row) in text]


@pytest.mark.parametrize(
    "options, said",
    [
        (["--serve"], "--serve does not go with --experts"),
        (["--model", "somewhere"], "--model does not go with --experts"),
        (["--batch-size", "1"], "--batch-size must be at least 2"),
    ],
)
def test_bad_options(options: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["demo", "--experts", *options]) == 2
    assert said in capsys.readouterr().err
