"""status --report: one page for several runs, that runs nothing and fetches nothing."""

from __future__ import annotations

import json
import os
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import pytest
from shared.browser import open_browser
from shared.pairs import make_pairs, write_lines
from shared.runs import read_metrics, read_record, set_back

from utils.status.page import make_page
from utils.status.state import read_runs

SCRIPT = "<script>document.title='ran'</script><img src=x onerror=\"document.title='ran'\">"


@pytest.fixture(scope="module")
def compared(tiny_model, tmp_path_factory) -> Path:
    """A folder with runs that differ in beta, one of sft, and a folder name that is markup."""
    import advanced_dpo_script

    root = tmp_path_factory.mktemp("compared")
    pairs = [pair | {"prompt": f"{SCRIPT} {pair['prompt']}"} for pair in make_pairs(40)]
    data = write_lines(tmp_path_factory.mktemp("data") / "pairs.jsonl", pairs)
    common = ["--model_name_or_path", tiny_model, "--dataset_name", data, "--max_steps", 4, "--learning_rate", 5e-3,
              "--per_device_train_batch_size", 4, "--logging_steps", 1, "--eval_steps", 2]  # fmt: skip
    samples = ["--sample_during_eval", "--num_eval_samples", 1, "--sample_max_new_tokens", 8]
    for name, more in {
        "train/low": ["--beta", 0.05, *samples],
        "train/<b>high & mighty": ["--beta", 0.7, *samples],
        "sft/imitation": [],
    }.items():
        verb = name.partition("/")[0]
        assert advanced_dpo_script.main([str(w) for w in (verb, *common, *more, "--output_dir", root / name)]) == 0
    set_back(root / "train" / "low", minutes=2)
    set_back(root / "train" / "<b>high & mighty", minutes=1)
    return root


@pytest.fixture(scope="module")
def page(compared, tmp_path_factory) -> Path:
    import advanced_dpo_script

    path = tmp_path_factory.mktemp("page") / "comparison.html"
    before = {file: file.stat().st_mtime_ns for file in compared.rglob("*")}
    assert advanced_dpo_script.main(["status", str(compared), "--report", str(path)]) == 0
    assert {file: file.stat().st_mtime_ns for file in compared.rglob("*")} == before, "runs are left as they are"
    return path


class Tables(HTMLParser):
    """Caption -> the cells of each row."""

    def __init__(self, text: str):
        super().__init__()
        self.found: dict[str, list[list[str]]] = {}
        self._texts: list[str] | None = None
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        if tag == "table":
            self._rows = []
        if tag == "tr":
            self._rows.append([])
        if tag in ("th", "td", "caption"):
            self._texts = []

    def handle_data(self, data):
        if self._texts is not None:
            self._texts.append(data)

    def handle_endtag(self, tag):
        if tag in ("th", "td"):
            self._rows[-1].append("".join(self._texts))
        if tag == "caption":
            self.found["".join(self._texts)] = self._rows


def test_the_page_holds_the_runs_own_numbers(compared, page):
    tables = Tables(page.read_text(encoding="utf-8")).found
    head, *rows = tables["by run"]
    by_run = {row[0]: dict(zip(head, row, strict=True)) for row in rows}
    assert set(by_run) == {"train/low", "train/<b>high & mighty", "sft/imitation"}
    for name in ("train/low", "train/<b>high & mighty"):
        held_out = read_record(compared / name)["metrics"]["held_out"]
        assert by_run[name]["accuracy"].startswith(f"{held_out['accuracy']:.1%}")
        assert by_run[name]["margin"] == f"{held_out['margin']:+.3f}"
        assert by_run[name]["KL"] == f"{held_out['chosen_kl']:.2f}"
    assert by_run["sft/imitation"]["accuracy"] == "-"
    for heading, name in (("Held-out margin", "held_out_margin"), ("Training loss", "loss")):
        shown = {row[0]: row[1:] for row in tables[heading]}
        lines = [line for line in read_metrics(compared / "train/low") if name in line]
        column = shown["step"].index("train/low")
        assert {step: cells[column] for step, cells in shown.items() if step != "step"} == {
            str(line["step"]): f"{line[name]:.4g}" for line in lines
        }


def test_what_does_not_compare_is_said(compared, page, tmp_path):
    assert "Margins and losses are in units of <code>--beta</code>" in page.read_text(encoding="utf-8")
    shutil.copytree(compared / "train" / "low", tmp_path / "a")
    shutil.copytree(compared / "train" / "low", tmp_path / "b")
    assert "in units of" not in make_page(read_runs(tmp_path))
    record = read_record(tmp_path / "b")
    record["settings"]["loss_type"] = ["ipo"]
    (tmp_path / "b" / "run.json").write_text(json.dumps(record), encoding="utf-8")
    assert "The losses are of different types (<code>--loss_type</code>)" in make_page(read_runs(tmp_path))


def test_only_settings_that_differ_are_shown(page):
    tables = Tables(page.read_text(encoding="utf-8")).found
    (caption,) = (name for name in tables if name.startswith("by run;"))
    head, *rows = tables[caption]
    settings = {row[0]: dict(zip(head, row, strict=True)) for row in rows}
    assert settings["beta"] == {
        "setting": "beta", "train/low": "0.05", "train/<b>high & mighty": "0.7", "sft/imitation": "-",
    }  # fmt: skip
    assert {"verb", "beta"} <= set(settings)
    assert not {"output_dir", "learning_rate", "sample_during_eval", "loss_type", "seed"} & set(settings)


def test_settings_left_to_the_script_are_compared_by_the_values_used(compared, tmp_path):
    low = compared / "train" / "low"
    for name in ("a", "b"):
        shutil.copytree(low, tmp_path / name)
    record = read_record(tmp_path / "b")
    record["used"]["max_length"] = 77
    (tmp_path / "b" / "run.json").write_text(json.dumps(record), encoding="utf-8")
    tables = Tables(make_page(read_runs(tmp_path))).found
    (rows,) = (rows for name, rows in tables.items() if name.startswith("by run;"))
    assert [row[0] for row in rows[1:]] == ["max_length"]
    # Records of older versions do not say: then it is what was given that is compared.
    del record["used"]
    (tmp_path / "b" / "run.json").write_text(json.dumps(record), encoding="utf-8")
    assert "They do not differ in any recorded setting." in make_page(read_runs(tmp_path))


def test_what_the_runs_write_stands_beside_one_another(compared, page):
    text = page.read_text(encoding="utf-8")
    for name, shown in (("train/low", "train/low"), ("train/<b>high & mighty", "train/&lt;b&gt;high &amp; mighty")):
        rows = [json.loads(line) for line in (compared / name / "samples.jsonl").read_text().splitlines()]
        assert f"<dt>{shown}, at step {rows[-1]['step']}</dt>" in text


@pytest.mark.parametrize(("width", "dark"), [(1200, False), (1200, True), (390, False), (390, True)])
def test_a_browser_shows_it_and_runs_nothing_of_it(page, width, dark, tmp_path):
    with open_browser(tmp_path / "profile") as browser:
        browser.resize(width, dark=dark)
        browser.open(page.as_uri())
        assert browser.messages == []
        assert browser.requests == [page.as_uri()]
        assert browser.run("document.title").startswith("Comparison of runs: ")
        assert browser.run("document.documentElement.scrollWidth") <= width, "nothing sticks out"
        assert browser.run("document.querySelectorAll('svg').length") == 7
        assert "<script>" in browser.text(), "shown as the text that it is"
        assert browser.run("document.scripts.length") == 0


def test_a_run_keeps_its_colour_in_every_chart(page):
    charts = re.findall(r"<svg.*?</svg>", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    colours = {
        (number, name)
        for chart in charts
        for number, points, name in re.findall(r'class="line s(\d)" points="([^"]*)"><title>(.*?)</title>', chart)
    }
    assert len({name for _, name in colours}) == len(colours) == 3


def test_many_runs_are_all_listed_and_the_newest_charted(compared, tmp_path):
    for number in range(8):
        folder = tmp_path / f"run{number}"
        folder.mkdir()
        record = read_record(compared / "train" / "low") | {"updated": f"2026-01-0{number + 1}T00:00:00Z"}
        (folder / "run.json").write_text(json.dumps(record))
        (folder / "metrics.jsonl").write_bytes((compared / "train" / "low" / "metrics.jsonl").read_bytes())
    text = make_page(read_runs(tmp_path))
    assert len(Tables(text).found["by run"]) == 9
    assert "The 6 newest of the 8 runs." in text
    assert "They do not differ in any recorded setting." in text
    assert "run6 follows with " in text
    assert ", the same." in text


def test_runs_on_other_data_are_not_ranked_together(compared, tmp_path):
    for name, fingerprint, accuracy in (("a", "x", 0.5), ("b", "x", 0.9), ("c", "y", 1.0)):
        record = read_record(compared / "train" / "low")
        record["data"]["fingerprint"] = fingerprint
        record["metrics"]["held_out"] |= {"accuracy": accuracy, "pairs": 1000}
        (tmp_path / name).mkdir()
        (tmp_path / name / "run.json").write_text(json.dumps(record))
    text = make_page(read_runs(tmp_path))
    assert "Highest held-out accuracy of 2 runs on the same data: b, 90.0%" in text
    assert "1 more was evaluated on other data and cannot be compared." in text


def test_where_the_page_may_not_be_written(compared, tmp_path, run_script):
    mine = tmp_path / "mine.html"
    mine.write_text("<title>mine</title>")
    os.mkfifo(tmp_path / "pipe.html")
    (tmp_path / "device.html").symlink_to("/dev/zero")
    for path, said in (
        (mine, "exists and is no page of this verb"),
        (tmp_path / "pipe.html", "exists and is no page of this verb"),
        (tmp_path / "device.html", "exists and is no page of this verb"),
        (compared / "train" / "low" / "page.html", "lies in the folder of a run"),
        (compared / "train" / "low" / "checkpoint-4" / "page.html", "lies in the folder of a run"),
        (mine / "below.html", "cannot be written"),
    ):
        code, _, err = run_script("status", compared, "--report", path)
        assert (code, len(err.splitlines())) == (2, 1)
        assert said in err
    assert mine.read_text() == "<title>mine</title>"
    (tmp_path / "empty").mkdir()
    code, _, err = run_script("status", tmp_path / "empty", "--report", tmp_path / "new.html")
    assert (code, "there are no runs to compare" in err) == (2, True)
    for _ in range(2):  # its own page is replaced
        assert run_script("status", compared, "--report", tmp_path / "new.html")[0] == 0
