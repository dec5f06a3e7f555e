"""The server as OpenAI's own client sees it: every feature against what the model itself says."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from serving_helpers import alone, continued, tokenizer_of

httpx = pytest.importorskip("httpx")
openai = pytest.importorskip("openai")
server = pytest.importorskip("lowrank_ops.server")
byte_letters = pytest.importorskip("lowrank_ops.serving.answers").byte_letters
tools = pytest.importorskip("lowrank_ops.serving.tools")
Calls, format_of = tools.Calls, tools.format_of

TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'tool' and not m.tool_call_id %}{{ raise_exception('a call is missing') }}"
    "{% endif %}<{{ m.role[0] }}>{{ m.content }}{% for c in m.tool_calls or [] %}{{ c.function.arguments.q }}{% endfor %}"
    "{% endfor %}{% for t in tools or [] %}[{{ t.function.name }}]{% endfor %}{% if add_generation_prompt %}<a>{% endif %}"
)
ASKED = [{"role": "system", "content": "be"}, {"role": "user", "content": [{"type": "text", "text": "a cat"}]}]
SHOWN = "<s>be<u>a cat<a>"


class Sdk:
    """OpenAI's client over a service, for calls of its methods by name: ``sdk("chat.completions.create", ...)``."""

    def __init__(self, made: Any) -> None:
        self.service = made
        self.app = server.create_app(made)

    def __call__(self, method: str, **options: Any) -> Any:
        async def call() -> Any:
            transport = httpx.ASGITransport(self.app, raise_app_exceptions=False)
            async with openai.AsyncOpenAI(
                api_key="none",
                base_url="http://test/v1",
                http_client=httpx.AsyncClient(transport=transport),
                max_retries=0,
            ) as made:
                found: Any = made
                for part in method.split("."):
                    found = getattr(found, part)
                answer = await found(**options)
                return [piece async for piece in answer] if options.get("stream") else answer

        return asyncio.run(call())

    def text(self, **options: Any) -> Any:
        return self("completions.create", **{"model": "user-0", "temperature": 0, "max_tokens": 12} | options)

    def chat(self, **options: Any) -> Any:
        asked = {"model": "user-0", "temperature": 0, "max_completion_tokens": 12, "messages": ASKED}
        return self("chat.completions.create", **asked | options)

    def post(self, path: str, body: Any) -> Any:
        async def call() -> Any:
            transport = httpx.ASGITransport(self.app, raise_app_exceptions=False)
            async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
                return await client.post(path, json=body)

        return asyncio.run(call())


@pytest.fixture(scope="module")
def sdk(
    causal_model: str, causal_adapters: tuple[Path, list[str]], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Sdk]:
    template = tmp_path_factory.mktemp("template") / "chat.jinja"
    template.write_text(TEMPLATE)
    made = server.load(causal_model, causal_adapters[0], chat_template=template, capacity_bytes=8 << 20)
    yield Sdk(made)
    assert made.engine.close(60)


@pytest.fixture(scope="module")
def own(causal_model: str, causal_adapters: tuple[Path, list[str]]) -> Any:
    """The model with the adapter user-0 by itself."""
    return alone(causal_model, causal_adapters[0], "user-0")


@pytest.fixture(scope="module")
def expected(causal_model: str, own: Any) -> Any:
    """Text -> the text with which the model itself goes on, and its tokens."""
    tokenizer = tokenizer_of(causal_model)

    def make(text: str, count: int = 12) -> tuple[str, list[int]]:
        drawn = continued(own, tokenizer(text)["input_ids"], count)
        return tokenizer.decode(drawn), drawn

    return make


def logits_of(own: Any, ids: list[int]) -> torch.Tensor:
    with torch.no_grad():
        return own(torch.tensor([ids])).logits[0].float()


def test_chat(sdk: Sdk, expected: Any) -> None:
    text, drawn = expected(SHOWN)
    answer = sdk.chat()
    choice = answer.choices[0]
    assert (choice.message.role, choice.message.content, choice.finish_reason) == ("assistant", text, "length")
    assert answer.object == "chat.completion" and answer.id.startswith("chatcmpl-") and answer.model == "user-0"
    assert answer.usage.prompt_tokens == len(SHOWN) and answer.usage.completion_tokens == len(drawn) == 12
    assert sdk.chat(max_completion_tokens=None, max_tokens=12).choices == answer.choices
    # What the client makes of an answer can be sent back as it is.
    more = [*ASKED, choice.message.model_dump(), {"role": "user", "content": "?"}]
    assert sdk.chat(messages=more).choices[0].message.content == expected(f"<s>be<u>a cat<a>{text}<u>?<a>")[0]
    developer = [{"role": "developer", "content": "be"}, ASKED[1]]
    assert sdk.chat(messages=developer).choices == answer.choices
    # Without a limit the answer ends with the model's context of 96 tokens.
    assert sdk.chat(max_completion_tokens=None).usage.total_tokens <= 96


def test_chat_streams(sdk: Sdk, expected: Any) -> None:
    *pieces, last = sdk.chat(stream=True, n=2, stream_options={"include_usage": True})
    assert last.choices == [] and last.usage.completion_tokens == 24 and last.usage.prompt_tokens == len(SHOWN)
    for index in range(2):
        mine = [piece.choices[0] for piece in pieces if piece.choices[0].index == index]
        assert mine[0].delta.role == "assistant" and mine[0].delta.content == ""
        assert "".join(choice.delta.content or "" for choice in mine) == expected(SHOWN)[0]
        assert [choice.finish_reason for choice in mine] == [None] * (len(mine) - 1) + ["length"]
    assert {piece.object for piece in pieces} == {"chat.completion.chunk"} and all(p.usage is None for p in pieces)


def test_tools(sdk: Sdk, expected: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    tools = [{"type": "function", "function": {"name": "look", "parameters": {"type": "object"}}}]
    call = {"id": "1", "type": "function", "function": {"name": "look", "arguments": '{"q": "up"}'}}
    talk = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "1", "content": "b"},
    ]
    answer = sdk.chat(messages=talk, tools=tools).choices[0].message.content
    assert answer == expected("<u>a<a>up<t>b[look]<a>")[0]
    assert (
        sdk.chat(messages=talk, tools=tools, tool_choice="none").choices[0].message.content
        == (expected("<u>a<a>up<t>b<a>")[0])
    )
    del talk[2]["tool_call_id"]
    refused(sdk.chat, "messages", "a call is missing", messages=talk)
    refused(sdk.chat, "tool_choice", "is not known", tools=tools, tool_choice="required")
    refused(sdk.chat, "tools", "function", tools=[{"type": "web_search"}])
    monkeypatch.setattr(sdk.service.tokenizer, "chat_template", "{{ messages[0].content }}")
    refused(sdk.chat, "tools", "takes none", tools=tools)
    monkeypatch.setattr(sdk.service.tokenizer, "chat_template", None)
    refused(sdk.chat, "model", "no chat template")


HERMES = "{% for m in messages %}<{{ m.role[0] }}>{{ m.content }}{% endfor %}{# <tool_call> {{ tools }} #}<a>"
LLAMA = HERMES.replace("<tool_call>", "<|python_tag|>")
TOOLS: Any = [
    {"type": "function", "function": {"name": "look", "parameters": {"type": "object", "additionalProperties": False}}},
    {
        "type": "function",
        "function": {
            "name": "put",
            "parameters": {
                "type": "object",
                "properties": {"b": {"enum": [7]}},
                "required": ["b"],
                "additionalProperties": False,
            },
        },
    },  # fmt: skip  # noqa: E501
]


@pytest.mark.parametrize("template", [HERMES, LLAMA], ids=["hermes", "llama"])
def test_forced_calls_of_tools(sdk: Sdk, monkeypatch: pytest.MonkeyPatch, template: str) -> None:
    pytest.importorskip("llguidance")
    monkeypatch.setattr(sdk.service.tokenizer, "chat_template", template)
    asked = {"messages": [{"role": "user", "content": "a"}], "tools": TOOLS, "max_completion_tokens": 80}
    named = {"type": "function", "function": {"name": "put"}}
    (choice,) = sdk.chat(tool_choice=named, **asked).choices
    assert (choice.finish_reason, choice.message.content) == ("tool_calls", None)
    (call,) = choice.message.tool_calls
    assert (call.type, call.function.name, json.loads(call.function.arguments)) == ("function", "put", {"b": 7})
    for choice in sdk.chat(tool_choice="required", temperature=2, seed=1, n=2, **asked).choices:
        (call,) = choice.message.tool_calls
        assert json.loads(call.function.arguments) == {"look": {}, "put": {"b": 7}}[call.function.name]
    pieces = [piece.choices[0] for piece in sdk.chat(tool_choice=named, stream=True, **asked)]
    (told,) = [call for piece in pieces for call in piece.delta.tool_calls or []]
    assert (told.index, told.function.name, json.loads(told.function.arguments)) == (0, "put", {"b": 7})
    assert told.id.startswith("call_") and not "".join(piece.delta.content or "" for piece in pieces)
    assert [piece.finish_reason for piece in pieces] == [None] * (len(pieces) - 1) + ["tool_calls"]
    # What the client makes of the answer can be sent back.
    talk = [*asked["messages"], choice.message.model_dump(), {"role": "tool", "tool_call_id": call.id, "content": "b"}]
    assert sdk.chat(messages=talk, tools=TOOLS, tool_choice="none").choices[0].message.content
    wanted = {"type": "json_object"}
    refused(sdk.chat, "tool_choice", "both", tool_choice="required", response_format=wanted, **asked)
    nobody = {"type": "function", "function": {"name": "nobody"}}
    refused(sdk.chat, "tool_choice", "no such tool", tool_choice=nobody, **asked)


def test_calls_of_tools_in_free_text() -> None:
    def read(template: str, text: str, size: int) -> tuple[str, list[tuple[str, str]]]:
        format = format_of(template)
        assert format is not None
        calls, told, made = Calls(format, ["look"]), "", []
        for at in range(0, len(text) + 1, size):
            plain, found = calls.add(text[at : at + size], last=at + size > len(text))
            told, made = told + plain, made + found
        return told, [(call.name, call.arguments) for call in made]

    one, look = '{"name": "look", "arguments": {"q": "\u00fc"}}', ("look", '{"q": "\u00fc"}')
    tagged = f"<tool_call>\n{one}\n</tool_call>"
    other = tagged.replace("look", "nobody")
    cases = [
        (HERMES, f"so: \n{tagged}\n{tagged}", "so:", [look] * 2),
        (HERMES, tagged + " and", "and", [look]),
        (HERMES, f"a < b {other} <tool", f"a < b {other} <tool", []),
        (HERMES, "<tool_call>\n{]</tool_call>", "<tool_call>\n{]</tool_call>", []),
        (HERMES, f"<tool_call>{one}", "", [look]),  # the mark of the end may be the end of the answer
        (LLAMA, one.replace("arguments", "parameters"), "", [look]),
        (LLAMA, f"{one}; {one}", "", [look] * 2),
        (LLAMA, '{"name": "nobody"}', '{"name": "nobody"}', []),
        (LLAMA, "no {calls}", "no {calls}", []),
        ("[TOOL_CALLS]", f"[{one}, {one}]", "", [look] * 2),
    ]
    for template, text, plain, made in cases:
        assert all(read(template, text, size) == (plain, made) for size in (1, 3, 7, 1000)), text
    assert format_of("<tool_call><function=") is None and format_of("plain") is None


def test_n_and_echo_and_stop(sdk: Sdk, expected: Any) -> None:
    prompts = ["a cat", "the sea"]
    texts = [expected(prompt)[0] for prompt in prompts for _ in range(2)]
    answer = sdk.text(prompt=prompts, n=2, best_of=2)
    assert [(choice.index, choice.text) for choice in answer.choices] == list(enumerate(texts))
    assert answer.usage.prompt_tokens == sum(map(len, prompts)) and answer.usage.completion_tokens == 48
    assert [choice.text for choice in sdk.text(prompt=prompts, echo=True).choices] == [
        prompt + text for prompt, text in zip(prompts, texts[::2], strict=True)
    ]
    ids = tokens("a cat", sdk)
    assert sdk.text(prompt=[ids], echo=True).choices[0].text == "a cat" + texts[0]
    streamed = sdk.text(prompt="a cat", echo=True, stream=True)
    assert "".join(piece.choices[0].text for piece in streamed) == "a cat" + texts[0]
    stop = texts[0][6:8]
    for asked in (stop, ["@" * 4096, stop]):
        choice = sdk.text(prompt="a cat", stop=asked).choices[0]
        assert (choice.text, choice.finish_reason) == (texts[0][: texts[0].index(stop)], "stop")
    assert sdk.chat(stop=expected(SHOWN)[0][3:5]).choices[0].finish_reason == "stop"


def test_seeds(sdk: Sdk) -> None:
    def texts(**options: Any) -> list[str]:
        return [choice.text for choice in sdk.text(prompt="a cat", temperature=1.5, n=3, **options).choices]

    first = texts(seed=5)
    assert len(set(first)) == 3 and first == texts(seed=5) != texts(seed=-6)
    assert texts(seed=6)[:2] == first[1:]


def test_logprobs(sdk: Sdk, own: Any, expected: Any) -> None:
    """They are of the model's own distribution, whatever the temperature, and one for each drawn token."""
    ids, drawn = tokens("a cat", sdk), expected("a cat")[1]
    got = sdk.text(prompt="a cat", logprobs=3).choices[0].logprobs
    own_values = logits_of(own, ids + drawn)[len(ids) - 1 : -1].log_softmax(-1)
    assert torch.allclose(torch.tensor(got.token_logprobs), own_values.amax(1), atol=2e-3)
    for values, top in zip(own_values, got.top_logprobs, strict=True):
        best = values.topk(3).values  # parts of characters may share a name
        assert len(top) < 3 or torch.allclose(torch.tensor(sorted(top.values(), reverse=True)), best, atol=2e-3)
    assert got.text_offset == [len("".join(got.tokens[:i])) for i in range(12)]

    ids, letters = tokens(SHOWN, sdk), {byte: letter for letter, byte in byte_letters().items()}
    for options in ({}, {"temperature": 1.5, "seed": 1, "frequency_penalty": 2}):
        whole = sdk.chat(logprobs=True, top_logprobs=2, **options)
        entries = whole.choices[0].logprobs.content
        written = bytes(byte for entry in entries for byte in entry.bytes)
        assert len(entries) == 12 and written.decode(errors="replace") == whole.choices[0].message.content
        drawn = sdk.service.tokenizer.convert_tokens_to_ids([letters[byte] for byte in written])
        own_values = logits_of(own, ids + drawn)[len(ids) - 1 : -1].log_softmax(-1)
        for values, token, entry in zip(own_values, drawn, entries, strict=True):
            top = [other.logprob for other in entry.top_logprobs]
            assert torch.allclose(
                torch.tensor([entry.logprob, *top]), torch.stack([values[token], *values.topk(2).values]), atol=2e-3
            )
    entries = sdk.chat(logprobs=True, top_logprobs=2).choices[0].logprobs.content
    pieces = sdk.chat(logprobs=True, top_logprobs=2, stream=True)
    streamed = [e for piece in pieces if piece.choices[0].logprobs for e in piece.choices[0].logprobs.content]
    assert [(e.token, e.bytes) for e in streamed] == [(e.token, e.bytes) for e in entries]
    assert sdk.chat(logprobs=True).choices[0].logprobs.content[0].top_logprobs == []
    assert sdk.chat().choices[0].logprobs is None


def test_logprobs_of_the_prompt(sdk: Sdk, own: Any, expected: Any) -> None:
    """With echo they come first, the same for a prompt that is read in parts, next to others, or was read before."""
    sdk.text(prompt="the grey sea at dawn")  # what it leaves must not shorten the prompt below
    prompts = ["the grey sea at dawn, and one", "a", "the cat \u2013 and"]
    running = sdk.service.engine._running
    before, running.chunk = running.chunk, 9
    try:
        answer = sdk.text(prompt=prompts, echo=True, logprobs=2, n=2)
    finally:
        running.chunk = before
    for choice in answer.choices:
        prompt = prompts[choice.index // 2]
        text, drawn = expected(prompt)
        ids, got = tokens(prompt, sdk), choice.logprobs
        assert choice.text == prompt + text
        assert len(got.tokens) == len(ids + drawn) and (got.token_logprobs[0], got.top_logprobs[0]) == (None, None)
        values = logits_of(own, ids + drawn)[:-1].log_softmax(-1)
        told = torch.tensor(got.token_logprobs[1:])
        assert torch.allclose(told, values.gather(1, torch.tensor((ids + drawn)[1:])[:, None])[:, 0], atol=2e-3)
        for best, top in zip(values.topk(2).values, got.top_logprobs[1:], strict=True):
            assert len(top) < 2 or torch.allclose(torch.tensor(sorted(top.values(), reverse=True)), best, atol=2e-3)
        assert got.text_offset == [len("".join(got.tokens[:i])) for i in range(len(got.tokens))]
    # Without any tokens to draw the prompt's are all.
    only = sdk.text(prompt=prompts, echo=True, logprobs=2, max_tokens=0)
    assert only.usage.completion_tokens == 0 and [choice.finish_reason for choice in only.choices] == ["length"] * 3
    for choice, both in zip(only.choices, answer.choices[::2], strict=True):
        count = len(tokens(prompts[choice.index], sdk))
        assert choice.text == prompts[choice.index] and choice.logprobs.tokens == both.logprobs.tokens[:count]
        told, more = choice.logprobs.token_logprobs[1:], both.logprobs.token_logprobs[1:count]
        assert torch.allclose(torch.tensor(told), torch.tensor(more), atol=1e-4)
    assert sdk.text(prompt="a cat", echo=True, max_tokens=0).choices[0].text == "a cat"
    refused(sdk.text, "max_tokens", "0 with echo", prompt="a cat", max_tokens=0)
    pieces = sdk.text(prompt=prompts[0], echo=True, logprobs=2, stream=True)
    streamed = [piece.choices[0].logprobs for piece in pieces]
    whole = answer.choices[0].logprobs
    assert [t for part in streamed for t in part.tokens] == whole.tokens
    assert [at for part in streamed for at in part.text_offset] == whole.text_offset
    # A special token has no text unless the prompt was given as tokens.
    ids = [256, *tokens("a cat", sdk)]
    assert sdk.text(prompt=[ids], echo=True, logprobs=0).choices[0].logprobs.text_offset[:3] == [0, 5, 6]


def test_bias_and_penalties(sdk: Sdk, own: Any, expected: Any) -> None:
    ids = tokens("a cat", sdk)

    def reference(bias: dict[int, float], presence: float, frequency: float) -> list[int]:
        drawn: list[int] = []
        for _ in range(12):
            z = logits_of(own, ids + drawn)[-1]
            counts = torch.bincount(torch.tensor(drawn, dtype=torch.long), minlength=len(z))
            for token, value in bias.items():
                z[token] += value
            z = z - presence * (counts > 0) - frequency * counts
            if (token := int(z.argmax())) == 256:
                break
            drawn.append(token)
        return drawn

    text = sdk.service.tokenizer.decode
    plain = expected("a cat")[1]
    banned = {plain[0]: -100.0, plain[3]: -100.0}
    for bias, presence, frequency in ((banned, 0, 0), ({}, 2, 0), ({}, 0, 1.5), ({65: 100.0}, 0, 0), (banned, -1, 2)):
        asked = {"logit_bias": {str(k): v for k, v in bias.items()}, "presence_penalty": presence}
        got = sdk.text(prompt="a cat", frequency_penalty=frequency, **asked).choices[0].text
        assert got == text(reference(bias, presence, frequency))
    assert sdk.text(prompt="a cat", logit_bias={"65": 100}).choices[0].text == text([65] * 12)


def test_cuts(sdk: Sdk, expected: Any) -> None:
    """Each cut alone leaves only the most probable token, and so does a temperature near 0."""
    for extra in ({"top_k": 1}, {"min_p": 1}):
        assert sdk.text(prompt="a cat", temperature=2, extra_body=extra).choices[0].text == expected("a cat")[0]
    tiny = ({"top_p": 5e-324}, {"temperature": 1e-38}, {"temperature": 5e-324}, {"temperature": 1e-5, "top_p": 1e-30})
    for options in tiny:
        assert sdk.text(prompt="a cat", **{"temperature": 2} | options).choices[0].text == expected("a cat")[0]
    free = {"top_k": -1, "min_p": 0}
    assert sdk.text(prompt="a cat", temperature=2, seed=3, extra_body=free).choices == (
        sdk.text(prompt="a cat", temperature=2, seed=3).choices
    )


def test_json(sdk: Sdk) -> None:
    pytest.importorskip("llguidance")
    schema = {
        "type": "object",
        "properties": {"kind": {"enum": ["cat", "dog"]}, "old": {"type": "boolean"}},
        "required": ["kind", "old"],
        "additionalProperties": False,
    }
    wanted = {"type": "json_schema", "json_schema": {"name": "pet", "schema": schema, "strict": True}}
    for options in ({}, {"temperature": 2, "seed": 1, "n": 3}):
        answer = sdk.chat(response_format=wanted, max_completion_tokens=50, **options)
        for choice in answer.choices:
            pet = json.loads(choice.message.content)
            assert set(pet) == {"kind", "old"} and pet["kind"] in ("cat", "dog") and choice.finish_reason == "stop"
    begun = sdk.chat(response_format={"type": "json_object"}, temperature=2, seed=1).choices[0].message.content
    assert begun.startswith("{")
    wanted["json_schema"]["schema"] = {"type": "nonsense"}
    refused(sdk.chat, "response_format", "nonsense", response_format=wanted)


def test_json_without_the_library(sdk: Sdk, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "llguidance", None)
    wanted = {"type": "json_object"}
    refused(sdk.chat, "response_format", r'pip install "lowrank-ops\[json\]"', response_format=wanted)


def refused(call: Any, param: str, message: str, **options: Any) -> None:
    with pytest.raises(openai.BadRequestError, match=message or ".") as caught:
        call(**options)
    assert caught.value.param == param


@pytest.mark.parametrize(
    ("param", "options"),
    [
        ("messages", {"messages": []}),
        ("messages", {"messages": [{"role": "nobody", "content": "a"}]}),
        ("messages", {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]}),
        ("messages", {"messages": [{"role": "user", "content": "a" * 200}]}),
        ("max_tokens", {"max_tokens": 3}),
        ("max_completion_tokens", {"max_completion_tokens": 0}),
        ("top_logprobs", {"top_logprobs": 2}),
        ("top_logprobs", {"logprobs": True, "top_logprobs": 21}),
        ("logit_bias", {"logit_bias": {"257": 1}}),
        ("logit_bias", {"logit_bias": {"-1": 1}}),
        ("logit_bias", {"logit_bias": {"5": 101}}),
        ("n", {"n": 65}),
        ("n", {"n": 0}),
        ("presence_penalty", {"presence_penalty": 2.5}),
        ("min_p", {"extra_body": {"min_p": -0.1}}),
        ("top_k", {"extra_body": {"top_k": -2}}),
        ("stop", {"stop": ["a" * 4097]}),
        ("stop", {"stop": ["a"] * 5}),
        ("response_format", {"response_format": {"type": "json_schema"}}),
        ("modalities", {"modalities": ["audio"]}),
    ],
    ids=lambda value: str(value)[:40],
)
def test_refusals(sdk: Sdk, param: str, options: dict[str, Any]) -> None:
    refused(sdk.chat, param, "", **options)


def test_null_is_unset(sdk: Sdk) -> None:
    from lowrank_ops.serving.requests import ChatRequest, CompletionRequest

    for path, kind, asked in (
        ("/v1/completions", CompletionRequest, {"model": "user-0", "prompt": "a cat", "seed": 1}),
        ("/v1/chat/completions", ChatRequest, {"model": "user-0", "messages": ASKED, "seed": 1, "max_tokens": 9}),
    ):
        nulls = dict.fromkeys(set(kind.model_fields) - set(asked))
        plain, same = sdk.post(path, asked), sdk.post(path, asked | nulls)
        assert same.status_code == 200, same.text
        assert same.json()["choices"] == plain.json()["choices"]


def test_tokens(sdk: Sdk) -> None:
    got = sdk.post("/tokenize", {"model": "user-0", "prompt": "a cat", "return_token_strs": True}).json()
    assert got == {"count": 5, "max_model_len": 96, "tokens": tokens("a cat", sdk), "token_strs": [*"aĠcat"]}
    got = sdk.post("/tokenize", {"messages": ASKED}).json()
    assert got["tokens"] == tokens(SHOWN, sdk) and got["token_strs"] is None
    assert sdk.post("/detokenize", {"tokens": got["tokens"]}).json() == {"prompt": SHOWN}
    for path, body, param in (
        ("/tokenize", {}, "prompt"),
        ("/tokenize", {"prompt": "a" * 600}, "prompt"),
        ("/detokenize", {"tokens": [257]}, "tokens"),
        ("/detokenize", {"tokens": ["a"]}, "tokens"),
    ):
        answer = sdk.post(path, body)
        assert answer.status_code == 400 and answer.json()["error"]["param"] == param
    assert sdk.post("/tokenize", {"model": "nobody", "prompt": "a"}).status_code == 404


def tokens(text: str, sdk: Sdk) -> list[int]:
    return sdk.service.tokenizer(text)["input_ids"]


def test_models(sdk: Sdk) -> None:
    assert "user-3" in [model.id for model in sdk("models.list").data]
