"""The report of a run: what it says, when it is written, and that nothing in it runs or is fetched."""

from __future__ import annotations

import json
import random
import re
import shlex
import shutil
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
from shared.browser import open_browser
from shared.pairs import make_pairs, write_lines
from shared.runs import read_record

from utils.report.charts import draw_lines
from utils.report.run_page import break_command, group_examples, make_run_page
from utils.report.run_verdict import describe_run, headline
from utils.run.record import RunRecord
from utils.run.writing import write_json, write_json_lines
from utils.training import reporting
from utils.training.reporting import ReportFile

HOSTILE = "<script>document.title='run'</script><img src=\"http://example.org/x\" onerror=\"document.title='run'\">"
CUT_OFF = """[...document.querySelectorAll('svg text')].filter(text => {
    const box = text.getBoundingClientRect(), chart = text.ownerSVGElement.getBoundingClientRect();
    return box.left < chart.left - 1 || box.right > chart.right + 1;
}).map(text => text.textContent)"""
BOXES_OUT_OF_REACH = """[...document.querySelectorAll('main *')].filter(box => box.scrollWidth > box.clientWidth + 1
    && /auto|scroll/.test(getComputedStyle(box).overflowX) && box.tabIndex < 0).map(box => box.outerHTML)"""
QUICK = ["--per_device_train_batch_size", 4, "--logging_steps", 1, "--learning_rate", 5e-3]
SAMPLES = [
    {"step": step, "prompt": prompt, "response": f"response {step} {HOSTILE}", "ended": step != 3}
    for step in (0, 3, 6)
    for prompt in ("Tell me.", [{"role": "user", "content": f"Say {HOSTILE}"}])
]


@pytest.fixture(scope="module")
def finished(tiny_model, tmp_path_factory) -> Path:
    """A run on pairs of which some hold markup, with samples beside it."""
    import advanced_dpo_script

    folder = tmp_path_factory.mktemp("reported")
    pairs = make_pairs(40)
    for pair in pairs[::2]:
        pair["chosen"] += " <b>bold</b><script>document.title='run'</script>"
    data = write_lines(folder / "pairs & more.jsonl", pairs)
    arguments = ["--model_name_or_path", tiny_model, "--dataset_name", data, "--output_dir", folder / "run", *QUICK,
                 "--max_steps", 6, "--eval_steps", 3, "--validation_split", 0.3, "--cost_per_hour", 3600]  # fmt: skip
    assert advanced_dpo_script.main([str(word) for word in arguments]) == 0
    write_json_lines(folder / "run" / "samples.jsonl", SAMPLES)
    return folder / "run"


@pytest.fixture
def copy(finished, tmp_path) -> Path:
    """The run's files, to be changed."""
    folder = tmp_path / "run"
    shutil.copytree(finished, folder)
    return folder


def read_page(folder: Path) -> str:
    return (folder / "report.html").read_text(encoding="utf-8")


def made_hostile(value):
    """The same JSON with markup in every text, names included."""
    if isinstance(value, str):
        return value + HOSTILE
    if isinstance(value, list):
        return [made_hostile(item) for item in value]
    if isinstance(value, dict):
        return {key: item if key == "kind" else made_hostile(item) for key, item in value.items()} | {
            f"x{HOSTILE}": f"y{HOSTILE}"
        }
    return value


def test_every_part_of_a_run_is_on_its_page(finished):
    page, record = read_page(finished), read_record(finished)
    assert "It learnt" in page or "It did not learn" in page
    for heading in ("Before and after", "Curves", "Held-out pairs", "Data", "How it was run"):
        assert f"<h2>{heading}</h2>" in page
    for heading in ("Loss", "Rewards", "Margin", "Accuracy", "KL", "Log-probs", "Gradient norm", "Learning rate",
                    "Tokens per second", "Peak memory"):  # fmt: skip
        assert f"<h3>{heading}" in page
    assert f"{record['metrics']['held_out']['loss']:.4f}" in page
    assert record["resources"]["cost"] == pytest.approx(record["resources"]["seconds"])
    assert f"{record['resources']['cost']:,.2f}" in page
    assert record["data"]["fingerprint"] in page
    assert "pairs &amp; more.jsonl" in page
    assert "&lt;script&gt;" in page
    assert "<h2>Samples</h2>" in make_run_page(finished)
    for name, value in (("device", record["device"]), ("dropped", "nothing"), ("GPU hours", "none")):
        assert f"<dt>{name}</dt><dd>{value}</dd>" in page
    assert "A reward is <code>--beta</code> times" in page
    assert '<th scope="col"></th>' not in page  # read out, a column without a name is a riddle


def test_the_verb_writes_the_page_again(copy, capsys):
    import advanced_dpo_script

    (copy / "report.html").unlink()
    assert advanced_dpo_script.main(["report", str(copy)]) == 0
    assert read_page(copy) == make_run_page(copy)
    assert capsys.readouterr().out == f"page: {copy / 'report.html'}\n"
    assert advanced_dpo_script.main(["report", str(copy.parent)]) == 2
    assert "is not the folder of a run of train or sft" in capsys.readouterr().err


def test_the_values_that_were_used_stand_beside_those_that_were_given(finished, copy):
    record = read_record(finished)
    used, settings = record["used"], record["settings"]
    assert {name for name in used.keys() & settings.keys() if used[name] is None} == set()
    assert {name: used[name] for name in record["given"]} == {
        name: used[name] if name == "max_steps" else settings[name] for name in record["given"]
    }
    assert "dtype" not in record["given"]
    assert (settings["max_length"], settings["gradient_checkpointing"]) == (None, None)
    for name, value in {
        "dtype": "float32", "max_length": record["data"]["max_length"], "gradient_checkpointing": False,
        "learning_rate": 5e-3, "max_steps": 6, "rows_per_step": 4, "warmup_steps": 1, "eval_steps": 3,
        "optim": "adamw_torch_fused", "weight_decay": 0.0, "engine": "shared_prefix",
    }.items():  # fmt: skip
        assert used[name] == value, name
    page = read_page(finished)
    for name, value, given in (("learning_rate", "0.005", "yes"), ("gradient_checkpointing", "no", "")):
        assert f'<th scope="row">{name}</th><td>{value}</td><td>{given}</td>' in page
    assert "<dt>learning rate</dt><dd>0.005, linear schedule, warm-up steps 1</dd>" in page
    # A record of an older version has neither.
    write_json(copy / "run.json", {name: part for name, part in record.items() if name not in ("used", "given")})
    assert '<th scope="row">learning_rate</th><td>0.005</td><td></td>' in make_run_page(copy)


@pytest.mark.parametrize("share", [False, True])
def test_no_two_values_on_an_axis_are_written_alike(share):
    draw = random.Random(0)
    for _ in range(200):
        low = draw.choice((0.0, 0.64, 204.5, 12_345.0, 1e-5)) * (draw.random() + 0.5)
        high = min(low + draw.choice((1e-3, 0.02, 1.5, 40.0)), 1.0 if share else 1e9)
        chart = draw_lines("values", {"a": [(0, low), (9, high)]}, "step", share=share)
        labels = re.findall(r'text-anchor="end">([^<]+)</text>', chart.partition("<polyline")[0])
        assert len(labels) >= 2
        assert len(set(labels)) == len(labels), (low, high, labels)


def test_nothing_in_a_page_runs_or_is_fetched(copy, tmp_path):
    """Markup in every text of every file, seen by a browser at two widths in light and in dark."""
    for name in ("metrics.jsonl", "held_out_pairs.jsonl", "held_out_examples.jsonl", "samples.jsonl"):
        rows = [json.loads(line) for line in (copy / name).read_text(encoding="utf-8").splitlines()]
        write_json_lines(copy / name, [made_hostile(row) for row in rows])
    record = read_record(copy)
    record["warnings"] = ["--beta is small"]
    changed = made_hostile(record) | {name: record[name] for name in ("verb", "status")}
    changed["arguments"] = [*record["arguments"], "--wandb_run_name", HOSTILE]
    changed["data"] |= {"dropped": {f"no good {HOSTILE}": 3}, "sources": changed["data"]["sources"] * 2}
    write_json(copy / "run.json", changed)
    folder = copy.rename(copy.with_name("<script>1<"))
    path = folder / "report.html"
    path.write_text(make_run_page(folder), encoding="utf-8")
    page = path.read_text(encoding="utf-8")
    assert page.count("&lt;script&gt;") > 90
    assert "<script" not in page
    assert "<img" not in page
    with open_browser(tmp_path / "profile") as browser:
        for width in (1200, 390):
            for dark in (False, True):
                browser.resize(width, dark=dark)
                browser.open(path.as_uri())
                assert browser.run("document.documentElement.scrollWidth") <= width
                assert browser.run("document.title").startswith("DPO run: <script>")
                assert browser.run(CUT_OFF) == []
                assert browser.run("document.querySelectorAll('svg[role=img][aria-label] > title').length") >= 11
        text = browser.text()
        assert "--beta is small<script>" in text
        assert "response 6 <script>" in text
        assert browser.messages == []
        assert set(browser.requests) == {path.as_uri()}


def test_a_page_can_be_made_of_whatever_is_there(finished, tmp_path):
    """While a run begins, or of a folder that lost a file."""
    names = ["run.json", "metrics.jsonl", "held_out_pairs.jsonl", "held_out_examples.jsonl", "samples.jsonl"]
    for absent in names:
        folder = tmp_path / absent
        folder.mkdir()
        for name in names:
            if name != absent:
                shutil.copy(finished / name, folder)
        assert make_run_page(folder).endswith("</html>\n")
    assert make_run_page(tmp_path / "nothing").endswith("</html>\n")


def test_the_page_is_rewritten_while_the_run_goes_on(run_script, tiny_model, pairs_file, tmp_path, monkeypatch):
    seen = []

    def look(folder):
        page = make_run_page(folder)
        seen.append(page.partition('class="verdict')[2].partition("</p>")[0])
        return page

    monkeypatch.setattr(reporting, "make_run_page", look)
    monkeypatch.setattr(reporting, "EVERY_SECONDS", 0)
    monkeypatch.setattr(reporting, "LARGEST_SHARE", 1e9)
    for verb, word in (("train", "of 5 held-out pairs right"), ("sft", "the loss per held-out token went from")):
        seen.clear()
        code, out, err = run_script(verb, "--model_name_or_path", tiny_model, "--dataset_name", pairs_file, *QUICK,
                                    "--max_steps", 4, "--eval_steps", 2, "--output_dir", tmp_path / verb)  # fmt: skip
        assert code == 0, err
        assert str(tmp_path / verb / "report.html") in out
        assert ", cost" not in out
        running = [text for text in seen if "Still running" in text]
        assert len(running) == len(seen) - 1 >= 6
        assert "at step 3 of 4" in "".join(running)
        assert word in running[-1]
        assert "Still running" not in seen[-1]
        assert word in seen[-1]
        assert seen[-1] in read_page(tmp_path / verb)


def test_a_page_that_is_long_to_write_is_written_seldom(tmp_path, monkeypatch):
    clock, written = [0.0], []

    def slow(folder):
        clock[0] += 5.0
        written.append(clock[0])
        return "page"

    monkeypatch.setattr(reporting, "make_run_page", slow)
    monkeypatch.setattr(reporting.time, "perf_counter", lambda: clock[0])
    page = ReportFile(tmp_path, RunRecord({}))
    while clock[0] < 3000:
        page.write()
        clock[0] += 1.0
    assert 5 * len(written) < 0.03 * 3000


def test_a_page_that_cannot_be_written_stops_no_run(run_script, tiny_model, pairs_file, tmp_path, monkeypatch):
    def broken(folder):
        raise ValueError("no page today")

    monkeypatch.setattr(reporting, "make_run_page", broken)
    code, out, err = run_script("--model_name_or_path", tiny_model, "--dataset_name", pairs_file, *QUICK,
                                "--max_steps", 2, "--output_dir", tmp_path / "run")  # fmt: skip
    assert code == 0, err
    assert out.count("report.html could not be written: ValueError: no page today") == 1
    assert read_record(tmp_path / "run")["warnings"] == ["report.html could not be written: ValueError: no page today"]
    assert not (tmp_path / "run" / "report.html").exists()


def a_record(before: dict, after: dict, **more):
    return {"status": "finished", "verb": "train", "step": 9, "steps": 9} | more | {
        "metrics": {"held_out_before": before, "held_out": after}
    }  # fmt: skip


START = {"accuracy": 0.5, "loss": 0.693, "pairs": 100, "chosen_kl": 0.0, "chosen_logps": -30.0, "chosen_tokens": 40.0,
         "chosen_end_prob": 0.6}  # fmt: skip


@pytest.mark.parametrize(
    ("after", "words", "kind"),
    [
        ({"accuracy": 0.99, "loss": 0.1}, "It learnt: it ranks 99% of 100 held-out pairs right (50% before)", "good"),
        ({"accuracy": 0.55, "loss": 0.68}, "It learnt a little, less than 100 held-out pairs can prove", "note"),
        ({"accuracy": 0.5, "loss": 0.693, "pairs": 400}, "It did not learn", "problem"),  # ±5 points
        ({"accuracy": 0.5, "loss": 0.693, "pairs": 399}, "Too small a change to tell from the chance of 399", "note"),
        (
            {"accuracy": 0.44, "loss": 0.693, "pairs": 41},
            "Too small a change to tell from the chance of 41 held-out pairs (±16 points): it ranks 44%",
            "note",
        ),
        ({"accuracy": 0.48, "loss": 0.68}, "Its held-out loss fell; its ranking is the same within the chance", "note"),
        ({"accuracy": 0.7, "loss": 0.692}, "It learnt to rank, with margins still near zero: it ranks 70%", "note"),
        ({"accuracy": 0.4, "loss": 0.9}, "It got worse", "problem"),
        ({"accuracy": 0.38, "loss": 0.693}, "It got worse", "problem"),  # by more than 100 pairs leave to chance
        ({"accuracy": 0.42, "loss": 0.693, "pairs": 900}, "It got worse", "problem"),
        (
            {"accuracy": 0.99, "loss": 0.1, "chosen_logps": -90.0, "chosen_end_prob": 0.2},
            "It came apart: it lost 1.5 nats on each token of the chosen responses and it ends where responses end "
            "with probability 0.20 (before 0.60). As for ranking, it ranks 99%",
            "problem",
        ),
        ({"accuracy": 0.99, "loss": 0.1, "chosen_logps": -64.0, "chosen_end_prob": 0.4}, "It learnt: it ranks", "good"),
        ({"accuracy": 0.8, "loss": 0.9}, "It learnt to rank, and is too sure of its mistakes", "note"),
    ],
)
def test_the_verdict_is_honest(after, words, kind):
    sentence, found = describe_run(a_record(START, {"pairs": 100, "chosen_kl": 1.0, "chosen_tokens": 40.0} | after))
    assert sentence.startswith(words)
    assert found == kind


def test_the_verdict_of_runs_without_an_end():
    running = a_record(START, START, status="running", step=40, steps=112, seconds_left=190.0)
    assert describe_run(running)[0].startswith("Still running at step 40 of 112, 3:10 left. So far it ranks 50%")
    assert describe_run(running | {"status": "interrupted"})[0].startswith("It was stopped at step 40 of 112.")
    failed = running | {"status": "failed", "warnings": ["something", "training diverged"]}
    assert describe_run(failed) == ("It failed at step 40 of 112: training diverged.", "problem")
    alone = describe_run({"status": "finished", "metrics": {"train": {"accuracy": 0.9}}})[0]
    assert "Nothing was held out" in alone
    early = {"metric": "loss", "step": 20, "value": 0.4, "stopped": True}
    assert "Stopped early at step 9; the model of step 20 is kept" in describe_run(
        a_record(START, START, early_stopping=early)
    )[0]  # fmt: skip
    assert headline({}) == []


def test_only_an_evaluation_after_the_first_step_is_progress(tmp_path):
    write_json(tmp_path / "run.json", {"status": "running", "verb": "train", "metrics": {"held_out_before": START}})
    lines = [{"step": step} | {f"held_out_{name}": value for name, value in START.items()} for step in (0, 4)]
    write_json_lines(tmp_path / "metrics.jsonl", lines[:1])
    assert "So far" not in make_run_page(tmp_path)
    write_json_lines(tmp_path / "metrics.jsonl", lines)
    assert "So far" in make_run_page(tmp_path)
    assert "at step 4" in make_run_page(tmp_path)


def test_the_command_on_the_page_is_one_that_a_shell_takes():
    words = [
        "train",
        "--dataset_name",
        "my pairs.jsonl",
        "--use_lora",
        "--max_steps",
        "-1",
        "--chat_template",
        "'{{x}}'",
    ]
    assert shlex.split(break_command(words).replace("\\\n", "")) == ["python", "advanced_dpo_script.py", *words]


@pytest.mark.parametrize(
    ("margins", "groups"),
    [
        ([-0.99, -0.5, 0.04, 0.1], ["2 pairs most confidently wrong: margin -0.99 to -0.50",
                                    "2 pairs ranked correctly, with the smallest margins: margin +0.04 to +0.10"]),
        ([-1.0], ["1 pair most confidently wrong: margin -1.00"]),
        ([0.0, 2.0], ["2 pairs ranked correctly, with the smallest margins: margin +0.00 to +2.00"]),
    ],
)  # fmt: skip
def test_only_pairs_that_are_ranked_wrongly_are_called_so(margins, groups):
    rows = [{"kind": "worst", "margin": margin} for margin in margins]
    found = list(group_examples([*rows, {"kind": "best", "margin": 3.0}]))
    assert [said for said, _ in found] == [*groups, "1 pair with the largest margins: margin +3.00"]
    assert [row["margin"] for _, rows in found for row in rows] == [*margins, 3.0]
    assert [said for said, _ in group_examples([{"kind": "worst"}])] == ["1 rows with the least likely tokens"]


def test_pages_of_a_run_lead_to_one_another_and_the_keyboard_reaches_all(copy, tmp_path, run_script):
    """Real pages, in a browser: every link leads to a file or a place on the page, every box that scrolls reached."""
    for words in (
        ("evaluate", "--model_name_or_path", copy),
        ("compare", "--model_name_or_path", copy, "--num_prompts", 2, "--max_new_tokens", 4),
        ("status", copy.parent, "--report", tmp_path / "all runs.html"),
    ):
        code, _, err = run_script(*words)
        assert code == 0, err
    pages = {
        copy / "report.html": 2,
        copy / "evaluation" / "evaluation.html": 1,  # which did not know of the comparison yet
        copy / "comparison" / "comparison.html": 2,
        tmp_path / "all runs.html": 1,
    }
    with open_browser(tmp_path / "profile") as browser:
        browser.resize(400)
        for page, count in pages.items():
            browser.open(page.as_uri())
            links = browser.run("[...document.querySelectorAll('nav:not(.parts) a')].map(link => link.href)")
            assert len(links) == count, page
            assert all(Path(unquote(urlsplit(link).path)).is_file() for link in links)
            assert browser.run("[...document.querySelectorAll('a[href^=\"#\"]')].filter(link => "
                               "!document.getElementById(link.getAttribute('href').slice(1))).length") == 0  # fmt: skip
            assert browser.run("document.querySelectorAll('th:empty').length") == 0  # read out, they are riddles
            browser.run("document.querySelectorAll('details').forEach(part => part.open = true)")
            assert browser.run("document.documentElement.scrollWidth") <= 400
            assert browser.run(BOXES_OUT_OF_REACH) == []
            assert browser.run(CUT_OFF) == []
