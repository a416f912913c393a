"""Turns with more than text, in every layout and verb; what a source holds beside its pairs is named."""

from __future__ import annotations

import json

import datasets
import numpy as np
import pytest
from shared.pairs import make_pairs, write_lines
from shared.runs import read_record

from utils.data.calls import functions_of, plain_turns
from utils.data.identity import read_pair_ids
from utils.data.loading import fingerprint_rows, load_pairs
from utils.data.writing import write_pairs
from utils.errors import UserError
from utils.settings.data import DataSettings


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


def load(path, verb: str = "train", **settings):
    return load_pairs(DataSettings(**{"dataset_name": str(path), "validation_split": "none"} | settings), verb, 0)


CALL = {"role": "assistant", "content": "", "tool_calls": [{"id": "c", "function": {"name": "f", "arguments": "{}"}}]}
ASKED = [{"role": "user", "content": "q"}, CALL, {"role": "tool", "content": "4"}]
ANSWER = [{"role": "assistant", "content": "It is 4."}]
OTHER = [{"role": "assistant", "content": "No."}]
PLAIN = [{"role": "user", "content": "q"}]
ROWS = {
    "explicit_prompt": {"prompt": ASKED, "chosen": ANSWER, "rejected": OTHER},
    "implicit_prompt": {"chosen": ASKED + ANSWER, "rejected": ASKED + OTHER},
    "openai": {"input": {"messages": ASKED}, "preferred_output": ANSWER, "non_preferred_output": OTHER},
    "sharegpt": {"conversations": ASKED, "chosen": ANSWER[0], "rejected": OTHER[0]},
    "ms_swift": {"messages": ASKED + ANSWER, "rejected_response": "No."},
    "two_answers": {"prompt": ASKED, "response_a": ANSWER, "response_b": OTHER, "winner": "a"},
    "scored_answers": {"prompt": ASKED, "responses": [ANSWER, OTHER], "scores": [2, 1]},
    "scored_turns": {"prompt": "q", "completions": [{**CALL, "score": 2}, {**OTHER[0], "score": 1}]},
    "scored_objects": {
        "prompt": "q",
        "answers": [{"text": "", "tool_calls": CALL["tool_calls"], "score": 2}, {"text": "No.", "score": 1}],
    },
    "message_tree": {
        "prompt": {
            "text": "q",
            "role": "prompter",
            "replies": [
                {"text": "a", "role": "assistant", "rank": rank, "replies": [], "tool_calls": CALL["tool_calls"]}
                for rank in range(2)
            ],
        }
    },
}


NOT_MESSAGES = ("scored_objects", "message_tree")  # whose other fields speak of who wrote or judged an answer


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("name", ROWS)
def test_calls_are_kept_in_every_layout_or_refused_by_name(name, streaming, tmp_path):
    path = write_lines(tmp_path / "rows.jsonl", [ROWS[name]] * 3)
    settings = DataSettings(dataset_name=str(path), validation_split="none", streaming=streaming)
    if name in NOT_MESSAGES:
        with pytest.raises(UserError, match="with 'tool_calls', which is not trained on") as error:
            load_pairs(settings, "train", 0, wanted=3)
        assert "in 3 rows" in str(error.value)
        return
    row = load_pairs(settings, "train", 0, wanted=3).train[0]
    prompt, chosen, rejected = (plain_turns(row[side]) for side in ("prompt", "chosen", "rejected"))
    made = {"type": "function", "id": "c", "function": {"name": "f", "arguments": {}}}
    whole = {**CALL, "tool_calls": [made]}
    expected = [*PLAIN, whole, {"role": "tool", "content": "4"}], ANSWER, OTHER
    assert (prompt, chosen, rejected) == ((PLAIN, [whole], OTHER) if name == "scored_turns" else expected)


def test_a_table_that_pads_every_turn_with_the_fields_of_one_is_read(tmp_path):
    """Parquet has one type for all rows: the calls of one row are nulls in all others, and arguments null in calls."""
    plain = {"prompt": PLAIN, "chosen": ANSWER, "rejected": OTHER}
    other = {**CALL, "tool_calls": [{"id": "d", "function": {"name": "g", "arguments": {"x": 1}}}]}
    first = {**CALL, "tool_calls": [{"id": "c", "function": {"name": "f", "arguments": {"y": [{"z": "2"}]}}}]}
    rows = [{**plain, "chosen": [first]}, {**plain, "chosen": [other]}, plain]
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / "rows.parquet")
    data = load(tmp_path / "rows.parquet")
    calls = [[function["arguments"] for function in functions_of(turn)] for (turn,) in data.train["chosen"]]
    assert calls == [[{"y": [{"z": "2"}]}], [{"x": 1}], []]
    assert [plain_turns(turns) for turns in data.train["prompt"]] == [PLAIN] * 3


def test_turns_of_text_alone_have_no_column_more_and_keep_their_names(tmp_path):
    """The name and the fingerprint of a row are those that it had before turns could say more than text."""
    plain = {"prompt": PLAIN, "chosen": ANSWER, "rejected": OTHER}
    alone = load(write_lines(tmp_path / "alone.jsonl", [plain]))
    assert alone.train["chosen"][0] == ANSWER
    mixed = load(write_lines(tmp_path / "mixed.jsonl", [plain, ROWS["explicit_prompt"]]))
    assert mixed.train["chosen"][0] == [{**ANSWER[0], "extra": None}]
    assert next(read_pair_ids(mixed.train)) == next(read_pair_ids(alone.train))
    assert fingerprint_rows(mixed.train.select([0]), None) == fingerprint_rows(alone.train, None)
    assert fingerprint_rows(mixed.train.select([1]), None) != fingerprint_rows(mixed.train.select([0]), None)


TEMPLATE = (
    "{%- for m in messages -%}{{ m.role[0] + ':' + m.content }}{%- for c in m.tool_calls or [] -%}"
    "{{ c.function.name }}{{ c.function.arguments }}{%- endfor -%}{{ eos_token }}{%- endfor -%}"
    "{%- if add_generation_prompt -%}a:{%- endif -%}"
)


def test_replies_of_several_turns_train_and_are_evaluated_and_written_out(run_script, tiny_model, tmp_path):
    result = {"role": "tool", "content": "RESULT", "tool_call_id": "c"}
    call = {**CALL, "tool_calls": [{"type": "function", "id": "c", "function": {"name": "f", "arguments": {"x": 1}}}]}
    prompts = [[{"role": "user", "content": f"question {n}"}] for n in range(12)]
    rows = [{"prompt": prompt, "chosen": [call, result, *ANSWER], "rejected": OTHER} for prompt in prompts]
    path = write_lines(tmp_path / "rows.jsonl", rows)
    flags = ("--dataset_name", path, "--chat_template", TEMPLATE)
    train = ("--model_name_or_path", tiny_model, *flags, "--max_steps", 2, "--validation_split", "0.3")
    code, _, err = run_script(*train, "--output_dir", tmp_path / "run")
    assert code == 0, err
    code, _, err = run_script(*train, "--output_dir", tmp_path / "padded", "--engine", "padded")
    assert code == 0, err
    shared, padded = (read_record(tmp_path / name)["metrics"]["held_out"] for name in ("run", "padded"))
    assert shared["loss"] == pytest.approx(padded["loss"], abs=1e-5)
    assert shared["chosen_logps"] == pytest.approx(padded["chosen_logps"], abs=1e-3)
    code, _, err = run_script("evaluate", "--model_name_or_path", tmp_path / "run", "--output_dir", tmp_path / "eval")
    assert code == 0, err
    evaluated = json.loads((tmp_path / "eval" / "evaluation.json").read_text())["metrics"]
    assert evaluated["loss"] == pytest.approx(shared["loss"], abs=1e-5)
    code, _, err = run_script("data", "--dataset_name", path, "--output_file", tmp_path / "out.jsonl")
    assert code in (0, 3), err
    written = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [row["chosen"] for row in written] == [row["chosen"] for row in rows]
    assert load(tmp_path / "out.jsonl").fingerprint == load(path).fingerprint


def test_columns_that_are_not_used_are_named_and_content_among_them_is_a_problem(run_script, tiny_model, tmp_path):
    rows = [{**pair, "images": ["cat.png"], "documents": [], "id": i} for i, pair in enumerate(make_pairs(30))]
    path = write_lines(tmp_path / "rows.jsonl", rows)
    code, out, _ = run_script("data", "--dataset_name", path)
    assert "not used: images, documents, id" in " ".join(out.split())
    assert (code, "30  rows whose 'images' is not used" in out) == (3, True)
    assert "'documents' is not" not in out
    flags = ("--dataset_name", path, "--output_dir", tmp_path / "run", "--max_steps", 1)
    code, out, _ = run_script("--model_name_or_path", tiny_model, *flags)
    assert code == 0
    assert "warning: 30 rows whose 'images' is not used" in out


def test_rows_that_a_column_marks_as_held_out_are_named(run_script, tiny_model, tmp_path):
    marks = ["train", "test_prefs", "trained", "held-out"]
    rows = [{**pair, "split": marks[i % 4]} for i, pair in enumerate(make_pairs(40))]
    path = write_lines(tmp_path / "rows.jsonl", rows)
    _, out, _ = run_script("data", "--dataset_name", path, "--json_file", tmp_path / "found.json")
    found = json.loads((tmp_path / "found.json").read_text())["findings"]
    (finding,) = [finding for finding in found if finding["name"] == "split_column"]
    assert finding["count"] == 20
    assert "'split' marks as held out (10 test_prefs, 10 held-out)" in finding["title"]
    flags = ("--dataset_name", path, "--output_dir", tmp_path / "run", "--max_steps", 1)
    _, out, _ = run_script("--model_name_or_path", tiny_model, *flags)
    assert "warning: 20 rows that 'split' marks as held out" in out
    write_lines(path, [row | {"split": "test"} for row in rows])  # one split, on purpose
    assert load(path).reading.remarks == ()


def test_where_prompt_and_replies_meet(run_script, tmp_path):
    rows = make_pairs(30)
    repeated = [{**pair, **{side: pair["prompt"] + pair[side] for side in ("chosen", "rejected")}} for pair in rows]
    answered = [
        {**pair, "prompt": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "And"}]} for pair in rows
    ]
    for found, name in ((repeated, "repeats_prompt"), (answered, "answered_prompt"), (rows, None)):
        path = write_lines(tmp_path / "rows.jsonl", found)
        run_script("data", "--dataset_name", path, "--json_file", tmp_path / "found.json")
        record = json.loads((tmp_path / "found.json").read_text())
        counts = {finding["name"]: finding["count"] for finding in record["findings"]}
        assert {key: counts[key] for key in ("repeats_prompt", "answered_prompt") if key in counts} == (
            {name: 30} if name else {}
        )


def test_transcripts_that_end_with_the_person(tmp_path):
    good = {"chosen": "\n\nHuman: q\n\nAssistant: good", "rejected": "\n\nHuman: q\n\nAssistant: bad"}
    thanks = {side: text + "\n\nHuman: Thanks!" for side, text in good.items()}
    empty = good | {"rejected": "\n\nHuman: q\n\nAssistant:"}
    data = load(write_lines(tmp_path / "rows.jsonl", [good, thanks, empty]), on_bad_rows="skip")
    reason = "'chosen' ends with a turn of the user: there is no reply to train on"
    assert data.dropped == {reason: 1, "'rejected' is empty": 1}


def test_demonstrations_that_end_with_the_person(tmp_path):
    path = write_lines(tmp_path / "rows.jsonl", [{"messages": [*PLAIN, *ANSWER, *PLAIN]}])
    with pytest.raises(UserError, match="'messages' ends with a turn of the user: there is no reply to train on"):
        load(path, "sft")
    path = write_lines(tmp_path / "rows.jsonl", [{"messages": [*PLAIN, {"role": "assistant", "content": ""}]}])
    with pytest.raises(UserError, match="'messages' is empty"):
        load(path, "sft")


def test_message_lists_in_csv_are_read_as_messages_and_it_is_said(tmp_path):
    sides = {"prompt": PLAIN, "chosen": ANSWER, "rejected": OTHER}
    for write in (json.dumps, str):
        rows = [{name: write(value) for name, value in sides.items()}] * 3
        datasets.Dataset.from_list(rows).to_csv(tmp_path / "rows.csv")
        data = load(tmp_path / "rows.csv")
        assert data.train[0] == {**sides, "row": 0}
        assert "the texts in 'prompt', 'chosen', 'rejected' are message lists" in data.reading.description


def test_a_few_texts_that_look_like_messages_stay_texts(tmp_path):
    rows = [{"prompt": "q", "chosen": "good", "rejected": "bad"}] * 5 + [
        {"prompt": json.dumps(PLAIN), "chosen": "good", "rejected": json.dumps(OTHER)}
    ]
    assert load(write_lines(tmp_path / "rows.jsonl", rows)).train[5]["rejected"] == json.dumps(OTHER)


@pytest.mark.parametrize("separator", ["\t", ";", "|", ","])
@pytest.mark.parametrize("streaming", [False, True])
def test_csv_files_may_be_separated_otherwise(separator, streaming, tmp_path):
    rows = [[" Prompt", "Chosen ", "rejected"], ["one, two", 'good "x"', "bad\nworse"], ["q", "a", "b"]]
    quoted = [separator.join('"' + field.replace('"', '""') + '"' for field in row) for row in rows]
    path = tmp_path / "rows.csv"
    path.write_text("\r\n".join(quoted), encoding="utf-8")
    settings = DataSettings(dataset_name=str(path), validation_split="none", streaming=streaming)
    data = load_pairs(settings, "train", 0, wanted=2 if streaming else None)
    assert [[row["prompt"], row["chosen"], row["rejected"]] for row in data.train] == rows[1:]


WRITTEN = {
    "JSON": json.dumps,
    "JSON in JSON": lambda turns: json.dumps(json.dumps(turns)),
    "JSON lines": lambda turns: "\n".join(map(json.dumps, turns)),
    "Python": str,
    "a tuple": lambda turns: str(tuple(turns)),
    "NumPy": lambda turns: str(np.array(turns, dtype=object)),
    "NumPy's own": lambda turns: repr(np.array(turns, dtype=object)),
}


@pytest.mark.parametrize("way", WRITTEN)
def test_messages_written_as_text_are_read_wherever_they_stand(way, tmp_path):
    write = WRITTEN[way]
    turns = [*PLAIN, {"role": "assistant", "content": 'It\'s "so".\nYes'}, {"role": "user", "content": "é } {"}]
    flat = {"prompt": write(turns), "chosen": write(ANSWER), "rejected": write(OTHER)}
    preferred = {"preferred_output": flat["chosen"], "non_preferred_output": flat["rejected"]}
    rows = {
        "nested": {"input": {"messages": flat["prompt"]}} | preferred,
        "object": {"input": (json.dumps if "JSON" in way else str)({"messages": turns})} | preferred,
        "flat": flat,
    }
    for name, row in rows.items():
        data = load(write_lines(tmp_path / f"{name}.jsonl", [row] * 3))
        assert {part: data.train[0][part] for part in flat} == {"prompt": turns, "chosen": ANSWER, "rejected": OTHER}


def test_a_message_list_written_as_text_among_other_texts_is_a_problem(run_script, tmp_path):
    rows = [{"prompt": f"q{number}", "chosen": "good", "rejected": f"bad {number}"} for number in range(150)]
    rows[120]["chosen"] = rows[121]["chosen"] = json.dumps(ANSWER)
    code, out, _ = run_script("data", "--dataset_name", write_lines(tmp_path / "rows.jsonl", rows))
    assert (code, "2  rows whose 'chosen' is a message list written as text" in out) == (3, True)
    rows[130]["chosen"] = ANSWER  # a list and no text, so a bad row: the column is held as JSON then
    assert load(write_lines(tmp_path / "rows.jsonl", rows), on_bad_rows="skip").reading.remarks[0].rows == 2
    lists = [{"prompt": [{"role": "user", "content": f"q{n}"}], "chosen": ANSWER, "rejected": OTHER} for n in range(9)]
    lists[3]["chosen"] = "a text"
    assert load(write_lines(tmp_path / "lists.jsonl", lists)).reading.remarks == ()


@pytest.mark.parametrize("field", ["function_calls", "functions", "tools", "tool_call", "thought", "reasoning_details"])
def test_other_names_of_calls_and_of_reasoning_are_refused_by_name(field, tmp_path):
    answer = [{**ANSWER[0], field: [{"name": "f"}]}]
    path = write_lines(tmp_path / "rows.jsonl", [{"prompt": PLAIN, "chosen": answer, "rejected": OTHER}])
    with pytest.raises(UserError, match=f"'chosen' has a turn with '{field}', which is not trained on"):
        load(path)


def test_rows_held_out_by_a_class_or_beside_numbers_are_counted(tmp_path):
    rows = [
        row | {"split": split} for row, split in zip(make_pairs(4), ["train", "test", "train", "test"], strict=True)
    ]
    classes = datasets.Dataset.from_list(rows).class_encode_column("split")
    classes.save_to_disk(str(tmp_path / "saved"))
    assert load(tmp_path / "saved").reading.remarks[0].rows == 2
    rows[0]["split"] = 7
    assert load(write_lines(tmp_path / "rows.jsonl", rows)).reading.remarks[0].rows == 2


def test_pairs_with_calls_are_written_and_read_back_whatever_the_file(tmp_path):
    def reply(arguments: dict) -> list[dict]:
        call = {"type": "function", "id": "call00001", "function": {"name": "add", "arguments": arguments}}
        return [{"role": "assistant", "content": None, "tool_calls": [call]}]

    prompt = [{"role": "user", "content": "one and nothing?"}]
    rows = [
        {"prompt": prompt, "chosen": reply({"terms": [1, None]}), "rejected": reply({"terms": "1"})},
        {"prompt": prompt[:1], "chosen": reply({}), "rejected": [{"role": "assistant", "content": "one"}]},
    ]
    read = load(write_lines(tmp_path / "rows.jsonl", rows)).train
    for name in ("again.jsonl", "again.parquet"):
        write_pairs(tmp_path / name, read)
        again = load(tmp_path / name).train
        for side in ("prompt", "chosen", "rejected"):
            assert [plain_turns(turns) for turns in again[side][:]] == [row[side] for row in rows], name
