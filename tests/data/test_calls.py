"""What a turn has besides its text, one function at a time: calls in every form, results, reasoning, what tells turns
apart."""

from __future__ import annotations

import json

import pytest

from utils.data.calls import (
    BadRow,
    argument_texts,
    is_nothing,
    keeps_extra,
    make_turn,
    read_arguments,
    read_calls,
    read_extra,
    result_text,
    said_by,
    turn_key,
    whole_message,
)
from utils.data.turns import read_turns

PLAIN = {"name": "f", "arguments": {"x": 1, "y": "2"}}
CALL = {"type": "function", "function": PLAIN}


@pytest.mark.parametrize(
    "given",
    [
        PLAIN,
        CALL,
        [PLAIN],
        json.dumps(CALL),
        json.dumps([PLAIN]),
        {"name": "f", "arguments": '{"x": 1, "y": "2"}'},
        {"type": None, "id": None, "function": {**PLAIN, "description": None}},
    ],
)
def test_a_call_is_one_whatever_its_form(given):
    assert read_calls(given, "chosen") == [CALL]


def test_what_stands_around_a_call_is_kept():
    assert read_calls({"id": "c1", "index": 0, **PLAIN}, "chosen") == [{**CALL, "id": "c1", "index": 0}]


@pytest.mark.parametrize(
    ("given", "fault"),
    [
        ("f(x)", "tool calls that are not JSON"),
        pytest.param("[" * 100_000, "tool calls that are not JSON", id="deep"),
        ([PLAIN, "f"], "a tool call that is a text, not an object"),
        ({"function": {"name": ""}}, "without the name of a function"),
        ({"name": 3}, "without the name of a function"),
        ({"function": None, "id": "c"}, "without the name of a function"),
    ],
)
def test_what_is_no_call_is_refused(given, fault):
    with pytest.raises(BadRow, match=fault):
        read_calls(given, "chosen")


@pytest.mark.parametrize(
    ("given", "read"),
    [
        (None, {}),
        ("", {}),
        ([], {}),
        ("{}", {}),
        ({"city": None}, {"city": None}),  # an argument that is null is one
        ('{"a": [1]}', {"a": [1]}),
        ('["a"]', '["a"]'),
        ("3", "3"),
        ("city=Oslo", "city=Oslo"),
        (["a"], ["a"]),
    ],
)
def test_arguments_are_an_object_where_they_are_one(given, read):
    assert read_arguments(given) == read


def test_nothing_is_what_a_table_adds():
    for value in (None, "", [], {}, {"a": None}, [{"a": [None, ""]}]):
        assert is_nothing(value), value
    for value in (0, False, " ", [0], {"a": {"b": "c"}, "d": None}):
        assert not is_nothing(value), value


def test_only_the_assistant_calls():
    for role in ("user", "system", "tool"):
        with pytest.raises(BadRow, match=f"a turn of the {role} with tool calls"):
            read_extra({"tool_calls": [PLAIN]}, role, "prompt")
    assert read_extra({"tool_calls": [PLAIN], "reasoning": ""}, "assistant", "prompt") == {"tool_calls": [CALL]}
    with pytest.raises(BadRow, match="whose 'tool_call_id' is a number, not text"):
        read_extra({"tool_call_id": 3}, "tool", "prompt")


def test_of_two_fields_for_calls_the_newer_one_is_read():
    other = {"name": "g", "arguments": {}}
    assert read_extra({"function_call": PLAIN}, "assistant", "chosen") == {"tool_calls": [CALL]}
    both = {"function_call": other, "tool_calls": [PLAIN]}
    assert read_extra(both, "assistant", "chosen") == {"tool_calls": [CALL]}


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (None, None),
        ("4", "4"),
        (4, "4"),
        ({"type": "text", "text": "4"}, {"type": "text", "text": "4"}),
        ({"type": "rain", "mm": 4}, '{"type": "rain", "mm": 4}'),
        ([{"type": "text", "text": "ø"}], [{"type": "text", "text": "ø"}]),
        ([{"city": "Tromsø"}], '[{"city": "Tromsø"}]'),
        ([1, 2], "[1, 2]"),
    ],
)
def test_a_result_is_text_or_its_parts(content, text):
    assert result_text(content) == text


@pytest.mark.parametrize("role", ["tool", "function"])
def test_the_result_in_a_turn_is_text_too(role):
    (turn,) = read_turns([{"role": role, "name": "f", "content": {"mm": 4}}], "prompt", "user")
    assert whole_message(turn) == {"role": role, "content": '{"mm": 4}', "name": "f"}


def test_a_turn_gives_its_message_back():
    for content in (None, "", "So:"):
        turn = make_turn("assistant", content, {"tool_calls": [CALL], "reasoning": "hm"})
        assert turn["content"] == (content or "")
        given = {"role": "assistant", "content": content, "tool_calls": [CALL], "reasoning": "hm"}
        assert whole_message(turn) == given
    assert make_turn("user", "So:", {}) == {"role": "user", "content": "So:"}


def test_one_turn_of_many_has_more_than_text():
    plain, called = make_turn("user", "q", {}), make_turn("assistant", None, {"tool_calls": [CALL]})
    assert keeps_extra([plain, called])
    assert not keeps_extra([plain])
    assert not keeps_extra("q")


def test_all_that_a_turn_says_counts_as_said():
    turn = make_turn("assistant", "So:", {"tool_calls": [CALL], "thinking": "hm"})
    assert said_by(turn).split("\n") == ["hm", "So:", json.dumps(PLAIN)]
    assert said_by(make_turn("assistant", None, {})) == ""
    assert sorted(argument_texts({"a": ["b", {"c": "d"}], "e": 3, "f": "g"})) == ["b", "d", "g"]


def test_turns_are_told_apart_by_what_they_say():
    def key(content="So:", arguments=PLAIN["arguments"], reasoning="hm", **call):
        called = {**CALL, **call, "function": {"name": "f", "arguments": arguments}}
        return turn_key(make_turn("assistant", content, {"tool_calls": [called], "reasoning": reasoning}))

    assert key() == key(id="c2") == key(arguments={"y": "2", "x": 1}) == key(content=" So:\n") == key(reasoning="hm ")
    assert (
        len({key(), key(content="No:"), key(arguments={"x": 2, "y": "2"}), key(reasoning="ah"), key(arguments={})}) == 5
    )


def test_a_turn_without_calls_has_none_however_a_table_writes_that():
    for nothing in (None, [], {}, "", "null", "[]", "{}"):
        for role in ("user", "assistant"):
            message = {"role": role, "content": "So:", "tool_calls": nothing, "function_call": nothing}
            assert read_turns([message], "chosen", role) == [{"role": role, "content": "So:"}], nothing


def test_a_role_that_calls_keeps_what_else_its_turn_says():
    message = {"from": "function_call", "value": json.dumps(PLAIN), "reasoning_content": "hm"}
    (turn,) = read_turns([message], "chosen", "assistant")
    assert whole_message(turn) == {
        "role": "assistant", "content": None, "tool_calls": [CALL], "reasoning_content": "hm",
    }  # fmt: skip
    with pytest.raises(BadRow, match="tool calls in two places"):
        read_turns([message | {"tool_calls": [PLAIN]}], "chosen", "assistant")


@pytest.mark.parametrize("field", ["weight", "loss_weight"])
def test_a_reply_that_is_not_meant_to_be_learnt_is_refused(field):
    asked, said = {"role": "user", "content": "q", field: 0}, {"role": "assistant", "content": "a", field: 1}
    assert len(read_turns([asked, said | {field: 0}, asked, said], "messages", "user")) == 4
    assert len(read_turns([asked], "prompt", "user")) == 1
    for zero in (0, 0.0):
        with pytest.raises(BadRow, match="ends with a turn of weight 0"):
            read_turns([asked, said | {field: zero}], "messages", "user")
