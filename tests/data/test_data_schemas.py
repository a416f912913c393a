"""Known shapes of data become one shape: the expected rows are typed out; the real files are read where present."""

from __future__ import annotations

import gzip
import json
from collections import Counter
from pathlib import Path

import datasets
import jinja2
import pytest
from shared.runs import REAL_DATA

from utils.data.conversion import convert_rows
from utils.data.loading import load_pairs
from utils.data.schemas import find_reading
from utils.data.turns import BadRow, split_transcript
from utils.errors import UserError
from utils.models.templates import TRANSCRIPT_TEMPLATE
from utils.settings.data import DataSettings

REAL = REAL_DATA / "preferences"
needs_real_data = pytest.mark.skipif(not REAL.is_dir(), reason="the real data is not here (DPO_REAL_DATA)")


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


def table(rows: list[dict]) -> datasets.Dataset:
    return datasets.Dataset.from_dict({name: [row.get(name) for row in rows] for name in rows[0]})


def read(rows: list[dict], verb: str = "train", **columns):
    settings = DataSettings(dataset_name="pairs.jsonl", **columns)
    reading = find_reading(table(rows), settings, verb)
    return reading, convert_rows(table(rows), reading).to_list()


def converted(row: dict, verb: str = "train", **columns) -> dict:
    """The one converted row; row 0 and no reason."""
    _, (result,) = read([row], verb, **columns)
    assert (result.pop("row"), result.pop("reason")) == (0, None)
    return result


def reasons(rows: list[dict], verb: str = "train", **columns) -> list[str | None]:
    return [row["reason"] for row in read(rows, verb, **columns)[1]]


def fault(row: dict, verb: str = "train", **columns) -> str:
    with pytest.raises(UserError) as error:
        read([row], verb, **columns)
    return str(error.value)


def turns(*texts: str) -> list[dict]:
    """Turns from "u: text", "a: text", "s: text"."""
    roles = {"u": "user", "a": "assistant", "s": "system"}
    return [{"role": roles[text[0]], "content": text[3:]} for text in texts]


def sharegpt(*texts: str) -> list[dict]:
    names = {"user": "human", "assistant": "gpt", "system": "system"}
    return [{"from": names[turn["role"]], "value": turn["content"]} for turn in turns(*texts)]


ONE_TURN = {"prompt": turns("u: q"), "chosen": turns("a: good"), "rejected": turns("a: bad")}
TWO_TURNS = {"prompt": turns("u: q", "a: r", "u: s"), "chosen": turns("a: good"), "rejected": turns("a: bad")}
WITH_SYSTEM = {"prompt": turns("s: be", "u: q"), "chosen": turns("a: good"), "rejected": turns("a: bad")}
TEXTS = {"prompt": "q", "chosen": "good", "rejected": "bad"}

PAIRS = {
    "texts": (TEXTS, TEXTS),
    "texts with more columns": (TEXTS | {"score": 1.5, "id": "x"}, TEXTS),
    "question": ({"question": "q", "chosen": "good", "rejected": "bad"}, TEXTS),
    "messages": (ONE_TURN, ONE_TURN),
    "prompt text, replies as messages": (ONE_TURN | {"prompt": "q"}, ONE_TURN),
    "prompt text, whole dialogues": (
        {"prompt": "q", "chosen": turns("u: q", "a: good"), "rejected": turns("u: q", "a: bad")},
        ONE_TURN,
    ),
    "prompt text, whole longer dialogues": (
        {
            "prompt": "q",
            "chosen": turns("u: q", "a: r", "u: s", "a: good"),
            "rejected": turns("u: q", "a: r", "u: s", "a: bad"),
        },
        TWO_TURNS,
    ),
    "prompt text, dialogues with a system turn": (
        {"prompt": "q", "chosen": turns("s: be", "u: q", "a: good"), "rejected": turns("s: be", "u: q", "a: bad")},
        WITH_SYSTEM,
    ),
    "prompt text, replies after a system turn": (
        {"prompt": "q", "chosen": turns("s: be", "a: good"), "rejected": turns("s: be", "a: bad")},
        WITH_SYSTEM,
    ),
    "prompt messages, replies as texts": (TWO_TURNS | {"chosen": "good", "rejected": "bad"}, TWO_TURNS),
    "prompt messages repeated in the replies": (
        {
            "prompt": turns("u: q"),
            "chosen": turns("u: q", "a: good"),
            "rejected": turns("u: q", "a: bad"),
        },
        ONE_TURN,
    ),
    "a prompt that ends in the assistant's words": (
        {
            "prompt": turns("u: q", "a: Well,"),
            "chosen": turns("u: q", "a: Well,", "a: good"),
            "rejected": turns("u: q", "a: Well,", "a: bad"),
        },
        {"prompt": turns("u: q", "a: Well,"), "chosen": turns("a: good"), "rejected": turns("a: bad")},
    ),
    "no prompt column": ({"chosen": turns("u: q", "a: good"), "rejected": turns("u: q", "a: bad")}, ONE_TURN),
    "no prompt column, two turns": (
        {
            "chosen": turns("u: q", "a: r", "u: s", "a: good"),
            "rejected": turns("u: q", "a: r", "u: s", "a: bad"),
        },
        TWO_TURNS,
    ),
    "transcripts": (
        {
            "chosen": "\n\nHuman: q\n\nAssistant: r\n\nHuman: s\n\nAssistant: good",
            "rejected": "\n\nHuman: q\n\nAssistant: r\n\nHuman: s\n\nAssistant: bad",
        },
        TWO_TURNS,
    ),
    "OpenAI": (
        {
            "input": {"messages": turns("s: be", "u: q")},
            "preferred_output": turns("a: good"),
            "non_preferred_output": turns("a: bad"),
        },
        WITH_SYSTEM,
    ),
    "system column": ({"system": "be", "question": "q", "chosen": "good", "rejected": "bad"}, WITH_SYSTEM),
    "empty system column": (TEXTS | {"system": " "}, ONE_TURN),
    "system column beside dialogues": (
        {"system": "be", "chosen": turns("u: q", "a: good"), "rejected": turns("u: q", "a: bad")},
        WITH_SYSTEM,
    ),
    "ShareGPT": (
        {"chosen": sharegpt("s: be", "u: q", "a: good"), "rejected": sharegpt("s: be", "u: q", "a: bad")},
        WITH_SYSTEM,
    ),
    "parts of text": (
        {
            "prompt": "q",
            "chosen": [{"role": "assistant", "content": [{"type": "text", "text": "good"}]}],
            "rejected": [{"role": "assistant", "content": [{"type": "text", "text": "bad"}]}],
        },
        ONE_TURN,
    ),
}


@pytest.mark.parametrize("name", PAIRS)
def test_pairs_of_every_shape(name):
    row, expected = PAIRS[name]
    assert converted(row) == expected
    single = converted(row, "sft")
    assert single == {"prompt": expected["prompt"], "completion": expected["chosen"]}


def test_tools_are_kept_as_json_without_the_nulls_of_other_rows():
    def row(tools):
        replies = {"preferred_output": turns("a: good"), "non_preferred_output": turns("a: bad")}
        return {"input": {"messages": turns("u: q"), "tools": tools}, **replies}

    _, rows = read([row([{"name": "f", "a": 1}, {"name": "g", "b": "ü"}]), row(None)])
    assert [r["tools"] for r in rows] == ['[{"name": "f", "a": 1}, {"name": "g", "b": "ü"}]', None]


def test_mapped_columns_reach_into_nested_fields():
    row = {"question": {"id": 1, "full_text": "q"}, "answer_0": "good", "answer_1": "bad", "prompt": "another"}
    columns = {"prompt_column": "question.full_text", "chosen_column": "answer_0", "rejected_column": "answer_1"}
    assert converted(row, **columns) == TEXTS
    swapped = columns | {"chosen_column": "answer_1", "rejected_column": "answer_0"}
    assert converted(row, **swapped) == TEXTS | {"chosen": "bad", "rejected": "good"}
    conversations = {
        "conversations": sharegpt("u: q"),
        "chosen": sharegpt("a: good")[0],
        "rejected": sharegpt("a: bad")[0],
    }
    assert converted(conversations, prompt_column="conversations") == ONE_TURN


def test_columns_whose_own_names_have_dots():
    row = {"prompt": "q", "a.b": {"c": "good"}, "a": {"b": None, "d": "bad"}}
    assert converted(row, chosen_column="a.b.c", rejected_column="a.d") == TEXTS
    del row["a"]
    assert converted(row | {"rejected": "bad"}, chosen_column="a.b.c") == TEXTS


def test_a_system_column_stands_before_a_transcript():
    row, expected = PAIRS["transcripts"]
    with_system = expected | {"prompt": turns("s: be brief") + expected["prompt"]}
    assert converted(row | {"system": "be brief"}) == with_system
    assert converted(row | {"system": ""}) == expected


def test_a_missing_column_is_named_with_the_nearest():
    row = {"question": {"full_text": "q"}, "response_j": "a", "response_k": "b"}
    names = {"prompt_column": "question.fulltext", "chosen_column": "respons_j", "rejected_column": "response_k"}
    assert fault(row, **names).splitlines() == [
        "--prompt_column question.fulltext: no such column; did you mean question.full_text? "
        "the data has: question, response_j, response_k, question.full_text",
        "--chosen_column respons_j: no such column; did you mean response_j? "
        "the data has: question, response_j, response_k, question.full_text",
    ]


def test_unknown_shapes_say_which_flags_to_use():
    assert fault({"a": "x", "b": "y"}) == (
        "--dataset_name pairs.jsonl: its columns fit no known format; name them with --prompt_column, --chosen_column "
        "and --rejected_column (dots reach into nested fields), or read them with your own function "
        "(--dataset_adapter file.py:function); the data has: a, b"
    )
    plain = fault({"chosen": "a long text, good", "rejected": "something else", "topic": "x"})
    assert plain.startswith(
        "--prompt_column is missing: no column is recognised as the prompt of 'chosen' and 'rejected'"
    )
    numbers = fault({"prompt": "q", "chosen": 1, "rejected": 2})
    assert "'chosen' has values that are not text" in numbers
    only_replies = fault({"dialogue": sharegpt("u: q"), "chosen": turns("a: x"), "rejected": turns("a: y")})
    assert only_replies.startswith("--prompt_column is missing")
    assert "--completion_column" in fault({"a": "x"}, "sft")


def test_rows_that_cannot_be_read_have_a_reason_and_the_others_stand():
    good = {"chosen": turns("u: q", "a: good"), "rejected": turns("u: q", "a: bad")}
    rows = [
        good,
        good | {"rejected": turns("u: other", "a: bad")},
        good | {"rejected": turns("u: q", "a: bad", "u: and", "a: more")},
        good | {"chosen": [{"role": "robot", "content": "x"}]},
        good | {"chosen": [{"role": "user", "content": None}]},
        good | {"chosen": None},
    ]
    assert reasons(rows) == [
        None,
        "the two sides differ before the last reply",
        "the two sides differ before the last reply",
        "'chosen' has a turn with an unknown role 'robot'",
        "'chosen' has a turn without text",
        "'chosen' is missing",
    ]
    _, read_rows = read(rows)
    assert [row["row"] for row in read_rows] == list(range(6))
    assert read_rows[1]["prompt"] is None
    assert read_rows[5] == {
        "prompt": turns("u: q"),
        "chosen": None,
        "rejected": turns("a: bad"),
        "row": 5,
        "reason": "'chosen' is missing",
    }


def test_more_reasons():
    other = TWO_TURNS | {"chosen": turns("u: x", "a: good")}
    assert reasons([TWO_TURNS, other])[1] == ("'chosen' has turns before its last reply that are not those of 'prompt'")
    start = {"chosen": "\n\nHuman: q\n\nAssistant: a", "rejected": "\n\nHuman: q\n\nAssistant: b"}
    rows = [start, start | {"rejected": "\n\nHuman: other\n\nAssistant: b"}, start | {"rejected": "plain"}]
    assert reasons(rows)[1:] == [
        "the two transcripts differ before the last reply",
        "a transcript does not start with 'Human:' or 'Assistant:'",
    ]


def test_values_that_are_not_text_among_texts(tmp_path):
    path = tmp_path / "pairs.jsonl"
    path.write_text(json.dumps(TEXTS) + "\n" + json.dumps(TEXTS | {"chosen": 5}) + "\n")
    with pytest.raises(UserError, match=r"'chosen' is not text in 1 row \(pairs.jsonl line 2\)"):
        load_pairs(DataSettings(dataset_name=str(path), validation_split="none"), "train", 0)


DEMONSTRATIONS = {
    "completion": ({"prompt": "q", "completion": "r"}, {"prompt": "q", "completion": "r"}),
    "completion as messages": (
        {"prompt": turns("u: q"), "completion": turns("a: r")},
        {"prompt": turns("u: q"), "completion": turns("a: r")},
    ),
    "text": ({"text": "once"}, {"prompt": "", "completion": "once"}),
    "messages": (
        {"messages": turns("u: q", "a: r", "u: s", "a: t")},
        {"prompt": turns("u: q", "a: r", "u: s"), "completion": turns("a: t")},
    ),
    "ShareGPT": (
        {"conversations": sharegpt("u: q", "a: r")},
        {"prompt": turns("u: q"), "completion": turns("a: r")},
    ),
    "instruction": (
        {"instruction": "do", "input": "this", "output": "r"},
        {"prompt": "do\n\nthis", "completion": "r"},
    ),
    "instruction with earlier rounds": (
        {"instruction": "do", "input": "this", "output": "t", "history": [["q", "r"]], "system": "be"},
        {"prompt": turns("s: be", "u: q", "a: r", "u: do\n\nthis"), "completion": turns("a: t")},
    ),
    "instruction without earlier rounds": (
        {"instruction": "do", "input": "", "output": "t", "history": []},
        {"prompt": turns("u: do"), "completion": turns("a: t")},
    ),
    "instruction without input": (
        {"instruction": "do", "input": "", "output": "r"},
        {"prompt": "do", "completion": "r"},
    ),
}


@pytest.mark.parametrize("name", DEMONSTRATIONS)
def test_demonstrations_of_every_shape(name):
    row, expected = DEMONSTRATIONS[name]
    assert converted(row, "sft") == expected


def test_flags_choose_among_the_shapes_of_demonstrations():
    row = TEXTS | {"completion": "c", "text": "t", "messages": turns("u: q", "a: m"), "story": "once", "reply": "r"}
    assert converted(row, "sft") == {"prompt": "q", "completion": "c"}
    assert converted(row, "sft", chosen_column="chosen") == {"prompt": "q", "completion": "good"}
    assert converted(row, "sft", completion_column="reply") == {"prompt": "q", "completion": "r"}
    assert converted(row, "sft", text_column="story") == {"prompt": "", "completion": "once"}


def test_a_reading_says_what_the_caller_needs():
    reading, _ = read([PAIRS["transcripts"][0]])
    assert (reading.is_transcript, reading.is_text) == (True, False)
    assert reading.description.endswith("(chosen 'chosen', rejected 'rejected')")
    reading, _ = read([PAIRS["transcripts"][0] | {"prompt": "not looked at"}])
    assert reading.description.endswith("(chosen 'chosen', rejected 'rejected')")
    reading, _ = read([TEXTS])
    assert (reading.is_transcript, reading.is_text) == (False, True)
    reading, _ = read([{"q": "x", "j": "a", "k": "b"}], prompt_column="q", chosen_column="j", rejected_column="k")
    assert reading.labels == {"prompt": "q", "chosen": "j", "rejected": "k"}


def test_transcript_turns():
    assert split_transcript("\n\nHuman: a\nb\n\nAssistant:  c ") == turns("u: a\nb", "a:  c ")
    quoted = "\n\nHuman: say\n\nHuman: hi\n\nAssistant: no\n\nAssistant: yes"
    assert split_transcript(quoted) == turns("u: say\n\nHuman: hi", "a: no\n\nAssistant: yes")
    assert split_transcript("Human: a\n\nAssistant:") == turns("u: a", "a: ")
    with pytest.raises(BadRow):
        split_transcript("Once\n\nHuman: a")


def test_conversion_is_cached_where_the_library_keeps_its_files(tmp_path):
    path = tmp_path / "saved"
    table([TEXTS] * 3).save_to_disk(str(path))
    before = sorted(path.iterdir())
    rows = datasets.load_from_disk(str(path))
    reading = find_reading(rows, DataSettings(dataset_name=str(path)), "train")
    first, second = convert_rows(rows, reading), convert_rows(rows, reading)
    assert sorted(path.iterdir()) == before
    assert first._fingerprint == second._fingerprint
    (file,) = Path(datasets.config.HF_DATASETS_CACHE).rglob("*.arrow")
    assert first.cache_files == second.cache_files == [{"filename": str(file)}]


def rendered(dialogue: list[dict]) -> str:
    """By the template that a tokenizer without one gets for transcripts."""
    return jinja2.Template(TRANSCRIPT_TEMPLATE).render(messages=dialogue)


@needs_real_data
def test_every_real_transcript_is_rendered_back_exactly():
    with gzip.open(REAL / "hh_rlhf/train.jsonl.gz", "rt", encoding="utf-8") as handle:
        texts = [text for line in handle for text in json.loads(line).values()]
    exact = sum(rendered(split_transcript(text)) == text for text in texts)
    assert (exact, len(texts)) == (3624, 3624)


EMPTY_CHOSEN, EMPTY_REJECTED, SAME = "'chosen' is empty", "'rejected' is empty", "'rejected' equals 'chosen'"


@needs_real_data
@pytest.mark.parametrize(
    ("name", "dropped", "kept"),
    [
        ("hh_rlhf", {EMPTY_CHOSEN: 3}, 1809),
        ("ultrafeedback_prompt_strings", {SAME: 4, EMPTY_REJECTED: 1, EMPTY_CHOSEN: 1}, 994),
        ("ultrafeedback_trl_lib", {SAME: 1}, 399),
        ("ultrafeedback_h4", {SAME: 2}, 399 + 199),
        ("orca_openai_format", {}, 284),
        ("llamafactory/dpo_en_demo.json", {}, 300),
        ("llamafactory/dpo_zh_demo.json", {}, 300),
        ("llamafactory/kto_en_demo.json", {"no answer with the other label for the same prompt": 298}, 1),
        ("oasst_trees", {}, 212),
        ("stack_exchange_paired", {}, 25),
        ("messages_tiny", {}, 1),
    ],
)
def test_real_files_from_end_to_end(name, dropped, kept):
    split = "none" if kept == 1 else None
    settings = DataSettings(dataset_name=str(REAL / name), on_bad_rows="skip", validation_split=split)
    data = load_pairs(settings, "train", 0)
    assert data.dropped == dropped
    assert len(data.train) + len(data.held_out or ()) == kept
    for row in data.train.select(range(min(20, len(data.train)))):
        assert row["chosen"] != row["rejected"]
        if not data.reading.is_text:
            assert row["prompt"][-1]["role"] in ("user", "tool")
            assert Counter(turn["role"] for turn in row["chosen"]) == {"assistant": 1}


@needs_real_data
def test_two_shapes_of_the_same_real_rows_are_the_same_pairs():
    common = {"on_bad_rows": "skip", "validation_split": "none"}
    by_prompt = load_pairs(DataSettings(dataset_name=str(REAL / "ultrafeedback_h4"), **common), "train", 0)
    implicit = load_pairs(DataSettings(dataset_name=str(REAL / "ultrafeedback_trl_lib"), **common), "train", 0)
    assert by_prompt.train.to_list() == implicit.train.to_list()
    assert by_prompt.fingerprint == implicit.fingerprint


@needs_real_data
def test_every_ranked_pair_of_the_real_trees_is_there_once():
    def pairs(node: dict) -> int:
        ranked = [r for r in node["replies"] if r.get("rank") is not None and not r["deleted"]]
        own = len(ranked) * (len(ranked) - 1) // 2 if node["role"] == "prompter" else 0
        return own + sum(pairs(reply) for reply in node["replies"] if not reply["deleted"])

    with (REAL / "oasst_trees/en_100_tree.jsonl").open(encoding="utf-8") as lines:
        expected = sum(pairs(json.loads(line)["prompt"]) for line in lines)
    settings = DataSettings(
        dataset_name=str(REAL / "oasst_trees"), pairs_per_prompt=1000, on_bad_rows="skip", validation_split="none"
    )
    data = load_pairs(settings, "train", 0)
    assert len(data.train) == expected > 300
    assert len({json.dumps([row["prompt"], row["chosen"], row["rejected"]]) for row in data.train}) == expected
