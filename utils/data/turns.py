"""Turns of a dialogue, however they are written: message lists, ShareGPT dicts, "Human: ... Assistant: ..." text."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from ..report.messages import show_messages
from .calls import (
    CALLING_ROLES,
    KEPT,
    RESULT_ROLES,
    BadRow,
    extra_of,
    is_nothing,
    make_turn,
    plain_turns,
    read_calls,
    read_extra,
    result_text,
    said_by,
)
from .scanning import name_of

TRANSCRIPT_ROLES = {"Human": "user", "Assistant": "assistant"}
TRANSCRIPT_MARK = re.compile(r"\n\n(Human|Assistant):")
ROLES = {
    "user": "user",
    "human": "user",
    "prompter": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "bot": "assistant",
    "chatbot": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
    "system": "system",
    "developer": "developer",
    **dict.fromkeys(CALLING_ROLES, "assistant"),
    **dict.fromkeys(("tool", "observation", "tool_response", "function_response"), "tool"),
    "function": "function",
}
MEDIA = ("images", "image", "image_url", "videos", "video", "audios", "audio", "documents")
# What a turn may say that no template is given. Rows that have it are refused: without it they would say other things.
CARRIED = (
    *("tool_call", "function_calls", "tool_responses", "tool_plan", "tools", "functions"),
    *("reasoning_details", "thinking_blocks", "thought", "thoughts"),
    *("refusal", "attachments", "files"),
    *MEDIA,
)
# The same in answers and trees that are no messages, whose other fields speak of who wrote or judged them.
SAID_BESIDE = (*CARRIED, *(field for field in KEPT if field != "name"))
WEIGHTS = ("weight", "loss_weight")  # how much a turn is to be learnt, in OpenAI's form and in LLaMA-Factory v1
TEXT_PARTS = ("text", "input_text", "output_text")
TEXT_KEYS = ("text", "value", "content")
# Parts of a turn's content that are no text of it, as LLaMA-Factory v1 writes them -> the field that they are.
FIELD_PARTS = {"tool_call": "tool_calls", "tool_calls": "tool_calls", "reasoning": "reasoning_content"}
MESSAGE_KEYS = (("role", "content"), ("from", "value"))
# Messages written as text: how they begin, their keys, and what stands between two where NumPy prints no comma.
WRITTEN_START = re.compile(r"""\s*(?:"\s*|array\(\s*)?[\[(]?\s*\{""")
WRITTEN_KEYS = [
    [re.compile(f"""['"]{key}\\\\*['"]\\s*:""") for key in keys]
    for keys in (*MESSAGE_KEYS, ("role", "(?:tool_calls|function_call)"))
]
WRITTEN_ARRAY = re.compile(r"array\((.*?)(?:,\s*dtype=\w+)?\)", re.DOTALL)
BETWEEN_OBJECTS = re.compile(r"""('(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*")|\}\s+\{""", re.DOTALL)

Turns = list[dict[str, str]]
Value = str | Turns


def is_message(value: Any) -> bool:
    """Whether a value is one message: {role, content} or ShareGPT's {from, value}; a tool call may lack the text."""
    if not isinstance(value, Mapping):
        return False
    keys = set(value)
    return any(role in keys and bool(keys & {text, *KEPT, *CARRIED}) for role, text in MESSAGE_KEYS)


def as_messages(value: Any) -> list[Mapping[str, Any]] | None:
    """The messages of a list, of a single message, or of an object of lists, as which tables hold a list; else None."""
    if isinstance(value, list):
        return value if all(is_message(message) for message in value) else None
    if not is_message(value):
        return None
    roles = value.get("role", value.get("from"))
    if not isinstance(roles, list):
        return [value]
    columns = {key: items for key, items in value.items() if items is not None}
    if any(not isinstance(items, list) or len(items) != len(roles) for items in columns.values()):
        return None
    return [dict(zip(columns, items, strict=True)) for items in zip(*columns.values(), strict=True)]


def unpack(value: Any, name: str) -> Any:
    """The messages that a text holds, as JSON or as Python or NumPy print them, also inside an object; any other value
    as it is.

    Raises BadRow for a text that looks like messages and cannot be read.
    """
    if not isinstance(value, str) or not WRITTEN_START.match(value):
        return value
    if not any(all(key.search(value) for key in keys) for keys in WRITTEN_KEYS):
        return value
    try:
        found = _parse(value)
    except ValueError:
        raise BadRow(f"'{name}' holds messages written as text that cannot be read") from None
    inner = found.values() if isinstance(found, Mapping) and not is_message(found) else [found]
    return found if any(part and as_messages(part) is not None for part in inner) else value


def holds_messages(text: str) -> bool:
    """Whether a text is a list of messages written as text, be it whole or damaged."""
    try:
        return unpack(text, "") is not text
    except BadRow:
        return True


def _parse(text: str) -> Any:
    """A value in JSON, or as Python or NumPy print it. Raises ValueError."""
    try:
        found = json.loads(text)
        return _parse(found) if isinstance(found, str) else found  # JSON in JSON
    except RecursionError:
        raise ValueError("nested too deeply") from None
    except ValueError:
        pass
    text = text.strip()
    array = WRITTEN_ARRAY.fullmatch(text)
    text = BETWEEN_OBJECTS.sub(lambda found: found[1] or "}, {", array[1] if array else text)
    try:
        found = ast.literal_eval(text)
        return list(found) if isinstance(found, tuple) else found
    except (ValueError, SyntaxError, RecursionError, MemoryError) as error:
        raise ValueError(str(error)) from None


def flatten(value: Value) -> str:
    """The text of the turns, without their roles."""
    return value if isinstance(value, str) else "\n".join(map(said_by, value))


def show_value(value: Value) -> str:
    """A prompt or a reply for people: a text, or that of a turn which is alone and says no more; else who says what."""
    if isinstance(value, list) and len(value) == 1 and not extra_of(value[0]):
        return value[0]["content"]
    return show_messages(plain_turns(value))


def is_transcript(text: Any) -> bool:
    """Whether a text is a whole dialogue that begins with "Human:"."""
    return isinstance(text, str) and text.startswith(("\n\nHuman:", "Human:"))


def read_turns(value: Any, name: str, text_role: str) -> Turns:
    """The turns in a message list, a single message, or a text (one turn of `text_role`).

    Raises BadRow for anything else, for a turn without text, and for an unknown role.
    """
    if isinstance(value, str):
        return [{"role": text_role, "content": value}]
    messages = as_messages(value)
    if messages is None:
        raise BadRow(f"'{name}' is neither text nor a list of messages")
    turns = [_read_message(message, name) for message in messages]
    if turns and turns[-1]["role"] == "assistant" and any(messages[-1].get(field) == 0 for field in WEIGHTS):
        raise BadRow(f"'{name}' ends with a turn of weight 0, which is not meant to be learnt")
    return turns


def _read_message(message: Mapping[str, Any], name: str) -> dict[str, str]:
    check_fields(message, name)
    said, role = str(message.get("role") or message.get("from")), role_of(message)
    if role is None:
        raise BadRow(f"'{name}' has a turn with an unknown role {said[:40]!r}")
    content = message.get("content") if message.get("content") is not None else message.get("value")
    if said.lower() in CALLING_ROLES:
        if not is_nothing(message.get("tool_calls")):
            raise BadRow(f"'{name}' has a turn with tool calls in two places")
        return make_turn(role, None, read_extra({**message, "tool_calls": read_calls(content, name)}, role, name))
    content, fields = _take_fields(content, name)
    extra = read_extra({**message, **fields}, role, name)
    if role in RESULT_ROLES:
        content = result_text(content)
    if content is None and "tool_calls" in extra:
        return make_turn(role, None, extra)
    return make_turn(role, _read_content(content, name), extra)


def _take_fields(content: Any, name: str) -> tuple[Any, dict[str, Any]]:
    """The content of a turn without the parts that are fields of it, and these fields."""
    if not isinstance(content, list):
        return content, {}
    kinds = [FIELD_PARTS.get(str(part.get("type"))) if isinstance(part, Mapping) else None for part in content]
    if not any(kinds):
        return content, {}
    taken: dict[str, Any] = {}
    for part, kind in zip(content, kinds, strict=True):
        if kind is None:
            continue
        value = part.get("value")
        if kind == "tool_calls":
            taken[kind] = taken.get(kind, []) + read_calls(value, name)
        elif not isinstance(value, str):
            raise BadRow(f"'{name}' has a turn with a part of type {part['type']!r} without text")
        else:
            taken[kind] = taken.get(kind, "") + value
    rest = [part for part, kind in zip(content, kinds, strict=True) if kind is None]
    return rest or (None if "tool_calls" in taken else ""), taken


def role_of(message: Mapping[str, Any]) -> str | None:
    """The usual name of the role of a message; None for one that is not known."""
    return ROLES.get(str(message.get("role") or message.get("from")).lower())


def check_fields(message: Mapping[str, Any], name: str, fields: Sequence[str] = CARRIED) -> None:
    """Raises BadRow where a turn, or an answer with fields, has content besides its text."""
    for field in fields:
        if not is_nothing(message.get(field)):
            raise BadRow(f"'{name}' has a turn with '{field}', which is not trained on")


def _read_content(content: Any, name: str) -> str:
    if isinstance(content, str):
        return content
    if content is None:
        raise BadRow(f"'{name}' has a turn without text")
    parts = [content] if isinstance(content, Mapping) else content
    if not isinstance(parts, list):
        raise BadRow(f"'{name}' has a turn whose content is {name_of(content)}, not text")
    if len(parts) == 1 and isinstance(parts[0], str):
        return parts[0]
    return "".join(_read_part(part, name) for part in parts)


def _read_part(part: Any, name: str) -> str:
    """The text of one part of a turn's content. Raises BadRow for a part that is not, or not only, text."""
    if not isinstance(part, Mapping):
        what = "several texts, not one" if isinstance(part, str) else f"a part that is {name_of(part)}"
        raise BadRow(f"'{name}' has a turn whose content is a list with {what}")
    kind = part.get("type")
    if kind is not None and kind not in TEXT_PARTS:
        raise BadRow(f"'{name}' has a turn with a part of type {str(kind)[:40]!r}, which is not text")
    check_fields(part, name)
    texts = [part[key] for key in TEXT_KEYS if isinstance(part.get(key), str)]
    if len(texts) != 1:
        raise BadRow(f"'{name}' has a turn with a part {'of two texts' if texts else 'without text'}")
    return texts[0]


def split_transcript(text: str) -> Turns:
    r"""The turns of "\n\nHuman: ...\n\nAssistant: ...", their text verbatim but for the one space after the colon.

    Speakers alternate, so a mark of the speaker who is already speaking is a quotation and stays in the text.

    Raises BadRow when the text does not begin with a mark.
    """
    text = text if text.startswith("\n") else "\n\n" + text
    marks = list(TRANSCRIPT_MARK.finditer(text))
    if not marks or marks[0].start() != 0:
        raise BadRow("a transcript does not start with 'Human:' or 'Assistant:'")
    turns: Turns = []
    ends = [mark.start() for mark in marks[1:]] + [len(text)]
    for mark, end in zip(marks, ends, strict=True):
        role = TRANSCRIPT_ROLES[mark[1]]
        if turns and turns[-1]["role"] == role:
            turns[-1]["content"] += text[mark.start() : end]
        else:
            turns.append({"role": role, "content": text[mark.end() : end].removeprefix(" ")})
    return turns


def split_reply(turns: Turns) -> tuple[Turns, Turns]:
    """The turns before the last reply, and the last reply (none: an empty list).

    A reply is all that follows the last turn of somebody else: turns of the assistant, with the results of the tools
    that it called in between.
    """
    start = len(turns)
    while start > 0 and turns[start - 1]["role"] in ("assistant", *RESULT_ROLES):
        start -= 1
    while start < len(turns) and turns[start]["role"] != "assistant":
        start += 1
    return (turns[:start], turns[start:]) if turns and turns[-1]["role"] == "assistant" else (turns, [])


def take_reply(turns: Turns, name: str) -> tuple[Turns, Turns]:
    """The same. Raises BadRow where there are turns and the last is not the assistant's."""
    before, answer = split_reply(turns)
    if turns and not answer:
        raise BadRow(f"'{name}' ends with a turn of the {turns[-1]['role']}: there is no reply to train on")
    return before, answer


def prepend_system(system: Any, turns: Turns) -> Turns:
    """The turns after a system turn, when there is a system text and no system turn yet."""
    if not isinstance(system, str) or not system.strip() or (turns and turns[0]["role"] == "system"):
        return turns
    return [{"role": "system", "content": system}, *turns]
