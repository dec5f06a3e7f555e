"""Several adapters on a row of a pool, each at a strength: against float64, alone, and through the server."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import assert_bits_equal, assert_within_baseline
from torch import Tensor, nn

import lowrank_ops as lo
from lowrank_ops.ops import _plan
from lowrank_ops.serving.mixtures import MOST

KINDS: dict[str, Any] = {
    "lora": lo.LoRA(4),
    "rslora": lo.LoRA(7, alpha=3, rslora=True),
    "svf": lo.SVF(rank=12),
    "svft": lo.SVFT(bandwidth=2, rank=9),
    "xs": lo.LoRAXS(6),
    "xs2": lo.LoRAXS(6),
}
N, K = 70, 96


def base() -> nn.Module:
    torch.manual_seed(0)
    return lo.adapt(nn.Sequential(nn.Linear(K, N)), None)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[nn.Module, lo.AdapterPool, dict[str, Tensor]]:
    """A model of one layer, a pool with an adapter of every kind, and what each adds to W in float64."""
    root = tmp_path_factory.mktemp("adapters")
    model = base()
    pool = lo.AdapterPool(model, 1 << 20, root=root)
    change = {}
    for name, kind in KINDS.items():
        tuned = base()
        tuned[0].set_adapter(kind)
        with torch.no_grad():
            for p in lo.adapter_parameters(tuned):
                p.copy_(torch.randn_like(p) / 4)
        change[name] = tuned[0].update.delta().double()
        lo.save_adapter(tuned, root / name)
        pool.load(name, root / name)
    return model, pool, change


def by_hand(layer: Any, x: Tensor, rows: list[Any], change: dict[str, Tensor], dtype: torch.dtype) -> Tensor:
    w, bias = layer.weight.dequantize(torch.float32).to(dtype), layer.bias.to(dtype)
    y = x.to(dtype) @ w.T + bias
    for i, row in enumerate(rows):
        for name, strength in ({row: 1.0} if isinstance(row, str) else row or {}).items():
            y[i] = y[i] + strength * (change[name].to(dtype) @ x[i].to(dtype))
    return y


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("form", ["few", "many"])
def test_one_to_four_of_every_kind(made: Any, form: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_plan, "FEW_TOKENS", dict.fromkeys(_plan.FEW_TOKENS, 10**9 if form == "few" else 0))
    M = 40
    model, pool, change = made
    names = itertools.cycle(itertools.permutations(KINDS, 4))
    strengths = itertools.cycle((0.7, 0.3, -0.5, 1.0, 2.0))
    rows: list[Any] = ["lora", None, {"xs": 0.5}, {"xs": 0.7, "xs2": 0.3}]
    rows += [dict(zip(next(names)[: 1 + i % 4], strengths, strict=False)) for i in range(M - len(rows))]
    x = torch.randn(M, K).to(dtype)
    with torch.no_grad(), pool.route(rows):
        y = model(x)
    exact, baseline = (by_hand(model[0], x, rows, change, to) for to in (torch.float64, dtype))
    assert_within_baseline(y, exact, baseline)
    with torch.no_grad():
        order = torch.randperm(M).tolist()
        with pool.route([rows[i] for i in order]):  # other neighbours, and mappings in another order
            assert_bits_equal(model(x[order]), y[order])
        for i, row in ((0, rows[0]), (2, rows[2]), (3, rows[3]), (7, rows[7])):
            with pool.route([dict(reversed(row.items())) if isinstance(row, dict) else row]):
                assert_bits_equal(model(x[i : i + 1])[0], y[i])
        with pool.route_tokens(rows, torch.arange(M).flip(0)):
            assert_bits_equal(model(x.flip(0)), y.flip(0))
        with pool.route([{"lora": 1}] * M):
            at_one = model(x)
        with pool.route(["lora"] * M):
            assert_bits_equal(model(x), at_one)


def test_factors_are_held_once(made: Any) -> None:
    _, pool, _ = made
    before = pool.stats()
    with pool.route([{"lora": 0.5, "svf": 0.5}, {"lora": 0.1, "svf": 0.2}, "svf"]):
        inside = pool.stats()
    assert inside["used_bytes"] == before["used_bytes"] and inside["in_use"] == 2


@pytest.mark.parametrize(
    "row, error, message",
    [
        ({}, ValueError, "names must have 1 to 8 adapters for a row, got 0"),
        ({str(i): 1 for i in range(MOST + 1)}, ValueError, "names must have 1 to 8 adapters for a row, got 9"),
        ({"lora": float("nan")}, ValueError, "names: the strength of 'lora' must be finite"),
        ({"lora": 1e300}, ValueError, "names: the strength of 'lora' must be finite in float32"),
        ({"lora": "1"}, TypeError, "names: the strength of 'lora' must be a number, got '1'"),
        ({"lora": True}, TypeError, "names: the strength of 'lora' must be a number, got True"),
        ({1: 1.0}, TypeError, "names must have a name, a mapping of names to strengths or None"),
        (["lora"], TypeError, "names must have a name, a mapping of names to strengths or None"),
        ({"lora": 1.0, "bob": 0.5}, KeyError, "not loaded: bob"),
    ],
)  # fmt: skip
def test_bad_rows_stop_before_anything_changes(made: Any, row: Any, error: type[Exception], message: str) -> None:
    _, pool, _ = made
    before = pool.stats()
    with pytest.raises(error, match=message), pool.route(["lora", row]):
        pass
    assert pool.stats() == before


def test_what_adapters_hold_of_their_own() -> None:
    """Biases, heads and a DoRA count by their strengths, and rows beside them keep their bits."""
    torch.manual_seed(1)
    model = lo.adapt(nn.ModuleDict({"body": nn.Linear(32, 32), "norm": nn.LayerNorm(32)}), None)

    def run(x: Tensor) -> Tensor:
        return model["norm"](model["body"](x))

    pool = lo.AdapterPool(model, 1 << 20)
    prefix, changed = "base_model.model.", {"lora_alpha": 4, "r": 4, "peft_type": "LORA", "target_modules": ["body"]}
    factors = {f"{prefix}body.lora_{n}.weight": torch.randn(s) / 4 for n, s in (("A", (4, 32)), ("B", (32, 4)))}
    pool.load("plain", factors, changed)
    dora = {f"{prefix}body.lora_magnitude_vector": torch.rand(32) + 0.5}
    pool.load("dora", factors | dora, changed | {"use_dora": True})
    norm = {f"{prefix}norm.weight": torch.rand(32), f"{prefix}norm.bias": torch.randn(32)}
    pool.load("norm", factors | norm, changed | {"modules_to_save": ["norm"]})
    x = torch.randn(6, 32)
    rows = [{"dora": 0.5, "plain": 0.25}, {"norm": 0.5}, "plain", "dora", None, {"plain": 0.5}]
    with torch.no_grad():

        def body(row: Any) -> Tensor:
            with pool.route([row] * len(x)):
                return model["body"](x)

        with pool.route(rows):
            y, z = model["body"](x), run(x)
        alone = {name: body(name) for name in ("plain", "dora", "norm", None)}
        change = {name: alone[name] - alone[None] for name in alone}
        torch.testing.assert_close(y[0], (alone[None] + 0.5 * change["dora"] + 0.25 * change["plain"])[0])
        torch.testing.assert_close(y[1], (alone[None] + 0.5 * change["norm"])[1])
        for i, name in ((2, "plain"), (3, "dora"), (4, None)):
            assert_bits_equal(y[i], alone[name][i])
        assert_bits_equal(y[5], body({"plain": 0.5})[5])
        h = nn.functional.layer_norm(y, (32,))
        plain = h * model["norm"].weight + model["norm"].bias
        own = h * norm[f"{prefix}norm.weight"] + norm[f"{prefix}norm.bias"]
        torch.testing.assert_close(z[1], (plain + 0.5 * (own - plain))[1])
        torch.testing.assert_close(z[[0, 2, 3, 4, 5]], plain[[0, 2, 3, 4, 5]])


# ---- the server ----


def test_the_server_takes_several_adapters(
    small_model: str,
    encoder_adapters: tuple[Path, list[str]],
    causal_model: str,
    causal_adapters: tuple[Path, list[str]],
) -> None:
    pytest.importorskip("httpx")
    server = pytest.importorskip("lowrank_ops.server")
    from starlette.testclient import TestClient

    @contextmanager
    def service(model: str, root: Path) -> Iterator[Any]:
        made = server.load(model, root, capacity_bytes=8 << 20)
        try:
            yield made
        finally:
            assert made.engine.close(60)

    def post(made: Any, path: str, body: Any) -> Any:
        return TestClient(server.create_app(made)).post(path, json=body)

    root, names = encoder_adapters
    several = [{"name": names[0], "strength": 0.7}, {"name": names[1], "strength": 0.3}]
    with service(small_model, root) as made:
        name = Path(small_model).name

        def embedding(**body: Any) -> Any:
            return post(made, "/v1/embeddings", {"model": name, "input": [5, 6, 7], **body})

        got = torch.tensor(embedding(adapters=several).json()["data"][0]["embedding"])
        pool = made.engine.pool
        with torch.inference_mode(), pool.route([{names[0]: 0.7, names[1]: 0.3}]):
            ids = torch.tensor([[5, 6, 7]])
            hidden = made.engine.model(input_ids=ids, attention_mask=torch.ones_like(ids)).last_hidden_state
            expected = made.engine.pooling(hidden, torch.ones_like(ids))[0]
        torch.testing.assert_close(got, expected.cpu().float())
        assert_bits_equal(
            torch.tensor(embedding(adapters=[{"name": names[0]}]).json()["data"][0]["embedding"]),
            torch.tensor(embedding(model=names[0]).json()["data"][0]["embedding"]),
        )
        for adapters, param, status, message in (
            ([], "adapters", 400, "at least 1"),
            ([{"name": n} for n in map(str, range(MOST + 1))], "adapters", 400, "at most 8"),
            ([*several, several[0]], "adapters", 400, "name each adapter once"),
            ([{"name": "bob"}], "adapters", 404, "the adapter 'bob' does not exist"),
            ([{"name": "../bob"}], "adapters", 400, "not a path"),
            ([{"name": names[0], "strength": "1"}], "adapters", 400, "valid number"),
            ([{"name": names[0], "strength": 1e300}], "adapters", 400, "less than or equal"),
            ([{"name": names[0], "weight": 1}], "adapters", 400, "not permitted"),
            ("a", "adapters", 400, "valid list"),
        ):
            answer = embedding(adapters=adapters)
            error = answer.json()["error"]
            assert (answer.status_code, error["param"]) == (status, param) and message in error["message"], error
        error = embedding(adapters=several, model=names[0]).json()["error"]
        assert error["param"] == "model" and "must be the base model" in error["message"]
    root, names = causal_adapters
    with service(causal_model, root) as made:
        name, ids = Path(causal_model).name, list(range(5, 45))

        def text(strength: float, ids: list[int] = ids) -> Any:
            adapters = [{"name": names[0], "strength": strength}, {"name": names[1], "strength": -0.5}]
            body = {
                "model": name,
                "prompt": ids,
                "adapters": adapters,
                "temperature": 0,
                "logprobs": 0,
                "max_tokens": 4,
            }
            return post(made, "/v1/completions", body).json()["choices"][0]["logprobs"]["token_logprobs"]

        first, other = text(0.7), text(-2.0)
        assert first != other
        # The same prompt from the kept keys and values of its own strengths.
        prefixes = made.engine._running.prefixes
        assert len(prefixes) == 2
        torch.testing.assert_close(torch.tensor(text(0.7)), torch.tensor(first), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(torch.tensor(text(-2.0)), torch.tensor(other), rtol=1e-4, atol=1e-5)
        body = {"model": name, "messages": [{"role": "user", "content": "a"}], "max_tokens": 2, "temperature": 0}
        bob = post(made, "/v1/chat/completions", body | {"adapters": [{"name": "bob"}]})
        assert bob.status_code == 404 and json.loads(bob.text)["error"]["param"] == "adapters"
