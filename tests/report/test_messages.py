"""Messages for people, in pages, tables and on the console: no call, result or reasoning goes unseen."""

from __future__ import annotations

import pytest

from utils.data.turns import read_turns, show_value
from utils.report.messages import show_messages

CALL = {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": {"city": "Málaga", "days": 2}}}
TALK = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "How is it?", "name": "Ann"},
    {"role": "assistant", "content": None, "reasoning_content": "I look.", "tool_calls": [CALL]},
    {"role": "tool", "content": "cold", "tool_call_id": "c1"},
    {"role": "assistant", "content": "Cold.\nVery.", "thinking": "so"},
]
SHOWN = """System: Be brief.

User (Ann): How is it?

Assistant (reasoning): I look.
Assistant calls weather(city="Málaga", days=2)

Tool (weather): cold

Assistant (reasoning): so
Assistant: Cold.
Very."""


def test_who_says_what_thinks_what_and_calls_what():
    assert show_messages(TALK) == SHOWN
    assert show_value(read_turns(TALK, "m", "user")) == SHOWN


def test_a_text_and_a_turn_of_text_alone_are_their_text():
    assert show_messages("Hi") == show_value("Hi") == show_value([{"role": "assistant", "content": "Hi"}]) == "Hi"
    assert show_messages([{"role": "user", "content": "Hi"}]) == "User: Hi"
    assert (
        show_value([{"role": "user", "content": "Hi"}, {"role": "assistant", "content": ""}])
        == "User: Hi\n\nAssistant: "
    )


def test_arguments_that_are_no_object_are_shown_as_they_are():
    turn = {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "a = 1"}}, {"name": "g"}]}
    assert show_messages([turn]) == "Assistant calls f(a = 1)\nAssistant calls g()"


ODD = [
    *(None, 3, {"a": 1}, [1, None], [{}], [{"role": 3, "content": [1]}], [{"tool_calls": 3}]),
    [{"tool_calls": [3, {}, {"function": 3}, {"function": {"arguments": {"a": float("nan")}}}]}],
    [{"role": "tool", "tool_call_id": [1], "name": 3}],
]


@pytest.mark.parametrize("odd", ODD, ids=str)
def test_what_damaged_files_hold_is_shown_somehow(odd):
    assert isinstance(show_messages(odd), str)
