"""All kinds side by side: the whole command on a small encoder, its plot, and one ordering of the papers on the real one."""

from __future__ import annotations

import csv
import json
import sys
from itertools import combinations
from pathlib import Path

import pytest
import torch

import lowrank_ops as lo
from lowrank_ops.__main__ import main
from lowrank_ops.commands import _data
from lowrank_ops.commands.demo import compare, task

matplotlib = pytest.importorskip("matplotlib")

FEW = "lora,qpissa,lora-xs,svft-random,svf-replace"


def run(*options: object) -> int:
    return main(["demo", "--compare", *(str(option) for option in options)])


def colours(path: Path) -> int:
    from matplotlib.image import imread

    image = imread(path)
    assert path.read_bytes().startswith(b"\x89PNG\r\n\x1a\n") and min(image.shape[:2]) >= 400
    return len({tuple(pixel) for pixel in image[::3, ::3].reshape(-1, image.shape[2]).round(1).tolist()})


def test_command_end_to_end(
    small_model: str,
    few_pairs: None,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    options = ("--model", small_model, "--rank", 4, "--batch-size", 6, "--steps", 3, "--seed", 7)
    file = tmp_path / "results.json"
    assert run(*options, "--kinds", FEW, "--json", file, "--out", tmp_path / "new") == 0
    shown, results = capsys.readouterr().out, json.loads(file.read_text())
    assert results["plot"] == str(tmp_path / "new" / "adapters.png") and colours(Path(results["plot"])) > 3
    rows = {row["name"]: row for row in results["kinds"]}
    assert list(rows) == FEW.split(",")
    table = shown[shown.index("parameters") :]
    for row in rows.values():
        ends = f"{row['mrr_before']:.3f}", f"{row['mrr_after']:.3f}"
        line = next(line for line in table.splitlines() if line.strip().startswith(f"{row['label']}  "))
        assert f" {row['parameters']:,} " in line and tuple(line.split()[-2:]) == ends
        assert len(row["loss"]) == 3 and 0 < row["mrr_before"] <= 1 and 0 < row["mrr_after"] <= 1
        assert row["trained_bytes"] == 4 * row["parameters"] and row["seconds_per_step"] > 0
    with Path(results["table"]).open(newline="") as opened:
        written = list(csv.DictReader(opened))
    assert results["table"] == str(tmp_path / "new" / "adapters.csv") and [line["name"] for line in written] == list(
        rows
    )
    for line in written:
        row = rows[line["name"]]
        numbers = [float(line[key]) for key in ("parameters", "tokens", "loss", "score")]
        assert numbers == [row[key] for key in ("parameters", "tokens", "final_loss", "mrr_after")]
        assert row["final_loss"] == row["loss"][-1]  # one of three steps
    # Two layers of four 36 x 36, one 51 x 36 and one 36 x 51, and the pooler.
    shapes = [(36, 36)] * 9 + [(51, 36), (36, 51)] * 2
    assert {name: row["parameters"] for name, row in rows.items()} == {
        name: sum(compare.KINDS[name].kind(4).num_parameters(*shape) for shape in shapes) for name in rows
    }
    assert rows["lora"]["frozen_bytes"] == 0 and rows["svf-replace"]["base_bytes"] == 0
    assert rows["qpissa"]["frozen_bytes"] == rows["qpissa"]["trained_bytes"]  # a copy of the factors at the start
    assert rows["lora-xs"]["frozen_bytes"] > 0 and rows["lora"]["base_bytes"] > 0
    # Kinds that keep the base start as the same model; the others do not.
    assert rows["lora"]["mrr_before"] == rows["lora-xs"]["mrr_before"] == rows["svft-random"]["mrr_before"]
    assert rows["lora"]["mrr_before"] == results["mrr"]["nf4"] and set(results["mrr"]) == {"dense", "nf4"}

    # A kind's numbers do not depend on other kinds, and standard output holds nothing but JSON.
    plot = tmp_path / "other.png"
    assert run(*options, "--kinds", " svft-random ,qpissa,", "--json", "--plot", plot) == 0
    captured = capsys.readouterr()
    again = json.loads(captured.out)
    assert "parameters" in captured.err and colours(plot) > 3
    assert [row["name"] for row in again["kinds"]] == ["qpissa", "svft-random"]
    for row in again["kinds"]:
        assert row | {"seconds_per_step": 0} == rows[row["name"]] | {"seconds_per_step": 0}


def test_every_kind_fits_the_default_model() -> None:
    model, _ = _data.load_model()
    for name, entry in compare.KINDS.items():
        assert compare._kind(name, entry, 16, model) is not None
    assert compare.selected(None) == compare.KINDS


def test_labels_cover_neither_each_other_nor_a_point() -> None:
    from matplotlib.text import Annotation

    close = [0.772, 0.775, 0.78, 0.781, 0.77, 0.773, 0.7715]  # one below the other, because the counts are equal
    rows = [
        {"label": entry.label, "kind": str(entry.kind(16)), "parameters": count, "mrr_after": mrr}
        for entry, count, mrr in zip(
            compare.KINDS.values(),
            [675_840] * 7 + [151_552, 14_208, 238_872, 238_872, 14_208],
            [*close, 0.765, 0.75, 0.768, 0.767, 0.75],
            strict=True,
        )
    ]
    drawn = compare.figure(rows, {"dense": 0.73, "nf4": 0.72})
    axes = drawn.axes[0]
    assert axes.get_xscale() == "log" and axes.get_xlabel() and axes.get_ylabel()
    notes = [child for child in axes.get_children() if isinstance(child, Annotation)]
    assert sorted(note.get_text() for note in notes) == sorted(entry.label for entry in compare.KINDS.values())
    drawn.canvas.draw()
    renderer = drawn.canvas.get_renderer()
    boxes = [compare._text_extent(note, renderer) for note in notes]
    assert not any(a.overlaps(b) for a, b in combinations(boxes, 2))
    points = [axes.transData.transform((row["parameters"], row["mrr_after"])) for row in rows]
    assert not any(box.contains(*point) for box in boxes for point in points)
    assert all(drawn.bbox.contains(*corner) for box in boxes for corner in box.corners())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--kinds", "lora,plissa,dora"), "--kinds knows no plissa, dora; the kinds are lora,rslora,pissa"),
        (("--kinds", " ,"), "--kinds names no kind"),
        (("--learning-rate", "0.1"), "--learning-rate does not go with --compare"),
        (("--plot", "/nowhere/at/all.png"), "--plot must name a .png file"),
        (("--plot", "plot.svg"), "--plot must name a .png file"),
        (("--rank", "10"), "lora-xs: rank must be at most min(out_features, in_features) = 36"),
        (("--batch-size", "100000", "--kinds", "lora"), "--batch-size must be at most"),
        (("--steps", "0"), "--steps must be at least 1"),
        (("--json", "/nowhere/at/all.json"), "--json must name a file"),
        (("--model", "/nowhere/at/all"), "not a Hugging Face model directory"),
    ],
)
def test_bad_input_is_refused_before_the_work(
    options: tuple[str, ...],
    message: str,
    small_model: str,
    few_pairs: None,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(task, "evaluate", lambda *_: pytest.fail("the work has begun"))
    assert run(*(() if "--model" in options else ("--model", small_model)), *options) == 2
    error = capsys.readouterr().err
    assert message in error and "Traceback" not in error


@pytest.mark.parametrize("option", ["--kinds", "--plot"])
def test_options_of_the_comparison_alone(option: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["demo", option, "lora"]) == 2
    assert f"{option} needs --compare" in capsys.readouterr().err


@pytest.mark.parametrize("package", ["matplotlib", "rich", "transformers"])
def test_missing_extra(
    package: str,
    small_model: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for name in (package, f"{package}.console", f"{package}.figure", f"{package}.backends.backend_agg"):
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setattr(task, "evaluate", lambda *_: pytest.fail("the work has begun"))
    assert run("--model", small_model) == 2
    error = capsys.readouterr().err
    assert package in error and 'pip install "lowrank-ops[demo]"' in error


def test_the_demo_alone_needs_no_matplotlib(
    small_model: str,
    few_pairs: None,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    options = ("--model", small_model, "--steps", "1", "--rank", "2", "--out", str(tmp_path))
    assert main(["demo", *options]) == 0


def test_a_loss_out_of_bounds_names_the_kind(
    small_model: str,
    few_pairs: None,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setitem(compare.KINDS, "svf", compare.KINDS["svf"]._replace(learning_rate=1e30))
    assert run("--model", small_model, "--steps", "4", "--batch-size", "4", "--kinds", "svf") == 2
    assert "svf: the loss became" in capsys.readouterr().err


def test_pissa_learns_faster_than_lora_at_an_equal_small_learning_rate(
    pairs: list[_data.Pair], monkeypatch: pytest.MonkeyPatch
) -> None:
    """On MiniLM over dense weights, where both kinds start as the same map: the mean loss of the last 4 of 12 steps."""
    monkeypatch.setattr(task, "TRAIN_TOKENS", 32)
    losses = {}
    for start in ("kaiming", "pissa"):
        model, tokenizer = _data.load_model()
        torch.manual_seed(0)
        lo.adapt(model, lo.LoRA(8, alpha=8, init=start), quantize=None)
        losses[start] = task.train(
            model, tokenizer, _data.hold_out(pairs)[0], steps=12, batch_size=16, learning_rate=1e-4, seed=0
        )
    assert losses["pissa"][0] == pytest.approx(losses["kaiming"][0], abs=1e-3)
    assert sum(losses["pissa"][-4:]) < sum(losses["kaiming"][-4:])
