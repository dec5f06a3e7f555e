"""What a file of data may hold beside plain text and numbers: answered, or refused by row, never a traceback."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from lowrank_ops.commands._cli import CommandError
from lowrank_ops.commands.evaluate import read_config
from lowrank_ops.files import load_json, load_row
from lowrank_ops.formats import from_state_dict
from lowrank_ops.preference.pairs import read_pairs
from lowrank_ops.scaling_laws.runs import ScalingError, read_runs

DEEP = "[" * 100_000
ROOT = Path(__file__).parents[2]

# A row, and what is said of it.
ROWS = {
    '{"a": ' + DEEP: "is not JSON: it is nested too deeply",
    '{"a": 1, "a": 2}': "has 'a' twice in one object",
    '{"b": {"a": 1, "a": 2}}': "has 'a' twice in one object",
    r'{"a": "\ud83d"}': "holds half of a character, '\\ud83d'",
    r'{"\ude00": 1}': "holds half of a character, '\\ude00'",
    '{"a": ' + "9" * 5000 + "}": "is not JSON: Exceeds the limit",
    '[{"a": 1}]': "must be a JSON object, got list",
    '{"a": 1} {"a": 2}': "is not JSON: Extra data",
    "\0": "is not JSON",
}


@pytest.mark.parametrize("row", ROWS, ids=range(len(ROWS)))
def test_a_row_that_means_nothing_is_told_by_its_number(row: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError) as raised:
        load_row(row)
    assert ROWS[row] in str(raised.value)
    good = '{"chosen": "x", "rejected": "y"}'
    (tmp_path / "pairs.jsonl").write_text(f"{good}\r\n\r\n{row}\n{good}", encoding="utf-8-sig")
    pairs, bad = read_pairs([tmp_path / "pairs.jsonl"])
    assert [pair.where for pair in pairs] == ["row 1", "row 4"] and list(bad) == ["row 3"]
    assert ROWS[row] in bad["row 3"]
    (tmp_path / "runs.jsonl").write_text('{"N": 1, "D": 2, "loss": 3}\n' + row)
    with pytest.raises(ScalingError) as raised:
        read_runs([tmp_path / "runs.jsonl"])
    assert f"row 2 {ROWS[row]}" in str(raised.value)


def test_many_names_in_one_object_take_no_square_of_time() -> None:
    with pytest.raises(ValueError, match="has 'k7' twice"):
        load_row("{" + ", ".join(f'"k{i}": 1' for i in [*range(100_000), 7]) + "}")


@pytest.mark.parametrize("name", ["chat_template", "tokenize", "tools", "max_length", "conversation"])
def test_a_row_does_not_bring_its_own_template(name: str, tmp_path: Path) -> None:
    message = '[{"role": "user", "content": "%s"}]'
    row = f'{{"chosen": {message % "a"}, "rejected": {message % "b"}, "chat_template_kwargs": {{"{name}": "x"}}}}'
    (tmp_path / "p.jsonl").write_text(row)
    assert f"has '{name}' in 'chat_template_kwargs'" in read_pairs([tmp_path / "p.jsonl"])[1]["row 1"]


@pytest.mark.parametrize("row", ["1e308,1e308,1e308,2", "1e300,,1e-300,2", "1e-300,,1e300,2", "1e200,1e200,1e-300,2"])
def test_numbers_at_the_ends_of_float64(row: str, tmp_path: Path) -> None:
    header = "N,D,C,loss\n" if ",," not in row else "N,C,loss\n"
    (tmp_path / "runs.csv").write_text(header + row.replace(",,", ",") + "\n")
    try:
        runs, _ = read_runs([tmp_path / "runs.csv"])
    except ScalingError as error:
        assert "row 2" in str(error) and "tokens" in str(error)
    else:
        assert 0 < runs.tokens[0] < float("inf")


def test_nothing_else_reads_json() -> None:
    """``json.loads`` raises RecursionError for deep nesting, which no caller expects; load_json does not."""
    own = ("files.py", "chat.py")  # load_json itself, and an answer of the demo's own server
    found = [
        path.name
        for path in (ROOT / "lowrank_ops").rglob("*.py")
        if "bench" not in path.parts and re.search(r"json\.loads?\(", path.read_text())
    ]
    assert sorted(found) == sorted(own)
    with pytest.raises(ValueError, match="nested too deeply"):
        load_json(DEEP)


def test_deep_json_in_files_of_models(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(DEEP)
    with pytest.raises(CommandError, match="nested too deeply"):
        read_config(tmp_path)
    state = {"w": torch.zeros(4), "w.absmax": torch.zeros(1)}
    state["w.quant_state.bitsandbytes__nf4"] = torch.tensor(list(DEEP.encode()), dtype=torch.uint8)
    with pytest.raises(ValueError, match="nested too deeply"):
        from_state_dict(state, "w")
