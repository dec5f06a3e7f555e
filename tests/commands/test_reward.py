"""``lowrank-ops reward``: pairs in users' formats, bad rows named by their numbers, the whole command on small models."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from lowrank_ops.__main__ import main
from lowrank_ops.commands import _data
from lowrank_ops.preference import load_reward_model, train
from lowrank_ops.preference.pairs import RewardError, read_pairs, split_pairs

COLOURS = ("red", "green", "blue", "white", "black", "brown", "pink", "grey")


def write(path: Path, rows: list[Any]) -> Path:
    lines = (row if isinstance(row, str) else json.dumps(row) for row in rows)
    path.write_text("".join(line + "\n" for line in lines))
    return path


def rows(count: int = 64) -> list[dict[str, Any]]:
    """The better answer repeats the colour of the question."""
    made = []
    for i in range(count):
        right, wrong = COLOURS[i % 8], COLOURS[(i * 3 + 1 + i // 8) % 8]
        if right != wrong:
            made.append({"prompt": f"say {right} {i}", "chosen": f"it is good, {right}", "rejected": f"bad, {wrong}"})
    return made


def conversation(row: dict[str, Any]) -> dict[str, Any]:
    return {
        "prompt": [{"role": "user", "content": row["prompt"]}],
        "chosen": [{"role": "assistant", "content": row["chosen"]}],
        "rejected": [{"role": "assistant", "content": row["rejected"]}],
    }


def command(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, dict[str, Any], str]:
    code = main(["reward", *map(str, arguments), "--json"])
    out, err = capsys.readouterr()
    return code, json.loads(out) if out else {}, err


@pytest.fixture(scope="module")
def small_decoder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A directory with a random Llama and MiniLM's tokenizer without a padding token."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    tokenizer = _data.load_model()[1]
    tokenizer.eos_token, tokenizer.pad_token = "[SEP]", None
    directory = tmp_path_factory.mktemp("decoder")
    LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=36,
            num_hidden_layers=2,
            num_attention_heads=3,
            num_key_value_heads=3,
            intermediate_size=52,
            max_position_embeddings=40,
        )  # fmt: skip
    ).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return str(directory)


# ---- pairs


def test_every_form_of_a_row(tmp_path: Path) -> None:
    first = {"prompt": "a", "chosen": "b", "rejected": "c", "margin": 2, "other": []}
    second = {"chosen": "whole text", "rejected": "another", "label": 0.25, "prompt": None}
    file = write(tmp_path / "p.jsonl", [first, "", second, conversation(first)])
    pairs, bad = read_pairs([file])
    assert not bad and [p.where for p in pairs] == ["row 1", "row 3", "row 4"]
    assert (pairs[0].margin, pairs[0].label) == (2.0, 1.0) and (pairs[1].prompt, pairs[1].label) == (None, 0.25)
    assert [(m.role, m.content) for m in pairs[2].chosen] == [("assistant", "b")]
    assert pairs[0].unread == ("other",) and pairs[1].unread == ()
    assert [p.where for p in read_pairs([file, file])[0]][3] == "p.jsonl row 1"


BAD = {
    "{": "is not JSON",
    "[1]": "must be a JSON object, got list",
    '{"prompt": "a", "chosen": "b"}': "lacks 'rejected'; it has 'prompt', 'chosen'",
    '{"chosen": "b", "rejected": null}': "lacks 'rejected'",
    '{"chosen": "b", "rejected": " "}': "'rejected' is empty",
    '{"chosen": [], "rejected": []}': "'chosen' is empty",
    '{"chosen": "b", "rejected": 3}': "must be a text or a list of messages, got int",
    '{"chosen": "b", "rejected": [{"role": "user", "content": "c"}]}': "mixes texts with lists",
    '{"chosen": [{"role": "user"}], "rejected": [{"role": "user", "content": "c"}]}': "has a message that is not",
    '{"chosen": ["b"], "rejected": ["c"]}': "has a message that is not",
    '{"chosen": [{"role": "user", "content": ""}], "rejected": [{"role": "user", "content": "c"}]}': "is empty",
    '{"chosen": "b", "rejected": "c", "margin": NaN}': "'margin' must be finite, got nan",
    '{"chosen": "b", "rejected": "c", "margin": 1e999}': "'margin' must be finite, got inf",
    '{"chosen": "b", "rejected": "c", "margin": "1"}': "'margin' must be a number, got '1'",
    '{"chosen": "b", "rejected": "c", "margin": true}': "'margin' must be a number, got True",
    '{"chosen": "b", "rejected": "c", "label": 1.5}': "'label' must be in",
    '{"chosen": "b", "rejected": "c", "label": NaN}': "'label' must be in",
    '{"chosen": "b", "rejected": "b"}': "is a tie",
    '{"chosen": "b", "rejected": "b", "label": 1}': "is a tie",
    '{"chosen": "b", "chosen": "d", "rejected": "c"}': "has 'chosen' twice",
    '{"prompt": "\\ud83d", "chosen": "b", "rejected": "c"}': "holds half of a character",
    '{"chosen": "b", "rejected": [{"role": "user", "content": "\\udc00"}]}': "holds half of a character",
    '{"chosen": "b", "rejected": "c", "tools": [{}]}': "has 'tools' beside texts",
    '{"chosen": [{"role": "user", "content": null}], "rejected": "c"}': "has a message that is not",
    '{"chosen": "b", "rejected": "c", "more": ' + "[" * 100_000 + "]" * 100_000 + "}": "nested too deeply",
}


def test_bad_rows_are_told_by_their_numbers(tmp_path: Path) -> None:
    good = {"chosen": "b", "rejected": "b", "label": 0.5}
    file = write(tmp_path / "p.jsonl", [good, *BAD, good])
    pairs, bad = read_pairs([file])
    assert [pair.where for pair in pairs] == ["row 1", f"row {len(BAD) + 2}"]
    assert list(bad) == [f"row {i}" for i in range(2, len(BAD) + 2)]
    for (line, message), told in zip(BAD.items(), bad.values(), strict=True):
        assert message in told, (line, told)
    (tmp_path / "bytes.jsonl").write_bytes(b'{"chosen": "\xff", "rejected": "c"}')
    assert "is not JSON" in read_pairs([tmp_path / "bytes.jsonl"])[1]["row 1"]


def test_files_that_hold_nothing(tmp_path: Path) -> None:
    with pytest.raises(RewardError, match="cannot read .*No such file"):
        read_pairs([tmp_path / "none.jsonl"])
    with pytest.raises(RewardError, match="holds no pairs"):
        read_pairs([write(tmp_path / "p.jsonl", ["", " "])])


def test_a_prompt_stays_on_one_side(tmp_path: Path) -> None:
    made = [{"prompt": f"p{i % 20}", "chosen": f"c{i}", "rejected": "r"} for i in range(100)]
    pairs, _ = read_pairs([write(tmp_path / "p.jsonl", made)])
    train, held = split_pairs(pairs, 0.2, 0)
    assert len(train) + len(held) == 100 and 20 <= len(held) < 26
    assert not {p.prompt for p in train} & {p.prompt for p in held}
    assert split_pairs(pairs, 0.2, 0) == (train, held) != split_pairs(pairs, 0.2, 1)
    with pytest.raises(RewardError, match="1 different prompts cannot be divided"):
        split_pairs([p for p in pairs if p.prompt == "p0"], 0.2, 0)


def test_answers_that_begin_alike_share_a_prompt(tmp_path: Path) -> None:
    """Questions in every form without a prompt column, several pairs of each."""
    asked = [[{"role": "system", "content": "s"}, {"role": "user", "content": f"q{i}"}] for i in range(12)]
    answers = ["yes it is", "yes it was", "no", "it may be"]
    texts = [f"Question {i}?\n\nAnswer: " for i in range(12)]

    def rows(begin: Any, answer: Any) -> list[dict[str, Any]]:
        return [
            {"chosen": begin[i] + answer(a), "rejected": begin[i] + answer(b)}
            for i in range(12)
            for a in answers
            for b in answers
            if a != b
        ]

    forms = {
        "messages": rows(asked, lambda a: [{"role": "assistant", "content": a}]),
        "texts": rows(texts, str),
    }
    # The second half of the rows goes on where the first half ends.
    for i, row in enumerate(forms["messages"][::2]):
        more = {"role": "user", "content": f"and {i}?"}
        for side in ("chosen", "rejected"):
            row[side] = [*row["chosen"][:3], more, *row[side][2:]]
    for name, made in forms.items():
        pairs, bad = read_pairs([write(tmp_path / "p.jsonl", made)])
        assert not bad
        train, held = split_pairs(pairs, 0.25, 0)

        def questions(some: Any) -> set[Any]:
            return {p.chosen[1] if name == "messages" else p.chosen[:12] for p in some}  # noqa: B023

        assert held and train and len(train) + len(held) == len(made)
        assert not questions(train) & questions(held), name
        assert len(questions(pairs)) == 12


def test_fields_reach_the_template_or_are_refused(tmp_path: Path) -> None:
    tokenizer = _data.load_model()[1]
    ask = {"role": "user", "content": "weather"}

    def call(name: str) -> dict[str, Any]:
        return {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": name, "arguments": {}}}]}

    made = [
        {"chosen": [ask, call("rain")], "rejected": [ask, call("snow")], "tools": [{"name": "rain"}]},
        {"chosen": [ask, call("rain")], "rejected": [ask, {"role": "assistant", "content": "no"}]},
        {"chosen": [ask | {"name": "a"}], "rejected": [ask | {"name": "b"}]},
    ]
    pairs, bad = read_pairs([write(tmp_path / "p.jsonl", made)])
    assert not bad
    assert (
        "holds 'tool_calls', 'tools', which only a chat template"
        in train.encode(tokenizer, pairs, 40, False)[1]["row 1"]
    )
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }} {% endfor %}"
    told = train.encode(tokenizer, pairs, 40, False)[1]
    assert all("which the model's chat template does not write" in told[f"row {i}"] for i in (1, 2, 3))
    tokenizer.chat_template = (
        "{% for t in tools or () %}{{ t.name }} {% endfor %}{% for m in messages %}{{ m.content }} "
        "{% for c in m.tool_calls or () %}{{ c.function.name }} {% endfor %}{% endfor %}"
    )
    kept, told = train.encode(tokenizer, pairs, 40, False)
    assert tokenizer.decode(kept[0].chosen["input_ids"]) == "rain weather rain"
    assert list(told) == ["row 3"] and "'name'" in told["row 3"]


def test_answers_that_become_the_same_tokens_are_reported(tmp_path: Path) -> None:
    tokenizer = _data.load_model()[1]
    pairs, _ = read_pairs([write(tmp_path / "p.jsonl", [{"prompt": "a", "chosen": "b", "rejected": "B "}])])
    assert "become the same tokens" in train.encode(tokenizer, pairs, 40, False)[1]["row 1"]


# ---- measures


def test_accuracy_and_calibration() -> None:
    """Pairs of confidence 0.75 are right in 3 of 4 cases and pairs of 0.95 in 19 of 20, so the calibration error is 0."""
    sure, surer = math.log(0.75 / 0.25), math.log(0.95 / 0.05)
    gap = torch.tensor([sure] * 3 + [-sure] + [surer] * 19 + [-surer])
    result = train.evaluate(gap, torch.ones(24))
    assert result["accuracy"] == pytest.approx(22 / 24) and result["calibration_error"] == pytest.approx(0, abs=1e-6)
    assert [b["count"] for b in result["bins"]] == [0, 0, 4, 0, 20]
    expected = -(3 * math.log(0.75) + math.log(0.25) + 19 * math.log(0.95) + math.log(0.05)) / 24
    assert result["log_loss"] == pytest.approx(expected, rel=1e-5)
    wrong = train.evaluate(-gap, torch.ones(24))
    assert wrong["calibration_error"] == pytest.approx((4 * 0.5 + 20 * 0.9) / 24, rel=1e-5)
    assert train.evaluate(-gap, torch.zeros(24))["accuracy"] == pytest.approx(22 / 24)


def test_ties_and_equal_rewards() -> None:
    result = train.evaluate(torch.tensor([0.0, 1.0, -3.0]), torch.tensor([1.0, 1.0, 0.5]))
    assert result["accuracy"] == 0.5 and result["ties"] == 1
    ties = train.evaluate(torch.zeros(2), torch.full((2,), 0.5))
    assert ties["accuracy"] is None and ties["log_loss"] == pytest.approx(math.log(2))


# ---- tokens


def test_segments_of_an_encoder_and_the_end_of_a_decoder(tmp_path: Path) -> None:
    tokenizer = _data.load_model()[1]
    row = {"prompt": "one two", "chosen": "three", "rejected": "four"}
    pairs, _ = read_pairs([write(tmp_path / "p.jsonl", [row, conversation(row)])])

    def words(causal: bool) -> list[str]:
        made, bad = train.encode(tokenizer, pairs, 40, causal)
        assert not bad
        return [tokenizer.decode(pair.chosen["input_ids"]) for pair in made]

    assert words(False) == ["[CLS] one two [SEP] three [SEP]", "[CLS] user : one two [SEP] assistant : three [SEP]"]
    tokenizer.eos_token = "[MASK]"
    assert words(True)[0] == "[CLS] one twothree [SEP] [MASK]"
    tokenizer.chat_template = "{% for m in messages %}<{{ m.role }}> {{ m.content }} {% endfor %}"
    assert words(True)[1] == "< user > one two < assistant > three [MASK]"
    tokenizer.chat_template = "{{ raise_exception('no system here') }}"
    assert "no system here" in train.encode(tokenizer, pairs, 40, True)[1]["row 2"]


def test_long_pairs_are_reported_and_not_cut(tmp_path: Path) -> None:
    tokenizer = _data.load_model()[1]
    made = [{"prompt": "a " * 30, "chosen": "b " * n, "rejected": "c"} for n in (1, 20)]
    pairs, _ = read_pairs([write(tmp_path / "p.jsonl", made)])
    kept, bad = train.encode(tokenizer, pairs, 40, False)
    assert [pair.pair.where for pair in kept] == ["row 1"]
    assert bad == {"row 2": "is too long: prompt and 'chosen' are 53 tokens, and the limit is 40"}


# ---- the command


@pytest.mark.parametrize("form", [dict, conversation])
def test_the_command_learns_and_what_it_saves_rewards_the_same(
    form: Any, small_model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = write(tmp_path / "p.jsonl", [form(row) for row in rows()])
    code, result, said = command(
        capsys, file, "--model", small_model, "--steps", 30, "--batch-size", 16, "--learning-rate", 0.01,
        "--out", tmp_path / "out", "--holdout", 0.25, "--rank", 4,
    )  # fmt: skip
    assert code == 0 and result["reloaded"]["agrees"] and result["reloaded"]["max_difference"] < 1e-5
    after = result["measured"]["after"]
    assert after["accuracy"] >= 0.9 and after["log_loss"] < 0.5 and sum(b["count"] for b in after["bins"])
    assert result["pairs"]["train"] + result["pairs"]["test"] == len(rows())
    assert "accuracy" in said and "calibration error" in said and "train   loss" in said
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {"adapter_config.json", "adapter_model.safetensors", "reward_head.safetensors"}
    model = load_reward_model(_data.load_transformer(small_model)[0], tmp_path / "out")
    assert model.head.pooling == "mean"


def test_a_decoder_without_a_padding_token(
    small_decoder: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made = rows()
    made[0]["margin"], made[1]["label"] = 1.5, 0.5
    train, test = write(tmp_path / "p.jsonl", made), write(tmp_path / "q.jsonl", made[:20])
    code, result, said = command(
        capsys, train, "--eval", test, "--model", small_decoder, "--epochs", 5, "--batch-size", 16,
        "--learning-rate", 0.01, "--center", 0.01, "--rank", 4,
    )  # fmt: skip
    assert code == 0 and result["reloaded"]["agrees"] and result["steps"] == 5 * -(-len(made) // 16)
    assert result["measured"]["after"]["accuracy"] >= 0.9 and result["measured"]["after"]["ties"] == 1
    assert "the last token" in said and "1 ties aside" in said


def test_bad_rows_stop_or_are_left_out_aloud(
    small_model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    long = {"prompt": "a", "chosen": "b " * 50, "rejected": "c"}
    file = write(tmp_path / "p.jsonl", [*rows(24), "{", {"prompt": "x"}, long])
    n = len(rows(24))
    code, _, said = command(capsys, file, "--model", small_model)
    assert code == 2 and f"2 of {n + 3} pairs cannot be used" in said and f"row {n + 1} is not JSON" in said
    assert f"row {n + 2} lacks 'chosen' and 'rejected'; it has 'prompt'" in said
    code, result, said = command(capsys, file, "--model", small_model, "--bad-rows", "skip", "--steps", 1, "--rank", 2)
    assert code == 0 and f"row {n + 1} is not JSON" in said and f"row {n + 3} is too long" in said
    assert result["pairs"]["train"] + result["pairs"]["test"] == n
    only_long = write(tmp_path / "long.jsonl", [long, {**long, "prompt": "b"}])
    code, _, said = command(capsys, only_long, "--model", small_model, "--bad-rows", "skip", "--holdout", 0.5)
    assert code == 2 and "are longer than 40 tokens" in said
    code, _, said = command(capsys, write(tmp_path / "none.jsonl", ["{"]), "--model", small_model, "--bad-rows", "skip")
    assert code == 2 and "no pair is left to train on" in said


def test_a_loss_that_explodes_names_its_rows(
    small_model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = write(tmp_path / "p.jsonl", rows())
    code, _, said = command(capsys, file, "--model", small_model, "--learning-rate", 1e30, "--steps", 20, "--rank", 2)
    assert code == 2 and "are not finite" in said and "row " in said


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ((), "give a JSONL file of pairs, or --demo"),
        (("p.jsonl", "--demo"), "--demo makes its own pairs"),
        (("p.jsonl", "--steps", 0), "--steps must be at least 1, got 0"),
        (("p.jsonl", "--rank", -1), "--rank must be at least 1"),
        (("p.jsonl", "--holdout", 1.0), "--holdout must be above 0 and below 1.0"),
        (("p.jsonl", "--learning-rate", "nan"), "--learning-rate must be above 0"),
        (("p.jsonl", "--center", -1), "--center must be a number of at least 0"),
        (("p.jsonl", "--seed", -1), "--seed must be in"),
        (("p.jsonl",), "cannot read p.jsonl"),
        (("p.jsonl", "--model", "/nowhere"), "is not a Hugging Face model directory"),
    ],
)
def test_bad_options_are_refused(options: tuple, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, _, said = command(capsys, *options)
    assert code == 2 and message in said


def test_the_demo(
    small_model: str, few_pairs: None, tmp_path: Path, capsys: pytest.CaptureFixture[str], pairs: list[_data.Pair]
) -> None:
    """A small random encoder may score badly, but the pairs must be correct."""
    code, result, said = command(
        capsys, "--demo", "--model", small_model, "--steps", 2, "--out", tmp_path, "--max-length", 40,
        "--bad-rows", "skip",
    )  # fmt: skip
    assert code == 0 and result["reloaded"]["agrees"] and "which docstring is this function's?" in said
    train, test = (read_pairs([tmp_path / name])[0] for name in ("train.jsonl", "test.jsonl"))
    sides: list[set[str]] = []
    for some in (train, test):
        found = set()
        for row in some[:50]:
            # The texts are cut, so several functions may begin like them.
            own, other = ([p for p in pairs if p.docstring.startswith(str(t))] for t in (row.chosen, row.rejected))
            own = [p for p in own if f"{p.definition}\n{p.body}".startswith(str(row.prompt))]
            assert own and {p.module for p in own} & {p.module for p in other}
            found |= {p.module for p in own}
        sides.append(found)
    assert train and test and sides[0].isdisjoint(sides[1])
