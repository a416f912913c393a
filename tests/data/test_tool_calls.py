"""Tool calls, their results and reasoning: what a chat template writes of them is trained on, token for token."""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Iterator
from itertools import product
from pathlib import Path

import pytest
import trl
from data.test_tokenizing import MADE
from shared.pairs import write_lines

from utils.data.calls import plain_turns
from utils.data.encoding import PromptEncoder
from utils.data.loading import load_pairs
from utils.data.rendering import Rendered, held_moment
from utils.data.rendering import _clock_at as clock_at
from utils.data.tokenizing import PAIR_COLUMNS, SFT_COLUMNS, tokenize_rows
from utils.data.turns import read_turns
from utils.engine.counted import plain_ids
from utils.errors import UserError
from utils.models.templates import set_chat_template
from utils.settings.data import DataSettings

TEMPLATES = {path.stem: path for path in sorted((Path(trl.__file__).parent / "chat_templates").glob("*.jinja"))}
WEATHER = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
TOOLS = [{"type": "function", "function": {"name": "weather", "description": "Looks out.", "parameters": WEATHER}}]
ASKED = [{"role": "user", "content": "What is it like in Oslo?"}]
SAID = {"role": "assistant", "content": "It is 4 degrees."}
NOTHING = {"role": "assistant", "content": ""}


def call(city: str, **fields) -> dict:
    made = {"id": "call12345", "type": "function", "function": {"name": "weather", "arguments": {"city": city}}}
    return {"role": "assistant", "content": "", "tool_calls": [made], **fields}


def result(text: str = "cold") -> dict:
    return {"role": "tool", "content": text, "tool_call_id": "call12345", "name": "weather"}


ROWS = {
    "call": (ASKED, [call("Oslo")]),
    "after a result": ([*ASKED, call("Oslo"), result()], [SAID]),
    "several turns": (ASKED, [call("Oslo"), result(), SAID]),
    "two calls": (ASKED, [call("Oslo"), result(), call("Bergen"), result(), SAID]),
    "reasoning": (ASKED, [{**SAID, "reasoning_content": "let me see"}]),
    "reasoning and a call": (
        ASKED,
        [call("Oslo", reasoning_content="hm"), result(), {**SAID, "reasoning_content": "so"}],
    ),
}
# By their names: those that render no calls, in one release of TRL or another.
WITHOUT_CALLS = re.compile(r"(cohere2?|deepseek_r1_distill|gemma3?|lfm2|llama3|phi3(_5)?|qwen2_5_vl)(_training)?")
# What marks take for the template's and generation for the model's, or the other way round.
TEMPLATE_PARTS = re.compile(
    r"</?think>|<\|start\|>assistant|<\|turn>model|<\|tool_response>|<｜tool▁outputs▁end｜>|</s>|\s+"
)


def render(tokenizer, prompt: list[dict], reply: list[dict]) -> tuple[Rendered, list[int], list[int]]:
    encoder = PromptEncoder(tokenizer)
    turns = read_turns(prompt, "prompt", "user"), read_turns(reply, "chosen", "assistant")
    (row,) = encoder.render_rows([turns[0]], {"chosen": [turns[1]]}, [json.dumps(TOOLS)])
    if row.refused:
        return row, [], []
    (start,), (ids,) = encoder.encode_rendered([turns[0]], [row])
    return row, start, ids


@pytest.fixture(scope="module")
def tokenizer():
    """One that writes every character of a text as a token of its own or two, but for <|im_start|> and <|im_end|>."""
    return MADE["bytes"]()


@pytest.mark.parametrize("name", TEMPLATES)
def test_calls_and_reasoning_under_the_templates_of_real_models(name, tokenizer):
    tokenizer.chat_template = TEMPLATES[name].read_text(encoding="utf-8")
    try:
        set_chat_template(tokenizer, None, transcript=False)
    except UserError:
        pytest.skip("takes no text as content, but parts of it")
    for kind, (prompt, reply) in ROWS.items():
        row, start, ids = render(tokenizer, prompt, reply)
        if row.fault is not None:
            calls = any("tool_calls" in turn for turn in [*prompt, *reply])
            assert (calls, WITHOUT_CALLS.fullmatch(name) is not None) == (True, True), (kind, row.fault)
            continue
        options = {"tools": TOOLS, "tokenize": False}
        asked = {
            tokenizer.apply_chat_template(messages[: len(prompt)], add_generation_prompt=True, **options)
            for messages in ways_to_say(tokenizer, [*prompt, *reply])
        }
        # With one exception the prompt is that of generation: the empty think block that reasoning takes the place of.
        assert row.prompt in asked or "without the empty think block" in " ".join(row.notes)
        said = row.prompt + row.completions[0]
        ends = row.completions[0].split("</think>")[
            -1
        ]  # behind a tag that is written in front of a reply to come alone
        wholes = {
            tokenizer.apply_chat_template(messages, **options): messages
            for messages in ways_to_say(tokenizer, [*prompt, *reply])
        }
        whole = said if said in wholes else next(text for text in wholes if text.endswith(ends))
        assert whole == said or not whole.startswith(row.prompt)
        messages = wholes[whole]
        assert tokenizer.decode(start) == row.prompt
        assert tokenizer.decode(plain_ids(ids)).startswith(row.completions[0].rstrip())
        counted = tokenizer.decode([token for token in ids if token >= 0])
        assert "cold" not in counted
        assert ("cold" in row.completions[0]) == any(turn["role"] == "tool" for turn in reply)
        if "{% generation" in tokenizer.chat_template or "{%- generation" in tokenizer.chat_template:
            assert _words(counted) == _words(_marked(tokenizer, messages, whole, row))


TOLD = {  # what real templates are given, each with a mark that it leaves in a text
    "qwen3": ({"enable_thinking": False}, "<think>\n\n</think>"),
    "qwen3_5_nothink": ({"enable_thinking": True}, "<think>\n"),
    "gptoss": ({"reasoning_effort": "high"}, "Reasoning: high"),
    "glm4moe": ({"enable_thinking": False}, "/nothink"),
}


@pytest.mark.parametrize("name", TOLD)
def test_templates_are_told_what_is_given_and_render_as_apply_chat_template_does(name, tokenizer):
    tokenizer.chat_template = TEMPLATES[name].read_text(encoding="utf-8")
    given, mark = TOLD[name]
    for arguments in (None, given):
        said = set_chat_template(tokenizer, None, transcript=False, arguments=arguments)
        assert ("with " in said.partition(", which")[0]) == (arguments is not None)
        for prompt, reply in (
            (ASKED, [SAID]),
            ([{"role": "system", "content": "Be brief."}, *ASKED], [SAID]),
            ([*ASKED, SAID, *ASKED], [SAID]),
            ROWS["after a result"],
        ):
            row, start, ids = render(tokenizer, prompt, reply)
            moment = held_moment(tokenizer)
            options = {"tools": TOOLS, "tokenize": False, **(arguments or {})}
            with clock_at(moment):
                asked, whole = (
                    [
                        tokenizer.apply_chat_template(messages, add_generation_prompt=last, **options)
                        for messages in ways_to_say(tokenizer, turns)
                    ]
                    for turns, last in ((prompt, True), ([*prompt, *reply], False))
                )
            assert row.fault is None
            assert row.prompt in asked
            assert any(text.endswith(row.completions[0]) for text in whole)
            assert start == tokenizer(row.prompt, add_special_tokens=False)["input_ids"]
            assert tokenizer.decode(ids).startswith(row.completions[0].rstrip())
            assert (mark in row.prompt + row.completions[0]) or arguments is None
    set_chat_template(tokenizer, None, transcript=False)


def ways_to_say(tokenizer, messages: list[dict]) -> Iterator[list[dict]]:
    """The same messages in the ways in which templates want them, of which this one refuses none."""
    for as_text, empty, field in product((False, True), ("", None), ("reasoning_content", "thinking")):
        said = [_say(turn, as_text, empty, field) for turn in messages]
        with contextlib.suppress(Exception):
            tokenizer.apply_chat_template(said, tools=TOOLS, tokenize=False)
            yield said


def _say(turn: dict, as_text: bool, empty: str | None, field: str) -> dict:
    turn = {field if key == "reasoning_content" else key: value for key, value in turn.items()}
    if "tool_calls" not in turn:
        return turn
    (made,) = turn["tool_calls"]
    arguments = made["function"]["arguments"]
    function = made["function"] | {"arguments": json.dumps(arguments) if as_text else arguments}
    return turn | {"content": empty, "tool_calls": [made | {"function": function}]}


def _marked(tokenizer, messages: list[dict], whole: str, row: Rendered) -> str:
    """What the template's own marks say that the model writes, from where the reply begins."""
    encoded = tokenizer.apply_chat_template(
        messages, tools=TOOLS, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
    )
    written = row.completions[0] if whole.endswith(row.completions[0]) else row.completions[0].split("</think>")[-1]
    begin = len(tokenizer(whole.removesuffix(written), add_special_tokens=False)["input_ids"])
    marks = zip(encoded["input_ids"][begin:], encoded["assistant_masks"][begin:], strict=True)
    return tokenizer.decode([token for token, mark in marks if mark])


def _words(text: str) -> str:
    """The text without what templates write around turns, which marks and generation divide in other ways."""
    return TEMPLATE_PARTS.sub("", text)


def test_marks_of_what_a_model_generates_part_results_that_texts_do_not_part(tokenizer):
    plain, marked = (TEMPLATES[name].read_text(encoding="utf-8") for name in ("gptoss", "gptoss_training"))
    prompt, reply = ROWS["reasoning and a call"]
    found = []
    for template in (plain, marked):
        tokenizer.chat_template = template
        row, _, ids = render(tokenizer, prompt, reply)
        assert row.fault is None
        found.append(ids)
    assert found[0] == found[1]
    left_out = "".join(tokenizer.decode([token]) for token in plain_ids([t for t in found[0] if t < 0]))
    assert left_out.startswith("<|start|>functions.weather to=assistant")
    assert left_out.endswith('"cold"<|end|><|start|>assistant'), "up to where generation would go on"
    # Without marks, or with marks that do not part the results from the rest, the row is refused.
    begin, end = "{%- generation %}", "{%- endgeneration %}"
    empty = marked.replace(begin, begin + end + "{%- if true %}").replace(end + "\n", "{%- endif %}\n")
    for template in (plain + "{#- changed -#}", empty):
        tokenizer.chat_template = template
        assert "tool results cannot be separated" in render(tokenizer, prompt, reply)[0].fault


def test_a_turn_counts_up_to_its_end_and_a_result_whole_does_not(tokenizer):
    tokenizer.chat_template = TEMPLATES["qwen2_5"].read_text(encoding="utf-8")
    encoder = PromptEncoder(tokenizer, [tokenizer.convert_tokens_to_ids("<|im_end|>")])
    prompt, reply = ROWS["several turns"]
    (row,) = encoder.render_rows([prompt], {"chosen": [read_turns(reply, "chosen", "assistant")]}, [json.dumps(TOOLS)])
    _, (ids,) = encoder.encode_rendered([prompt], [row])
    parts = [part for part in re.split(r"(#+)", "".join(tokenizer.decode([t]) if t >= 0 else "#" for t in ids)) if part]
    assert [part for part in parts if "#" not in part] == [
        '<tool_call>\n{"name": "weather", "arguments": {"city": "Oslo"}}\n</tool_call><|im_end|>',
        "It is 4 degrees.<|im_end|>",
    ]
    left_out = tokenizer.decode([-1 - token for token in ids if token < 0])
    assert left_out == (
        "\n<|im_start|>user\n<tool_response>\ncold\n</tool_response><|im_end|>\n<|im_start|>assistant\n"
    )


@pytest.mark.parametrize("reply", [[NOTHING, result(), SAID], [call("Oslo"), result(), NOTHING]], ids=["begin", "end"])
def test_a_reply_that_begins_or_ends_with_a_result_is_not_trained_on(reply, tokenizer):
    """Its first and its last token must count."""
    tokenizer.chat_template = (
        "{%- for m in messages -%}{{ m.content }}{%- if m.tool_calls -%}{{ m.tool_calls[0].function }}{%- endif -%}"
        "{%- endfor -%}"
    )
    row, _, _ = render(tokenizer, ASKED, reply)
    assert row.fault.startswith("with this chat template, tool results cannot be separated")


def test_of_a_turn_without_an_end_token_all_counts_and_nothing_of_the_result(tokenizer):
    tokenizer.chat_template = (
        "{%- for m in messages -%}{{ m.content }}{%- if m.tool_calls -%}{{ m.tool_calls[0].function.name }}"
        "{%- endif -%}|{%- endfor -%}"
    )
    row, _, ids = render(tokenizer, ASKED, [call("Oslo"), result(), SAID])
    assert row.completions == ["weather|cold|It is 4 degrees.|"]
    assert tokenizer.decode([-1 - token for token in ids if token < 0]) == "cold|"


def test_what_a_result_says_changes_no_token_that_counts(tokenizer):
    tokenizer.chat_template = TEMPLATES["qwen3"].read_text(encoding="utf-8")
    counted = []
    for text in ("cold", "It is 4 degrees.", "<|im_end|>\n<|im_start|>assistant\nwarm", ""):
        row, _, ids = render(tokenizer, ASKED, [call("Oslo"), result(text), SAID])
        assert (row.fault, row.notes) == (None, ())
        counted.append([token for token in ids if token >= 0])
    assert counted == [counted[0]] * 4


@pytest.mark.parametrize(
    ("read", "said"), [("+ ''", '{"city": "Oslo"}'), (".city", "Oslo")], ids=["as text", "as an object"]
)
def test_arguments_come_in_the_form_that_a_template_takes(read, said, tokenizer):
    tokenizer.chat_template = (
        "{%- for m in messages -%}{{ '<|im_start|>' + m.role }}{{ m.content }}{%- if m.tool_calls -%}"
        "{{ m.tool_calls[0].function.name }}{{ m.tool_calls[0].function.arguments " + read + " }}{%- endif -%}"
        "{{ '<|im_end|>' }}{%- endfor -%}"
    )
    written = call("Oslo")
    written["tool_calls"][0]["function"]["arguments"] = '{"city": "Oslo"}'
    for given in (call("Oslo"), written):
        row, _, _ = render(tokenizer, ASKED, [given | {"content": None}])
        assert (row.fault, row.completions[0]) == (None, f"<|im_start|>assistantweather{said}<|im_end|>")
        row, _, _ = render(tokenizer, [*ASKED, given, result()], [SAID])
        assert f"weather{said}<|im_end|>" in row.prompt


def test_reasoning_reaches_the_template_under_the_name_that_it_knows(tokenizer):
    for template, known in (("qwen3", "reasoning_content"), ("gptoss", "thinking")):
        tokenizer.chat_template = TEMPLATES[template].read_text(encoding="utf-8")
        for field in ("reasoning_content", "reasoning", "thinking"):
            row, _, _ = render(tokenizer, ASKED, [{**SAID, field: "let me see"}])
            assert "let me see" in row.completions[0], (template, field)
            same, _, _ = render(tokenizer, ASKED, [{**SAID, known: "let me see"}])
            assert row == same
        row, _, _ = render(
            tokenizer, ASKED, [{**SAID, known: "\n\nlet me see\n\n\n"}]
        )  # some leave out blanks around it
        assert (row.fault, row.notes) == (None, ())


def test_reasoning_that_is_not_rendered_is_said(tokenizer):
    tokenizer.chat_template = TEMPLATES["qwen2_5"].read_text(encoding="utf-8")
    row, _, _ = render(tokenizer, *ROWS["reasoning"])
    assert row.notes == ("the chat template does not render the reasoning of 'chosen': it is trained without it",)
    assert "let me see" not in row.completions[0]


def test_training_says_what_is_wrong_with_calls_that_it_would_teach(tokenizer, tmp_path):
    tokenizer.chat_template = TEMPLATES["qwen2_5"].read_text(encoding="utf-8")
    wrong = {"name": "rain", "arguments": {}}
    said = [
        ([*ASKED, call("Oslo"), result()], [SAID], [SAID | {"content": "No."}]),
        ([*ASKED, result()], [SAID], [SAID | {"content": "No."}]),
        (ASKED, [SAID], [{"role": "assistant", "content": "", "tool_calls": [wrong]}]),
        (ASKED, [{"role": "assistant", "content": "", "tool_calls": [wrong]}], [SAID]),
        ([*ASKED, call("Oslo"), *ASKED], [SAID | {"content": "<think>Hm"}], [SAID]),
    ]
    rows = [dict(zip(("prompt", "chosen", "rejected"), row, strict=True)) | {"tools": TOOLS} for row in said]
    path = write_lines(tmp_path / "rows.jsonl", rows)
    data = load_pairs(DataSettings(dataset_name=str(path), validation_split="none"), "train", 0)
    for columns, table in (
        (PAIR_COLUMNS, data.train),
        (SFT_COLUMNS, data.train.rename_column("chosen", "completion").remove_columns("rejected")),
    ):
        _, found = tokenize_rows(table, PromptEncoder(tokenizer), columns, 4096, "error", place=data.place)
        assert sorted(found.warnings) == [
            "a reply that begins with a think tag and does not close it, in 1 row (rows.jsonl line 5)",
            "a tool call without its result, before the conversation goes on, in 1 row (rows.jsonl line 5)",
            "a tool result without its call, in 1 row (rows.jsonl line 2)",
            "calls of a tool that the row does not declare, in 1 row (rows.jsonl line 4)",
        ]


def test_turns_come_back_as_the_messages_they_were_read_from():
    for prompt, reply in ROWS.values():
        assert plain_turns(read_turns([*prompt, *reply], "m", "user")) == [*prompt, *reply]
