"""--reasoning: what becomes of the reasoning of replies under the chat templates of real models."""

from __future__ import annotations

import json

import pytest
from data.test_tokenizing import MADE
from data.test_tool_calls import ASKED, SAID, TEMPLATES, call, render, result

from utils.data.thoughts import find_thoughts, split_block, thought_of, without_thought
from utils.data.turns import read_turns
from utils.engine.counted import plain_ids
from utils.errors import UserError
from utils.models.templates import set_chat_template

THOUGHT = "first the sky, then the sea"
THINKING = {
    "in a field": (ASKED, [{**SAID, "reasoning_content": THOUGHT}]),
    "in the text": (ASKED, [{**SAID, "content": f"<think>\n{THOUGHT}\n</think>\n\n{SAID['content']}"}]),
    "before a call": (ASKED, [call("Oslo", reasoning_content=THOUGHT)]),
    "in several turns": (
        ASKED,
        [call("Oslo", reasoning_content=THOUGHT), result(), {**SAID, "reasoning_content": THOUGHT + " again"}],
    ),
    "in an earlier turn too": (
        [*ASKED, {**SAID, "reasoning_content": THOUGHT}, *ASKED],
        [{**SAID, "reasoning_content": THOUGHT}],
    ),
}


@pytest.fixture(scope="module")
def tokenizer():
    return MADE["bytes"]()


def rendered(tokenizer, how: str | None, prompt: list[dict], reply: list[dict]):
    """The row with --reasoning; None where it is a bad row."""
    set_chat_template(tokenizer, None, transcript=False, reasoning=how)
    row, start, ids = render(tokenizer, prompt, reply)
    return None if row.fault is not None else (row, start, ids)


def reworded(turns: list[dict]) -> list[dict]:
    return json.loads(json.dumps(turns).replace(THOUGHT, "it is cold; why, nobody can tell"))


@pytest.mark.parametrize("name", TEMPLATES)
def test_reasoning_is_counted_masked_or_dropped_under_the_templates_of_real_models(name, tokenizer):
    tokenizer.chat_template = TEMPLATES[name].read_text(encoding="utf-8")
    try:
        set_chat_template(tokenizer, None, transcript=False)
    except UserError:
        pytest.skip("takes no text as content, but parts of it")
    for kind, (prompt, reply) in THINKING.items():
        kept, masked, dropped = (rendered(tokenizer, how, prompt, reply) for how in ("keep", "mask", "drop"))
        bare = rendered(tokenizer, None, *([without_thought(turn) for turn in turns] for turns in (prompt, reply)))
        assert (dropped is None) == (bare is None), kind
        if dropped is not None:
            assert THOUGHT not in dropped[0].prompt + dropped[0].completions[0], kind
            assert dropped[1:] == bare[1:], kind
            assert dropped[0].reasoned == 1
        assert (kept is None) == (masked is None), kind
        if kept is None:
            continue
        assert (kept[1], plain_ids(kept[2])) == (masked[1], plain_ids(masked[2])), kind
        counted = [token for token in masked[2] if token >= 0]
        assert THOUGHT not in tokenizer.decode(counted), kind
        said = kept[0].completions[0].count(THOUGHT)
        left_out = "does not render the reasoning" in " ".join(kept[0].notes)
        assert left_out == (said < sum(map(bool, map(thought_of, reply)))), kind
        assert tokenizer.decode([token for token in kept[2] if token >= 0]).count(THOUGHT) == said, kind
        # What it says changes no token that counts.
        other = rendered(tokenizer, "mask", prompt, reworded(reply))
        assert [token for token in other[2] if token >= 0] == counted, kind
        assert (other[2] != masked[2]) == (said > 0), kind


def test_think_tags_around_masked_reasoning_do_not_count_and_the_answer_does(tokenizer):
    tokenizer.chat_template = TEMPLATES["qwen3"].read_text(encoding="utf-8")
    _, _, ids = rendered(tokenizer, "mask", *THINKING["in a field"])
    parts = "".join(tokenizer.decode([token]) if token >= 0 else "#" for token in ids).strip("#")
    assert parts.strip() == f"{SAID['content']}<|im_end|>\n</s>"
    assert (ids[0] < 0, ids[-1] >= 0) == (True, True)


def test_reply_that_is_reasoning_alone_is_a_bad_row_once_that_is_dropped(tokenizer):
    tokenizer.chat_template = TEMPLATES["qwen3"].read_text(encoding="utf-8")
    set_chat_template(tokenizer, None, transcript=False, reasoning="drop")
    row, _, _ = render(tokenizer, ASKED, [{"role": "assistant", "content": "<think>Hm.</think>"}])
    assert row.fault == "--reasoning drop leaves nothing of 'chosen': it is reasoning alone"


def test_keep_has_a_template_render_the_reasoning_of_earlier_turns_where_it_can(tokenizer):
    prompt, reply = THINKING["in an earlier turn too"]
    for name, switch in (("qwen3_6", "preserve_thinking true"), ("nemotron_3_nano", "truncate_history_thinking false")):
        tokenizer.chat_template = TEMPLATES[name].read_text(encoding="utf-8")
        assert THOUGHT not in rendered(tokenizer, None, prompt, reply)[0].prompt
        assert THOUGHT in rendered(tokenizer, "keep", prompt, reply)[0].prompt
        assert switch in set_chat_template(tokenizer, None, transcript=False, reasoning="keep")


@pytest.mark.parametrize(
    ("content", "thought", "rest"),
    [
        ("<think>a</think>b", "a", "b"),
        ("a</think>b", "a", "b"),
        ("<reasoning>a</reasoning>b", "a", "b"),
        ("[THINK]a[/THINK]b", "a", "b"),
        ("<think>a", "", "<think>a"),
        ("b <think>a</think>", "", "b <think>a</think>"),
        ("b", "", "b"),
    ],
)
def test_think_block_at_the_beginning_of_a_text(content, thought, rest):
    assert split_block(content) == (thought, rest)


def test_turn_without_its_reasoning_keeps_all_else():
    for turn in read_turns([call("Oslo", reasoning_content="a"), {**SAID, "thinking": "b"}], "m", "assistant"):
        bare = without_thought(turn)
        assert (thought_of(turn) != "", thought_of(bare)) == (True, "")
        assert bare["content"] == turn["content"]
    asked = {"role": "user", "content": "<think>a</think>b"}
    assert (without_thought(asked), thought_of(asked)) == (asked, "")


def test_words_of_reasoning_that_stand_in_a_result_are_found_in_their_own_turn():
    reply = [call("Oslo"), result("hm"), {**SAID, "reasoning_content": "hm"}]
    text = "CALL<|end|>RESULT hm<|go|><think>\nhm\n</think>It is 4 degrees."
    at = text.index("<think>")
    assert find_thoughts(text, reply, ((4, text.index("<think>")),)) == ((at, text.index("It is")),)
