"""--dataset_adapter: a function of one's own from a row to pairs; what it does wrong is said with the row's place."""

from __future__ import annotations

import builtins
import json
import subprocess
import sys
from pathlib import Path

import datasets
import pytest
from shared.pairs import write_lines
from shared.runs import ROOT

from utils.data.adapter import load_adapter
from utils.data.loading import load_pairs
from utils.errors import UserError
from utils.settings.data import DataSettings
from utils.user_code import load_function

ADAPTER = """\
import beside, sys

def one(row):
    return {"prompt": row["q"], "chosen": beside.better(row["a"]), "rejected": row["b"]}

def several(row):
    return [{"prompt": row["q"] + mark, "chosen": row["a"], "rejected": row["b"]} for mark in ("?", "!")]

def dialogue(row):
    turns = [{"role": "user", "content": row["q"]}]
    sides = {name: turns + [{"role": "assistant", "content": row[name]}] for name in ("a", "b")}
    return {"chosen": sides["a"], "rejected": sides["b"], "chosen_score": 2, "rejected_score": 1}

def some(row):
    return one(row) if row["q"] != "q1" else None

def wrong_column(row):
    return {"prompt": row["q"], "chosen": row["nothing"]} if row["q"] == "q2" else one(row)

def number(row):
    return 7 if row["q"] == "q0" else one(row)

def fails_everywhere(row):
    return row["q"].nothing

def incomplete(row):
    return {"prompt": row["q"], "chosen": row["a"]}

def exits(row):
    return sys.exit(0) if row["q"] == "q2" else one(row)

def half(row):
    return one(row) | {"rejected": "a\\ud800"} if row["q"] == "q2" else one(row)

def half_in_turns(row):
    turns = [{"role": "user", "content": row["q"] + ("\\ud800" if row["q"] == "q2" else "")}]
    return one(row) | {"prompt": turns}

LIMIT = 3
"""
ROWS = [{"q": f"q{i}", "a": "good", "b": "bad"} for i in range(3)]


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
    load_adapter.cache_clear()


@pytest.fixture
def load(tmp_path):
    (tmp_path / "adapt.py").write_text(ADAPTER, encoding="utf-8")
    (tmp_path / "beside.py").write_text("def better(text):\n    return text.upper()\n", encoding="utf-8")
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS), encoding="utf-8")

    def read(name: str, verb: str = "train", **settings):
        settings = {"validation_split": "none", "dataset_adapter": f"{tmp_path / 'adapt.py'}:{name}"} | settings
        return load_pairs(DataSettings(dataset_name=str(path), **settings), verb, 0)

    return read


def faults(load, name: str, **settings) -> tuple[str, ...]:
    with pytest.raises(UserError) as error:
        load(name, **settings)
    return error.value.faults


def test_one_pair_several_and_none(load):
    assert load("one").train[0] == {"prompt": "q0", "chosen": "GOOD", "rejected": "bad", "tools": None, "row": 0}
    several = load("several").train
    assert several["prompt"][:] == ["q0?", "q0!", "q1?", "q1!", "q2?", "q2!"]
    assert several["row"][:] == [0, 0, 1, 1, 2, 2]
    some = load("some")
    assert (some.train["row"][:], some.dropped) == ([0, 2], {"the adapter returned None": 1})


def test_messages_and_scores(load):
    row = load("dialogue").train[1]
    assert row["prompt"] == [{"role": "user", "content": "q1"}]
    assert row["chosen"] == [{"role": "assistant", "content": "good"}]
    assert (row["chosen_score"], row["rejected_score"]) == (2.0, 1.0)


def test_for_sft_the_chosen_side(load):
    assert load("one", "sft").train["completion"][:] == ["GOOD"] * 3


def test_its_errors_name_the_row_and_its_own_line(load):
    (line,) = faults(load, "wrong_column")
    assert line.startswith("the adapter failed: KeyError: 'nothing' at adapt.py line 18 in 1 row (rows.jsonl line 3)")
    assert load("wrong_column", on_bad_rows="skip").dropped == {
        "the adapter failed: KeyError: 'nothing' at adapt.py line 18": 1
    }
    (line,) = faults(load, "number")
    assert line.startswith("the adapter gave a number, not a pair")
    assert "(rows.jsonl line 1)" in line
    (line,) = faults(load, "fails_everywhere")
    assert "made no pair from the first 3 rows: the adapter failed: AttributeError" in line
    assert "must give prompt, chosen and rejected" in faults(load, "incomplete")[0]


def test_an_adapter_cannot_end_the_run(load, tmp_path):
    (line,) = faults(load, "exits")
    assert line.startswith("the adapter failed: SystemExit at adapt.py line 30 in 1 row (rows.jsonl line 3)")
    assert len(load("exits", on_bad_rows="skip").train) == 2
    (tmp_path / "ends.py").write_text("import sys\nsys.exit(0)\n", encoding="utf-8")
    (line,) = faults(load, "x", dataset_adapter=str(tmp_path / "ends.py:f"))
    assert line.endswith("ends.py cannot be run: SystemExit: 0 at ends.py line 2")
    (tmp_path / "stops.py").write_text("raise KeyboardInterrupt\n", encoding="utf-8")
    with pytest.raises(KeyboardInterrupt):
        load("x", dataset_adapter=str(tmp_path / "stops.py:f"))


@pytest.mark.parametrize(("name", "part"), [("half", "rejected"), ("half_in_turns", "prompt")])
def test_half_a_character_is_a_bad_row(load, name, part):
    (line,) = faults(load, name)
    assert line.startswith(f"'{part}' has half a character (an unpaired surrogate) in 1 row (rows.jsonl line 3)")


def test_what_cannot_be_loaded(load, tmp_path):
    flag = "dataset_adapter"
    assert "adapt.py has no function nothing; it has: one, several" in faults(load, "nothing")[0]
    assert "has no function LIMIT" in faults(load, "LIMIT")[0]
    assert "must be file.py:function" in faults(load, "x", **{flag: "adapt.py"})[0]
    assert "there is no file" in faults(load, "x", **{flag: str(tmp_path / "no.py:f")})[0]
    (tmp_path / "broken.py").write_text("x = 1\ndef f(row:\n", encoding="utf-8")
    (line,) = faults(load, "x", **{flag: str(tmp_path / "broken.py:f")})
    assert "broken.py cannot be run: SyntaxError" in line
    assert "line 2" in line


def test_a_changed_adapter_is_run_again(load, tmp_path):
    assert load("one").train["chosen"][:] == ["GOOD"] * 3
    (tmp_path / "adapt.py").write_text(ADAPTER.replace("beside.better(row", "(row"), encoding="utf-8")
    load_adapter.cache_clear()
    assert load("one").train["chosen"][:] == ["good"] * 3


def test_it_runs_in_the_script(run_script, tiny_model, load, tmp_path):
    flags = ("--model_name_or_path", tiny_model, "--dataset_name", tmp_path / "rows.jsonl", "--dry_run")
    code, out, err = run_script(*flags, "--dataset_adapter", f"{tmp_path / 'adapt.py'}:several")
    assert code == 0, err
    assert "adapt.py:several: prompt and replies are texts" in out
    code, _, err = run_script(*flags, "--dataset_adapter", f"{tmp_path / 'adapt.py'}:wrong_column")
    assert code == 2
    assert "rows.jsonl line 3" in err
    assert "Traceback" not in err


def test_a_change_in_what_an_adapter_imports_is_seen(tmp_path):
    """In a process of its own each, as Python keeps what it imported."""
    rows = [{"q": f"q{i}", "good": f"good {i}", "bad": f"bad {i}"} for i in range(8)]
    path = write_lines(tmp_path / "rows.jsonl", rows)
    (tmp_path / "own.py").write_text(
        "from words import FRONT\n\ndef pairs(row):\n"
        "    return {'prompt': FRONT + row['q'], 'chosen': row['good'], 'rejected': row['bad']}\n"
    )
    code = (
        "import sys, datasets; datasets.config.HF_DATASETS_CACHE = sys.argv[1]\n"
        "from utils.data.loading import load_pairs; from utils.settings.data import DataSettings\n"
        f"settings = DataSettings(dataset_name={str(path)!r}, dataset_adapter={str(tmp_path / 'own.py:pairs')!r})\n"
        "print(load_pairs(settings, 'train', 0).train[0]['prompt'])\n"
    )
    for front in ("Say ", "Tell "):
        (tmp_path / "words.py").write_text(f"FRONT = {front!r}\n")
        command = [sys.executable, "-B", "-c", code, str(tmp_path / "cache")]
        said = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
        assert said.startswith(front)


def test_a_persons_own_utils_is_theirs_and_ours_stays_ours(tmp_path):
    """Also where it is imported as the function is called, by a module beside it, or is a package."""
    (tmp_path / "utils.py").write_text("x = 5\n")
    (tmp_path / "helper.py").write_text("def later():\n    import utils\n    return utils.x\n")
    (tmp_path / "own.py").write_text(
        "import helper\nfrom utils import x\n\ndef f():\n    import utils\n    return x, utils.x, helper.later()\n"
    )
    package = tmp_path / "below" / "utils"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("from utils.inner import y\n")
    (package / "inner.py").write_text("y = 7\n")
    (tmp_path / "below" / "own.py").write_text(
        "import utils.inner as inner\n\ndef f():\n    from utils.inner import y\n    import utils\n"
        "    return inner.y, y, utils.y\n"
    )
    former, import_before = dict(sys.modules), builtins.__import__
    try:
        one = load_function("--scorer", f"{tmp_path / 'own.py'}:f")
        other = load_function("--scorer", f"{tmp_path / 'below' / 'own.py'}:f")
        assert (one(), other(), one()) == ((5, 5, 5), (7, 7, 7), (5, 5, 5))
        assert sys.modules["utils"] is former["utils"]
        sys.modules.pop("utils.responses.drawing", None)
        import utils.responses.drawing

        assert Path(utils.responses.drawing.__file__).is_relative_to(ROOT)
    finally:
        builtins.__import__ = import_before
        sys.modules.pop("helper", None)
