"""Turns of a dialogue, however they are written: message lists, ShareGPT dicts, "Human: ... Assistant: ..." text."""

from __future__ import annotations

import re
from typing import Any

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
    "tool": "tool",
    "observation": "tool",
    "function": "function",
}

Turns = list[dict[str, str]]


class BadRow(Exception):
    """A row that cannot be read as a pair; its text is the reason, the same for all rows with the same fault."""


def is_message(value: Any) -> bool:
    """Whether a value is one message: {role, content} or ShareGPT's {from, value}."""
    return isinstance(value, dict) and ({"role", "content"} <= set(value) or {"from", "value"} <= set(value))


def is_transcript(text: Any) -> bool:
    """Whether a text is a whole dialogue that begins with "Human:"."""
    return isinstance(text, str) and text.startswith(("\n\nHuman:", "Human:"))


def read_turns(value: Any, name: str, text_role: str) -> Turns:
    """The turns in a message list, a single message, or a text (one turn of `text_role`).

    Raises BadRow for anything else, for a turn without text, and for an unknown role.
    """
    if isinstance(value, str):
        return [{"role": text_role, "content": value}]
    if isinstance(value, dict):
        value = [value]
    if not isinstance(value, list) or not all(is_message(message) for message in value):
        raise BadRow(f"'{name}' is neither text nor a list of messages")
    return [_read_message(message, name) for message in value]


def _read_message(message: dict[str, Any], name: str) -> dict[str, str]:
    said = message.get("role") or message.get("from")
    role = ROLES.get(str(said).lower())
    if role is None:
        raise BadRow(f"'{name}' has a turn of unknown role {str(said)[:40]!r}")
    content = message.get("content") if message.get("content") is not None else message.get("value")
    if isinstance(content, list) and all(_is_text_part(part) for part in content):
        content = "".join(part["text"] for part in content)
    if not isinstance(content, str):
        raise BadRow(f"'{name}' has a turn without text")
    return {"role": role, "content": content}


def _is_text_part(part: Any) -> bool:
    return isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str)


def split_transcript(text: str) -> Turns:
    r"""The turns of "\n\nHuman: ...\n\nAssistant: ...", their text verbatim but for the one space after the colon.

    Speakers alternate, so a mark of the speaker who is already speaking is a quotation and stays in the text.

    Raises BadRow when the text does not begin with a mark.
    """
    text = text if text.startswith("\n") else "\n\n" + text
    marks = list(TRANSCRIPT_MARK.finditer(text))
    if not marks or marks[0].start() != 0:
        raise BadRow("a transcript does not begin with 'Human:' or 'Assistant:'")
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
    """The turns before the last reply, and the last reply: the assistant turns at the end (none: an empty list)."""
    start = len(turns)
    while start > 0 and turns[start - 1]["role"] == "assistant":
        start -= 1
    return turns[:start], turns[start:]


def prepend_system(system: Any, turns: Turns) -> Turns:
    """The turns after a system turn, when there is a system text and no system turn yet."""
    if not isinstance(system, str) or not system.strip() or (turns and turns[0]["role"] == "system"):
        return turns
    return [{"role": "system", "content": system}, *turns]
