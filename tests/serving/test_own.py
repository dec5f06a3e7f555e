"""What rows have of their own beside updates: heads, embeddings, norms and biases, each row as its adapter alone."""

from __future__ import annotations

import copy
import gc
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import assert_bits_equal
from models import bert, gemma, tiny, write_peft
from safetensors.torch import load_file
from torch import nn

import lowrank_ops as lo

ROWS = torch.arange(1, 29).view(4, 7) % 40
NAMES = ["a", None, "b", "a"]
CASES: dict[str, tuple[Callable[[], Any], dict[str, Any]]] = {
    "head": (tiny, {"modules_to_save": ["lm_head"]}),
    "head and embeddings": (tiny, {"modules_to_save": ["embed_tokens", "lm_head"]}),
    "tied, embeddings": (partial(tiny, tied=True), {"modules_to_save": ["embed_tokens"]}),
    "score": (partial(tiny, classes=3), {"task_type": "SEQ_CLS"}),
    "classifier": (bert, {"task_type": "SEQ_CLS", "target_modules": ["query"]}),
    "positions": (bert, {"target_modules": ["query"], "modules_to_save": ["position_embeddings"]}),
    "norms": (tiny, {"modules_to_save": ["norm"]}),
    "all biases": (bert, {"task_type": "SEQ_CLS", "target_modules": ["query"], "bias": "all"}),
    "biases of adapted layers": (partial(tiny, bias=True), {"bias": "lora_only"}),
    "a block": (tiny, {"modules_to_save": ["mlp"]}),
    "adapted head": (tiny, {"target_modules": ["q_proj", "lm_head"]}),
    "dora": (tiny, {"use_dora": True}),
    "dora over biases that were trained": (partial(tiny, bias=True), {"use_dora": True, "bias": "lora_only"}),
    "dora of a head": (partial(tiny, tied=True), {"use_dora": True, "target_modules": ["q_proj", "lm_head"]}),
    "lora_bias": (tiny, {"lora_bias": True, "target_modules": ["q_proj", "lm_head"]}),
    "lora_bias over biases": (partial(tiny, bias=True), {"lora_bias": True, "bias": "lora_only"}),
    "olora": (tiny, {"init_lora_weights": "olora"}),
    "olora of a head": (tiny, {"init_lora_weights": "olora", "target_modules": ["q_proj", "lm_head"]}),
    "tokens": (tiny, {"trainable_token_indices": {"embed_tokens": [30, 3, 9], "lm_head": [2]}}),
    "tokens, tied": (partial(tiny, tied=True), {"trainable_token_indices": [5, 1, 3]}),
    "tokens, scaled and tied": (gemma, {"trainable_token_indices": [5, 1, 3]}),
    "adapted embeddings": (bert, {"target_modules": ["query", "word_embeddings"]}),
    "adapted embeddings, scaled, and head, tied": (
        gemma,
        {"target_modules": ["q_proj", "embed_tokens", "lm_head"]},
    ),
}
NEAR = partial(torch.testing.assert_close, rtol=1e-5, atol=2e-6)


def pooled(
    make: Callable[[], Any], path: Path, quantize: str | None = None, head: bool = True, **options: Any
) -> tuple[Any, Any]:
    model = lo.adapt(make(), None, r".*(_proj|query|key|value|dense)" + "|lm_head" * head, quantize)
    pool = lo.AdapterPool(model, 1 << 20, **options)
    for name in "ab":
        pool.load(name, path / name)
    return model, pool


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Callable[[], Any], dict[str, torch.Tensor]]:
    """A model, and PEFT's logits of all rows through each of two adapters."""
    make, options = CASES[request.param]
    return make, {name: write_peft(make, tmp_path / name, ROWS, seed, **options)[0] for seed, name in enumerate("ab")}


@pytest.mark.filterwarnings("ignore::UserWarning")
@torch.no_grad()
def test_each_row_is_what_peft_computes(case: Any, tmp_path: Path) -> None:
    make, alone = case
    base = make()(ROWS).logits
    expected = torch.stack([base[i] if name is None else alone[name][i] for i, name in enumerate(NAMES)])
    assert (expected - base).abs().max() > 1e-3
    for head in (True, False):  # a layer of ours, or a plain one
        model, pool = pooled(make, tmp_path, head=head)
        with pool.route(NAMES):
            NEAR(model(ROWS).logits, expected)
        with pool.route(["b"] * 4):  # one group
            NEAR(model(ROWS).logits, alone["b"])
        NEAR(model(ROWS).logits, base)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_rows_of_others_keep_their_bits(dtype: torch.dtype, tmp_path: Path) -> None:
    """A scale or a bias is of its row alone, and a layer in which no adapter has one does not look for it."""
    make = partial(tiny, bias=True)
    write_peft(make, tmp_path / "a", ROWS, 0, use_dora=True, target_modules=["q_proj"])
    write_peft(make, tmp_path / "b", ROWS, 1, target_modules=["q_proj", "k_proj"])
    model, pool = pooled(lambda: make().to(dtype), tmp_path, "nf4")
    with pool.route([None] * 4):
        base = model(ROWS).logits
    with pool.route(["b"] * 4):
        plain = model(ROWS).logits
    with pool.route(NAMES):
        mixed = model(ROWS).logits
        assert {pool._layers[name] for name in pool._known["a"].own} == {
            m for n, m in model.named_modules() if n.endswith("q_proj")
        }
    assert_bits_equal(mixed[1], base[1])
    assert_bits_equal(mixed[2], plain[2])
    assert not torch.equal(mixed[0], base[0])
    with pool.route([None, "b", "b", "a"]):
        assert_bits_equal(model(ROWS).logits[3], mixed[3])


@torch.no_grad()
def test_scales_are_of_the_quantised_base(tmp_path: Path) -> None:
    torch.manual_seed(0)
    trained = lo.adapt(tiny(), lo.LoRA(4, dora=True))
    for p in lo.adapter_parameters(trained):
        p += 0.1 * torch.randn(p.shape)
    lo.save_adapter(trained, tmp_path / "a")
    model = lo.adapt(tiny(), None)
    pool = lo.AdapterPool(model, 1 << 20)
    pool.load("a", tmp_path / "a")
    with pool.route(["a", None, "a", None]):
        NEAR(model(ROWS).logits[::2], trained(ROWS).logits[::2])


@pytest.fixture
def heads(tmp_path: Path) -> Path:
    for seed, name in enumerate("abc"):
        write_peft(tiny, tmp_path / name, ROWS, seed, modules_to_save=["embed_tokens", "lm_head"])
    return tmp_path


@torch.no_grad()
def test_tokens_of_packed_sequences_and_generation(heads: Path) -> None:
    model, pool = pooled(tiny, heads)
    alone = {name: lo.load_adapter(tiny(), heads / name) for name in "ab"}
    packed = torch.cat([ROWS[0], ROWS[1], ROWS[2]])[None]
    slots = torch.arange(3).repeat_interleave(7)
    logits = {name: m(packed).logits for name, m in (*alone.items(), (None, tiny()))}
    with pool.route_tokens(["a", "b"], torch.full((21,), 1)):
        NEAR(model(packed).logits, logits["b"])
    with pool.route_tokens(["a", "b", None], slots):
        embedded = model.model.embed_tokens(packed)
        hidden = torch.randn(1, 21, 32)
        scores = model.lm_head(hidden)
    for slot, m in enumerate((alone["a"], alone["b"], tiny())):
        assert_bits_equal(embedded[:, slots == slot], m.model.embed_tokens(packed)[:, slots == slot])
        NEAR(scores[:, slots == slot], m.lm_head(hidden)[:, slots == slot])
    options = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    with pool.route(NAMES):
        drawn = model.generate(ROWS, **options)
    for i, name in enumerate(NAMES):
        own = tiny() if name is None else alone[name]
        assert drawn[i].tolist() == own.generate(ROWS[i : i + 1], **options)[0].tolist()


@torch.no_grad()
def test_their_bytes_count_and_come_back(heads: Path) -> None:
    """An adapter is as large as its updates and its parameters; it is evicted and read ahead with them."""
    model = lo.adapt(tiny(), None, quantize=None)
    pool = lo.AdapterPool(model, 48 << 10)
    whole = 2 * 40 * 32 * 4
    read = pool.read(heads / "b")
    pool.load("a", heads / "a")
    size = pool.stats()["used_bytes"]
    assert size >= whole + 4 * 2 * 4 * 32 * 2
    pool.load("b", read)
    pool.load("c", heads / "c")
    pool.load("a2", heads / "a")
    pool.load("a3", heads / "a")
    assert pool.stats()["evictions"] > 0 and pool.stats()["host_bytes"] == size * pool.stats()["evictions"]
    for name in ("a", "b", "c"):
        with pool.route([name] * 4):
            NEAR(model(ROWS).logits, lo.load_adapter(tiny(), heads / name)(ROWS).logits)
    for name in pool.names():
        pool.unload(name)
    assert pool.stats()["used_bytes"] == pool.stats()["host_bytes"] == 0
    small = lo.AdapterPool(lo.adapt(tiny(), None, quantize=None), whole)
    with pytest.raises(MemoryError, match="adapter a needs"):
        small.load("a", heads / "a")
    assert "forward" not in vars(model.model.norm)


def test_a_quantised_head_gives_way_to_that_of_the_row(heads: Path) -> None:
    model, pool = pooled(tiny, heads, "nf4")
    head = model.lm_head.weight
    hidden = torch.randn(4, 3, 32)
    with torch.no_grad(), pool.route(NAMES):
        y = model.lm_head(hidden)
    for i, name in enumerate(NAMES):
        weight = head.dequantize() if name is None else lo.load_adapter(tiny(), heads / name).lm_head.weight
        NEAR(y[i], hidden[i] @ weight.T, rtol=1e-4, atol=1e-5)


def test_modules_in_use_cannot_be_replaced_and_copies_have_no_pool(heads: Path) -> None:
    model = lo.adapt(tiny(), None)
    pool = lo.AdapterPool(model, 1 << 20)
    pool.load("a", heads / "a")
    second = lo.AdapterPool(model, 1 << 20)
    second.load("a", heads / "a")
    for change in (partial(lo.adapt, model, None, ["lm_head"]), partial(lo.load_adapter, model, heads / "a")):
        with pytest.raises(ValueError, match="AdapterPool routes"):
            change()
    other = copy.deepcopy(model)
    with torch.no_grad(), pool.route(["a"] * 4):
        assert_bits_equal(other(ROWS).logits, lo.adapt(tiny(), None)(ROWS).logits)
    expected = lo.load_adapter(lo.adapt(tiny(), None), heads / "a").lm_head(hidden := torch.randn(4, 3, 32))
    del pool
    gc.collect()
    with torch.no_grad(), second.route(["a"] * 4):
        assert_bits_equal(model.lm_head(hidden), expected)
    del second
    gc.collect()
    assert "forward" not in vars(model.lm_head)
    lo.adapt(model, None, ["lm_head"])


class Mixing(nn.Module):
    """Mixes the tokens of a row, so it cannot be given tokens one by one; may return two tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.two = nn.Parameter(torch.ones(64)), False

    def forward(self, x: torch.Tensor, *, mask: torch.Tensor | None = None) -> Any:
        y = self.weight * x.cumsum(1) * (1 if mask is None else mask[:, :, None])
        return (y, y) if self.two else y


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer, self.mix = nn.Linear(64, 64), Mixing()

    def forward(self, x: torch.Tensor, mask: torch.Tensor | None = None) -> Any:
        return self.mix(self.layer(x), mask=mask)


def test_a_users_own_module(tmp_path: Path) -> None:
    def make() -> Net:
        torch.manual_seed(0)
        return Net()

    trained = lo.adapt(make(), lo.LoRA(4), quantize=None)
    trained.mix.weight = nn.Parameter(torch.randn(64))
    lo.save_adapter(trained, tmp_path)
    model = lo.adapt(make(), None, quantize=None)
    pool = lo.AdapterPool(model, 1 << 20)
    pool.load("a", tmp_path)
    x, mask = torch.randn(3, 5, 64), torch.rand(3, 5)
    with torch.no_grad(), pool.route([None, "a", None]):
        y = model(x, mask)
        NEAR(y[1], trained(x, mask)[1])
        NEAR(y[::2], make()(x, mask)[::2])
        model.mix.two = True
        with pytest.raises(TypeError, match="Mixing of which adapters have their own must return a Tensor, got tuple"):
            model(x, mask)
    with (
        torch.no_grad(),
        pool.route_tokens([None, "a"], torch.arange(15) % 2),
        pytest.raises(ValueError, match=r"Mixing of which .* a row for each name, got \[3, 5, 64\] and names by token"),
    ):
        model(x, mask)


@pytest.mark.parametrize(
    "message, change",
    [
        (
            r"lm_head.weight in .* must be \[40, 32\] as in the model, got \[2, 2\]",
            {"lm_head.weight": torch.ones(2, 2)},
        ),
        ("values for 'head.weight', for which the model has no place", {"head.weight": torch.ones(2)}),
    ],
)
def test_values_that_do_not_fit_leave_the_pool_as_it_was(
    message: str, change: dict[str, torch.Tensor], heads: Path
) -> None:
    model = lo.adapt(tiny(), None)
    pool = lo.AdapterPool(model, 1 << 20)
    tensors = load_file(heads / "a" / "adapter_model.safetensors")
    config = json.loads((heads / "a" / "adapter_config.json").read_text())
    with pytest.raises(ValueError, match=message):
        pool.load("a", tensors | {f"base_model.model.{key}": value for key, value in change.items()}, config)
    assert not pool.names() and pool.stats()["used_bytes"] == 0 and "forward" not in vars(model.lm_head)
    pool.load("a", tensors, config)


@pytest.mark.filterwarnings("ignore")
@torch.no_grad()
def test_a_compiled_model(heads: Path) -> None:
    model, pool = pooled(tiny, heads)
    compiled = torch.compile(model, backend="eager")
    with pool.route(NAMES):
        expected = model(ROWS).logits
        NEAR(compiled(ROWS).logits, expected)
    NEAR(compiled(ROWS).logits, model(ROWS).logits)
