"""What training changed in a checkpoint is found again as an adapter, layer by layer from the files."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

import lowrank_ops as lo
from lowrank_ops.__main__ import main


def load(path: str | Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.arange(12).view(1, 12)).logits


def tuned_by(kind: Any, base: str, path: Path) -> Any:
    """A model whose layers were changed by an adapter and merged."""
    model = load(base)
    lo.adapt(model, kind, targets="all-linear")
    generator = torch.Generator().manual_seed(1)
    for parameter in lo.adapter_parameters(model):
        parameter.data += 0.05 * torch.randn(parameter.shape, generator=generator)
    changes = {name: m.update.delta() for name, m in model.named_modules() if isinstance(m, lo.Linear)}
    plain = load(base)
    for name, change in changes.items():
        plain.get_submodule(name).weight.data += change
    plain.save_pretrained(path)
    return plain


@pytest.mark.parametrize("factors", ["recipe", "stored"])
@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (lo.LoRA(3), ["--kind", "lora", "--rank", "3"]),
        (lo.LoRAXS(4, factors="float32"), ["--kind", "lora-xs", "--rank", "4"]),
        (lo.SVF(factors="float32"), ["--kind", "svf"]),
        (lo.SVFT(bandwidth=2, factors="float32"), ["--kind", "svft", "--bandwidth", "2"]),
    ],
    ids=["lora", "lora-xs", "svf", "svft"],
)
def test_an_adapter_that_was_merged_is_found_again(
    kind: Any, options: list[str], factors: str, causal_model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tuned = tuned_by(kind, causal_model, tmp_path / "tuned")
    out = str(tmp_path / "out")
    assert main(["extract", str(tmp_path / "tuned"), causal_model, *options, "--factors", factors, "--out", out]) == 0
    rows = re.findall(r"^(\S+) +(\d+) +([\d.]+)% +([\d.]+)%$", capsys.readouterr().out, re.MULTILINE)
    assert len(rows) == sum(isinstance(m, nn.Linear) for m in tuned.modules()) - 1
    least = 99.9 if isinstance(kind, lo.LoRA) else 98  # cores stand between 4-bit factors, the tuned between others
    assert all(float(kept) >= least for *_, kept in rows), rows
    model = load(causal_model)
    lo.load_adapter(model, out)
    before, wanted = logits(load(causal_model)), logits(tuned)
    assert (logits(model) - wanted).norm() <= (0.001 if isinstance(kind, lo.LoRA) else 0.15) * (wanted - before).norm()


def test_a_part_is_the_nearest_and_says_how_much_it_keeps(causal_model: str, tmp_path: Path) -> None:
    from lowrank_ops.adapters.extract import extract

    base = load(causal_model)
    base.save_pretrained(tmp_path / "base")
    assert main(["quantize", str(tmp_path / "base"), "--out", str(tmp_path / "nf4")]) == 0
    found = {row.name: row for row in extract(tmp_path / "nf4", tmp_path / "base", lo.LoRA(10), tmp_path / "out")}
    rounded = AutoModelForCausalLM.from_pretrained(tmp_path / "nf4")
    model = load(causal_model)
    lo.load_adapter(model, tmp_path / "out")
    for name, row in found.items():
        weight = base.get_submodule(name).weight.detach().double()
        change = rounded.get_submodule(name).weight.dequantize(torch.float32).double() - weight
        s = torch.linalg.svdvals(change)
        assert row.kept == pytest.approx(float(s[:10].square().sum() / s.square().sum()), rel=1e-3)
        assert row.change == pytest.approx(float(change.norm() / weight.norm()), rel=1e-4) and row.rank == 10
        made = model.get_submodule(name).update.delta().detach().double()
        assert (change - made).square().sum() == pytest.approx(float(s[10:].square().sum()), rel=1e-3)


def test_an_unchanged_layer_has_no_change(causal_model: str, tmp_path: Path) -> None:
    from lowrank_ops.adapters.extract import extract

    for kind in (lo.LoRA(2), lo.LoRAXS(2), lo.SVF()):
        rows = extract(causal_model, causal_model, kind, tmp_path / "out")
        assert all(row.change == 0 and row.kept == 1 for row in rows)
        model = load(causal_model)
        lo.load_adapter(model, tmp_path / "out")
        assert torch.allclose(logits(model), logits(load(causal_model)), atol=1e-6)


def test_what_is_not_in_the_adapter_is_said(causal_model: str, tmp_path: Path) -> None:
    from lowrank_ops.adapters.extract import extract

    model = load(causal_model)
    model.get_input_embeddings().weight.data += 1
    model.save_pretrained(tmp_path / "tuned")
    with pytest.warns(UserWarning, match="changed that are no linear layers and are not in the adapter: .*embed"):
        extract(tmp_path / "tuned", causal_model, lo.LoRA(2), tmp_path / "out")


def test_what_cannot_be_extracted_is_refused(
    causal_model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from lowrank_ops.adapters.extract import extract

    for kind, message in (
        (lo.LoRA(2, init="pissa"), "without init, dora and lora_bias"),
        (lo.SVF(form="replace"), "only the additive form"),
        (lo.LoRA(1000), r"layer '.*': rank"),
    ):
        with pytest.raises(ValueError, match=message):
            extract(causal_model, causal_model, kind, tmp_path / "out")
    with pytest.raises(ValueError, match="factors must be"):
        extract(causal_model, causal_model, lo.LoRA(2), tmp_path / "out", factors="none")
    wide = load(causal_model)
    name = next(name for name, m in wide.named_modules() if isinstance(m, nn.Linear))
    wide.get_submodule(name).weight.data[0, 0] = float("nan")
    wide.save_pretrained(tmp_path / "nan")
    assert main(["extract", str(tmp_path / "nan"), causal_model, "--rank", "2", "--out", str(tmp_path / "out")]) == 1
    assert f"layer '{name}': a weight is not finite" in capsys.readouterr().err
    assert main(["extract", str(tmp_path / "none"), causal_model, "--out", str(tmp_path / "out")]) == 1
    assert not (tmp_path / "out").exists()
