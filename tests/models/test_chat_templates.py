"""What chat templates and the limit of tokens do to whole runs: said, counted, refused; the date that they write, and
what they are given."""

from __future__ import annotations

import inspect
import json
from datetime import datetime
from pathlib import Path

import datasets
import pytest
from shared.pairs import make_pairs, write_lines
from shared.runs import read_record
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from utils.data.encoding import PromptEncoder
from utils.data.loading import load_pairs
from utils.data.rendering import hold_moment, render_chat
from utils.data.tokenizing import PAIR_COLUMNS, tokenize_rows
from utils.models.templates import set_chat_template
from utils.run.state import read_kept
from utils.settings.data import DataSettings
from utils.settings.flags import NAMES_TAKEN
from utils.training.differences import find_changes

LOOP = "{%- for m in messages -%}"
TURN = "{{ m['role'] + ': ' + (WORDS) + '\n' }}{%- endfor -%}"
TURN += "{%- if add_generation_prompt -%}{{ 'assistant:' }}{%- endif -%}"
PLAIN = LOOP + TURN.replace("WORDS", "m['content']")
CUTS = LOOP + TURN.replace("WORDS", "m['content'].split('</think>')[-1]")
DROPS = LOOP + TURN.replace("WORDS", "'' if m['role'] == 'assistant' else m['content']")
NO_SYSTEM = (
    LOOP
    + "{%- if m['role'] != 'system' -%}"
    + PLAIN.removeprefix(LOOP).replace("{%- endfor -%}", "{%- endif -%}{%- endfor -%}")
)
OPENS = CUTS.replace("'assistant:'", "'assistant: <think>\n'")
TOLD = "{{ 'Mood: ' + mood | default('plain') + '\n' }}" + PLAIN
DOCUMENTED = TOLD.replace(LOOP, "{%- for d in documents or [] -%}{{ d.text + '\n' }}{%- endfor -%}" + LOOP)
DATED = "{{ 'Now: ' + strftime_now('%d %b %Y %H:%M') + '\n' }}" + PLAIN


def make_rows(count: int, reasoning: int = 0, system: int = 0) -> list[dict]:
    """Pairs as message lists, the first ones with reasoning in their replies, or with a system turn."""
    rows = []
    for place, pair in enumerate(make_pairs(count)):
        thought = "<think>It was a day.</think>" if place < reasoning else ""
        turns = [{"role": "system", "content": "Be kind."}] if place < system else []
        row = {"prompt": [*turns, {"role": "user", "content": pair["prompt"]}]}
        for side in ("chosen", "rejected"):
            row[side] = [{"role": "assistant", "content": thought + pair[side].strip()}]
        rows.append(row)
    return rows


@pytest.fixture
def train(run_script, tiny_model, tmp_path):
    """Trains one step on rows; further flags by name."""

    def run(rows: list[dict], template: str | None = None, verb: str = "train", **flags):
        write_lines(tmp_path / "pairs.jsonl", rows)
        usual = {"model_name_or_path": tiny_model, "dataset_name": tmp_path / "pairs.jsonl"}
        usual |= {"dtype": "float32"} if verb != "data" else {}
        if template is not None:
            (tmp_path / "own.jinja").write_text(template, encoding="utf-8")
            usual["chat_template"] = tmp_path / "own.jinja"
        if verb in ("train", "sft"):
            usual |= {"output_dir": tmp_path / "run", "max_steps": 1, "validation_split": "none"}
        code, out, err = run_script(
            verb, *(word for item in (usual | flags).items() for word in (f"--{item[0]}", item[1]))
        )
        return code, out, err

    run.folder = tmp_path / "run"
    return run


def test_system_turn_that_the_template_leaves_out_is_said_counted_and_recorded(train):
    code, out, err = train(make_rows(12, system=3), NO_SYSTEM)
    assert code == 0, err
    (line,) = (line for line in out.splitlines() if "leaves out" in line)
    assert "the chat template leaves out the system turn, in 3 rows (pairs.jsonl line 1, 2, 3)" in line
    assert [text for text in read_record(train.folder)["warnings"] if text in line]


@pytest.mark.parametrize("verb", ["train", "sft"])
def test_reasoning_that_the_template_cuts_out_is_a_bad_row(verb, train):
    rows = make_rows(12, reasoning=2)
    if verb == "sft":
        rows = [{"messages": [*row["prompt"], *row["chosen"]]} for row in rows]
    what = "the chat template cuts the reasoning out of " + ("'chosen'" if verb == "train" else "the reply")
    code, _, err = train(rows, CUTS, verb)
    assert code == 2
    assert f"{what} (--chat_template sets another template) in 2 rows (pairs.jsonl line 1, 2)" in err
    assert not train.folder.exists()
    code, out, err = train(rows, CUTS, verb, on_bad_rows="skip")
    assert code == 0, err
    assert f"dropped 2: {what}" in out
    data = read_record(train.folder)["data"]
    assert [count for reason, count in data["dropped"].items() if what in reason] == [2]
    assert data[f"train_{'pairs' if verb == 'train' else 'rows'}"] == 10


def test_template_without_the_replies_leaves_nothing_to_train_on(train):
    rows = make_rows(8)
    code, _, err = train(rows, DROPS)
    assert code == 2
    assert "the chat template drops 'chosen'" in err
    code, _, err = train(rows, DROPS, on_bad_rows="skip")
    assert code == 2
    assert "no usable row is left of 8 (the chat template drops 'chosen'" in err


def test_prompt_that_opens_a_think_block_is_never_answered_inside_it_in_silence(train):
    code, out, err = train(make_rows(12, reasoning=2), OPENS)
    assert code == 0, err
    warnings = read_record(train.folder)["warnings"]
    assert any("does not close" in text and "in 10 rows" in text for text in warnings)
    assert any("trained as it was written" in text and "in 2 rows" in text for text in warnings)
    assert all(f"warning: {text}" in out for text in warnings)


def make_cut_pairs() -> list[dict[str, str]]:
    """Twenty pairs of which three differ far behind their beginning only."""
    rows = make_pairs(20)
    for row in rows[4:7]:
        row["chosen"], row["rejected"] = (" It was a day." * 20 + end for end in (" Good.", " Bad."))
    return rows


def test_sides_that_are_the_same_tokens_when_cut_are_bad_rows(train, run_script, tmp_path):
    what = "'rejected' and 'chosen' are the same tokens once truncated to --max_length 60 (raise it)"
    code, _, err = train(make_cut_pairs(), max_length=60)
    assert code == 2
    assert f"{what} in 3 rows (pairs.jsonl line 5, 6, 7)" in err
    code, out, err = train(make_cut_pairs(), max_length=60, on_bad_rows="skip")
    assert code == 0, err
    assert f"dropped 3: {what}" in out
    assert read_record(train.folder)["data"]["dropped"] == {what: 3}
    # Rows that are dropped for their length are not counted twice; rows that are not cut differ.
    code, out, err = train(make_cut_pairs(), max_length=60, truncation="drop", overwrite_output_dir="true")
    assert (code, "same tokens" in out) == (0, False), err
    code, _, err = train(
        make_cut_pairs(), max_length=60, on_bad_rows="skip", verb="evaluate", model_name_or_path=train.folder
    )
    assert code == 0, err
    code, _, err = train(make_cut_pairs()[4:7], max_length=60, on_bad_rows="skip", output_dir=tmp_path / "none")
    assert code == 2
    assert f"no usable row is left of 3 ({what}: 3)" in err


def test_evaluation_leaves_out_what_the_run_left_out(train, run_script, tmp_path):
    rows = make_cut_pairs()
    code, _, err = train(rows, max_length=60, validation_split="0.5", on_bad_rows="skip")
    assert code == 0, err
    code, out, err = run_script("evaluate", "--model_name_or_path", train.folder, "--output_dir", tmp_path / "figures")
    assert code == 0, err
    held_out = read_record(train.folder)["data"]["held_out_pairs"]
    assert f"{held_out} pairs that the run held out" in out
    assert "same tokens" in out


def test_data_finds_what_training_refuses(train, tmp_path):
    def look(rows, template=None, **flags) -> dict[str, dict]:
        code, _, err = train(rows, template, "data", json_file=tmp_path / "found.json", **flags)
        assert code in (0, 3), err
        return {item["name"]: item for item in json.loads((tmp_path / "found.json").read_text())["findings"]}

    found = look(make_rows(12, reasoning=2), CUTS)["template_loses"]
    assert (found["severity"], found["count"]) == ("problem", 2)
    assert "cuts the reasoning out of 'chosen'" in found["title"]
    found = look(make_rows(12, system=3), NO_SYSTEM)["template_changes"]
    assert (found["severity"], found["count"]) == ("note", 3)
    rows = make_rows(12)
    rows[4]["rejected"] = [{"role": "assistant", "content": "No, <b>" + rows[4]["chosen"][0]["content"]}]
    found = look(rows, PLAIN.replace("(m['content'])", "(m['content'].replace('No, <b>', ''))"))
    assert (found["equal_as_tokens"]["count"], found["template_loses"]["count"]) == (1, 1)
    assert look(make_cut_pairs(), max_length=60)["equal_when_cut"]["count"] == 3
    clean = tmp_path / "clean.jsonl"
    look(make_rows(12, reasoning=2), CUTS, remove="too_long", output_file=clean)
    assert len(clean.read_text().splitlines()) == 10


# The date


def set_clock(monkeypatch, moment: datetime) -> None:
    class Clock(datetime):
        @classmethod
        def now(cls, tz=None):
            return moment

    for module in ("utils.training.folder", "utils.models.templates", "utils.comparing.sides"):
        monkeypatch.setattr(f"{module}.datetime", Clock)


@pytest.fixture
def forget_rows(monkeypatch, tmp_path):
    """Another machine, or a cache that was emptied."""

    def forget() -> None:
        monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "another cache")

    return forget


def ids_of(folder: Path) -> list[str]:
    return read_kept(folder / "checkpoint-2")["identity"]["ids"]


def test_run_keeps_the_date_that_its_template_wrote(train, run_script, monkeypatch, forget_rows, tmp_path):
    rows, first, later = make_rows(24), datetime(2026, 2, 3, 4, 5), datetime(2026, 2, 4, 9, 30)
    flags = {"max_steps": 4, "save_steps": 2, "validation_split": "0.2"}
    set_clock(monkeypatch, first)
    code, out, err = train(rows, DATED, **flags)
    assert code == 0, err
    assert "as given with --chat_template, which writes the date: 2026-02-03 04:05 throughout" in out
    assert read_record(train.folder)["data"]["template_date"] == "2026-02-03T04:05:00"
    before, figures = ids_of(train.folder), read_record(train.folder)["metrics"]["held_out"]

    set_clock(monkeypatch, later)
    forget_rows()
    code, out, err = train(rows, DATED, resume_from_checkpoint=train.folder / "checkpoint-2", **flags)
    assert code == 0, err
    assert "2026-02-03 04:05 throughout" in out
    assert read_record(train.folder)["metrics"]["held_out"]["loss"] == pytest.approx(figures["loss"], abs=1e-6)
    assert ids_of(train.folder) == before

    code, out, err = run_script("evaluate", "--model_name_or_path", train.folder, "--output_dir", tmp_path / "figures")
    assert code == 0, err
    assert "2026-02-03 04:05 throughout" in out
    evaluated = json.loads((tmp_path / "figures" / "evaluation.json").read_text())
    assert evaluated["recorded"]["same"]
    assert evaluated["metrics"]["chosen_logps"] == pytest.approx(figures["chosen_logps"], abs=1e-3)
    code, out, err = run_script(
        "chat", "--model_name_or_path", train.folder, "--prompt", "Hello", "--max_new_tokens", 2
    )
    assert code == 0, err
    assert "2026-02-03 04:05 throughout" in err

    # A new run is of its own day, whatever lies in the cache.
    code, out, err = train(rows, DATED, output_dir=tmp_path / "new", **flags)
    assert code == 0, err
    assert "2026-02-04 09:30 throughout" in out
    assert ids_of(tmp_path / "new") != before


def test_date_without_the_time_of_day_is_the_day(train, monkeypatch):
    set_clock(monkeypatch, datetime(2026, 2, 3, 4, 5))
    code, out, err = train(make_rows(8), DATED.replace(" %H:%M", ""))
    assert code == 0, err
    assert "which writes the date: 2026-02-03 throughout" in out
    assert read_record(train.folder)["data"]["template_date"] == "2026-02-03T00:00:00"


@pytest.mark.parametrize(
    "part", ["strftime_now('%S')", "strftime_now('%p')", "strftime_now('%A')", "strftime_now('%d') | int > 3"]
)
@pytest.mark.parametrize("place", ["true", "m['role'] == 'assistant'", "loop.index > 2", "tools"])
def test_any_part_of_date_and_time_is_held_wherever_it_is_written(part, place, tiny_model):
    tokenizer, moment = AutoTokenizer.from_pretrained(tiny_model), datetime(2026, 2, 3, 15, 5, 9)
    tokenizer.chat_template = PLAIN.replace(LOOP, LOOP + "{%- if " + place + " -%}{{ " + part + " }}{%- endif -%}")
    assert "which writes the date: 2026-02-03" in set_chat_template(tokenizer, None, transcript=False, moment=moment)
    turns = [{"role": role, "content": "Hello"} for role in ("user", "assistant", "user")]
    held = render_chat(tokenizer, turns, tools=[{"name": "wait"}])
    hold_moment(tokenizer, moment)
    assert held == render_chat(tokenizer, turns, tools=[{"name": "wait"}])


def test_template_that_asks_for_no_date_has_none(train):
    code, out, err = train(make_rows(8), PLAIN)
    assert code == 0, err
    assert "writes the date" not in out
    assert read_record(train.folder)["data"]["template_date"] is None


def test_ids_of_another_day_are_refused_for_that_reason():
    now = {
        "settings": {},
        "data": "d",
        "rows": [1, 0],
        "ids": ["a"],
        "tokenizer": "t",
        "model": None,
        "reference": None,
    }
    now |= {"precision": "float32", "batch": None, "template_date": "2026-02-04T00:00:00"}
    other = now | {"ids": ["b"], "template_date": "2026-02-03T00:00:00"}
    assert find_changes(other, now) == {
        "tokenizer": "the chat template writes the date, which was 2026-02-03T00:00:00 then and is "
        "2026-02-04T00:00:00 now"
    }
    (said,) = find_changes(other | {"template_date": now["template_date"]}, now).values()
    assert "with the same vocabulary and template" in said


def test_record_with_a_date_that_is_none_is_refused(train):
    code, _, err = train(make_rows(8), DATED, save_steps=1, max_steps=2)
    assert code == 0, err
    record = read_record(train.folder)
    record["data"]["template_date"] = "tomorrow"
    (train.folder / "run.json").write_text(json.dumps(record))
    code, _, err = train(make_rows(8), DATED, save_steps=1, max_steps=3, resume_from_checkpoint="auto")
    assert code == 2
    assert "data.template_date is 'tomorrow': must be a date such as 2026-12-01T00:00:00" in err


# What a template is given


def test_arguments_of_a_template_go_with_the_run_that_they_were_given_to(train, run_script, forget_rows, tmp_path):
    flags = {"max_steps": 4, "save_steps": 2, "validation_split": "0.2"}
    merry = {"chat_template_kwargs": '{"mood": "merry"}'}
    code, out, err = train(make_rows(24), TOLD, **merry, **flags)
    assert code == 0, err
    assert 'as given with --chat_template with mood "merry"' in out
    record = read_record(train.folder)
    assert record["settings"]["chat_template_kwargs"] == {"mood": "merry"}
    assert record["data"]["chat_template"] == 'as given with --chat_template with mood "merry"'
    code, _, err = train(make_rows(24), TOLD, resume_from_checkpoint=train.folder / "checkpoint-2", **flags)
    assert code == 2
    assert '--chat_template_kwargs was {"mood": "merry"}, is not given' in err
    # Other rows, not those that are kept for the other mood.
    code, out, err = train(make_rows(24), TOLD, output_dir=tmp_path / "plain", **flags)
    assert code == 0, err
    assert ids_of(tmp_path / "plain") != ids_of(train.folder)

    said = 'with mood "merry"'
    evaluate = ("evaluate", "--model_name_or_path", train.folder, "--output_dir", tmp_path / "figures")
    code, out, err = run_script(*evaluate)
    assert code == 0, err
    evaluated = json.loads((tmp_path / "figures" / "evaluation.json").read_text())
    assert (evaluated["data"]["chat_template"].endswith(said), evaluated["recorded"]["same"]) == (True, True)
    few = ("--max_new_tokens", 2)
    code, out, err = run_script("chat", "--model_name_or_path", train.folder, "--prompt", "Hello", *few)
    assert (code, said in err) == (0, True), err
    folder = tmp_path / "compared"
    code, out, err = run_script("compare", train.folder, "--num_prompts", 2, "--output_dir", folder, *few)
    assert code == 0, err
    compared = json.loads((folder / "comparison.json").read_text())
    assert all(template.endswith(said) for template in compared["chat_templates"])


def test_row_gives_its_template_what_it_holds_before_the_flag_does(train):
    rows = make_rows(24)
    rows[0] |= {"chat_template_kwargs": {"mood": "sad"}, "documents": [{"text": "It rained."}]}
    rows[1]["chat_template_kwargs"] = '{"moood": "sad"}'
    for row in rows[2:]:
        row["chat_template_kwargs"] = {"mood": "merry"}
    flags = {"chat_template_kwargs": '{"mood": "grave"}', "validation_split": "0.2", "sample_during_eval": "true"}
    flags |= {"eval_strategy": "steps", "eval_steps": 1, "sample_max_new_tokens": 2}
    code, out, err = train(rows, DOCUMENTED, **flags)
    assert code == 0, err
    assert "the chat template does not read 'moood', which the row gives it, in 1 row (pairs.jsonl line 2)" in out
    data = load_pairs(
        DataSettings(dataset_name=str(train.folder.parent / "pairs.jsonl"), validation_split="none"), "train", 0
    )
    tokenizer = AutoTokenizer.from_pretrained(train.folder)
    set_chat_template(tokenizer, None, transcript=False, arguments={"mood": "grave"})
    tokenized, _ = tokenize_rows(data.train, PromptEncoder(tokenizer), PAIR_COLUMNS, 1024, "error")
    begins = [tokenizer.decode(ids).split("user:")[0].strip() for ids in tokenized["prompt_ids"][:3]]
    assert begins == ["Mood: sad\nIt rained.", "Mood: grave", "Mood: merry"]


def test_masked_and_dropped_reasoning_go_with_the_run(train, run_script, tmp_path):
    flags = {"validation_split": "0.5", "save_steps": 1}
    code, out, err = train(make_rows(12, reasoning=12), PLAIN, reasoning="mask", **flags)
    assert code == 0, err
    said = "of 24 replies, rendered, not counted in log-probs and losses"
    assert f"reasoning: {said}" in out
    assert read_record(train.folder)["data"]["reasoning"] == said
    assert said in (train.folder / "report.html").read_text()
    code, out, err = run_script("evaluate", train.folder, "--output_dir", tmp_path / "figures")
    assert code == 0, err
    evaluated = json.loads((tmp_path / "figures" / "evaluation.json").read_text())
    assert evaluated["data"]["reasoning"] == said.replace("24", "12")
    assert evaluated["recorded"]["same"]
    code, out, err = run_script("evaluate", train.folder, "--output_dir", tmp_path / "kept", "--reasoning", "keep")
    assert code == 0, err
    kept = json.loads((tmp_path / "kept" / "evaluation.json").read_text())
    assert kept["metrics"]["chosen_logps"] < evaluated["metrics"]["chosen_logps"] - 1, "more tokens count"
    again = {"resume_from_checkpoint": train.folder / "checkpoint-1", "max_steps": 2}
    code, _, err = train(make_rows(12, reasoning=12), PLAIN, reasoning="drop", **again, **flags)
    assert (code, "--reasoning was mask, is drop" in err) == (2, True), err
    code, out, err = train(
        make_rows(12, reasoning=12), PLAIN, reasoning="drop", output_dir=tmp_path / "dropped", **flags
    )
    assert code == 0, err
    assert "reasoning: of 24 replies, left out of the texts" in out
    code, out, err = train(
        make_rows(12, reasoning=12), PLAIN, verb="sft", reasoning="mask", output_dir=tmp_path / "sft"
    )
    assert (code, "of 12 replies, rendered, not counted" in out) == (0, True), err
    code, _, err = train(make_rows(12, reasoning=12), CUTS, verb="data", reasoning="drop")
    assert code == 0, err
    code, _, err = train(make_pairs(8), reasoning="drop", output_dir=tmp_path / "texts")
    assert (code, "--reasoning: these rows are plain texts" in err) == (2, True), err


def test_argument_that_the_template_does_not_read_is_refused(train):
    code, _, err = train(make_rows(8), TOLD, chat_template_kwargs='{"moood": "merry", "mood": "sad"}')
    assert code == 2
    assert "--chat_template_kwargs: the chat template reads no moood; it reads mood" in err
    code, _, err = train(make_pairs(8), chat_template_kwargs='{"mood": "merry"}')
    assert code == 2
    assert "--chat_template_kwargs: these rows are plain texts" in err


@pytest.mark.parametrize("given", ["{mood: 1}", "[1]", "3", '{"messages": []}', '{"add_generation_prompt": true}'])
def test_arguments_that_are_no_object_or_are_given_anyway_are_refused_at_once(given, train):
    code, _, err = train(make_rows(8), TOLD, chat_template_kwargs=given)
    assert (code, "--chat_template_kwargs is" in err) == (2, True), err


def test_names_that_are_given_anyway_are_all_that_transformers_takes_itself():
    own = set(inspect.signature(PreTrainedTokenizerBase.apply_chat_template).parameters) - {"self", "kwargs"}
    assert own - {"documents"} <= {*NAMES_TAKEN}
