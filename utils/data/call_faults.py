"""What is wrong with the tool calls, results and reasoning of a row, by rules that need no model."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from typing import Any

from .calls import EXTRA, RESULT_ROLES, Turn, extra_of, functions_of, reasoning_of
from .think_tags import KINDS, split_thoughts
from .tools import list_tools
from .written_calls import RESULT_MARK, holds_call

Value = str | Sequence[Turn]

# What is found -> how it is said of rows; to be read after "in 3 rows" too.
CALL_FAULTS = {
    "unreadable_call": "tool calls that cannot be read: arguments that are not a JSON object, or text in call tags",
    "undeclared_tool": "calls of a tool that the row does not declare",
    "missing_argument": "tool calls without an argument that the tool requires",
    "result_without_call": "a tool result without its call",
    "call_without_result": "a tool call without its result, before the conversation goes on",
    "open_think": "a reply that begins with a think tag and does not close it",
}


def find_call_faults(prompt: Value, reply: Value, tools: str | None) -> tuple[set[str], set[str]]:
    """The faults of CALL_FAULTS in a prompt, and those in a reply to it."""
    texts = [reply] if isinstance(reply, str) else [t["content"] for t in reply if t["role"] == "assistant"]
    in_reply = {"open_think"} if any(map(_is_open, texts)) else set()
    if isinstance(prompt, str) or isinstance(reply, str):
        return set(), in_reply
    turns = [*prompt, *reply]
    if not (tools or any(turn.get(EXTRA) or turn["role"] in RESULT_ROLES for turn in turns)):
        return set(), in_reply  # most rows have none of these
    found = [*_find_in_calls(turns, tools), *_find_in_results(turns)]
    in_prompt = {name for place, name in found if place < len(prompt)}
    return in_prompt, in_reply | {name for place, name in found if place >= len(prompt)}


def measure_reasoning(reply: Value) -> int:
    """Characters of the reasoning in a reply, in fields or in tags, with what parts it from the answer."""
    if isinstance(reply, str):
        return _measure_thoughts(reply)
    fields = (len(reasoning_of(turn)) + 1 for turn in reply if reasoning_of(turn).strip())
    return sum(fields) + sum(_measure_thoughts(turn["content"]) for turn in reply if turn["role"] == "assistant")


def _measure_thoughts(text: str) -> int:
    thoughts, answer = split_thoughts(text)
    return len(text) - len(answer) if thoughts else 0


def calls_undeclared(prompt: Value, reply: Value, tools: str | None) -> bool:
    """Whether turns have calls and the row declares no tools."""
    if tools in (None, "", "[]"):
        return any(functions_of(turn) for value in (prompt, reply) if not isinstance(value, str) for turn in value)
    return False


def lists_tools_twice(prompt: Value, tools: str | None) -> bool:
    """Whether a system text lists the tools that a chat template writes as well."""
    if isinstance(prompt, str) or tools in (None, "", "[]"):
        return False
    return any(turn["role"] in ("system", "developer") and "<tools>" in turn["content"] for turn in prompt)


def _is_open(text: str) -> bool:
    tags = next((tags for tags in KINDS if tags.opening.match(text)), None)
    return tags is not None and tags.closing.search(text) is None


def _find_in_calls(turns: Sequence[Turn], tools: str | None) -> Iterator[tuple[int, str]]:
    required = _required_arguments(tools)
    for place, turn in enumerate(turns):
        if tools and turn["role"] == "assistant" and holds_call(turn["content"]):
            yield place, "unreadable_call"
        for function in functions_of(turn):
            arguments = function["arguments"]
            if not isinstance(arguments, Mapping):
                yield place, "unreadable_call"
            elif required is not None and function["name"] not in required:
                yield place, "undeclared_tool"
            elif required is not None and required[function["name"]] - set(arguments):
                yield place, "missing_argument"


def _required_arguments(tools: str | None) -> dict[str, set[str]] | None:
    """Tool -> the arguments that it requires; None where no tools are declared, or some that are no functions."""
    try:
        listed = [tool.get("function") for tool in list_tools(tools)]
    except ValueError:
        return None
    if not listed or not all(isinstance(function, Mapping) for function in listed):
        return None
    return {str(function.get("name")): _names(function.get("parameters")) for function in listed}


def _names(parameters: Any) -> set[str]:
    required = parameters.get("required") if isinstance(parameters, Mapping) else None
    return {name for name in required if isinstance(name, str)} if isinstance(required, list) else set()


def _find_in_results(turns: Sequence[Turn]) -> Iterator[tuple[int, str]]:
    """Calls and results that lack the other: turns with calls are followed by their results until somebody else speaks,
    or by nothing at all."""
    groups = [(kind, [place for place, _ in group]) for kind, group in groupby(enumerate(turns), _kind)]
    are_texts = not any(kind == "calls" for kind, _ in groups)  # then calls stand in texts, in whatever form
    for number, (kind, places) in enumerate(groups):
        before = groups[number - 1] if number else ("", [])
        goes_on = number + 1 < len(groups)
        if kind == "calls" and goes_on and groups[number + 1][0] != "results":
            yield places[-1], "call_without_result"
        elif kind == "results" and before[0] == "calls":
            yield from _match(turns, before[1], places, goes_on)
        elif kind == "results" and not (are_texts and before[1] and turns[before[1][-1]]["role"] == "assistant"):
            yield places[0], "result_without_call"


def _kind(numbered: tuple[int, Turn]) -> str:
    _, turn = numbered
    if turn["role"] in RESULT_ROLES or (turn["role"] == "user" and turn["content"].lstrip().startswith(RESULT_MARK)):
        return "results"
    return "calls" if functions_of(turn) else "others"


def _match(
    turns: Sequence[Turn], calling: Sequence[int], answering: Sequence[int], goes_on: bool
) -> Iterator[tuple[int, str]]:
    """Calls against the results behind them, by their ids. Where some have none, one result may answer all calls."""
    calls = [(place, call.get("id")) for place in calling for call in extra_of(turns[place])["tool_calls"]]
    results = [(place, extra_of(turns[place]).get("tool_call_id")) for place in answering]
    if any(own is None for _, own in (*calls, *results)):
        if len(results) > len(calls):
            yield results[len(calls)][0], "result_without_call"
        return
    waiting = Counter(str(own) for _, own in calls)
    waiting.subtract(str(own) for _, own in results)
    yield from ((place, "result_without_call") for place, own in results if waiting[str(own)] < 0)
    if goes_on:
        yield from ((place, "call_without_result") for place, own in calls if waiting[str(own)] > 0)
