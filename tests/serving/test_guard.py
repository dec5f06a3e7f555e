"""What the server refuses and bounds: keys, hosts, origins, TLS, what a client may hold, slow and absent clients, health."""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from serving_helpers import Held, tokenizer_of, wait_for

from lowrank_ops.commands import serve

httpx = pytest.importorskip("httpx")
gate = pytest.importorskip("lowrank_ops.serving.gate")
parse = pytest.importorskip("lowrank_ops.serving.parse")
process = pytest.importorskip("lowrank_ops.serving.process")
from lowrank_ops.serving.http import create_app  # noqa: E402
from lowrank_ops.serving.load import ServeError, load  # noqa: E402
from lowrank_ops.serving.protocol import Limits, RequestError  # noqa: E402
from lowrank_ops.serving.texts import make_bound  # noqa: E402

Access = gate.Access


@pytest.fixture(scope="module")
def encoder(small_model: str) -> Iterator[Any]:
    made = load(small_model, None, capacity_bytes=1 << 20, name="base")
    yield made
    assert made.engine.close(60)


@pytest.fixture
def limited(encoder: Any) -> Iterator[Any]:
    """Sets limits of the shared service for one test."""
    before = encoder.limits
    yield lambda **limits: setattr(encoder, "limits", replace(before, **limits))
    encoder.limits = before


def ask(made: Any, *requests: tuple[str, str, dict[str, Any]], access: Any = None) -> list[Any]:
    """The answers to requests (method, path, options), one after the other, of the application in this process."""

    async def send() -> list[Any]:
        transport = httpx.ASGITransport(create_app(made, access=access), raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost", timeout=60) as c:
            return [await c.request(method, path, **options) for method, path, options in requests]

    return asyncio.run(send())


def embedding(given: Any = "a text", **options: Any) -> tuple[str, str, dict[str, Any]]:
    return "POST", "/v1/embeddings", {"json": {"model": "base", "input": given}, **options}


def assert_error(answer: Any, status: int, code: str | None = None) -> None:
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"} and error["code"] == code, error


# ---- who may ask ----


def test_keys(encoder: Any) -> None:
    access = Access(keys=("first-key", "second-key"), origins=("https://page.example",))

    def bearer(key: str) -> dict[str, Any]:
        return {"headers": {"Authorization": key.encode("latin-1"), "Origin": b"https://page.example"}}

    wrong = [
        "",
        "Bearer",
        "Bearer ",
        "Bearer first",
        "Bearer first-key1",
        "Basic first-key",
        "first-key",
        "Bearer \xe9",
    ]
    for answer in ask(encoder, *(embedding(**bearer(key)) for key in wrong), access=access):
        assert_error(answer, 401, "invalid_api_key")
        assert answer.headers["www-authenticate"] == "Bearer"
        assert answer.headers["access-control-allow-origin"] == "https://page.example"
    paths = ["/metrics", "/docs", "/redoc", "/openapi.json", "/v1/models", "/nowhere", "/health/", "//health"]
    assert {a.status_code for a in ask(encoder, *(("GET", path, {}) for path in paths), access=access)} == {401}
    right = [embedding(**bearer(key)) for key in ("Bearer first-key", "bearer second-key", "Bearer  second-key")]
    shown = ("GET", "/metrics", bearer("Bearer first-key"))
    assert {a.status_code for a in ask(encoder, *right, shown, ("GET", "/health", {}), access=access)} == {200}


def test_pages_of_other_origins(encoder: Any) -> None:
    access = Access(keys=("key",), origins=("https://page.example",))

    def preflight(origin: str) -> tuple[str, str, dict[str, Any]]:
        headers = {"Origin": origin, "Access-Control-Request-Method": "POST"}
        headers["Access-Control-Request-Headers"] = "authorization, content-type"
        return "OPTIONS", "/v1/embeddings", {"headers": headers}

    mine, other = ask(encoder, preflight("https://page.example"), preflight("https://other.example"), access=access)
    assert mine.status_code == 200 and mine.headers["access-control-allow-origin"] == "https://page.example"
    assert other.status_code == 400 and "access-control-allow-origin" not in other.headers
    (none,) = ask(encoder, ("GET", "/v1/models", {"headers": {"Origin": "https://page.example"}}))
    assert none.status_code == 200 and "access-control-allow-origin" not in none.headers


@pytest.mark.parametrize(
    ("host", "status"),
    [("localhost:80", 200), ("a.example.com", 200), ("LOCALHOST", 200), ("example.com.evil", 400), ("evil", 400), ("", 400)],
)  # fmt: skip
def test_host_header(encoder: Any, host: str, status: int) -> None:
    access = Access(hosts=("localhost", "*.example.com"))
    (answer,) = ask(encoder, ("GET", "/v1/models", {"headers": {"Host": host}}), access=access)
    assert answer.status_code == status
    if status == 400:
        assert_error(answer, 400)
    (probe,) = ask(encoder, ("GET", "/health", {"headers": {"Host": host}}), access=access)
    assert probe.status_code == 200


def test_keys_of_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parser = argparse.ArgumentParser()
    serve.add_arguments(parser)
    file = tmp_path / "keys"
    file.write_text("c\nd\n\n")
    monkeypatch.setenv(serve.KEYS, "b")
    arguments = parser.parse_args(["model", "--api-key", "a", "--api-key", "e", "--api-key-file", str(file)])
    assert sorted(serve._keys(arguments)) == list("abcde")
    file.write_text("\n")
    with pytest.raises(ValueError, match="holds no key"):
        serve._keys(arguments)
    for wrong in ("", "a key", "\xe9", "a\n"):
        with pytest.raises(ValueError, match="printable ASCII"):
            Access(keys=(wrong,))
    for wrong in ("a.*.com", "http://example.com", "example.com:8000", "example.com/", "\xe9.com", "", "*."):
        with pytest.raises(ValueError, match="allowed host"):
            Access(hosts=(wrong,))
    Access(hosts=("*", "*.example.com", "a_b", "::1", "[::1]", "127.0.0.1"))
    assert serve.run(parser.parse_args(["model", "--api-key-file", str(tmp_path / "none")])) == 2


# ---- what a request costs before it is refused ----


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"input": [1] * 100_000 + ["x"]}, "input: must be a text"),
        ({"input": [[1]] * 100_000 + [["x"]]}, "input: must be a text"),
        ({"input": {str(n): 1 for n in range(60_000)}}, "input: must be a text"),
        ({"input": "a", **{str(n): 1 for n in range(60_000)}}, "more than 16384 keys"),
        ({"input": "a", "user": [1] * 60_000}, "more than 16384 keys"),
        ({"input": "a", "user": [[{"a": [1] * 10_000}] * 2] * 2}, "more than 16384 keys"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_wrong_bodies_have_few_errors(encoder: Any, body: Any, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from fastapi.exceptions import RequestValidationError

    counts = [0]
    before = RequestValidationError.__init__

    def noted(self: Any, errors: Any, **options: Any) -> None:
        counts.append(len(errors))
        before(self, errors, **options)

    monkeypatch.setattr(RequestValidationError, "__init__", noted)
    (answer,) = ask(encoder, ("POST", "/v1/embeddings", {"json": {"model": "base", **body}}))
    assert_error(answer, 400)
    assert message in answer.json()["error"]["message"] and max(counts) <= 1


def test_parts_of_a_body_are_counted() -> None:
    assert parse.parse(b'{"input": [[1, 2], [3]], "user": "me"}') == {"input": [[1, 2], [3]], "user": "me"}
    many = json.dumps({"prompt": [1] * 50_000, "stop": ["a"] * (parse.PARTS - 2)}).encode()
    assert len(parse.parse(many)["prompt"]) == 50_000
    for wrong in (b"[" * 5000, b'{"a":' * 5000, b"\xff", b'{"a": "\\ud800"}', b"1 2", many[:-1] + b', "a": 1}'):
        with pytest.raises(ValueError, match=r"not valid JSON|more than"):
            parse.parse(wrong)


def byte_tokenizer(normalizer: Any = None, added: str | None = None) -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {letter: n for n, letter in enumerate([*letters, "ab", "abab"])}
    made = Tokenizer(models.BPE(vocab=vocabulary, merges=[("a", "b"), ("ab", "ab")]))
    made.pre_tokenizer, made.normalizer = pre_tokenizers.ByteLevel(add_prefix_space=False), normalizer
    if added:
        made.add_tokens([added])
    return PreTrainedTokenizerFast(tokenizer_object=made)


def test_a_text_that_fits_is_never_refused(small_model: str) -> None:
    from tokenizers import normalizers

    bert = tokenizer_of(small_model)
    tokenizers = [bert, byte_tokenizer(), byte_tokenizer(normalizers.NFC()), byte_tokenizer(added="<a long token>")]
    pieces = ["abab", " ", "\t\n", "[MASK]", "[SEP]", "<a long token>", ".", "\u1f82", "\u03b1\u0313\u0300\u0345",
              "\u1112\u1161\u11ab", "\u4e2d", "a" * 120, "\x00", "\u0301", "x\u0301y", "\U0001f600", "don't", "\xa0",
              "\xad"]  # fmt: skip
    chance = random.Random(0)
    for tokenizer in tokenizers:
        has_more = make_bound(tokenizer)
        for _ in range(300):
            some = chance.sample(pieces, chance.randint(1, 4))
            text = "".join(chance.choices(some, k=chance.randint(1, 60)))
            count = len(tokenizer(text)["input_ids"])
            assert not has_more(text, count), (tokenizer, text)
        assert has_more("ab, " * 5000, 512) and not has_more(" " * 100_000, 512)


def test_what_drops_characters_has_no_bound() -> None:
    from tokenizers import Regex, Tokenizer, models, normalizers
    from transformers import PreTrainedTokenizerFast

    unknown = Tokenizer(models.WordLevel({"<unk>": 0}, unk_token="<unk>"))
    dropping = [normalizers.StripAccents(), normalizers.Replace(Regex("a+"), "b"), normalizers.Replace("a", "")]
    for made in (PreTrainedTokenizerFast(tokenizer_object=unknown), *map(byte_tokenizer, dropping)):
        assert not make_bound(made)("a" * 100_000, 1)
    assert not make_bound(SimpleNamespace())("a" * 100_000, 1)


def test_long_texts_are_refused_without_tokenising(encoder: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encoder, "tokenize", lambda texts: pytest.fail("it tokenised"))
    for answer in ask(encoder, embedding("ab " * 20_000), embedding(["hi", "ab " * 20_000])):
        assert_error(answer, 400, "context_length_exceeded")


def test_long_work_is_done_in_turns() -> None:
    """One piece of a client at a time; its second piece comes after another client's first; short work does not wait."""
    order: list[str] = []
    go = threading.Event()

    def work(name: str) -> str:
        go.wait(30)
        order.append(name)
        return name

    async def run() -> None:
        made = SimpleNamespace(limits=Limits())
        door = gate.Gate(None, made, Access(), set())
        clients = {name: gate.Client(name) for name in "ab"}

        async def one(client: str, name: str) -> str:
            gate._REQUEST.set(gate._Request(door, clients[client]))
            return await gate.in_turn(gate.LONG, work, name)

        tasks = [asyncio.create_task(one(name[0], name)) for name in ("a1", "a2", "a3", "b1")]
        await asyncio.sleep(0.05)
        tasks[1].cancel()
        gate._REQUEST.set(gate._Request(door, clients["a"]))
        assert await gate.in_turn(5, lambda: "short") == "short"
        go.set()
        assert await asyncio.gather(tasks[0], tasks[2], tasks[3]) == ["a1", "a3", "b1"]
        door.long.shutdown()

    asyncio.run(run())
    assert order == ["a1", "b1", "a3"]


# ---- what a client may hold ----


def test_rows_of_a_client(encoder: Any, limited: Any) -> None:
    limited(client_rows=8)
    held = Held(encoder.engine)

    async def run() -> None:
        access = Access(keys=("a", "b"))
        transport = httpx.ASGITransport(create_app(encoder, access=access), raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost", timeout=60) as c:

            def send(key: str, rows: int) -> Any:
                body = {"model": "base", "input": ["x"] * rows}
                return c.post("/v1/embeddings", json=body, headers={"Authorization": f"Bearer {key}"})

            running = asyncio.create_task(send("a", 6))
            await asyncio.to_thread(held.entered.wait, 30)
            refused = await send("a", 3)
            assert_error(refused, 429, "too_many_inputs")
            assert refused.headers["retry-after"] == "1"
            others = [asyncio.create_task(send("a", 2)), asyncio.create_task(send("b", 8))]
            while encoder.engine.queued < 10:
                await asyncio.sleep(0.01)
            held.go.set()
            assert [(await task).status_code for task in (running, *others)] == [200] * 3
            assert (await send("a", 8)).status_code == 200

    try:
        asyncio.run(run())
    finally:
        held.release()


def test_bytes_of_bodies_together(encoder: Any, limited: Any) -> None:
    limited(max_body_bytes=1000, client_body_bytes=1500, bodies_bytes=2000)

    async def run() -> list[int]:
        async def app(scope: Any, receive: Any, send: Any) -> None:
            pytest.fail("no body is whole")

        door = gate.Gate(app, encoder, Access(keys=("a", "b", "c")), set())
        statuses: dict[str, int] = {}

        async def one(name: str, size: int) -> None:
            """A body that stops after some bytes, until the client leaves."""
            messages: asyncio.Queue[Any] = asyncio.Queue()
            messages.put_nowait({"type": "http.request", "body": b"x" * size, "more_body": True})
            held.append(messages)

            async def send(message: Any) -> None:
                if message["type"] == "http.response.start":
                    statuses[name] = message["status"]

            headers = [(b"authorization", b"Bearer " + name[0].encode())]
            await door(
                {"type": "http", "method": "POST", "path": "/v1/embeddings", "headers": headers}, messages.get, send
            )

        held: list[asyncio.Queue[Any]] = []
        tasks = []
        for name, size in (("a1", 900), ("a2", 600), ("a3", 1), ("b1", 500), ("c1", 1), ("c2", 1001)):
            tasks.append(asyncio.create_task(one(name, size)))
            await asyncio.sleep(0)
            await asyncio.sleep(0)
        await asyncio.sleep(0.05)
        assert statuses == {"a3": 429, "c1": 429, "c2": 413}
        for messages in held:
            messages.put_nowait({"type": "http.disconnect"})
        await asyncio.gather(*tasks)
        assert not door.clients and not door.bytes
        return list(statuses.values())

    asyncio.run(run())


def test_limits_that_contradict_each_other(small_model: str) -> None:
    for limits, message in (
        (Limits(client_rows=1), "max_inputs must be at most client_rows"),
        (Limits(client_body_bytes=5), "max_body_bytes must be at most client_body_bytes"),
        (Limits(read_seconds=0), "read_seconds must be a number above 0"),
        (Limits(request_seconds=float("nan")), "request_seconds must be"),
        (Limits(bodies_bytes=-1), "bodies_bytes must be at least"),
    ):
        with pytest.raises(ServeError, match=message):
            load(small_model, None, limits=limits)


def test_an_answer_that_takes_too_long(encoder: Any, limited: Any) -> None:
    limited(request_seconds=0.2)
    held = Held(encoder.engine)
    try:
        (answer,) = ask(encoder, embedding())
        assert_error(answer, 504, "timeout")
    finally:
        held.release()
    wait_for(lambda: not encoder.engine.queued)


# ---- health ----


def test_health_fails_while_all_forwards_fail(encoder: Any) -> None:
    broken = [True]

    def fail(*_: Any) -> None:
        if broken[0]:
            raise RuntimeError("device-side assert")

    handle = encoder.engine.model.register_forward_pre_hook(fail)
    health = ("GET", "/health", {})
    try:
        assert [a.status_code for a in ask(encoder, embedding(), embedding(), health, health)] == [500, 500, 503, 503]
        broken[0] = False
        assert [a.status_code for a in ask(encoder, health, embedding(), health)] == [200] * 3
    finally:
        handle.remove()


def test_one_bad_request_does_not_change_health(encoder: Any) -> None:
    def fail(module: Any, arguments: Any, named: dict[str, Any]) -> None:
        if named["input_ids"].shape[1] > 5:
            raise RuntimeError("only this one")

    handle = encoder.engine.model.register_forward_pre_hook(fail, with_kwargs=True)
    try:
        bad = embedding("a b c d e f g h")
        assert [a.status_code for a in ask(encoder, bad, bad, bad, ("GET", "/health", {}))] == [500, 500, 500, 200]
    finally:
        handle.remove()


@pytest.mark.parametrize(
    ("address", "name"),
    [("10.0.0.1", "10.0.0.1"), ("::ffff:10.0.0.1", "10.0.0.1"), ("2001:db8::1:2", "2001:db8::/64"), (None, ""), ("x", "x")],
)  # fmt: skip
def test_names_of_clients(address: str | None, name: str) -> None:
    assert gate.client_name(address) == name


def test_a_refusal_says_when_to_come_back() -> None:
    headers = {status: RequestError(status, "no").response().headers for status in (401, 408, 429, 503)}
    assert headers[401]["www-authenticate"] == "Bearer" and headers[408]["connection"] == "close"
    assert headers[429]["retry-after"] == headers[503]["retry-after"] == "1"
