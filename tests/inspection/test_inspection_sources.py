"""The verb `data` on several sources: split, drawn and counted as `train` does, findings across and within them."""

from __future__ import annotations

import json
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path

import pytest
from shared.findings import counts_of, make_texts, places_of
from shared.pairs import make_pairs, write_lines
from shared.runs import read_record

from utils.arguments import parse_arguments
from utils.data.identity import pair_id
from utils.data.loading import load_pairs
from utils.data.splitting import advise_on_spare
from utils.inspection.subject import load_subject


def as_messages(pair: dict[str, str]) -> dict[str, list[dict[str, str]]]:
    roles = {"prompt": "user", "chosen": "assistant", "rejected": "assistant"}
    return {name: [{"role": role, "content": pair[name]}] for name, role in roles.items()}


def write_folder(folder: Path, train: list[dict], test: list[dict]) -> Path:
    folder.mkdir()
    write_lines(folder / "train.jsonl", train)
    write_lines(folder / "test.jsonl", test)
    return folder


@pytest.fixture
def mixture(tmp_path) -> str:
    """Texts with bad rows, a share of messages, several answers to a prompt, and a source with a split of its own."""
    texts, chats, ranked, own = (make_texts(60, seed=seed) for seed in range(4))
    texts[3] = texts[3] | {"rejected": texts[3]["chosen"]}
    texts[8] = texts[8] | {"chosen": None}
    answers = [
        {"prompt": pair["prompt"], "completions": [
            {"response": text, "overall_score": score}
            for score, text in enumerate((pair["rejected"], pair["chosen"], pair["chosen"] + " And more."))
        ]}
        for pair in ranked
    ]  # fmt: skip
    sources = (
        write_lines(tmp_path / "texts.jsonl", texts),
        f"{write_lines(tmp_path / 'chats.jsonl', [as_messages(pair) for pair in chats])}:0.45",
        f"{write_lines(tmp_path / 'ranked.jsonl', answers)}:17",
        write_folder(tmp_path / "own", own[:50], own[50:]),
    )
    return ",".join(map(str, sources))


def sides_of_train(name: str, *flags: str) -> tuple[Counter, Counter]:
    """The place and the id of each pair that train trains on, and of each that it evaluates."""
    settings = parse_arguments(["--model_name_or_path", "m", "--output_dir", "o", "--dataset_name", name, *flags])
    data = load_pairs(settings.data, "train", settings.training.seed)
    trained = Counter((data.place(row["row"]), pair_id(row)) for row in data.train)
    return trained, Counter((data.held_out_place(row["row"]), row["id"]) for row in data.held_out or ())


def sides_of_data(name: str, *flags: str) -> tuple[Counter, Counter]:
    flags = tuple(word for word in flags if word not in ("--on_bad_rows", "skip"))
    subject = load_subject(parse_arguments(["data", "--dataset_name", name, *flags]))
    pairs = [(subject.find_place(number), pair_id(row)) for number, row in enumerate(subject.pairs)]
    return tuple(
        Counter(pair for pair, there in zip(pairs, mask, strict=True) if there)
        for mask in (subject.trained, subject.held_out)
    )


@pytest.mark.parametrize(
    "flags",
    [
        [],
        ["--validation_split", "0.3", "--seed", "7"],
        ["--validation_split", "none"],
        ["--max_samples", "40"],
        ["--pairs_per_prompt", "2", "--seed", "1"],
    ],
    ids=" ".join,
)
def test_the_split_is_the_one_that_train_makes(mixture, flags):
    expected = sides_of_train(mixture, "--on_bad_rows", "skip", *flags)
    assert sides_of_data(mixture, *flags) == expected
    assert expected[0]


def test_what_is_set_aside_is_said_by_both_verbs(run_script, tmp_path, tiny_model, monkeypatch):
    for module in ("data.splitting", "training.description"):  # 1000 of them would take many rows
        monkeypatch.setattr(f"utils.{module}.DEFAULT_MOST_ROWS", 10)
    path = write_lines(tmp_path / "pairs.jsonl", make_pairs(400))
    assert sides_of_data(str(path)) == sides_of_train(str(path))
    trained, held_out = sides_of_data(str(path))
    assert held_out.total() == 10
    aside = 400 - trained.total() - 10
    assert aside > 0, "the rest of the tenth is on neither side"
    _, said, _ = run_script("data", "--dataset_name", path)
    _, ran, _ = run_script("--model_name_or_path", tiny_model, "--dataset_name", path, "--dry_run")
    assert f"{aside} set aside, neither trained on nor evaluated: a tenth of the prompts is held out" in ran
    for text in (said, ran):
        text = " ".join(text.split())
        assert f"{aside} set aside, neither trained on nor evaluated" in text
        assert "--validation_split 0.02 trains on nearly all of them; --validation_split 0.1 evaluates all" in text


def test_how_the_pairs_are_parted_is_said(tmp_path):
    pairs = make_texts(60)
    own = [write_folder(tmp_path / name, pairs[:20], pairs[20:30]) for name in ("own", "other")]
    file = write_lines(tmp_path / "pairs.jsonl", pairs[30:])

    def split(*names: Path, flags: tuple[str, ...] = ()) -> str:
        return load_subject(parse_arguments(["data", "--dataset_name", ",".join(map(str, names)), *flags])).split

    made = "the split that train makes with --seed 7"
    assert split(file, flags=("--seed", "7")) == made
    assert split(own[0]) == "the source's own held-out split"
    assert split(*own) == "the sources' own held-out splits"
    seeded = split(own[0], file, flags=("--seed", "7"))
    assert seeded == f"the sources' own held-out splits where they have one, else {made}"
    assert split(file, flags=("--validation_split", "none")) == "no validation split"


def test_held_out_pairs_stay_where_trained_ones_of_their_prompts_are_left_out(run_script, tmp_path):
    """With --group_by a prompt can be on both sides: cleaning takes out its trained pairs, so the evaluation stays."""
    texts = make_texts(80)
    rows = [pair | {"prompt": texts[i % 40]["prompt"], "writer": f"w{i // 40}{i % 8}"} for i, pair in enumerate(texts)]
    path, clean = write_lines(tmp_path / "pairs.jsonl", rows), tmp_path / "clean.jsonl"
    flags = ("--group_by", "writer", "--validation_split", "0.4")
    trained, held_out = sides_of_data(str(path), *flags)
    code, _, err = run_script(
        "data", "--dataset_name", path, *flags, "--output_file", clean, "--remove", "held_out_prompts"
    )
    assert code == 3, err
    written = {pair_id(json.loads(line)) for line in clean.read_text(encoding="utf-8").splitlines()}
    prompts = {rows[int(place.rpartition(" ")[2]) - 1]["prompt"] for place, _ in held_out}
    both = {name for place, name in trained if rows[int(place.rpartition(" ")[2]) - 1]["prompt"] in prompts}
    assert both
    assert written == {name for _, name in trained + held_out} - both


@pytest.mark.parametrize(("rows", "fraction"), [(9_800, "0.05"), (60_000, "0.01"), (1_500_000, "0.0005")])
def test_the_fraction_to_pass_holds_out_no_more_than_is_evaluated(rows, fraction):
    assert advise_on_spare(rows).startswith(f"--validation_split {fraction} ")


def test_counts_agree_with_a_run(run_script, tmp_path, tiny_model):
    pairs = make_texts(80)
    first, second = write_lines(tmp_path / "a.jsonl", pairs[:50]), write_lines(tmp_path / "b.jsonl", pairs[40:])
    name = f"{first},{second}:0.75"
    code, out, _ = run_script("data", "--dataset_name", name, "--json_file", tmp_path / "found.json")
    assert code == 3
    found = json.loads((tmp_path / "found.json").read_text(encoding="utf-8"))
    flags = ("--model_name_or_path", tiny_model, "--dataset_name", name, "--output_dir", tmp_path / "run")
    code, _, err = run_script(*flags, "--max_steps", 1)
    assert code == 0, err
    run = read_record(tmp_path / "run")["data"]
    names = {"good_pairs": "good", "drawn": "drawn", "train_pairs": "train", "held_out_pairs": "held_out"}
    for said, ran in zip(found["sources"], run["sources"], strict=True):
        assert {key: said[key] for key in (*names, "repeated")} == {
            key: ran[names.get(key, key)] for key in (*names, "repeated")
        }
    assert found["sources"][1]["drawn"] == 30
    assert counts_of(found)["repeated"] == found["sources"][1]["repeated"] > 0
    lines = (tmp_path / "run" / "held_out_pairs.jsonl").read_text(encoding="utf-8").splitlines()
    held_out = Counter((row["place"], row["id"]) for row in map(json.loads, lines))
    assert sides_of_data(name)[1] == held_out
    assert "40 good of 40 rows, 30 of them drawn" in " ".join(out.split())


@pytest.mark.parametrize("order", [1, -1])
def test_tokens_of_texts_among_messages_are_those_of_messages(run_script, tmp_path, tiny_model, order):
    texts = write_lines(tmp_path / "texts.jsonl", make_pairs(10))
    chats = write_lines(tmp_path / "chats.jsonl", [as_messages(pair) for pair in make_pairs(10, seed=1)])
    all_chats = write_lines(
        tmp_path / "all.jsonl", [as_messages(pair) for pair in (*make_pairs(10), *make_pairs(10, seed=1))]
    )
    flags = ("--model_name_or_path", tiny_model, "--json_file", "-", "--dataset_name")
    _, mixed, err = run_script("data", *flags, ",".join(map(str, (texts, chats)[::order])))
    assert err == ""
    _, alone, _ = run_script("data", *flags, all_chats)
    assert json.loads(mixed)["tokens"]["total"] == json.loads(alone)["tokens"]["total"]


def test_findings_across_sources(run_script, tmp_path):
    first, second, third = make_texts(40), make_texts(40, seed=1), make_texts(30, seed=2)
    second[6] = first[2] | {"chosen": first[2]["chosen"] + "  "}  # a copy in another source
    second[9] = second[8]  # in the same one
    second[11] = first[5] | {"chosen": first[5]["rejected"], "rejected": first[5]["chosen"]}
    second[13] = second[13] | {"chosen": ""}
    third[25]["prompt"] = first[7]["prompt"].upper()  # held out in the third, trained on in the first
    for number, pair in enumerate(second):
        pair |= {"score_chosen": 2, "score_rejected": 3 if number == 20 else 1}
    for number, pair in enumerate(third):
        pair |= {"rating_of_chosen": 5, "rating_of_rejected": 5 if number in (4, 27) else 1}
    sources = (
        write_lines(tmp_path / "first.jsonl", first),
        write_lines(tmp_path / "second.jsonl", [as_messages(p) | {"score_chosen": p["score_chosen"],
                                                "score_rejected": p["score_rejected"]} for p in second]),
        write_folder(tmp_path / "third", third[:25], third[25:]),
    )  # fmt: skip
    clean, page = tmp_path / "clean.jsonl", tmp_path / "page.html"
    code, out, err = run_script(
        "data", "--dataset_name", ",".join(map(str, sources)), "--json_file", tmp_path / "found.json",
        "--output_file", clean, "--report_file", page, "--remove", "held_out_prompts", "ties",
    )  # fmt: skip
    assert (code, err) == (3, "")
    record = json.loads((tmp_path / "found.json").read_text(encoding="utf-8"))
    found = counts_of(record)
    assert found.pop("held_out_prompt") == 1
    assert found == {
        "empty": 1, "repeated": 1, "duplicate": 1, "both_ways": 2, "score_contradiction": 1, "tie": 2,
    }  # fmt: skip
    places = {
        "empty": "second.jsonl line 14",
        "repeated": "second.jsonl line 7",
        "duplicate": "second.jsonl line 10",
        "both_ways": "first.jsonl line 6; second.jsonl line 12",
        "score_contradiction": "second.jsonl line 21",
        "tie": "train.jsonl line 5; test.jsonl line 3",
        "held_out_prompt": "test.jsonl line 1",
    }
    assert {name: places_of(record, name) for name in places} == places
    examples = {finding["name"]: finding["examples"][0] for finding in record["findings"]}
    assert examples["repeated"]["also at"] == "first.jsonl line 3"
    assert examples["held_out_prompt"]["trained prompt"].startswith("first.jsonl line 8: ")
    assert [source["repeated"] for source in record["sources"]] == [0, 1, 0]
    assert [source["bad_rows"] for source in record["sources"]] == [{}, {"'chosen' is empty": 1}, {}]
    assert [source["rows"] for source in record["sources"]] == [40, 40, 30]
    written = [json.loads(line) for line in clean.read_text(encoding="utf-8").splitlines()]
    assert Counter(row["source"] for row in written) == {
        str(sources[0]): 38,  # without one that is labelled both ways, and one that is held out
        str(sources[1]): 36,
        str(sources[2]): 24,
    }
    assert written[0] == as_messages(first[0]) | {"source": str(sources[0])}
    for shown in (
        "first.jsonl: 40 good of 40 rows",
        "second.jsonl: 39 good of 40 rows",
        "1 also in a source before it",
    ):
        assert shown in " ".join(out.split())
    assert {"Sources", "also in a source before"} <= set(texts_of(page))


def texts_of(page: Path) -> list[str]:
    found: list[str] = []
    reader = HTMLParser()
    reader.handle_data = found.append
    reader.feed(page.read_text(encoding="utf-8"))
    return found


def test_files_of_one_name_are_told_apart(run_script, tmp_path):
    for name in ("x", "y"):
        (tmp_path / name).mkdir()
        bad = {"prompt": "p", "chosen": "c", "rejected": "c"}
        write_lines(tmp_path / name / "pairs.jsonl", [*make_texts(3, seed=ord(name)), bad])
    both = f"{tmp_path / 'x' / 'pairs.jsonl'},{tmp_path / 'y' / 'pairs.jsonl'}"
    place = f"{tmp_path / 'x' / 'pairs.jsonl'} line 4"
    code, out, _ = run_script("data", "--dataset_name", both)
    assert code == 3
    assert f"{place}; {tmp_path / 'y' / 'pairs.jsonl'} line 4" in " ".join(out.split())
    code, _, err = run_script("--model_name_or_path", "m", "--output_dir", "o", "--dataset_name", both)
    assert code == 2
    assert place in err


def test_a_source_without_a_good_pair_is_a_finding(run_script, tmp_path):
    good = write_lines(tmp_path / "good.jsonl", make_texts(20))
    bad = write_lines(tmp_path / "bad.jsonl", [as_messages({"prompt": "p", "chosen": "", "rejected": "r"})] * 2)
    code, out, err = run_script("data", "--dataset_name", f"{good},{bad}")
    assert (code, err) == (3, "")
    assert f"train would stop: no good pair in {bad}" in " ".join(out.split())


def test_max_samples_takes_the_first_good_pairs(run_script, tmp_path):
    rows = make_texts(30)
    rows[2] = rows[2] | {"chosen": ""}
    rows[20] = rows[20] | {"chosen": ""}
    path, clean = write_lines(tmp_path / "pairs.jsonl", rows), tmp_path / "clean.jsonl"
    code, out, _ = run_script("data", "--dataset_name", path, "--max_samples", 10, "--output_file", clean)
    assert code == 3
    assert "10 good of 11 rows" in out
    assert "pairs.jsonl line 3\n" in out, "the bad row behind them is not looked at"
    written = [json.loads(line) for line in clean.read_text(encoding="utf-8").splitlines()]
    assert written == [row for row in rows[:11] if row["chosen"]]


def test_more_than_there_is_cannot_be_drawn(run_script, tmp_path):
    paths = [write_lines(tmp_path / f"{name}.jsonl", make_texts(5)) for name in "ab"]
    code, _, err = run_script("data", "--dataset_name", f"{paths[0]}:6,{paths[1]}:7")
    assert code == 2
    assert err.count("has only 5 good rows") == 2
