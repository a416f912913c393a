"""The verb `data`: what is planted is found, and nothing else; summary, JSON, page and clean pairs."""

from __future__ import annotations

import json
import random
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from shared.findings import counts_of, make_texts, places_of
from shared.pairs import write_lines

from utils.data.places import list_places
from utils.inspection.languages import LANGUAGES, number_language
from utils.inspection.similarity import find_alike, group_alike, sign_texts
from utils.inspection.statistics import check_rules
from utils.inspection.texts import has_control, has_html, has_mojibake, nearly_equal, refuses, says_nothing
from utils.report.charts import Bar, draw_bars, draw_histogram, draw_lines


def inspect(run_script, tmp_path: Path, rows: list[dict], *flags, name: str = "pairs.jsonl") -> tuple[int, dict, str]:
    """The exit code, the JSON and the summary of `data` on these rows."""
    path = write_lines(tmp_path / name, rows)
    code, out, err = run_script("data", "--dataset_name", path, "--json_file", tmp_path / "found.json", *flags)
    assert err == ""
    return code, json.loads((tmp_path / "found.json").read_text(encoding="utf-8")), out


def test_a_clean_file_is_clean(run_script, tmp_path):
    code, record, out = inspect(run_script, tmp_path, make_texts(80))
    assert code == record["exit_code"] == 0
    assert record["findings"] == []
    assert out.startswith("clean: no problems in 80 pairs\n")
    assert record["counts"]["train_pairs"] + record["counts"]["held_out_pairs"] == 80
    assert 0.3 < record["words_classifier"]["accuracy"] < 0.7


def test_rows_that_make_no_pair_by_design_are_a_note(run_script, tmp_path):
    """As `train` leaves them out without being told to: answers that were scored alike."""
    rows = [
        {"question": {"full_text": row["prompt"]}, "answer_0": row["chosen"], "score_0": score,
         "answer_1": row["rejected"], "score_1": -score}
        for row, score in zip(make_texts(80), [0.5, 0.0] * 40, strict=True)
    ]  # fmt: skip
    code, record, out = inspect(run_script, tmp_path, rows)
    assert code == 0
    assert counts_of(record) == {"left_out": 40}
    assert "train leaves them out and counts them" in out


FULL = "The answer is that ten words and more are said here in all."
PLANTED = {
    "identical": [{"chosen": FULL, "rejected": FULL}],
    "empty": [{"chosen": " "}, {"prompt": None}],
    "duplicate": ["copy"],
    "both_ways": ["both ways"],
    "near_duplicate": ["near copy"],
    "swapped_looking": [
        {"chosen": "I'm sorry, but I can't help with that.", "rejected": FULL},
        {"chosen": "N/A", "rejected": FULL},
    ],
    "nearly_equal": [{"chosen": FULL, "rejected": FULL.upper() + "!"}],
    "control": [{"chosen": "bell \x07 rings"}, {"prompt": "turned \u202e around"}],
    "encoding": [{"rejected": "the cafÃ© is closed"}, {"chosen": "lost \ufffd here"}],
    "html": [{"chosen": "a <b>bold</b> word &amp; more"}],
    "score_contradiction": [{"score_chosen": 1.0, "score_rejected": 2.5}],
    "tie": [{"score_chosen": 3.0, "score_rejected": 3.0}],
}
COUNTS = {name: len(plants) for name, plants in PLANTED.items()} | {"both_ways": 2}


def plant(rows: list[dict], wish: dict | str, number: int) -> list[dict]:
    """Rows with one thing wrong, made of a pair that stands nowhere else."""
    pair = make_texts(1, seed=1000 + number)[0]
    score = {"score_chosen": 2.0, "score_rejected": 1.0}
    match wish:
        case "copy":
            return [dict(rows[3]) | {"chosen": rows[3]["chosen"] + "  "}]
        case "both ways":
            return [pair | score, pair | score | {"chosen": pair["rejected"], "rejected": pair["chosen"]}]
        case "near copy":
            words = rows[4]["prompt"].split()
            return [dict(rows[4]) | {"prompt": " ".join(["Another", *words[1:]])}]
    return [pair | score | wish]


def test_each_check_finds_what_was_planted_and_nothing_else(run_script, tmp_path):
    rows = [pair | {"score_chosen": 2.0, "score_rejected": 1.0} for pair in make_texts(60)]
    lines: dict[str, list[int]] = {}
    for number, (name, wish) in enumerate((name, wish) for name, plants in PLANTED.items() for wish in plants):
        added = plant(rows, wish, number)
        lines.setdefault(name, []).extend(range(len(rows) + 1, len(rows) + len(added) + 1))
        rows += added
    code, record, out = inspect(run_script, tmp_path, rows, "--validation_split", "none")
    assert code == 3
    found: dict[str, int] = {}
    for finding in record["findings"]:
        found[finding["name"]] = found.get(finding["name"], 0) + finding["count"]
    assert found == COUNTS
    places = {finding["name"]: [] for finding in record["findings"]}
    for finding in record["findings"]:
        places[finding["name"]] += [int(place.rpartition(" ")[2]) for place in finding["places"]]
        assert finding["count"] < 6, "each place is listed"
    assert {name: sorted(numbers) for name, numbers in places.items()} == lines
    assert {f["name"] for f in record["findings"] if f["severity"] == "note"} == {
        "near_duplicate", "swapped_looking", "nearly_equal", "html",
    }  # fmt: skip
    assert "contradictory labels: the same pair with both preferences" in out
    assert f"pairs.jsonl line {lines['both_ways'][0]}, {lines['both_ways'][1]}" in out


@pytest.mark.parametrize(("words", "found"), [(9, 0), (10, 1)])
def test_an_answer_of_ten_words_may_be_on_the_wrong_side(words, found, run_script, tmp_path):
    pair = {"prompt": "Why is it so?", "chosen": "N/A", "rejected": " ".join(["word"] * words)}
    record = inspect(run_script, tmp_path, [*make_texts(20), pair])[1]
    assert counts_of(record).get("swapped_looking", 0) == found


@pytest.mark.parametrize(
    ("unlike", "right", "pairs", "share"),
    [
        (100, 65, 400, "65%"),  # just enough pairs, just often enough
        (99, 90, 400, None),
        (100, 64, 400, None),
        (110, 100, 2400, None),  # fewer than a twentieth of all
        (120, 30, 2400, "75%"),  # of the rejected sides
    ],
)
def test_a_shallow_sign_is_told_from_where_it_decides_much(unlike, right, pairs, share):
    rule = {"name": "list", "rule": "the one that has a list", "unlike": unlike, "right": right, "accuracy": 0.5}
    titles = [finding.title for finding in check_rules([rule], pairs)]
    assert len(titles) == (share is not None)
    assert all(f"is {'chosen' if right > 60 else 'rejected'} in {share} of the pairs" in title for title in titles)


def test_several_processes_find_the_same(run_script, tmp_path, tiny_model, monkeypatch):
    rows = [*make_texts(60), *make_texts(10)]
    flags = ("--model_name_or_path", tiny_model, "--compare", write_lines(tmp_path / "other.jsonl", make_texts(3)))
    alone = inspect(run_script, tmp_path, rows, *flags)[1]
    monkeypatch.setattr("utils.inspection.scanning.choose_processes", lambda count: 2)
    monkeypatch.setattr("utils.inspection.tokens.choose_processes", lambda count: 2)
    shared = inspect(run_script, tmp_path, rows, *flags)[1]
    assert alone["problems"] == 2
    assert shared | {"seconds": 0} == alone | {"seconds": 0}


def test_lines_that_hold_no_row_are_counted(run_script, tmp_path):
    path = write_lines(tmp_path / "pairs.jsonl", make_texts(5))
    path.write_text(path.read_text(encoding="utf-8") + "{broken\n", encoding="utf-8")
    code, out, err = run_script("data", "--dataset_name", path)
    assert (code, err) == (3, "")
    assert "1  a line that cannot be read: invalid JSON" in out


def test_prompts_shared_between_the_splits_of_a_source(run_script, tmp_path):
    train, held_out = make_texts(40), make_texts(10, seed=1)
    held_out[2]["prompt"] = train[7]["prompt"].upper()
    held_out[5]["prompt"] = train[9]["prompt"].replace(train[9]["prompt"].split()[0], "Another")
    (tmp_path / "both").mkdir()
    write_lines(tmp_path / "both" / "train.jsonl", train)
    write_lines(tmp_path / "both" / "test.jsonl", held_out)
    flags = ("--json_file", tmp_path / "found.json", "--output_file", tmp_path / "clean.jsonl")
    code, _, err = run_script("data", "--dataset_name", tmp_path / "both", *flags, "--remove", "held_out_prompts")
    assert (code, err) == (3, "")
    record = json.loads((tmp_path / "found.json").read_text(encoding="utf-8"))
    assert counts_of(record) == {"held_out_prompt": 1, "near_held_out_prompt": 1}
    assert places_of(record, "held_out_prompt") == "test.jsonl line 3"
    assert places_of(record, "near_held_out_prompt") == "test.jsonl line 6"
    written = [json.loads(line) for line in (tmp_path / "clean.jsonl").read_text(encoding="utf-8").splitlines()]
    assert written == [pair for pair in train if pair != train[7]], "the trained side of it is left out"


def test_prompts_of_an_evaluation_set(run_script, tmp_path):
    rows = make_texts(40)
    other = [{"question": rows[5]["prompt"]}, {"question": "Quite " + rows[6]["prompt"]}, {"question": "What else?"}]
    evaluation = write_lines(tmp_path / "evaluation.jsonl", other)
    flags = ("--compare", evaluation, "--output_file", tmp_path / "clean.parquet", "--remove", "overlap")
    code, record, _ = inspect(run_script, tmp_path, rows, *flags)
    assert code == 3
    assert counts_of(record) == {"overlap": 1, "near_overlap": 1}
    assert places_of(record, "overlap") == "pairs.jsonl line 6"
    assert places_of(record, "near_overlap") == "pairs.jsonl line 7"
    assert record["compare"]["prompts"] == 3
    assert record["compare"]["prompts_found"] == record["compare"]["prompts_nearly_found"] == 1
    written = pq.read_table(tmp_path / "clean.parquet").to_pylist()
    assert written == [pair for pair in rows if pair not in (rows[5], rows[6])]


def test_clean_pairs_are_what_train_reads(run_script, tmp_path, tiny_model):
    rows = make_texts(30)
    rows += [rows[0], {"prompt": "P", "chosen": "c", "rejected": "r"}, {"prompt": "P", "chosen": "r", "rejected": "c"}]
    rows += [{"prompt": "Q", "chosen": "", "rejected": "r"}]
    clean = tmp_path / "clean.jsonl"
    code, record, out = inspect(run_script, tmp_path, rows, "--output_file", clean)
    assert code == 3
    assert record["output"]["pairs"] == 30
    assert record["output"]["removed"] == {"'chosen' is empty": 1, "duplicate": 1, "both_ways": 2}
    assert "wrote 30 pairs" in out
    written = [json.loads(line) for line in clean.read_text(encoding="utf-8").splitlines()]
    assert written == rows[:30]
    code, record, _ = inspect(run_script, tmp_path, written, name="again.jsonl")
    assert (code, record["findings"]) == (0, [])
    code, out, err = run_script("--model_name_or_path", tiny_model, "--dataset_name", clean, "--use_lora", "--dry_run")
    assert code == 0, err
    counts = record["counts"]
    assert f"{counts['train_pairs']} rows to train on, {counts['held_out_pairs']} held out" in out


def test_messages_stay_messages(run_script, tmp_path):
    def talk(*contents: str) -> list[dict[str, str]]:
        return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(contents)]

    rows = [
        {"chosen": talk(pair["prompt"], pair["chosen"]), "rejected": talk(pair["prompt"], pair["rejected"])}
        for pair in make_texts(20)
    ]
    inspect(run_script, tmp_path, rows, "--output_file", tmp_path / "clean.jsonl")
    first = json.loads((tmp_path / "clean.jsonl").read_text(encoding="utf-8").splitlines()[0])
    assert first == {
        "prompt": rows[0]["chosen"][:1],
        "chosen": rows[0]["chosen"][1:],
        "rejected": rows[0]["rejected"][1:],
    }


def test_tokens_are_counted_as_training_counts_them(run_script, tmp_path, tiny_model):
    from transformers import AutoTokenizer

    rows = [
        {"prompt": "On day one it was", "chosen": f" {'lovely ' * n}.", "rejected": f" {'awful ' * n}."} for n in (1, 3)
    ]
    # Both sides alike up to the limit, and not behind it.
    rows.append(
        {"prompt": "On day two " * 5 + "it was", "chosen": " so" * 40 + " lovely.", "rejected": " so" * 40 + " awful."}
    )
    flags = ("--model_name_or_path", tiny_model, "--max_length", 32, "--validation_split", "none")
    code, record, _ = inspect(run_script, tmp_path, rows, *flags)
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    prompts = [len(tokenizer(row["prompt"])["input_ids"]) for row in rows]  # with BOS
    sides = {
        side: [len(tokenizer(row[side], add_special_tokens=False)["input_ids"]) + 1 for row in rows]  # with EOS
        for side in ("chosen", "rejected")
    }
    tokens = record["tokens"]
    assert tokens["total"] == sum(prompts) + sum(sides["chosen"]) + sum(sides["rejected"])
    assert tokens["lengths"]["chosen"]["max"] == max(sides["chosen"])
    assert code == 3
    assert {name: count for name, count in counts_of(record).items() if name in ("equal_when_cut", "too_long")} == {
        "equal_when_cut": 1, "too_long": 1,
    }  # fmt: skip
    assert (tokens["pairs_too_long"], tokens["responses_cut"]) == (1, 1)
    widths = [min(p + max(c, r), 32) for p, c, r in zip(prompts, *sides.values(), strict=True)]
    assert tokens["padded_tokens"] == 2 * len(rows) * max(widths)
    assert (
        tokens["shared_prefix_tokens"]
        == sum(
            [
                prompts[0] + sides["chosen"][0] + sides["rejected"][0],
                prompts[1] + sides["chosen"][1] + sides["rejected"][1],
            ]
        )
        + 8
        + 2 * 24
    )  # the long one keeps a quarter of the limit for its prompt


def test_a_tokenizer_alone_is_enough_and_one_that_cannot_be_read_is_named(run_script, tmp_path, tiny_model):
    alone = tmp_path / "tokenizer"
    alone.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tiny_model / name, alone)
    code, record, _ = inspect(run_script, tmp_path, make_texts(5), "--model_name_or_path", alone)
    assert code == 0
    assert record["tokens"]["max_length"] == 1024
    code, _, err = run_script("data", "--dataset_name", tmp_path / "pairs.jsonl", "--model_name_or_path", tmp_path)
    assert code == 2
    assert err.startswith(f"error: --model_name_or_path {tmp_path}: no tokenizer can be loaded from it")


MARKUP = "<script>document.title='run'</script><img src=x onerror=\"document.title='run'\"></dd></main>\x00 &lt;"


class Reader(HTMLParser):
    """The elements of a page, its attributes, and its text."""

    def __init__(self) -> None:
        super().__init__()
        self.tags, self.attributes, self.text = set(), [], ""

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.attributes += attrs

    def handle_data(self, data):
        self.text += data


@pytest.fixture
def hostile_page(run_script, tmp_path) -> tuple[Path, dict]:
    rows = [*make_texts(20), {"prompt": MARKUP, "chosen": "fine", "rejected": MARKUP}]
    rows.append({"prompt": "p", "chosen": MARKUP, "rejected": MARKUP})
    name = "<img src=x onerror=alert(1)>.jsonl"
    _, record, _ = inspect(run_script, tmp_path, rows, "--report_file", tmp_path / "page.html", name=name)
    return tmp_path / "page.html", record


def test_markup_in_rows_is_text_in_the_page(hostile_page):
    page, record = hostile_page
    content = page.read_text(encoding="utf-8")
    reader = Reader()
    reader.feed(content)
    assert not reader.tags & {"script", "img", "link", "iframe", "object", "form"}
    assert not [name for name, _ in reader.attributes if name.startswith("on")]
    assert not [value for name, value in reader.attributes if name in ("src", "href") and not value.startswith("#")]
    assert "<script>document.title='run'</script>" in reader.text
    assert "\x00" not in content
    assert counts_of(record)["html"] == 1


def test_page_and_json_agree(hostile_page):
    page, record = hostile_page
    reader = Reader()
    reader.feed(page.read_text(encoding="utf-8"))
    for finding in record["findings"]:
        assert f"{finding['count']:,} × {finding['title']}" in reader.text
        assert list_places(finding["places"], finding["count"]) in reader.text
    for rule in record["shortcuts"]:
        assert f"{rule['accuracy']:.1%}" in reader.text
    for side in ("prompt", "chosen", "rejected"):
        assert f"{record['lengths']['words'][side]['mean']:,.0f}" in reader.text


def test_a_browser_runs_nothing_of_it(hostile_page, tmp_path):
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("no Chromium here")
    flags = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom"]
    shown = subprocess.run([browser, *flags, hostile_page[0].as_uri()], capture_output=True, text=True, timeout=120)
    assert "<title>Preference data:" in shown.stdout
    assert "<script" not in shown.stdout
    assert "<title>run" not in shown.stdout


def test_json_alone_on_standard_output(run_script, tmp_path):
    path = write_lines(tmp_path / "pairs.jsonl", make_texts(5))
    code, out, _ = run_script("data", "--dataset_name", path, "--json_file", "-")
    assert code == 0
    assert json.loads(out)["verdict"] == "clean"


@pytest.mark.parametrize(
    ("flags", "fault"),
    [
        ([], "--dataset_name is missing: name a hub dataset, a folder or a file"),
        (["--dataset_name", "x.jsonl", "--report_file", "x.txt"], "--report_file is x.txt: must end in .html or .htm"),
        (
            ["--dataset_name", "x.jsonl", "--output_file", "x.jsonl"],
            "--output_file is x.jsonl: is the input data",
        ),
        (["--dataset_name", "x.jsonl", "--remove", "ties"], "--remove: has no effect without --output_file"),
        (
            ["--dataset_name", "x.jsonl", "--max_length", "9"],
            "--max_length: tokens are counted with --model_name_or_path",
        ),
        (["--dataset_name", "x.jsonl", "--beta", "1"], "--beta: is a flag of the verb train and evaluate, not of data"),
        (
            ["--dataset_name", "x.jsonl", "--streaming"],
            "--streaming: is a flag of the verb train and sft, not of data",
        ),
        (
            ["--dataset_name", "y.jsonl,x.jsonl:0.5", "--output_file", "x.jsonl"],
            "--output_file is x.jsonl: is one of the sources",
        ),
    ],
)
def test_flags_that_do_not_fit_are_refused(run_script, flags, fault):
    code, _, err = run_script("data", *flags)
    assert code == 2
    assert err.startswith(f"error: {fault}"), err


def test_compare_names_its_own_flag(run_script, tmp_path):
    path = write_lines(tmp_path / "pairs.jsonl", make_texts(5))
    code, _, err = run_script("data", "--dataset_name", path, "--compare", tmp_path / "none.jsonl")
    assert code == 2
    assert err.startswith("error: --compare")
    other = write_lines(tmp_path / "other.jsonl", [{"sentence": "a"}, {"sentence": "b"}])
    code, _, err = run_script("data", "--dataset_name", path, "--compare", other)
    assert code == 2
    assert "no column is recognised as the prompt; it has: sentence" in err


def test_nothing_left_to_write_is_said(run_script, tmp_path):
    rows = [{"prompt": "p", "chosen": "a", "rejected": "b"}, {"prompt": "p", "chosen": "b", "rejected": "a"}]
    path = write_lines(tmp_path / "pairs.jsonl", rows)
    code, out, err = run_script("data", "--dataset_name", path, "--output_file", tmp_path / "clean.jsonl")
    assert code == 2
    assert err.endswith("clean.jsonl: not written, as no pair is left\n")
    assert "left out: both ways 2" in out
    assert not (tmp_path / "clean.jsonl").exists()


def test_not_one_good_pair_is_a_finding(run_script, tmp_path):
    code, record, _ = inspect(run_script, tmp_path, [{"prompt": "p", "chosen": "", "rejected": "b"}] * 2)
    assert code == 3
    assert counts_of(record) == {"empty": 2}


def jaccard(one: str, other: str) -> float:
    left, right = (
        {tuple([*text.split(), "", ""][i : i + 3]) for i in range(len(text.split()))} for text in (one, other)
    )
    return len(left & right) / len(left | right)


def test_signatures_estimate_the_share_of_common_runs():
    draw = random.Random(3)
    errors = []
    for _ in range(100):
        words = draw.choices([str(n) for n in range(3000)], k=80)
        changed = list(words)
        for place in draw.sample(range(80), draw.randint(0, 12)):
            changed[place] = "changed"
        one, other = " ".join(words), " ".join(changed)
        left, right = sign_texts([one, other])
        errors.append((left == right).mean() - jaccard(one, other))
    assert abs(np.mean(errors)) < 0.02
    assert np.std(errors) < 0.06


def test_texts_with_seven_tenths_of_their_runs_in_common_are_not_nearly_the_same():
    words = [f"word{i}" for i in range(400)]
    texts = [" ".join(words), " ".join([*words[:330], *(f"other{i}" for i in range(70))])]
    signatures = sign_texts(texts)
    assert 0.62 < (signatures[0] == signatures[1]).mean() < 0.78
    assert group_alike(signatures).tolist() == [0, 1]
    assert find_alike(signatures[:1], signatures[1:])[0].tolist() == [-1]


def test_case_and_punctuation_make_no_other_text_and_no_words_make_none():
    signatures = sign_texts(["One two, three!", "one TWO three", "", "...", "你好,世界", "你好世界", "four"])
    assert group_alike(signatures).tolist() == [0, 0, 2, 3, 4, 4, 6]
    found, likeness = find_alike(signatures[:1], signatures[1:])
    assert (found.tolist(), likeness.tolist()) == ([0], [1.0])
    assert find_alike(signatures[2:3], signatures)[0].tolist() == [-1]


@pytest.mark.parametrize(
    ("text", "language"),
    [
        ("What is the best way to learn a language when you have no time for it?", "English"),
        ("Wie ist das Wetter heute, und was soll ich mit der Zeit machen, die nicht reicht?", "German"),
        ("¿Cómo se llama el río que pasa por la ciudad de los abuelos?", "Spanish"),
        ("Почему небо голубое?", "Cyrillic script"),
        ("今日はとても天気がいいですね", "Japanese"),
        ("今天天气很好我们去公园", "Chinese"),
        ("x = 3", "unclear"),
        ("", "unclear"),
    ],
)
def test_languages(text, language):
    assert LANGUAGES[number_language(text)] == language


SIGNS = {
    refuses: (
        ["I'm sorry, but I can't do that", "As an AI language model, I", "Unfortunately, I cannot help"],
        ["I can do that", "Sorry to hear that! Here is what helps", "I cannot praise it enough", ""],
    ),
    says_nothing: (["N/A.", "…", "", "I don't know."], ["None of them fits", "No", "42"]),
    has_mojibake: (["donâ€™t", "cafÃ©", "\ufffd"], ["NÃO", "São Paulo", "«Â»", "naïve café", "20 °C"]),
    has_control: (["a\x00", "\u202e"], ["a\tb\r\n", "👩‍👩‍👧"]),
    has_html: (["<p>one</p>", "a &amp; b", '<a href="x">y</a>'], ["if a < b > c: `<b>`", "R&D", "```\n<p>\n```"]),
}


@pytest.mark.parametrize("test", SIGNS, ids=lambda test: test.__name__)
def test_signs_in_texts(test):
    there, absent = SIGNS[test]
    assert [text for text in there if not test(text)] == []
    assert [text for text in absent if test(text)] == []


def test_texts_that_differ_in_form_alone():
    assert nearly_equal("One, two.", "one two")
    assert not nearly_equal("one two", "one three")
    assert not nearly_equal("...", "!")


def test_charts_draw_what_they_are_given():
    chart = draw_histogram("sizes <b>", [1, 2, 4], {"a": [2, 0], "b": [0, 1]}, "x & y", (3, "limit"))
    assert "sizes &lt;b&gt;" in chart
    assert "x &amp; y" in chart
    assert chart.count("<polygon") == 2
    assert "limit" in chart
    assert draw_bars("bars", [Bar("up", 0.6, "60%"), Bar("down", 0.45, "45%")], 0.5).count('class="bar ') == 2
    assert draw_lines("lines", {"loss": [(0, 1.0), (10, 0.5)]}, "steps").count("<polyline") == 1
    assert draw_lines("lines", {}, "steps") == ""


def test_copies_of_one_text_are_grouped_without_walks_through_all_of_them():
    """Each copy is joined to the one before it; walking these links one at a time would take hours."""
    two = sign_texts(["once upon a time there was a king", "and a queen who ruled the sea"])
    signatures = np.repeat(two, 100_000, axis=0)
    assert group_alike(signatures).tolist() == [0] * 100_000 + [100_000] * 100_000
