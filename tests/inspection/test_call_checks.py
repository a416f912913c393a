"""The verb `data` on conversations with tools: what is planted in calls, results and reasoning is found, no more."""

from __future__ import annotations

import json

import pytest
from shared.findings import counts_of, make_texts, places_of
from shared.pairs import write_lines

from utils.data.call_faults import CALL_FAULTS, measure_reasoning

SCHEMA = {"type": "object", "properties": {"city": {"type": "string"}, "day": {"type": "string"}}, "required": ["city"]}
TOOLS = [{"type": "function", "function": {"name": "weather", "parameters": SCHEMA}}]


def say(text: str | None, role: str = "assistant", **fields) -> dict:
    return {"role": role, "content": text, **fields}


def call(*ids: str | None, name: str = "weather", arguments="{}") -> dict:
    function = {"name": name, "arguments": {"city": "Oslo"} if arguments == "{}" else arguments}
    calls = [{"type": "function", "function": function} | ({"id": own} if own else {}) for own in ids or (None,)]
    return say(None, tool_calls=calls)


def result(own: str | None = None, text: str = "4 degrees") -> dict:
    return say(text, "tool", **({"tool_call_id": own} if own else {}))


def make_row(number: int, prompt=(), chosen=(), rejected=(), tools=TOOLS) -> dict:
    """A pair with nothing in common with others, in which these turns stand behind the question and as replies."""
    text = make_texts(1, seed=number)[0]
    return {
        "prompt": [say(text["prompt"], "user"), *prompt],
        "chosen": [*chosen, say(text["chosen"])],
        "rejected": [*rejected, say(text["rejected"])],
        "tools": tools,
    }


CLEAN = {
    "a call answered by its id": {"prompt": [call("a"), result("a")]},
    "two calls answered in the other order": {"prompt": [call("a", "b"), result("b"), result("a")]},
    "an id that is used again": {"prompt": [call("a"), result("a"), call("a"), result("a")]},
    "two calls answered in one turn": {"prompt": [call(None, None), result()]},
    "calls of two turns, then their results": {"prompt": [call("a"), call("b"), result("a"), result("b")]},
    "within a reply": {"chosen": [call("a"), result("a")], "rejected": [call("b"), result("b")]},
    "calls and results in texts": {"prompt": [say("[weather(city='Oslo')]"), result()], "tools": None},
    "a result in the person's turn": {"prompt": [call(), say("<tool_response>4</tool_response>", "user")]},
    "reasoning on both sides": {
        "chosen": [call("a") | {"reasoning_content": "hm"}, result("a")],
        "rejected": [say("<think>hm</think>"), say("so")],
    },
    "an empty think block": {"rejected": [say("<think>\n\n</think>\n\nyes")]},
    "tags that are spoken of": {"chosen": [say("Write <think> and <tools> there.")]},
}
PLANTED = {
    "unreadable_call": [
        {"prompt": [call("a", arguments="city = Oslo"), result("a")]},
        {"chosen": [call("a", arguments="[1]"), result("a")]},
        {"chosen": [say("<tool_call>weather(Oslo)</tool_call>")]},
    ],
    "undeclared_tool": [{"prompt": [call("a", name="whether"), result("a")]}],
    "missing_argument": [{"chosen": [call("a", arguments={"day": "Monday"}), result("a")]}],
    "rejected_missing_argument": [{"rejected": [call("a", arguments={}), result("a")]}],
    "result_without_call": [
        {"prompt": [call("a"), result("b"), call("c"), result("c")]},
        {"prompt": [call("a"), result("a"), result("a")]},
        {"prompt": [call(), result(), result()]},
        {"prompt": [result()], "tools": None},
        {"prompt": [call("a"), result("a"), say("so"), result("a")]},
    ],
    "call_without_result": [
        {"prompt": [call("a"), say("and?", "user")]},
        {"prompt": [call("a", "b"), result("b")]},
        {"chosen": [call("a")]},
    ],
    "open_think": [{"chosen": [say("<think> Let me see.")]}],
    "rejected_open_think": [{"rejected": [say("[THINK] Let me see.")]}],
    "one_sided_reasoning": [{"chosen": [say("<think>hm</think> yes")]}, {"rejected": [say("yes", thinking="hm")]}],
    "calls_without_tools": [{"prompt": [call("a"), result("a")], "tools": None}],
    "tools_twice": [{"prompt": [say("You have <tools>[]</tools>", "system")]}],
}
# One fault that is another one too: what is thought on one side alone is not closed, a result answers nothing.
TOO = {"one_sided_reasoning": 2, "call_without_result": 1}


def inspect(run_script, tmp_path, rows: list[dict], *flags) -> tuple[int, dict, str]:
    path = write_lines(tmp_path / "rows.jsonl", rows)
    code, out, err = run_script("data", "--dataset_name", path, "--json_file", tmp_path / "found.json", *flags)
    assert err == ""
    return code, json.loads((tmp_path / "found.json").read_text(encoding="utf-8")), out


def test_conversations_in_order_give_no_finding(run_script, tmp_path):
    rows = [make_row(number, **parts) for number, parts in enumerate(CLEAN.values())]
    code, record, _ = inspect(run_script, tmp_path, rows)
    assert (code, record["findings"]) == (0, [])


def test_each_planted_fault_is_found_with_its_line_and_left_out_on_request(run_script, tmp_path):
    rows, lines = [], {}
    for name, plants in PLANTED.items():
        for parts in plants:
            rows.append(make_row(len(rows), **parts))
            lines.setdefault(name, []).append(len(rows))
    clean = tmp_path / "clean.jsonl"
    code, record, out = inspect(run_script, tmp_path, rows, "--output_file", clean, "--remove", "bad_calls")
    assert code == 3
    assert counts_of(record) == {name: len(own) + TOO.get(name, 0) for name, own in lines.items()}
    for name, own in lines.items():
        if name not in TOO:
            assert places_of(record, name) == f"rows.jsonl line {', '.join(map(str, own))}"
    assert {finding["name"] for finding in record["findings"] if finding["severity"] == "problem"} == set(CALL_FAULTS)
    assert "calls of a tool that the row does not declare" in out
    bad = {line for name in CALL_FAULTS for line in lines.get(name, [])}
    assert len(clean.read_text(encoding="utf-8").splitlines()) == len(rows) - len(bad)


def test_lengths_are_counted_without_reasoning_too(run_script, tmp_path):
    rows = make_texts(120)
    for number, row in enumerate(rows):
        row["chosen"], row["rejected"] = "a" * 20 + str(number), "b" * 30 + str(number)
        if number < 110:
            row["chosen"] = f"<think>{'hm ' * 20}</think>\n\n{row['chosen']}"
    rows[119]["chosen"] = "<think>" + "a" * 40
    page = tmp_path / "page.html"
    _, record, out = inspect(run_script, tmp_path, rows, "--report_file", page)
    counts = counts_of(record)
    assert {name: counts[name] for name in ("open_think", "one_sided_reasoning")} == {
        "open_think": 1,
        "one_sided_reasoning": 111,
    }
    details = {finding["name"]: finding["details"] for finding in record["findings"]}
    assert details["one_sided_reasoning"] == {"chosen": 111, "rejected": 0}
    rules = {rule["name"]: (rule["unlike"], rule["right"]) for rule in record["shortcuts"]}
    assert (rules["longer"], rules["longer_answer"]) == ((120, 111), (120, 0))
    assert {"shortcut_longer", "shortcut_longer_answer"} <= set(counts)
    assert record["lengths"]["characters_without_reasoning"]["chosen"]["max"] == 23
    assert "reasoning   without it: median" in out
    assert "Characters without reasoning" in page.read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("reply", "characters"),
    [
        ("yes", 0),
        ("<think>hm</think>\n\nyes", 19),
        ("hm</think> yes", 11),
        ("<think>\n\n</think>\n\nyes", 0),
        ("[THINK]hm", 9),
        ("I write <think> there.", 0),
        ([say("<think>hm</think>yes"), say("yes", reasoning="so"), result(text="a</think>b")], 20),
    ],
)
def test_reasoning_is_what_stands_in_its_field_or_tags(reply, characters):
    assert measure_reasoning(reply) == characters
