"""Messages for people: who says what, reasoning apart, tool calls with their arguments, results with their tool."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

REASONING = ("reasoning_content", "reasoning", "thinking")


def show_messages(value: Any, between: str = "\n\n") -> str:
    """A text as it is, messages one below the other; anything else, as damaged files may hold it, as Python says it."""
    if not isinstance(value, list):
        return str(value)
    tools: dict[str, str] = {}  # id of a call -> its tool
    return between.join("\n".join(_show_message(message, tools)) for message in value)


def _show_message(message: Any, tools: dict[str, str]) -> Iterator[str]:
    if not isinstance(message, Mapping):
        yield str(message)
        return
    who, content = str(message.get("role", "")).capitalize(), message.get("content")
    calls = [call for call in _list(message.get("tool_calls")) if isinstance(call, Mapping)]
    reasoning = next((message[field] for field in REASONING if message.get(field)), "")
    if who in ("Tool", "Function"):
        tool = message.get("name") or tools.get(str(message.get("tool_call_id")))
        who += f" ({tool})" if tool else ""
    elif message.get("name"):
        who += f" ({message['name']})"
    if reasoning:
        yield f"{who} (reasoning): {reasoning}"
    if content or not (calls or reasoning):
        yield f"{who}: {'' if content is None else content}"
    for call in calls:
        function = call.get("function") if isinstance(call.get("function"), Mapping) else call
        name = str(function.get("name", "?"))
        tools[str(call.get("id"))] = name
        yield f"{who} calls {name}({_show_arguments(function.get('arguments'))})"


def _show_arguments(arguments: Any) -> str:
    if not isinstance(arguments, Mapping):
        return "" if arguments is None else str(arguments)
    return ", ".join(f"{name}={json.dumps(value, ensure_ascii=False)}" for name, value in arguments.items())


def _list(value: Any) -> Sequence[Any]:
    return value if isinstance(value, list) else ()
