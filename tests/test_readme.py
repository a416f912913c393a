"""What the README, docs/ and the examples tell people to type works, and what they link to or name is there.

Every Markdown file of the repository is looked at for links and names of files.
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
from pathlib import Path

import datasets
import pytest
from shared.runs import ROOT, read_record

from utils.arguments import parse_arguments
from utils.data.calls import functions_of
from utils.data.encoding import read_tools
from utils.data.layouts import PAIR_FORMATS, SFT_FORMATS
from utils.data.loading import load_pairs
from utils.settings.data import DataSettings

README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = {path.name: path.read_text(encoding="utf-8") for path in sorted((ROOT / "docs").glob("*.md"))}
DATA = PAGES["data.md"]
TRACKED = subprocess.run(
    ["git", "ls-files", "*.md"], cwd=ROOT, capture_output=True, text=True, check=True
).stdout.split()
OURS = re.compile(
    r"\s*(?:.*\| *)?(?:accelerate launch .*?|torchrun .*?|(?:\S*/)?python )(?:\S*/)?advanced_dpo_script\.py (.*)"
    r"|\s*dpo-train (.*)"
)
LEFT_OUT = ["--model_name_or_path", "m", "--dataset_name", "d", "--output_dir", "o"]  # what `...` may stand for
EXAMPLES = sorted((ROOT / "examples").glob("*.sh"))


def lines_of(text: str) -> list[str]:
    """The lines of the code blocks of a Markdown text, continued lines as one."""
    blocks = re.findall(r"```\w*\n(.*?)```", text, flags=re.DOTALL)
    blocks += re.findall(r"^    (?:python|make|accelerate|torchrun) (?:[^\n]*\\\n)*[^\n]*", text, flags=re.MULTILINE)
    return [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]


def commands_of(text: str) -> list[list[str]]:
    """The words of every command of ours in the code blocks of a Markdown text, whatever launches or feeds it."""
    matches = filter(None, map(OURS.match, lines_of(text)))
    return [shlex.split(match[1] or match[2], comments=True) for match in matches]


def commands_of_example(path: Path, **environment) -> list[list[str]]:
    """The argument lists that an example script would start the script with."""
    shown = subprocess.run(
        ["bash", str(path)],
        env=os.environ | {"PYTHON": "echo"} | environment,
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    return [shlex.split(line)[1:] for line in shown.splitlines()]


def whole_commands() -> dict[str, list[str]]:
    """Every different command of the README and the pages. `...` stands for what the command does not give itself."""
    found = {}
    for words in (words for text in (README, *PAGES.values()) for words in commands_of(text)):
        shown = " ".join(words)
        if "..." in words:
            place = words.index("...")
            left_out = zip(LEFT_OUT[::2], LEFT_OUT[1::2], strict=True)
            words[place : place + 1] = [word for pair in left_out if pair[0] not in words for word in pair]
        found[shown] = words
    return found


@pytest.mark.parametrize("words", whole_commands().values(), ids=lambda words: " ".join(words)[:60])
def test_every_command_of_the_readme_and_the_pages_parses(words):
    if "--help" in words:
        with pytest.raises(SystemExit):
            parse_arguments(words)
    else:
        parse_arguments(words)


def test_the_readme_shows_the_well_known_invocations():
    shown = [" ".join(words) for words in commands_of(README)]
    assert len(shown) >= 6
    assert any(
        "--use_lora --use_4bit --lora_r 64 --lora_alpha 16" in words and "--use_wandb" in words for words in shown
    )
    assert any("--use_lora" not in words and not words.startswith("sft") for words in shown)
    assert any(words.startswith("sft") for words in shown)


def anchors_of(text: str) -> set[str]:
    """The names under which GitHub reaches the headings of a page."""
    headings = re.findall(r"^#+ (.*)$", re.sub(r"```.*?```", "", text, flags=re.DOTALL), flags=re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("name", TRACKED)
def test_every_link_leads_somewhere_and_every_file_named_is_there(name):
    path = ROOT / name
    text = path.read_text(encoding="utf-8")
    for file in re.findall(r"`((?:tests|utils|benchmarks|examples|docs)/[\w./-]+)", text):
        assert (ROOT / file).exists(), file
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if not link.startswith("https://"):
            file, _, anchor = link.partition("#")
            target = path.parent / file if file else path
            assert target.exists(), link
            assert not anchor or anchor in anchors_of(target.read_text(encoding="utf-8")), link


def test_every_other_command_of_a_page_names_what_is_there():
    """Benchmarks with flags that they know, tests, targets of make; and nothing that no test looks at."""
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    shell = ("source .venv/bin/activate", "export ", "pip install ", ".venv/bin/pip install ", "wandb sync ")
    for line in (line for text in (README, *PAGES.values()) for line in lines_of(text)):
        words = line.split("#")[0].split()
        while words and re.fullmatch(r"[A-Z_]+=\S+", words[0]):
            del words[0]
        if words[:1] == ["make"]:
            assert re.search(rf"^{words[1]}:", makefile, flags=re.MULTILINE), line
        elif words[:1] in (["python"], [".venv/bin/python"]) and words[1].startswith("benchmarks/"):
            source = (ROOT / words[1]).read_text(encoding="utf-8")
            assert [word for word in words if word.startswith("--") and f'"{word}"' not in source] == [], line
        elif words[1:3] == ["-m", "pytest"]:
            assert (ROOT / words[3]).exists(), line
        elif words[:1] in (["python"], ["accelerate"], ["torchrun"]):
            assert OURS.match(line), line
        elif words[:1] in (["source"], ["export"], ["pip"], ["wandb"]):
            assert line.strip().startswith(shell), line


def test_the_readme_is_short_and_its_targets_are_in_the_makefile():
    assert len(README.split()) < 1500
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in set(re.findall(r"`make (\w+)", README)):
        assert re.search(rf"^{target}:", makefile, flags=re.MULTILINE), target


def test_the_commands_of_every_target_of_the_makefile_are_told_for_who_has_no_make():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    recipes = re.findall(r"^(\w+):[^\n]*\n((?:\t.*\n)+)", makefile, flags=re.MULTILINE)
    told = {
        target: line for line in PAGES["installing.md"].splitlines() for target in re.findall(r"^\| `make (\w+)`", line)
    }
    assert set(told) == {target for target, _ in recipes} - {"help"}
    for target, recipe in recipes:
        for command in re.findall(r"\$\(BIN\)/(\w[^$\n]*)", recipe):
            assert f"`{command.strip()}" in told[target], target


def test_the_readme_links_to_every_page():
    assert set(re.findall(r"\]\(docs/(\w+\.md)\)", README)) == set(PAGES) - {"index.md"}


def test_the_picture_of_the_demo_shows_the_figures_of_its_text():
    picture = (ROOT / "docs" / "demo.svg").read_text(encoding="utf-8")
    rows = re.findall(r"^  (\w.*?)  +(\d+%) +(\d+%)$", README, flags=re.MULTILINE)
    assert len(rows) == 3
    written = re.findall(r"<text[^>]*>([^<]*)</text>", picture)
    at = written.index(rows[0][0])
    assert written[at:-1] == [word for row in rows for word in row]
    (kl,) = re.findall(r"KL from the base model, nats +0\.0 +(\S+)", README)
    assert f"KL from the base model {kl} nats" in written[-1]


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_every_example_parses(path):
    commands = commands_of_example(path)
    assert commands
    for words in commands:
        parse_arguments(words)


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_every_example_runs_with_a_model_and_data_of_ones_own(path, run_script, tiny_model, pairs_file, tmp_path):
    environment = {"MODEL": str(tiny_model), "DATA": str(pairs_file), "OUTPUT": str(tmp_path / "out")}
    for words in commands_of_example(path, **environment):
        words = [word for word in words if word != "--use_wandb" and word != "--wandb_project" and word != "dpo"]
        code, _, err = run_script(*words, "--max_steps", 1)
        assert code == 0, err
    folders = [tmp_path / "out", tmp_path / "out" / "dpo"]
    assert any(read_record(folder)["status"] == "finished" for folder in folders if (folder / "run.json").is_file())


ROWS = dict(re.findall(r"### `(\w+)`\n.*?```json\n(.*?)```", DATA, flags=re.DOTALL))


def test_every_format_is_documented():
    assert set(ROWS) == set(PAIR_FORMATS)


@pytest.mark.parametrize("name", ROWS)
def test_the_documented_rows_are_read_as_documented(name, tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    path = tmp_path / "rows.jsonl"
    path.write_text(ROWS[name], encoding="utf-8")
    forced = name if name == "ranked_answers" else None
    settings = DataSettings(dataset_name=str(path), dataset_format=forced, validation_split="none")
    data = load_pairs(settings, "train", 0)
    assert data.reading.name == name
    assert len(data.train) == 1
    assert data.dropped == {}


LABELLED = re.findall(r"^`(\w+)`([^\n]*):\n\n```json\n([^\n]*)\n```", DATA, flags=re.MULTILINE)


def test_every_format_of_sft_is_documented():
    assert {name for name, words, _ in LABELLED if not words} == set(SFT_FORMATS)


@pytest.mark.parametrize(("name", "words", "row"), LABELLED, ids=[name + words for name, words, _ in LABELLED])
def test_rows_for_sft_and_rows_with_tools_are_read_as_documented(name, words, row, tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "rows.jsonl").write_text(row, encoding="utf-8")
    settings = DataSettings(dataset_name=str(tmp_path / "rows.jsonl"), validation_split="none")
    data = load_pairs(settings, "train" if words else "sft", 0)
    assert (data.reading.name, len(data.train), data.dropped) == (name, 1, {})
    if "weather" in row:
        turns = data.train[0]["chosen" if words else "completion"]
        assert functions_of(turns[0]) == [{"name": "weather", "arguments": {"city": "Oslo"}}]
        (tool,) = read_tools(data.train[0]["tools"])
        assert (tool["type"], tool["function"]["name"]) == ("function", "weather")


def test_the_index_orders_every_page():
    assert set(re.findall(r"\]\(([\w.]+\.md)\)", PAGES["index.md"])) == set(PAGES) - {"index.md"}


def test_the_map_of_the_code_names_every_room():
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    rooms = text.partition("```text\n")[2].partition("```")[0]
    names = {
        path.name.removesuffix(".py")
        for path in (ROOT / "utils").iterdir()
        if path.suffix == ".py" or (path / "__init__.py").is_file()
    }
    assert {name for name in names - {"__init__"} if name not in rooms} == set()
