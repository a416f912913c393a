"""What a turn has besides its text: tool calls, the id and name of a result, and reasoning.

A table has one type for all turns, and the arguments of a call may be anything. So a turn keeps such fields as one JSON
text, `extra`, and `whole_message` gives the message back as a chat template takes it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from .scanning import name_of

EXTRA = "extra"
REASONING = ("reasoning_content", "reasoning", "thinking")
KEPT = ("tool_calls", "function_call", "tool_call_id", "name", *REASONING)
RESULT_ROLES = ("tool", "function")
NO_CALLS = ("null", "[]", "{}")  # as a table of texts writes them
# Roles of ShareGPT files whose text is the call itself.
CALLING_ROLES = ("function_call", "tool_call", "tool_calls")

Turn = Mapping[str, Any]


class BadRow(Exception):
    """A row that cannot be read as a pair; its text is the reason, the same for all rows with the same fault."""


def is_nothing(value: Any) -> bool:
    """Whether a value has no content: null, empty, or made of such (a table adds nulls for what other rows have)."""
    inner = value.values() if isinstance(value, Mapping) else value if isinstance(value, list) else None
    return value is None or value == "" or (inner is not None and all(map(is_nothing, inner)))


def read_calls(value: Any, name: str) -> list[dict[str, Any]]:
    """Tool calls in OpenAI's form, {"function": {"name", "arguments"}}, their arguments as objects.

    `value` is a list of calls or a single one, each in that form or as {"name", "arguments"}; or JSON text of these.
    Arguments that are text stay so where it is not a JSON object: the checks of `data` speak of them.

    Raises BadRow for anything else.
    """
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            raise BadRow(f"'{name}' has a turn with tool calls that are not JSON") from None
    calls = value if isinstance(value, list) else [value]
    return [_read_call(call, name) for call in calls]


def _read_call(call: Any, name: str) -> dict[str, Any]:
    if not isinstance(call, Mapping):
        raise BadRow(f"'{name}' has a turn with a tool call that is {name_of(call)}, not an object")
    in_form = isinstance(call.get("function"), Mapping)
    function = call["function"] if in_form else call
    if not isinstance(function.get("name"), str) or not function["name"]:
        raise BadRow(f"'{name}' has a turn with a tool call without the name of a function")
    said = {"name": function["name"], "arguments": read_arguments(function.get("arguments"))}
    around = {key: part for key, part in call.items() if part is not None and key not in ("function", *said)}
    return {"type": "function", **around, "function": said}


def read_arguments(arguments: Any) -> Any:
    """The arguments of a call as an object, where they are one, be it as JSON text."""
    if is_nothing(arguments):
        return {} if not isinstance(arguments, Mapping) else arguments
    if isinstance(arguments, str):
        try:
            read = json.loads(arguments)
        except (ValueError, RecursionError):
            return arguments
        return read if isinstance(read, dict) else arguments
    return arguments


def read_extra(message: Mapping[str, Any], role: str, name: str) -> dict[str, Any]:
    """The fields of a message that a turn keeps besides its text; those without content are left out.

    Raises BadRow for tool calls that cannot be read.
    """
    extra = {field: message[field] for field in KEPT if not is_nothing(message.get(field))}
    for field in ("tool_calls", "function_call"):
        if extra.get(field) in NO_CALLS:
            del extra[field]
    older = extra.pop("function_call", None)
    if "tool_calls" in extra or older is not None:
        extra["tool_calls"] = read_calls(extra.get("tool_calls", older), name)
        if role != "assistant":
            raise BadRow(f"'{name}' has a turn of the {role} with tool calls; only the assistant calls tools")
    for field in (*REASONING, "tool_call_id", "name"):
        if field in extra and not isinstance(extra[field], str):
            raise BadRow(f"'{name}' has a turn whose '{field}' is {name_of(extra[field])}, not text")
    return extra


def result_text(content: Any) -> Any:
    """A tool's result as text: JSON of an object or a number; text and parts of text stay as they are."""
    if isinstance(content, Mapping):
        is_part = isinstance(content.get("type"), str) and "text" in content
    elif isinstance(content, list):
        is_part = all(isinstance(part, Mapping) and isinstance(part.get("type"), str) for part in content)
    else:
        is_part = content is None or isinstance(content, str)
    return content if is_part else json.dumps(content, ensure_ascii=False)


def make_turn(role: str, content: str | None, extra: Mapping[str, Any]) -> dict[str, str]:
    """A turn of a table; its text is empty where the message has none."""
    said = {**({"content": None} if content is None else {}), **extra}
    kept = {EXTRA: json.dumps(said, ensure_ascii=False)} if said else {}
    return {"role": role, "content": content or "", **kept}


def whole_message(turn: Turn) -> dict[str, Any]:
    """The message of a turn, with all of its fields."""
    message = {key: value for key, value in turn.items() if key != EXTRA}
    return message | extra_of(turn)


def extra_of(turn: Turn) -> dict[str, Any]:
    """What a turn, or a whole message, has besides its text."""
    if EXTRA in turn:
        return json.loads(turn[EXTRA]) if turn[EXTRA] else {}
    return {field: turn[field] for field in KEPT if field in turn}


def keeps_extra(value: Any) -> bool:
    """Whether a value is turns of which one has content besides its text."""
    return isinstance(value, list) and any(EXTRA in turn for turn in value)


def functions_of(turn: Turn) -> list[dict[str, Any]]:
    """The functions that a turn calls, each {"name", "arguments"}."""
    return [call["function"] for call in extra_of(turn).get("tool_calls", ())]


def reasoning_of(turn: Turn) -> str:
    """The reasoning of a turn that has a field of its own, in whatever field."""
    extra = extra_of(turn)
    return next((extra[field] for field in REASONING if field in extra), "")


def said_by(turn: Turn) -> str:
    """All that a turn says, as one text: its reasoning, its text, and its calls as JSON."""
    extra, content = extra_of(turn), turn.get("content") or ""
    if not extra:
        return content
    calls = (json.dumps(function, ensure_ascii=False) for function in functions_of(turn))
    return "\n".join(filter(None, (reasoning_of(turn), content, *calls)))


def turn_key(turn: Turn) -> tuple[str, ...]:
    """What tells one turn from another: blanks around its text, ids of calls and the order of arguments do not."""
    calls = (json.dumps(function, ensure_ascii=False, sort_keys=True) for function in functions_of(turn))
    return (turn["role"], turn["content"].strip(), reasoning_of(turn).strip(), *calls)


def plain_turns(turns: Any) -> Any:
    """Messages as other programs take them, for whatever leaves the script; anything but a list stays as it is."""
    return [whole_message(turn) for turn in turns] if isinstance(turns, list) else turns


def argument_texts(value: Any) -> Iterator[str]:
    """Every text in the arguments of a call."""
    if isinstance(value, str):
        yield value
    for inner in value.values() if isinstance(value, Mapping) else value if isinstance(value, list) else ():
        yield from argument_texts(inner)
