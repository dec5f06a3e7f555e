"""Messages to token ids, by the chat template of the model's tokenizer."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from ..files import load_json
from .load import Service
from .protocol import RequestError
from .requests import Message
from .tools import Format, format_of


def render(service: Service, messages: Sequence[Message], tools: list[dict[str, Any]], answer: bool = True) -> str:
    """The text of messages, and with ``answer`` the beginning of the next one.

    Raises:
        RequestError: the model has no chat template; it takes no tools; or it cannot render these messages.
    """
    tokenizer = service.tokenizer
    if not getattr(tokenizer, "chat_template", None):
        message = f"{service.name} has no chat template (--chat-template FILE gives one): use /v1/completions"
        raise RequestError(400, message, "model", "no_chat_template")
    try:
        template = tokenizer.get_chat_template(None, tools or None)
        given = [_plain(message) for message in messages]
        if tools and not re.search(r"\btools\b", template):
            raise RequestError(400, f"tools: the chat template of {service.name} takes none", "tools")
        return tokenizer.apply_chat_template(
            given, tools=tools or None, chat_template=template, add_generation_prompt=answer, tokenize=False
        )
    except RequestError:
        raise
    except Exception as error:  # the template's own refusals, and what it meets in messages that it does not expect
        message = f"messages: the chat template of {service.name} refuses them: {error}"
        raise RequestError(400, message, "messages") from None


def format_for(service: Service, tools: list[dict[str, Any]]) -> Format | None:
    """The format in which the model writes calls of tools; None if it is not known, or there are no tools."""
    if not tools or not getattr(service.tokenizer, "chat_template", None):
        return None
    return format_of(service.tokenizer.get_chat_template(None, tools))


def _plain(message: Message) -> dict[str, Any]:
    """A message as templates expect it: no unset fields, arguments of calls as objects, no role that only OpenAI has."""
    plain = message.model_dump(exclude_none=True)
    plain.setdefault("content", "")
    if message.role == "developer":
        plain["role"] = "system"
    for call in plain.get("tool_calls", ()):
        function = call.get("function")
        if isinstance(function, dict) and isinstance(function.get("arguments"), str):
            try:
                function["arguments"] = load_json(function["arguments"])
            except ValueError:
                raise RequestError(400, "messages: the arguments of a tool call must be JSON", "messages") from None
    return plain
