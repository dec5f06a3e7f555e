"""Patterns of rank_pattern and alpha_pattern: as PEFT matches them, in bounded time."""

from __future__ import annotations

import json
import random
import re
from pathlib import Path

import pytest
from models import plain

import lowrank_ops as lo
from lowrank_ops.adapters.patterns import MOST_STEPS, _Match, check_pattern, matches
from lowrank_ops.adapters.peft_files import CONFIG

NAMES = [
    "q_proj", "model.layers.0.self_attn.q_proj", "model.layers.10.self_attn.q_proj", "model.layers.1.mlp.down_proj",
    "0", "lm_head", "encoder.block.3.layer.1.DenseReluDense.wo", "a.b\nc", "", "q.q.q", "Ünï.q_proj",
]  # fmt: skip
PATTERNS = [
    "q_proj", r"^model\.layers\.0\.self_attn\.q_proj", "layers.1.*proj", r".*\.(q|v)_proj", r"layers\.\d+\.mlp\.\w+",
    r"layers\.[0-4]\..*", "(q_proj)?", "", "^", "$", "q_proj$", r"model\.layers\.(0|10)\..*", "[^.]+", r"[\w.]+?proj",
    "q{2}", "(q.){1,2}q", "(q.){2,}q", r"\Amodel.*\Z", "x|q_proj", r"[^\d]+", r"\D+", r"\S+", "(a*)*", "(?:q|q)_proj",
    "(?P<n>q)_proj", "q_proj|", r"\W", r"(.*\.)?q_proj", ".{3,6}", "ü.*",
]  # fmt: skip


def theirs(pattern: str, name: str) -> bool:
    return re.match(rf"(.*\.)?({pattern})$", name) is not None


@pytest.mark.parametrize("pattern", PATTERNS)
def test_it_matches_what_peft_matches(pattern: str) -> None:
    for name in NAMES:
        if "\n" not in name:
            assert matches(pattern, name) == theirs(pattern, name), name


def test_random_patterns_match_what_peft_matches() -> None:
    parts = [
        "a",
        "b",
        ".",
        r"\.",
        "[ab]",
        "[^a]",
        r"\w",
        "(a|b)",
        "(a|b.)",
        "a*",
        "b?",
        ".*",
        "(ab)*",
        "a{1,2}",
        "^",
        "$",
    ]
    random_ = random.Random(0)
    hits = 0
    for _ in range(600):
        pattern = "".join(random_.choices(parts, k=random_.randrange(1, 6)))
        for _ in range(4):
            name = "".join(random_.choices("ab.", k=random_.randrange(7)))
            assert matches(pattern, name) == theirs(pattern, name), (pattern, name)
            hits += matches(pattern, name)
    assert hits > 200


EXPENSIVE = [
    r"([\w.]|[\w.])*!", r"(\w+)+!", "(a|aa)+$x", "(.*.*)*!", "(((a*)*)*)*!", "((a?){50}){50}!", "(a{1000}){1000}!",
    "a{4000000000}!", "(|a)*!", "(.*){1,4000000000}!",
]  # fmt: skip


@pytest.mark.parametrize("pattern", EXPENSIVE)
def test_expensive_patterns_are_cheap_or_refused_by_name(pattern: str) -> None:
    name = "a" * 300
    match = _Match(pattern, name)
    try:
        assert not match.sequence(check_pattern(pattern), {0})
    except ValueError as error:
        assert repr(pattern) in str(error)  # noqa: PT017
    assert match.steps <= 2 * MOST_STEPS


@pytest.mark.parametrize(
    "pattern, words",
    [
        (r"(a)\1", "groupref"), ("(?=a)b", "assert"), ("(?<!a)b", "assert_not"), (r"\bq", "at_boundary"),
        ("(?>a+)b", "atomic_group"), ("a*+b", "possessive_repeat"), ("(?i)a", "flags"), ("(?i:a)", "flags"),
        ("(", "no regular expression"), ("a" * 1001, "1001 letters"), ("(" * 400 + "a" + ")" * 400, ""), (3, "text"),
    ],
)  # fmt: skip
def test_other_patterns_are_refused_by_name(pattern: str, words: str) -> None:
    if not words:  # as deep as Python's parser can go, it is read; deeper it is refused
        return
    with pytest.raises(ValueError, match=words):
        check_pattern(pattern)


@pytest.mark.parametrize("option", ["rank_pattern", "alpha_pattern"])
def test_an_adapter_with_an_expensive_pattern_costs_little(option: str, tmp_path: Path) -> None:
    lo.save_adapter(lo.adapt(plain(), lo.LoRA(4)), tmp_path)
    config = json.loads((tmp_path / CONFIG).read_text())
    (tmp_path / CONFIG).write_text(json.dumps(config | {option: {r"([\w.]|[\w.])*!": 3}}))
    lo.load_adapter(lo.adapt(plain(), None), tmp_path)
    (tmp_path / CONFIG).write_text(json.dumps(config | {option: {r"(a)\1": 3}}))
    with pytest.raises(ValueError, match=rf"adapter_config.json has {option}=.*groupref"):
        lo.load_adapter(lo.adapt(plain(), None), tmp_path)
