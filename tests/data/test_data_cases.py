"""One file in tests/data/cases per form of data: rows as found, the pairs that they become, what is dropped."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import datasets
import pytest
import yaml
from shared.pairs import write_lines

from utils.data.calls import plain_turns
from utils.data.layouts import LAYOUTS, PAIR_FORMATS, SFT_FORMATS
from utils.data.loading import load_pairs
from utils.data.matching import FITS
from utils.data.prompts import read_prompts
from utils.data.ranking import EXPANSIONS
from utils.data.shapes import find_shape
from utils.data.tools import list_tools
from utils.errors import UserError
from utils.settings.data import DataSettings

CASES = {path.stem: path for path in sorted((Path(__file__).parent / "cases").glob("*.yaml"))}
DEMONSTRATIONS = {path.stem: path for path in sorted((Path(__file__).parent / "cases").glob("demonstrations/*.yaml"))}


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


def read_case(name: str, folder: Path) -> tuple[dict, str]:
    """The case and a file with its rows."""
    case = yaml.safe_load((CASES | DEMONSTRATIONS)[name].read_text(encoding="utf-8"))
    path = folder / f"{name}.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in case["rows"]), encoding="utf-8")
    return case, str(path)


def load(path: str, verb: str = "train", **settings):
    return load_pairs(
        DataSettings(**{"dataset_name": path, "validation_split": "none", "on_bad_rows": "skip"} | settings), verb, 0
    )


def written_out(side):
    """A text, or messages, some in short: {user: q} -> {"role": "user", "content": "q"}."""
    if isinstance(side, str):
        return side
    return [turn if "role" in turn else dict(zip(("role", "content"), *turn.items(), strict=True)) for turn in side]


def expected_pairs(case: dict) -> list[dict]:
    pairs = []
    for pair in case["pairs"]:
        row = {name: written_out(pair[name]) for name in ("prompt", "chosen", "rejected")}
        scores = pair.get("scores")
        if scores:
            row |= dict(zip(("chosen_score", "rejected_score"), scores, strict=True))
        row |= {"tools": pair.get("tools", [])} if tells_tools(case["pairs"]) else {}
        row |= {"chat_template_kwargs": pair["kwargs"]} if "kwargs" in pair else {}
        pairs.append(row | {"row": pair["row"]})
    return pairs


def tells_tools(rows: list[dict]) -> bool:
    return any("tools" in row for row in rows)


def plain(row: dict, with_tools: bool) -> dict:
    """A converted row as other programs take it, with its tools as templates take them."""
    tools = {"tools": list_tools(row.get("tools"))} if with_tools else {}
    return {key: plain_turns(value) for key, value in row.items() if key != "tools"} | tools


@pytest.mark.parametrize("name", CASES)
def test_rows_become_the_expected_pairs(name, tmp_path):
    case, path = read_case(name, tmp_path)
    flags = case.get("flags", {})
    forced = load(path, dataset_format=case["format"], **flags)
    found = forced if case.get("forced_only") else load(path, **flags)
    for data in (forced, found):
        expected = expected_pairs(case)
        pairs = [plain(row, tells_tools(case["pairs"])) for row in data.train]
        if case.get("in_any_order"):
            pairs, expected = (sorted(rows, key=json.dumps) for rows in (pairs, expected))
        assert pairs == expected
        assert data.dropped == case.get("dropped", {})
        assert data.reading.name == case["format"]


@pytest.mark.parametrize("name", CASES)
def test_the_chosen_sides_can_be_imitated(name, tmp_path):
    case, path = read_case(name, tmp_path)
    data = load(path, "sft", dataset_format=case["format"])
    wanted = {json.dumps([pair["prompt"], pair["chosen"]]) for pair in expected_pairs(case)}
    imitated = {json.dumps([plain_turns(row["prompt"]), plain_turns(row["completion"])]) for row in data.train}
    if "strip_citations" not in case.get("flags", {}) and name not in ("several_pairs", "tool_turns"):
        assert wanted <= imitated
    assert data.train.column_names[:2] == ["prompt", "completion"]


@pytest.mark.parametrize("name", DEMONSTRATIONS)
def test_rows_become_the_expected_demonstrations(name, tmp_path):
    case, path = read_case(name, tmp_path)
    expected = [
        row | {part: written_out(row[part]) for part in ("prompt", "completion")} for row in case["demonstrations"]
    ]
    for flags in ({}, {"dataset_format": case["format"]}):
        data = load(path, "sft", **flags)
        assert [plain(row, tells_tools(expected)) for row in data.train] == expected
        assert data.dropped == case.get("dropped", {})
        assert data.reading.name == case["format"]
    prompts = read_prompts(DataSettings(dataset_name=path)).rows["prompt"][:]
    assert list(map(plain_turns, prompts)) == [row["prompt"] for row in expected]


OF_TOOLS = ("openai_tools", "tool_turns", "llamafactory_v1", "when2call", "hermes", "nemotron", "xlam", "functions")


@pytest.mark.parametrize("name", OF_TOOLS)
def test_rows_with_tools_are_the_same_in_files_of_every_kind(name, tmp_path):
    case, path = read_case(name, tmp_path)
    verb, rows = ("train" if "pairs" in case else "sft"), case["rows"]
    names = list(dict.fromkeys(column for row in rows for column in row))
    values = [[row.get(column) for column in names] for row in rows]
    texts = [["" if v is None else v if isinstance(v, str) else json.dumps(v) for v in row] for row in values]
    with open(tmp_path / "rows.csv", "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([names, *texts])
    datasets.load_dataset("json", data_files=path, split="train").to_parquet(tmp_path / "rows.parquet")
    expected = load(path, verb)
    for other in ("rows.csv", "rows.parquet"):
        found = load(str(tmp_path / other), verb)
        assert [plain(row, True) for row in found.train] == [plain(row, True) for row in expected.train]
        assert found.dropped == expected.dropped


def test_every_format_has_a_case_and_a_name():
    named = {yaml.safe_load(path.read_text(encoding="utf-8"))["format"] for path in CASES.values()}
    pairs, demonstrations = ({layout.name for layout in LAYOUTS[verb]} for verb in ("train", "sft"))
    assert named == pairs == set(PAIR_FORMATS)
    assert demonstrations - pairs == set(SFT_FORMATS)


def test_layouts_name_what_there_is():
    for layout in {id(layout): layout for layouts in LAYOUTS.values() for layout in layouts}.values():
        assert layout.expand is None or layout.expand in EXPANSIONS, layout.name
        assert layout.fits is None or layout.fits in FITS, layout.name
        assert all(find_shape(name).name == name for name in layout.shapes), layout.name


def refusal(rows: list[dict], tmp_path: Path, verb: str = "train", **settings) -> tuple[str, ...]:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    with pytest.raises(UserError) as error:
        load(str(path), verb, **settings)
    return error.value.faults


PAIR = {"prompt": "q", "chosen": "good", "rejected": "bad"}


def test_a_forced_format_that_does_not_fit_says_what_is_missing_or_wrong(tmp_path):
    assert refusal([PAIR], tmp_path, dataset_format="webgpt") == (
        "--dataset_format webgpt: no column for its prompt (looked for question.full_text, question); "
        "the data has: prompt, chosen, rejected",
        "--dataset_format webgpt: no column for its first (looked for answer_0); "
        "the data has: prompt, chosen, rejected",
        "--dataset_format webgpt: no column for its second (looked for answer_1); "
        "the data has: prompt, chosen, rejected",
        "--dataset_format webgpt: no column for its first score (looked for score_0); "
        "the data has: prompt, chosen, rejected",
        "--dataset_format webgpt: no column for its second score (looked for score_1); "
        "the data has: prompt, chosen, rejected",
    )
    (line,) = refusal([PAIR], tmp_path, dataset_format="transcripts")
    assert line.startswith("--dataset_format transcripts: the columns are there, but with other content: ")
    assert "'chosen' has texts" in line
    (line,) = refusal([PAIR | {"rejected": 3}], tmp_path, dataset_format="explicit_prompt")
    assert "'rejected' has values that are not text" in line
    assert refusal([PAIR], tmp_path, dataset_format="text") == (
        "--dataset_format text: has no pairs; it is a format for the verb sft",
    )


def test_texts_that_begin_alike_are_told_from_replies_whose_prompt_is_elsewhere(tmp_path):
    rows = [{"chosen": f"The answer is {n}", "rejected": f"The answer is no {n}"} for n in range(20)]
    path = str(write_lines(tmp_path / "rows.jsonl", rows))
    assert load(path).train["prompt"][0] == "The answer is"
    assert "what both begin with, up to a whole word, is the prompt" in load(path).reading.description
    assert read_prompts(DataSettings(dataset_name=path)).rows["prompt"][:] == ["The answer is"] * 20
    assert load(path, "sft").train["completion"][1] == " 1"
    asked = [row | {"user query": f"Is it {n}?"} for n, row in enumerate(rows)]
    unlike = [row | ({"rejected": "No"} if n < 3 else {}) for n, row in enumerate(rows)]
    for odd in (asked, unlike):
        (line,) = refusal(odd, tmp_path)
        assert line.startswith(
            "--prompt_column is missing: no column is recognised as the prompt of 'chosen' and 'rejected'"
        )
        assert "--dataset_format implicit_prompt" in line
        assert load(path, dataset_format="implicit_prompt").train["prompt"][0] == "The answer is"
    (line,) = refusal(unlike, tmp_path, dataset_format="implicit_prompt", on_bad_rows="error")
    assert line.startswith(
        "'chosen' and 'rejected' do not begin alike: there is no prompt in 3 rows (rows.jsonl line 1, 2"
    )


def test_flags_without_effect_are_refused(tmp_path):
    flags = {"pairs_per_prompt": 2, "min_score_gap": 1.0, "min_score_ratio": 2.0, "strip_citations": True}
    lines = refusal([PAIR], tmp_path, **flags)
    assert [line.partition(":")[0] for line in lines] == [f"--{name}" for name in flags]


def test_answers_with_labels_that_share_no_prompt_are_refused(tmp_path):
    rows = [{"prompt": f"q{i}", "completion": "x", "label": i % 2 == 0} for i in range(6)]
    (line,) = refusal(rows, tmp_path)
    assert line.startswith("the rows (6) are single answers with a yes/no label ('label', as for KTO), and no prompt")
    path = tmp_path / "rows.jsonl"
    data = load(str(path), "sft")
    assert data.train["row"][:] == [0, 2, 4]
    assert data.dropped == {"the answer is labelled as bad": 3}


def test_each_answer_of_the_fewer_meets_another_before_one_meets_two(tmp_path):
    answers = [("good 1", True), ("good 2", True), ("bad 1", False), ("bad 2", False), ("bad 3", False)]
    path = write_lines(tmp_path / "rows.jsonl", [{"prompt": "q", "completion": c, "label": y} for c, y in answers])
    expected = {2: ["1 1", "2 2"], 4: ["1 1", "1 2", "2 2", "2 3"], 6: ["1 1", "1 2", "1 3", "2 1", "2 2", "2 3"]}
    for most, pairs in expected.items():
        rows = load(str(path), pairs_per_prompt=most).train
        assert [f"{row['chosen'][-1]} {row['rejected'][-1]}" for row in rows] == pairs


def test_labels_that_are_not_yes_or_no_make_no_unpaired_rows(tmp_path):
    rows = [{"prompt": f"q{i}", "completion": "x", "label": i} for i in range(3)]
    assert "its columns fit no known format" in refusal(rows, tmp_path)[0]
    data = load(str(tmp_path / "rows.jsonl"), "sft")
    assert (data.reading.name, len(data.train)) == ("prompt_completion", 3)


def write_labels(path: Path, names: tuple[str, str], labels: list) -> Path:
    rows = [{"prompt": f"q{i}", names[0]: "x", names[1]: "y", "label": label} for i, label in enumerate(labels)]
    if path.suffix == ".csv":
        datasets.Dataset.from_list([row | {"label": str(row["label"])} for row in rows]).to_csv(path)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


ONE_TWO, ZERO_ONE, LETTERS = ("response_1", "response_2"), ("response_0", "response_1"), ("response_a", "response_b")
UNEXPLAINED = {
    "counts_from_0": (ONE_TWO, [0, 1, 1, 0], "0"),
    "counts_from_1": (ZERO_ONE, [1, 2, 1, 2], "2"),
    "late_in_the_file": (ONE_TWO, [1] * 1500 + [0], "0"),
    "floats": (ZERO_ONE, [1.0, 2.0, 1.0], "2"),
    "soft": (ZERO_ONE, [1.0, 0.9, 0.0], "0.9"),
    "letters": (LETTERS, [0, 1], "0, 1"),
    "one_among_words": (LETTERS, ["a", "b", "0"], "0"),
    "words_with_numbers": (ONE_TWO, ["model_0", "model_1"], "model_0"),
    "its_own_stem": (ONE_TWO, ["response_0", "response_1"], "response_0"),
    "beside_yes_and_no": (ONE_TWO, [False, 0, True, 1], "0"),
    "infinite": (ZERO_ONE, ["0", "1", "inf"], "inf"),
    "ties_as_numbers": (ONE_TWO, [1, 2, 1.5], "1.5"),
}


@pytest.mark.parametrize("ending", [".jsonl", ".csv"])
@pytest.mark.parametrize("name", UNEXPLAINED)
def test_one_number_that_the_names_do_not_explain_refuses_the_source(name, ending, tmp_path):
    names, labels, shown = UNEXPLAINED[name]
    path = write_labels(tmp_path / f"rows{ending}", names, labels)
    said = f"'label' holds {shown}, which fits the name of neither '{names[0]}' nor '{names[1]}'"
    flags = ({"on_bad_rows": "error"}, {"max_samples": 1}, {"dataset_format": "two_answers"}, {"group_by": "prompt"})
    for verb, setting in [("train", flag) for flag in flags] + [("sft", {})]:
        with pytest.raises(UserError) as error:
            load(str(path), verb, **setting)
        (line,) = error.value.faults
        assert line.startswith(f"--dataset_name {path}: {said}")
        assert "pass --on_bad_rows skip" not in line
    streamed = DataSettings(dataset_name=str(path), streaming=True, on_bad_rows="skip", validation_split="none")
    with pytest.raises(UserError) as error:
        load_pairs(streamed, "train", 0, wanted=10**9)
    assert said in str(error.value)


def test_a_held_out_split_with_other_numbers_is_refused(tmp_path):
    write_labels(tmp_path / "train.jsonl", ONE_TWO, [1, 1, 1])
    write_labels(tmp_path / "test.jsonl", ONE_TWO, [1, 0])
    with pytest.raises(UserError, match="'label' holds 0, which fits the name of neither"):
        load(str(tmp_path), validation_split=None)


def test_a_stream_of_one_number_alone_does_not_tell_what_it_counts_from(tmp_path):
    path = write_labels(tmp_path / "rows.jsonl", ONE_TWO, [1] * 2500 + [0])
    settings = DataSettings(dataset_name=str(path), streaming=True, validation_split="none")
    with pytest.raises(UserError, match="holds the number 1 alone in the 1,000 rows that were read"):
        load_pairs(settings, "train", 0, wanted=5)
    write_labels(path, ONE_TWO, [1, 2] * 600)
    assert len(load_pairs(settings, "train", 0, wanted=5).train) == 5


def test_the_verb_data_refuses_unexplained_numbers_and_writes_nothing(run_script, tmp_path):
    path = write_labels(tmp_path / "rows.jsonl", ONE_TWO, [1, 0, 1])
    code, _, err = run_script("data", "--dataset_name", path, "--output_file", tmp_path / "clean.jsonl")
    assert code == 2
    assert "'label' holds 0, which fits the name of neither" in err
    assert not (tmp_path / "clean.jsonl").exists()


@pytest.mark.parametrize("nothing", ["", None, float("nan")])
def test_a_label_that_says_nothing_is_missing_among_numbers_and_a_tie_among_words(nothing, tmp_path):
    path = write_labels(tmp_path / "rows.jsonl", ONE_TWO, [1, 2, nothing])
    assert load(str(path)).dropped == {"'label' is missing": 1}
    if nothing == nothing:
        write_labels(path, LETTERS, ["a", "tie", nothing])
        assert load(str(path)).dropped == {"the answers have equal scores (a tie)": 2}


@pytest.mark.parametrize(("names", "labels"), [(ONE_TWO, [1, 2]), (ZERO_ONE, [0, 1]), (ONE_TWO, ["1.0", " 2 "])])
def test_numbers_that_the_names_explain_are_read(names, labels, tmp_path):
    data = load(str(write_labels(tmp_path / "rows.csv", names, labels)))
    assert data.train["chosen"][:] == ["x", "y"]


@pytest.mark.parametrize("name", ["shp", "winner", "safe_rlhf", "alpaca_farm", "helpsteer_preference", "kto_texts"])
def test_labels_and_scores_in_csv_where_all_is_text(name, tmp_path):
    case, _ = read_case(name, tmp_path)
    path = tmp_path / "rows.csv"
    datasets.Dataset.from_list(case["rows"]).to_csv(path)
    data = load(str(path), **case.get("flags", {}))
    assert data.train.to_list() == expected_pairs(case)


def test_bad_rows_of_several_pairs_lead_back_to_their_line(tmp_path):
    answers = [{"answer": text, "rank": rank} for rank, text in enumerate(("good", "bad"))]
    same = [{"answer": "good", "rank": rank} for rank in range(2)]
    rows = [{"prompt": "q", "answers": answers}, {"prompt": None, "answers": answers}, {"prompt": "q", "answers": same}]
    assert [line.partition(" Fix")[0] for line in refusal(rows, tmp_path, on_bad_rows="error")] == [
        "'prompt' is missing in 1 row (rows.jsonl line 2).",
        "'rejected' equals 'chosen' in 1 row (rows.jsonl line 3).",
    ]
    data = load(str(tmp_path / "rows.jsonl"), dataset_format="scored_answers")
    assert [data.place(row) for row in data.train["row"]] == ["rows.jsonl line 1"]


def test_several_processes_read_the_same(tmp_path):
    from utils.data.conversion import convert_rows
    from utils.data.schemas import find_reading
    from utils.data.sources import load_source

    rows = [{"prompt": f"q{i}", "responses": ["a", "b", "c"], "scores": [i % 3, 1, 2]} for i in range(50)]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    settings = DataSettings(dataset_name=str(path), pairs_per_prompt=3)
    source = load_source(settings, "train")
    reading = find_reading(source.rows, settings, "train")
    alone = convert_rows(source.rows, reading).to_list()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "other")
        shared = convert_rows(source.rows, reading, num_proc=2).to_list()
    assert alone == shared
    assert {row["row"] for row in alone} == set(range(50))
    assert len(alone) > 100


def test_an_unexplained_label_late_in_a_held_out_split_refuses_the_source_too(tmp_path):
    """Also where --max_samples would not read so far: what a number means is one thing in the whole source."""
    answers = {"response_1": "yes", "response_2": "no"}
    rows = [{"prompt": f"Question {n}?", **answers, "label": 1 + n % 2} for n in range(30)]
    write_lines(tmp_path / "train.jsonl", rows)
    write_lines(tmp_path / "test.jsonl", [*rows[:25], {**rows[25], "label": 0}])
    with pytest.raises(UserError, match="label"):
        load_pairs(DataSettings(dataset_name=str(tmp_path), max_samples=3), "train", seed=1)
