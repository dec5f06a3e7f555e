"""Trained rows of single tokens: against PEFT, in training, in files, with other adapters, and what is refused."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import assert_bits_equal
from models import TOKENS, gemma, snapshot, tiny, write_peft
from torch import nn

import lowrank_ops as lo

NEAR = partial(torch.testing.assert_close, rtol=1e-5, atol=1e-6)


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("tied", [False, True])
@torch.no_grad()
def test_new_tokens_of_a_whole_model(tied: bool, tmp_path: Path) -> None:
    """Only the rows are trained; a tied head reads them, an untied one does not."""
    model = lo.adapt(tiny(tied), lo.LoRA(4), quantize=None)
    before = model(TOKENS).logits
    assert lo.train_tokens(model, [5, 39, 2]) is model
    assert_bits_equal(model(TOKENS).logits, before)
    rows = model.model.embed_tokens.token_rows
    assert any(p is rows.rows for p in lo.adapter_parameters(model)) and rows.index.tolist() == [2, 5, 39]
    with torch.enable_grad():
        model(TOKENS, labels=TOKENS).loss.backward()
    assert rows.rows.grad[:2].any(1).all() and rows.rows.grad[2].any() == tied
    assert model.lm_head.weight.grad is None and model.model.embed_tokens.weight.grad is None
    rows.rows += torch.randn_like(rows.rows)
    dense = tiny(tied)
    dense.model.embed_tokens.weight[[2, 5, 39]] = rows.rows
    expected = dense(TOKENS).logits
    NEAR(model(TOKENS).logits, expected)
    with lo.disabled(model):
        assert_bits_equal(model(TOKENS).logits, before)
    NEAR(lo.reference(model)(TOKENS).logits, expected)
    NEAR(lo.reference(model, adapter=False)(TOKENS).logits, before)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        NEAR(other(TOKENS).logits, expected)
    again = lo.train_tokens(lo.adapt(tiny(tied), lo.LoRA(4), quantize=None), [2, 39, 5])
    again.load_state_dict(model.state_dict())
    NEAR(again(TOKENS).logits, expected)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    NEAR(compiled(TOKENS).logits, expected)
    model.save_pretrained(tmp_path / "state")
    NEAR(lo.load_adapter(tiny(tied), tmp_path / "state")(TOKENS).logits, expected)
    merged = lo.merge(model)
    NEAR(merged(TOKENS).logits, expected)
    assert (merged.lm_head.weight is merged.model.embed_tokens.weight) == tied
    assert type(merged.lm_head) is nn.Linear and "token_rows" not in dict(merged.model.embed_tokens.named_children())


CASES: dict[str, tuple[Callable[[], Any], dict[str, Any]]] = {
    "a list": (tiny, {"trainable_token_indices": [3, 1]}),
    "a table": (tiny, {"trainable_token_indices": {"embed_tokens": [1, 3], "lm_head": [2]}}),
    "tied": (partial(tiny, tied=True), {"trainable_token_indices": [5, 1, 3]}),
    "scaled": (gemma, {"trainable_token_indices": [5, 1, 3]}),
}


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("case", CASES)
def test_what_peft_trained(case: str, tmp_path: Path) -> None:
    """Loaded, saved so that PEFT and we load it, and merged: the logits of PEFT each time."""
    from peft import PeftModel

    make, options = CASES[case]
    expected, _ = write_peft(make, tmp_path / "peft", **options)
    assert (make()(TOKENS).logits - expected).abs().max() > 1e-3
    model = lo.load_adapter(lo.adapt(make(), None, quantize=None), tmp_path / "peft")
    NEAR(model(TOKENS).logits, expected)
    lo.save_adapter(model, tmp_path / "ours")
    NEAR(PeftModel.from_pretrained(make(), str(tmp_path / "ours")).eval()(TOKENS).logits, expected)
    NEAR(lo.load_adapter(make(), tmp_path / "ours")(TOKENS).logits, expected)
    rows = model.model.embed_tokens.token_rows.rows
    rows.data.zero_()
    assert lo.load_adapter(model, tmp_path / "peft").model.embed_tokens.token_rows.rows is rows
    NEAR(model(TOKENS).logits, expected)
    NEAR(lo.merge(model)(TOKENS).logits, expected)


def test_a_tied_head_in_four_bits_reads_them_too(tmp_path: Path) -> None:
    write_peft(partial(tiny, tied=True), tmp_path, trainable_token_indices=[5, 1, 3])
    model = lo.load_adapter(lo.adapt(tiny(tied=True), None, r".*_proj|lm_head"), tmp_path)
    hidden, rows = torch.randn(2, 3, 32), model.model.embed_tokens.token_rows
    scores = model.lm_head(hidden)
    NEAR(scores[..., rows.index], hidden @ rows.rows.T)
    lo.merge(model)
    NEAR(model.lm_head(hidden), scores, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "error, message, make",
    [
        (TypeError, "tokens must be integers", lambda: lo.train_tokens(tiny(), [1.5])),
        (ValueError, r"different numbers from 0 to 39, got \[40\]", lambda: lo.train_tokens(tiny(), [40])),
        (ValueError, r"different numbers from 0 to 39, got \[1, 1\]", lambda: lo.train_tokens(tiny(), [1, 1])),
        (ValueError, r"different numbers from 0 to 39, got \[\]", lambda: lo.train_tokens(tiny(), [])),
        (ValueError, "names no input embedding", lambda: lo.train_tokens(nn.Linear(2, 2), [1])),
        (ValueError, "'zz' matches no module", lambda: lo.train_tokens(tiny(), [1], ["zz"])),
        (
            TypeError,
            "'model.norm' must be an embedding or a linear",
            lambda: lo.train_tokens(tiny(), [1], ["model.norm"]),
        ),
        (ValueError, r"trains the tokens \[1\] already", lambda: lo.train_tokens(lo.train_tokens(tiny(), [1]), [1])),
        (
            ValueError,
            "tied to it, has an adapter",
            lambda: lo.train_tokens(lo.adapt(tiny(True), lo.LoRA(2), ["lm_head"], None), [1]),
        ),
        (
            ValueError,
            "'model.embed_tokens' is of class Embedding, which cannot be adapted",
            lambda: lo.adapt(lo.train_tokens(tiny(), [1]), lo.LoRA(2), ["embed_tokens"]),
        ),
    ],
)
def test_what_is_refused(error: type[Exception], message: str, make: Callable[[], Any]) -> None:
    with pytest.raises(error, match=message):
        make()


@pytest.mark.parametrize(
    "message, config",
    [
        ("trainable_token_indices='a', which is no list", {"trainable_token_indices": "a"}),
        (
            r"tokens of 'model.embed_tokens' must be different numbers from 0 to 39",
            {"trainable_token_indices": [1, 77]},
        ),
        (
            r"rows of the tokens of 'model.embed_tokens' must be \[1, 32\], got \[2, 32\]",
            {"trainable_token_indices": [1]},
        ),
    ],
)
def test_files_that_do_not_fit_change_nothing(message: str, config: dict[str, Any], tmp_path: Path) -> None:
    import json

    write_peft(tiny, tmp_path, trainable_token_indices=[3, 1])
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | config))
    model = lo.adapt(tiny(), None)
    description, state, _ = snapshot(model)
    with pytest.raises(ValueError, match=message):
        lo.load_adapter(model, tmp_path)
    assert repr(model) == description and type(model.model.embed_tokens) is nn.Embedding
    for key, value in model.state_dict().items():
        assert_bits_equal(value, state[key])


def test_a_file_without_the_rows_that_the_model_trains_is_refused(tmp_path: Path) -> None:
    write_peft(tiny, tmp_path)
    with pytest.raises(ValueError, match="no rows for the tokens that 'model.embed_tokens' trains"):
        lo.load_adapter(lo.train_tokens(tiny(), [1]), tmp_path)
