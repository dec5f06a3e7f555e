"""Requests in OpenAI's format and, where OpenAI has none, in vLLM's. A null field is an unset one."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, PlainValidator, model_validator

from .mixtures import MOST, STRONGEST

LONGEST_STOP = 4096


def _check_input(value: Any) -> Any:
    """Check the form of an input; stops at the first wrong item, where a union would collect errors of all."""
    if isinstance(value, str) or _are_ids(value):
        return value
    if isinstance(value, list) and value and (set(map(type, value)) == {str} or all(map(_are_ids, value))):
        return value
    raise ValueError("must be a text, a list of texts, a list of token ids or a list of these, none of them empty")


def _are_ids(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(type(item) is int for item in value)


def _check_stop(value: Any) -> list[str]:
    stops = [value] if isinstance(value, str) else value
    if not isinstance(stops, list) or len(stops) > 4 or not all(isinstance(stop, str) and stop for stop in stops):
        raise ValueError("must be a text or a list of at most 4 texts, none of them empty")
    if any(len(stop) > LONGEST_STOP for stop in stops):
        raise ValueError(f"must have at most {LONGEST_STOP} characters each")
    return stops


def _check_bias(value: Any) -> dict[int, float]:
    if not isinstance(value, dict):
        raise ValueError("must be an object of token ids and numbers")
    bias = {}
    for key, number in value.items():
        if not (isinstance(key, str) and key.isdecimal() and key.isascii() and len(key) < 10):
            raise ValueError("must have token ids as keys")
        if type(number) not in (int, float) or not -100 <= number <= 100:
            raise ValueError("must have numbers from -100 to 100 as values")
        bias[int(key)] = float(number)
    return bias


def _join_parts(value: Any) -> Any:
    """The text of a message whose content is a list of parts."""
    if not isinstance(value, list):
        return value
    for part in value:
        if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
            raise ValueError("every part must be a text, as {'type': 'text', 'text': ...}")
    return "\n".join(part["text"] for part in value)


def _check_tools(value: list[dict[str, Any]]) -> list[dict[str, Any]]:
    for tool in value:
        function = tool.get("function")
        if (
            tool.get("type") != "function"
            or not isinstance(function, dict)
            or not isinstance(function.get("name"), str)
        ):
            raise ValueError("every tool must be a function with a name")
    return value


Ids = Annotated[list[int], Field(min_length=1)]
Forms = str | Ids | Annotated[list[str], Field(min_length=1)] | Annotated[list[Ids], Field(min_length=1)]
Input = Annotated[Any, PlainValidator(_check_input, json_schema_input_type=Forms)]
Stop = Annotated[Any, PlainValidator(_check_stop, json_schema_input_type=str | list[str])]
Bias = Annotated[Any, PlainValidator(_check_bias, json_schema_input_type=dict[str, float])]
Penalty = Annotated[float, Field(ge=-2, le=2, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=1)]
Tools = Annotated[list[dict[str, Any]], AfterValidator(_check_tools)]


class _Object(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    @model_validator(mode="before")
    @classmethod
    def _drop_nulls(cls, given: Any) -> Any:
        return {key: value for key, value in given.items() if value is not None} if isinstance(given, dict) else given


class AdapterAtStrength(_Object):
    """One of several adapters of a request."""

    name: str
    strength: Annotated[float, Field(ge=-STRONGEST, le=STRONGEST, allow_inf_nan=False)] = 1.0


def _check_names(value: list[AdapterAtStrength]) -> list[AdapterAtStrength]:
    names = [adapter.name for adapter in value]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise ValueError(f"must name each adapter once, got {twice[:128]!r} twice")
    return value


Several = Annotated[list[AdapterAtStrength], Field(min_length=1, max_length=MOST), AfterValidator(_check_names)]


class _Asked(_Object):
    model: str
    adapters: Several | None = None
    # Fields that sort a client's requests; no answer depends on them.
    user: str | None = None
    metadata: dict[str, str] | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None


class EmbeddingRequest(_Asked):
    """As in OpenAI's API; ``dimensions`` can only be the model's own."""

    input: Input
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: int | None = None


class StreamOptions(_Object):
    include_usage: bool = False


class Schema(_Object):
    name: str = ""
    description: str = ""
    schema_: dict[str, Any] = Field(default={"type": "object"}, alias="schema")
    strict: bool = True


class ResponseFormat(_Object):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: Schema | None = None

    @model_validator(mode="after")
    def _has_schema(self) -> ResponseFormat:
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise ValueError("json_schema goes with the type json_schema")
        return self


class DrawingRequest(_Asked):
    """What completions and chat completions have in common; ``top_k`` and ``min_p`` are vLLM's."""

    temperature: Annotated[float, Field(ge=0, le=2, allow_inf_nan=False)] = 1.0
    top_p: Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)] = 1.0
    top_k: Annotated[int, Field(ge=-1, lt=2**31)] = 0
    min_p: Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)] = 0.0
    presence_penalty: Penalty = 0.0
    frequency_penalty: Penalty = 0.0
    logit_bias: Bias = {}
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    stop: Stop = []
    n: Count = 1
    stream: bool = False
    stream_options: StreamOptions | None = None
    response_format: ResponseFormat | None = None


class CompletionRequest(DrawingRequest):
    """As in OpenAI's API, without ``suffix``; ``best_of`` must equal ``n``; no tokens are drawn only with ``echo``."""

    prompt: Input
    max_tokens: Annotated[int, Field(ge=0)] = 16
    best_of: int | None = None
    echo: bool = False
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    suffix: Literal[""] | None = None


class Message(_Object):
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Annotated[str | None, BeforeValidator(_join_parts)] = None
    name: str | None = None
    refusal: str | None = None
    tool_calls: list[dict[str, Any]] | None = None
    tool_call_id: str | None = None


Messages = Annotated[list[Message], Field(min_length=1)]


class _Name(_Object):
    name: str


class NamedTool(_Object):
    """A choice of one tool."""

    type: Literal["function"]
    function: _Name


class ChatRequest(DrawingRequest):
    """As in OpenAI's API; content is text only."""

    messages: Messages
    max_tokens: Count | None = None
    max_completion_tokens: Count | None = None
    logprobs: bool = False
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    tools: Tools = []
    tool_choice: Literal["none", "auto", "required"] | NamedTool = "auto"


class TokenizeRequest(_Object):
    """As in vLLM's API: a prompt, or messages for the chat template."""

    model: str | None = None
    prompt: str | None = None
    messages: Messages | None = None
    tools: Tools = []
    add_special_tokens: bool = True
    add_generation_prompt: bool = True
    return_token_strs: bool = False


class DetokenizeRequest(_Object):
    """As in vLLM's API."""

    model: str | None = None
    tokens: list[int]


class LoadAdapterRequest(_Object):
    """As in vLLM's API."""

    lora_name: str
    lora_path: str
    load_inplace: bool = False


class UnloadAdapterRequest(_Object):
    """As in vLLM's API."""

    lora_name: str
    lora_int_id: int | None = None
