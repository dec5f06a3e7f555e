"""Greedy completions equal the model's own, for the families that are served, by the installed version of transformers.

`make test` runs this file with the pinned version and with the newest.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from serving_helpers import greedy, run
from torch import nn

import lowrank_ops as lo
from lowrank_ops.serving.engine import Engine
from lowrank_ops.serving.rows import Completion

VOCABULARY = 96
QUIET: dict[str, Any] = {"decode": str, "on_text": lambda text: None}
FOUR_HEADS = {"num_hidden_layers": 2, "num_attention_heads": 4, "hidden_size": 48}
COMMON = {**FOUR_HEADS, "vocab_size": VOCABULARY, "pad_token_id": 0, "bos_token_id": None, "eos_token_id": None}
GROUPED: dict[str, Any] = {**COMMON, "intermediate_size": 52, "num_key_value_heads": 2, "max_position_embeddings": 64}
GEMMA = {**GROUPED, "head_dim": 12, "query_pre_attn_scalar": 12, "sliding_window": 8}
# Gemma's window is shorter than the texts. Bart counts positions over padding, RoBERTa from its padding's id on; Mamba and
# LFM2 keep states.
FAMILIES: dict[str, Callable[[], Any]] = {
    "Llama": lambda: transformers.LlamaConfig(**GROUPED),
    "Qwen3": lambda: transformers.Qwen3Config(**GROUPED, head_dim=12),
    "Gemma2": lambda: transformers.Gemma2Config(**GEMMA),
    "Gemma3": lambda: transformers.Gemma3TextConfig(
        **GEMMA, layer_types=["sliding_attention", "full_attention"]
    ),
    "OPT": lambda: transformers.OPTConfig(**COMMON, ffn_dim=52, word_embed_proj_dim=48, max_position_embeddings=64),
    "GPT2": lambda: transformers.GPT2Config(**COMMON, n_positions=64),
    "Bloom": lambda: transformers.BloomConfig(**COMMON),
    "Bart": lambda: transformers.BartConfig(
        vocab_size=VOCABULARY, d_model=48, decoder_layers=2, decoder_attention_heads=4, decoder_ffn_dim=52,
        max_position_embeddings=64, pad_token_id=0, bos_token_id=None, eos_token_id=None, forced_eos_token_id=None,
    ),
    "RoBERTa": lambda: transformers.RobertaConfig(
        **{**COMMON, "pad_token_id": 1}, intermediate_size=52, max_position_embeddings=64, is_decoder=True
    ),
    "Mamba": lambda: transformers.MambaConfig(**COMMON, state_size=4),
    "LFM2": lambda: transformers.Lfm2Config(**GROUPED, layer_types=["conv", "full_attention"]),
}  # fmt: skip


def model_of(config: Any) -> Any:
    """A random model whose every token depends on the whole text."""
    torch.manual_seed(3)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                nn.init.normal_(parameter, std=0.25)
        nn.init.normal_(model.get_input_embeddings().weight, std=0.05)
    return lo.adapt(model, None, quantize=None)


def continued(model: Any, ids: list[int], count: int) -> list[int]:
    """The most probable tokens, one forward over the whole text for each, without a cache."""
    drawn: list[int] = []
    with torch.no_grad():
        for _ in range(count):
            text = torch.tensor([ids + drawn])
            drawn.append(int(model(input_ids=text, use_cache=False).logits[0, -1].argmax()))
    return drawn


@pytest.mark.parametrize("family", FAMILIES)
def test_completions_are_the_models_own(family: str) -> None:
    """Completions of rows of several lengths that begin together, end one after the other, and join running rows.

    Three prompts make a chunk, and one takes three. Rows with the scores of their prompts come among them.
    """
    model = model_of(FAMILIES[family]())
    engine = Engine(model, None, causal=True, capacity_bytes=1 << 20, max_batch=4, chunk_tokens=10)
    prompts = [[5, 6, 7], [20, 40, 60, 80, 11, 9, 33, 2, 57], [9], [71, 5, 18], [44, 3], list(range(20, 45))]
    counts = [12, 9, 14, 4, 11, 6]
    rows: list[Any] = [greedy(None, ids, count) for ids, count in zip(prompts, counts, strict=True)]
    scored = [
        Completion(None, ids, **QUIET, max_tokens=1, logprobs=0, echo=True) for ids in (*prompts[:3], prompts[-1])
    ]
    assert run(engine, [*rows, *scored]) == ["length"] * len([*rows, *scored])
    assert engine.close(60)
    for row, ids, count in zip(rows, prompts, counts, strict=True):
        assert row.drawn == continued(model, ids, count), ids
    for row in scored:
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([row.ids]), use_cache=False).logits[0]
        values = logits.log_softmax(-1)[range(len(row.ids) - 1), row.ids[1:]]
        first, *others = row.prompt_scores
        assert first.logprob is None and [score.token for score in row.prompt_scores] == row.ids
        assert torch.allclose(torch.tensor([score.logprob for score in others]), values, atol=1e-4)
    # A model whose output ignored its context would hide a lost cache.
    alone = [continued(model, [row.drawn[-2]], 1)[0] for row in rows]
    assert alone != [row.drawn[-1] for row in rows]


def test_a_long_prompt_is_read_between_the_tokens_of_a_running_completion() -> None:
    model = model_of(FAMILIES["Llama"]())
    engine = Engine(model, None, causal=True, capacity_bytes=1 << 20, chunk_tokens=10)
    read: list[tuple[int, ...]] = []
    model.register_forward_pre_hook(lambda _, args, named: read.append(named["input_ids"].shape), with_kwargs=True)
    rows: list[Any] = [greedy(None, [5], 12), greedy(None, list(range(20, 60)), 3)]
    assert run(engine, rows) == ["length"] * 2 and engine.close(60)
    parts = [(1, 9), (1, 10), (1, 10), (1, 10), (1, 1)]
    assert read[:10] == [shape for part in parts for shape in ((1, 1), part)] and read[10] == (2, 1)
    assert [row.drawn for row in rows] == [continued(model, row.ids, len(row.drawn)) for row in rows]


@pytest.mark.parametrize("family", ["Llama", "Gemma3"])
def test_a_text_continues_from_what_is_kept_of_an_earlier_one(family: str) -> None:
    """A text that goes on after an earlier one with its answer, and texts that differ from it at some token."""
    model = model_of(FAMILIES[family]())
    engine = Engine(model, None, causal=True, capacity_bytes=1 << 20, chunk_tokens=10)
    read: list[int] = []
    model.register_forward_pre_hook(lambda _, args, named: read.append(named["input_ids"].shape[1]), with_kwargs=True)

    def completed(*prompts: list[int]) -> list[Any]:
        read.clear()
        rows: list[Any] = [greedy(None, ids, 5) for ids in prompts]
        assert run(engine, rows) == ["length"] * len(rows)
        reads = sum(read)
        for row, ids in zip(rows, prompts, strict=True):
            assert row.drawn == continued(model, ids, 5), ids
        read[:] = [reads - 4]  # without the drawn tokens
        return rows

    text = list(range(20, 42))
    (first,) = completed(text)
    assert read == [22]
    again = [*text, *first.drawn, 7, 8, 9]
    completed(again)
    assert read == [len(again) - len(text) - 4]  # the last token that was drawn has not been read
    completed([*text[:18], 50, 51, 52])
    # A window has dropped what the 18th token sees.
    assert read == [21 if family == "Gemma3" else 3]
    completed(again, [*again[:20], 1, 2], [3, *again])
    assert engine.close(60)


@pytest.mark.parametrize(
    "config",
    [
        lambda: transformers.OpenAIGPTConfig(vocab_size=VOCABULARY, n_positions=64, n_embd=48, n_layer=2, n_head=4),
        lambda: transformers.XLMConfig(vocab_size=VOCABULARY, emb_dim=48, n_layers=2, n_heads=4, causal=True),
        lambda: transformers.RecurrentGemmaConfig(**GROUPED, block_types=["recurrent", "attention"]),
    ],
    ids=["it takes none", "it needs the whole text beside it", "its layers have states beside it"],
)
def test_a_model_without_a_cache_is_refused(config: Callable[[], Any]) -> None:
    model = model_of(config())
    with pytest.raises(ValueError, match=f"keep a cache .* forward of {type(model).__name__} in transformers"):
        Engine(model, None, causal=True)
