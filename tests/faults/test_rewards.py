"""Reports on rewards: marks at the beginning and the end of a text."""

from __future__ import annotations

import json

from transformers import AutoTokenizer

from lowrank_ops.preference import train
from lowrank_ops.preference.pairs import Message, PreferencePair

TEMPLATE = "{{ bos_token }}{% for m in messages %}{{ m.content }} {% endfor %}{{ eos_token }}"


def message(role: str, text: str) -> tuple[Message]:
    return (Message(role, text, json.dumps({"role": role, "content": text})),)


def test_a_text_begins_and_ends_once(small_model: str) -> None:
    """Whether the chat template writes the marks, or the tokenizer, or nobody the last one."""
    tokenizer = AutoTokenizer.from_pretrained(small_model)
    tokenizer.bos_token, tokenizer.eos_token = "[CLS]", "[SEP]"
    pair = PreferencePair("row 1", message("user", "why"), message("assistant", "yes"), message("assistant", "no"))
    for template in (TEMPLATE, TEMPLATE.replace("{{ eos_token }}", ""), None):
        tokenizer.chat_template = template
        made, bad = train.encode(tokenizer, [pair], 40, causal=True)
        assert not bad
        for ids in (made[0].chosen["input_ids"], made[0].rejected["input_ids"]):
            for mark, place in ((tokenizer.bos_token_id, 0), (tokenizer.eos_token_id, -1)):
                assert ids[place] == mark and ids.count(mark) == 1, template
