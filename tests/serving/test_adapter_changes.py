"""Adapters that clients load and unload over HTTP, in vLLM's format."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
from serving_helpers import alone, continued, replace, tokenizer_of

httpx = pytest.importorskip("httpx")
server = pytest.importorskip("lowrank_ops.server")


@pytest.fixture(scope="module")
def post(causal_model: str, causal_adapters: tuple[Path, list[str]], tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Post to a server with user-0 in its own directory, and good, other, bad and a link to the outside to load from."""
    root, names = causal_adapters
    own, source = tmp_path_factory.mktemp("own"), tmp_path_factory.mktemp("source")
    replace(own / "user-0", root / names[0])
    replace(source / "good", root / names[1])
    replace(source / "other", root / names[2])
    replace(source / "bad", root / names[3], cut=-50)
    (source / "out").symlink_to(root / names[1])
    made = server.load(causal_model, own, source=source, capacity_bytes=8 << 20)
    app = server.create_app(made)

    def send(path: str, **body: Any) -> Any:
        async def call() -> Any:
            transport = httpx.ASGITransport(app, raise_app_exceptions=False)
            async with httpx.AsyncClient(transport=transport, base_url="http://test", timeout=60) as client:
                return await client.post(path, json=body) if body else await client.get(path)

        return asyncio.run(call())

    send.source = source  # type: ignore[attr-defined]
    yield send
    assert made.engine.close(60)


def test_loading_and_unloading(post: Any, causal_model: str, causal_adapters: tuple[Path, list[str]]) -> None:
    root, names = causal_adapters
    tokenizer = tokenizer_of(causal_model)

    def completed(name: str) -> Any:
        answer = post("/v1/completions", model=name, prompt="a cat", max_tokens=8, temperature=0)
        return answer.json()["choices"][0]["text"] if answer.status_code == 200 else answer.status_code

    def expected(name: str) -> str:
        return tokenizer.decode(continued(alone(causal_model, root, name), tokenizer("a cat")["input_ids"], 8))

    assert completed("mine") == 404
    answer = post("/v1/load_lora_adapter", lora_name="mine", lora_path="good")
    assert answer.status_code == 200 and answer.text.startswith("Success: LoRA adapter 'mine' added")
    assert completed("mine") == expected(names[1])
    assert [model["id"] for model in post("/v1/models").json()["data"]][1:] == ["mine", "user-0"]
    other = str(post.source / "other")  # an absolute path
    assert post("/v1/load_lora_adapter", lora_name="mine", lora_path=other).status_code == 400
    assert post("/v1/load_lora_adapter", lora_name="mine", lora_path=other, load_inplace=True).status_code == 200
    assert completed("mine") == expected(names[2]) != expected(names[1])
    assert post("/v1/unload_lora_adapter", lora_name="mine").status_code == 200
    assert completed("mine") == 404 and completed("user-0") == expected(names[0])
    assert post("/v1/unload_lora_adapter", lora_name="mine").status_code == 404


@pytest.mark.parametrize(
    ("name", "path", "param"),
    [
        ("new", "nothing", "lora_path"),
        ("new", "../own/user-0", "lora_path"),
        ("new", "/etc", "lora_path"),
        ("new", "out", "lora_path"),
        ("new", "a\0", "lora_path"),
        ("new", "bad", "lora_path"),
        ("user-0", "good", "lora_name"),
        ("a/b", "good", "lora_name"),
        ("", "good", "lora_name"),
    ],
)
def test_refusals(name: str, path: str, param: str, post: Any) -> None:
    answer = post("/v1/load_lora_adapter", lora_name=name, lora_path=path)
    assert answer.status_code == 400 and answer.json()["error"]["param"] == param, answer.text
    assert str(post.source) not in answer.text
    assert post("/v1/unload_lora_adapter", lora_name="user-0").status_code == 404
    assert [model["id"] for model in post("/v1/models").json()["data"]][1:] == ["user-0"]


def test_only_behind_its_option(causal_model: str, causal_adapters: tuple[Path, list[str]]) -> None:
    from types import SimpleNamespace

    from lowrank_ops.serving.endpoints import make_router

    paths = [route.path for route in make_router(SimpleNamespace(engine=SimpleNamespace(source=None))).routes]  # type: ignore[arg-type]
    assert "/v1/models" in paths and "/v1/load_lora_adapter" not in paths
