"""lowrank-ops evaluate: perplexity, KL and bits of models against the first one."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import mixtures
import models
import pytest
import torch
from serving_helpers import text_of, tokenizer_of

import lowrank_ops as lo
from lowrank_ops.__main__ import main
from lowrank_ops.commands import evaluate, text

LENGTH = 16


@pytest.fixture(scope="module")
def nf4(causal_model: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    out = tmp_path_factory.mktemp("evaluate") / "nf4"
    assert main(["quantize", causal_model, "--out", str(out)]) == 0
    return str(out)


@pytest.fixture
def words(tmp_path: Path) -> Path:
    (tmp_path / "text.txt").write_text("\n".join(map(text_of, range(12))))
    return tmp_path / "text.txt"


def load(directory: str) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()


def test_the_numbers_are_those_of_the_definitions(causal_model: str, nf4: str, words: Path, tmp_path: Path) -> None:
    saved, plot = tmp_path / "results.json", tmp_path / "plot.png"
    options = [
        "--text",
        str(words),
        "--length",
        str(LENGTH),
        "--tokens",
        "101",
        "--json",
        str(saved),
        "--plot",
        str(plot),
    ]
    assert main(["evaluate", causal_model, nf4, causal_model, *options]) == 0
    dense, rounded, again = json.loads(saved.read_text())["models"]
    ids = torch.tensor(tokenizer_of(causal_model)(words.read_text())["input_ids"])[: 6 * LENGTH].view(6, LENGTH)
    with torch.no_grad():
        p, q = (load(d)(ids).logits[:, :-1].double().log_softmax(-1).flatten(0, 1) for d in (causal_model, nf4))
    targets = ids[:, 1:].reshape(-1, 1)
    assert dense["tokens"] == rounded["tokens"] == len(p)
    for row, log in ((dense, p), (rounded, q)):
        assert row["perplexity"] == pytest.approx(math.exp(-log.gather(1, targets).mean()), rel=1e-5)
    assert rounded["kl"] == pytest.approx(float((p.exp() * (p - q)).sum(1).mean()), abs=1e-4)
    assert rounded["agreement"] == pytest.approx(float((p.argmax(1) == q.argmax(1)).double().mean()))
    assert dense["kl"] == 0 and dense["agreement"] == again["agreement"] == 1 and abs(again["kl"]) < 1e-6
    assert plot.read_bytes().startswith(b"\x89PNG")


def test_bits_count_codes_scales_and_factors(nf4: str, causal_model: str) -> None:
    dense = evaluate.size_of(load(causal_model))
    layers = [m for n, m in load(causal_model).named_modules() if isinstance(m, torch.nn.Linear) and n != "lm_head"]
    assert dense == evaluate.Size(4 * sum(m.weight.numel() for m in layers), sum(m.weight.numel() for m in layers))
    assert evaluate.size_of(load(causal_model), torch.bfloat16).bits == 16
    rounded = load(nf4)
    weights = sum(m.weight.nbytes for m in rounded.modules() if isinstance(m, lo.Linear))
    assert evaluate.size_of(rounded).bytes == weights and 4 < evaluate.size_of(rounded).bits < 5
    lo.adapt(rounded, lo.LoRA(2))
    factors = sum(p.nbytes for p in lo.adapter_parameters(rounded))
    assert evaluate.size_of(rounded).bytes == weights + factors


def test_stacks_of_experts_count() -> None:
    model = mixtures.mixture("mixtral")
    dense, rounded = evaluate.size_of(model), evaluate.size_of(lo.adapt(model, None))
    assert dense.weights == rounded.weights and dense.bits == 32 and 4 < rounded.bits < 6


def test_windows_begin_as_the_tokenizer_begins_a_text(causal_model: str, words: Path) -> None:
    from tokenizers import processors

    tokenizer = tokenizer_of(causal_model)
    plain = text.read_windows(tokenizer, words, "--text", LENGTH, 3 * LENGTH)
    assert plain.shape == (3, LENGTH)
    tokenizer.bos_token = "<end>"
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<end> $A", special_tokens=[("<end>", tokenizer.bos_token_id)]
    )
    begun = text.read_windows(tokenizer, words, "--text", LENGTH, 3 * LENGTH)
    assert bool((begun[:, 0] == tokenizer.bos_token_id).all())
    assert torch.equal(begun[:, 1:].flatten(), plain.flatten()[: 3 * (LENGTH - 1)])


@pytest.mark.parametrize(
    "options, message",
    [
        (["--length", "4000", "--tokens", "9000"], "text.txt has .* tokens, and one window needs 4000"),
        (["--length", "1"], "a window needs at least 2 tokens"),
        (["--length", "16", "--tokens", "8"], "--tokens one window, got 16 and 8"),
        (["--text", "no-such-file"], "cannot read no-such-file"),
        (["--plot", "picture.jpg"], "--plot must name a .png file"),
    ],
)
def test_bad_options_are_named(
    causal_model: str, words: Path, options: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["evaluate", causal_model, "--text", str(words), *options]) == 1
    with pytest.raises(AssertionError, match=message):
        raise AssertionError(capsys.readouterr().err)


def test_bad_directories_are_named(
    causal_model: str, words: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    encoder, bare, other = tmp_path / "encoder", tmp_path / "bare", tmp_path / "other"
    models.bert().save_pretrained(encoder)
    models.llama().save_pretrained(bare)
    models.llama().save_pretrained(other)  # 99 words
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(Path(causal_model) / name, other)
    for directory, message in (
        (tmp_path / "missing", "missing is not a Hugging Face model directory"),
        (encoder, "encoder holds no causal language model: its architectures are"),
        (bare, "cannot load a model and its tokenizer from .*bare"),
        (other, "other: the model has 99 words, and the text has the token"),
    ):
        assert main(["evaluate", causal_model, str(directory), "--text", str(words), "--length", "8"]) == 1
        with pytest.raises(AssertionError, match=message):
            raise AssertionError(capsys.readouterr().err)


def test_tokenizers_are_compared_beyond_the_text(
    causal_model: str, nf4: str, words: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tmp_path / "other"
    shutil.copytree(nf4, other)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(Path(causal_model) / name, other)
    options = ["--text", str(words), "--length", "16", "--tokens", "32"]
    tokenizer = json.loads((other / "tokenizer.json").read_text())
    letters = tokenizer["model"]["vocab"]
    assert not {"Q", "Z"} & set(words.read_text())
    letters["Q"], letters["Z"] = letters["Z"], letters["Q"]
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    assert main(["evaluate", causal_model, str(other), *options]) == 1
    assert (
        f"other has another tokenizer than {causal_model}: token {min(letters['Q'], letters['Z'])} is another word"
        in capsys.readouterr().err
    )


def test_a_judge_wants_windows() -> None:
    with pytest.raises(ValueError, match=r"windows must be \[count, length\] with length 2 or more, got \[3, 1\]"):
        evaluate.Judge(torch.zeros(3, 1, dtype=torch.int64))


def test_a_judge_compares_models_of_one_vocabulary() -> None:
    model = models.llama()
    with evaluate.Judge(models.TOKENS) as judge:
        judge(model)
        model.lm_head = torch.nn.Linear(64, 50)
        with pytest.raises(ValueError, match="the model has 50 words, and the first model 99"):
            judge(model)


def test_a_directory_with_a_branch(causal_model: str, words: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    ids = torch.tensor(tokenizer_of(causal_model)(words.read_text())["input_ids"])[:378].view(7, 54)
    config = lo.NF4Config(calibration=lo.calibrate(load(causal_model), [ids]), compensate=4)
    branched, saved = tmp_path / "branched", tmp_path / "results.json"
    model = AutoModelForCausalLM.from_pretrained(causal_model, quantization_config=config)
    model.save_pretrained(branched)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(Path(causal_model) / name, branched)
    assert (branched / "branch").is_dir()
    assert (
        main(["evaluate", causal_model, str(branched), "--text", str(words), "--json", str(saved), "--length", "16"])
        == 0
    )
    layers = [m for m in model.modules() if isinstance(m, lo.Linear)]
    expected = sum(m.weight.nbytes + 2 * 4 * (m.in_features + m.out_features) for m in layers)
    row = json.loads(saved.read_text())["models"][1]
    assert row["bytes"] == expected and 0 < row["kl"] < 1
