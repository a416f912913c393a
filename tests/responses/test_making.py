"""Pairs that a model and a scorer make: by function, reward model and endpoint; interrupted and resumed."""

from __future__ import annotations

import gc
import json
import os
import re
from datetime import datetime
from pathlib import Path

import pytest
from shared.endpoint import KEY
from shared.models import save_tiny_reward_model
from shared.pairs import make_pairs, write_lines

from utils.data.prompts import read_prompts
from utils.errors import UserError
from utils.responses.making import Sampled, Samples, _hash_files, pick_pair
from utils.responses.scorers import load_reward_model, load_scorer
from utils.settings.data import DataSettings

BY_LENGTH = "def longest(prompts, responses):\n    return [len(response) for response in responses]\n"


@pytest.fixture
def scorer_file(tmp_path) -> Path:
    path = tmp_path / "scorer.py"
    path.write_text(BY_LENGTH, encoding="utf-8")
    return path


def read_lines(path: Path | str) -> list[dict]:
    return [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]


def generate(run_script, model: Path, data: Path, output: Path, *flags) -> tuple[int, str, str]:
    short = ("--num_generations", 3, "--max_new_tokens", 6)
    names = ("--model_name_or_path", model, "--dataset_name", data, "--output_file", output)
    return run_script("data", "--generate", *names, *short, *flags)


def test_best_and_worst_become_a_pair_that_train_reads(run_script, tmp_path, tiny_model, scorer_file):
    rows = make_pairs(10)
    data = write_lines(tmp_path / "prompts.jsonl", [{"prompt": row["prompt"]} for row in (*rows, rows[0])])
    output = tmp_path / "made.jsonl"
    code, out, err = generate(run_script, tiny_model, data, output, "--scorer", f"{scorer_file}:longest")
    assert code == 0, err
    made = read_lines(output)
    assert f"wrote {len(made)} pairs" in out
    first, *samples = read_lines(tmp_path / "made.jsonl.samples.jsonl")
    assert first["run"]["num_generations"] == 3
    assert [sample["prompt"] for sample in samples] == [row["prompt"] for row in rows], "each prompt once"
    by_prompt = {sample["prompt"]: sample for sample in samples}
    for pair in made:
        responses = by_prompt[pair["prompt"]]["responses"]
        assert pair["score_chosen"] == len(pair["chosen"]) == max(map(len, responses))
        assert pair["score_rejected"] == len(pair["rejected"])
        assert pair["score_chosen"] > pair["score_rejected"]
    assert len(made) >= 5
    code, _, err = run_script("--model_name_or_path", tiny_model, "--dataset_name", output, "--use_lora", "--dry_run")
    assert code == 0, err


def test_an_interrupted_run_goes_on_and_ends_in_the_same_pairs(run_script, tmp_path, tiny_model, scorer_file):
    data = write_lines(tmp_path / "prompts.jsonl", make_pairs(20))
    whole, parted = tmp_path / "whole.jsonl", tmp_path / "parted.jsonl"
    scorer = ("--scorer", f"{scorer_file}:longest")
    assert generate(run_script, tiny_model, data, whole, *scorer)[0] == 0
    lines = (tmp_path / "whole.jsonl.samples.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    cut = "".join(lines[:12]) + lines[12][:20]  # killed in the second batch, in the middle of a line
    (tmp_path / "parted.jsonl.samples.jsonl").write_text(cut, encoding="utf-8")
    code, out, err = generate(run_script, tiny_model, data, parted, *scorer)
    assert code == 0, err
    assert "resuming after 8 prompts" in out
    assert parted.read_bytes() == whole.read_bytes()
    samples = (tmp_path / "whole.jsonl.samples.jsonl").read_bytes()
    code, out, err = generate(run_script, tiny_model, data, whole, *scorer)
    assert code == 0, err
    assert "resuming after 20 prompts" in out
    assert (tmp_path / "whole.jsonl.samples.jsonl").read_bytes() == samples
    code, _, err = generate(run_script, tiny_model, data, parted, *scorer, "--temperature", 0.5)
    assert code == 2
    assert "holds samples made with another temperature; remove it" in err
    scorer_file.write_text(BY_LENGTH.replace("len(", "-len("), encoding="utf-8")
    code, _, err = generate(run_script, tiny_model, data, parted, *scorer)
    assert code == 2
    assert "holds samples made with another scorer_content; remove it" in err
    scorer_file.write_text(BY_LENGTH, encoding="utf-8")
    other = write_lines(tmp_path / "other.jsonl", make_pairs(20, seed=1))
    code, _, err = generate(run_script, tiny_model, other, parted, *scorer)
    assert code == 2
    assert "holds samples of other prompts" in err


def test_dialogues_get_messages(run_script, tmp_path, tiny_model, scorer_file):
    prompts = [{"prompt": [{"role": "user", "content": pair["prompt"]}]} for pair in make_pairs(3)]
    data = write_lines(tmp_path / "prompts.jsonl", prompts)
    output = tmp_path / "made.jsonl"
    code, _, err = generate(run_script, tiny_model, data, output, "--scorer", f"{scorer_file}:longest")
    assert code == 0, err
    assert [message["role"] for message in read_lines(output)[0]["chosen"]] == ["assistant"]


def test_the_tools_of_a_prompt_are_shown_to_model_and_scorer_and_go_with_its_pair(run_script, tmp_path, tiny_model):
    tools = [{"type": "function", "function": {"name": name, "parameters": {}}} for name in ("look_up", "add")]
    call = {"type": "function", "id": "call00001", "function": {"name": "add", "arguments": {"terms": [1, None]}}}
    turns = [
        {"role": "user", "content": "one and nothing?"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "call00001", "content": "1"},
        {"role": "user", "content": "so?"},
    ]
    rows = [{"prompt": pair["prompt"], "tools": tools[:1]} for pair in make_pairs(3)]
    rows = [*rows, {**rows[0], "tools": tools[1:]}, rows[0], {"prompt": turns, "tools": None}]
    template = "{{ tools | tojson if tools }}{% for m in messages %}{{ m['content'] or m['tool_calls'] }}\n{% endfor %}"
    told = tmp_path / "told.json"
    scorer = tmp_path / "scorer.py"
    scorer.write_text(
        "import json\ndef score(prompts, responses, tools):\n"
        f"    with open({str(told)!r}, 'w') as file:\n        json.dump([prompts, tools], file)\n"
        "    return [len(response) for response in responses]\n"
    )
    output = tmp_path / "made.jsonl"
    data = write_lines(tmp_path / "prompts.jsonl", [{**row, "prompt": _as_turns(row["prompt"])} for row in rows])
    flags = ("--scorer", f"{scorer}:score", "--chat_template", template)
    code, out, err = generate(run_script, tiny_model, data, output, *flags)
    assert code == 0, err
    assert "1 are duplicates" in out, "the same prompt with other tools is another one"
    samples = {json.dumps([one["prompt"], one.get("told")]): one for one in read_lines(f"{output}.samples.jsonl")[1:]}
    first, _, _, other, last = samples.values()
    assert first["responses"] != other["responses"], "the model was not shown its tools"
    assert last["prompt"] == turns
    prompts, given = json.loads(told.read_text())
    assert given == [tools[:1]] * 9 + [tools[1:]] * 3 + [[]] * 3
    assert prompts[-1] == turns
    for pair in read_lines(output):
        assert pair["prompt"] in [_as_turns(row["prompt"]) for row in rows], "a call lost its null"
        listed = json.loads(pair["tools"]) if "tools" in pair else None
        assert {"prompt": pair["prompt"], "tools": listed} in [{**r, "prompt": _as_turns(r["prompt"])} for r in rows]
    blind = template.partition("}}")[2]
    code, _, err = generate(run_script, tiny_model, data, tmp_path / "x.jsonl", *flags[:3], blind)
    assert (code, "leaves out the tools" in err) == (2, True)


def _as_turns(prompt: str | list) -> list:
    return [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt


def test_samples_are_gone_on_with_on_the_date_of_the_first(run_script, tmp_path, tiny_model, scorer_file, monkeypatch):
    class Clock(datetime):
        @classmethod
        def now(cls, tz=None):
            return moment

    monkeypatch.setattr("utils.models.templates.datetime", Clock)
    prompts = [{"prompt": [{"role": "user", "content": pair["prompt"]}]} for pair in make_pairs(10)]
    data, output = write_lines(tmp_path / "prompts.jsonl", prompts), tmp_path / "made.jsonl"
    samples = tmp_path / "made.jsonl.samples.jsonl"
    dated = "{{ strftime_now('%d %b %Y') }}{% for m in messages %}{{ m['content'] }}{% endfor %}"
    scorer = ("--scorer", f"{scorer_file}:longest", "--chat_template", dated)
    moment = datetime(2026, 2, 3, 4, 5)
    assert generate(run_script, tiny_model, data, output, *scorer)[0] == 0
    written = samples.read_bytes()
    samples.write_bytes(b"".join(written.splitlines(keepends=True)[:9]))  # killed behind the first batch
    output.unlink()
    moment = datetime(2026, 2, 4, 5, 6)
    code, out, err = generate(run_script, tiny_model, data, output, *scorer)
    assert code == 0, err
    assert "which writes the date: 2026-02-03 throughout" in out
    assert "resuming after 8 prompts" in out
    assert samples.read_bytes() == written


def test_prompts_without_room_are_counted(run_script, tmp_path, tiny_model, scorer_file):
    data = write_lines(tmp_path / "prompts.jsonl", [{"prompt": "lovely " * 200}, *make_pairs(3)])
    scorer = ("--scorer", f"{scorer_file}:longest")
    code, out, err = generate(run_script, tiny_model, data, tmp_path / "made.jsonl", *scorer)
    assert code == 0, err
    assert "1 without a pair: prompt too long for the model's context" in out


@pytest.mark.parametrize(
    ("rows", "flags", "expected"),
    [
        ([{"instruction": "Add.", "input": "1 and 2"}, {"instruction": "Rhyme.", "input": ""}], {},
         ["Add.\n\n1 and 2", "Rhyme."]),
        ([{"system": "Be short.", "prompt": "Why?"}, {"system": None, "prompt": "How?"}], {},
         [[("system", "Be short."), ("user", "Why?")], [("user", "How?")]]),
        ([{"instruction": "And then?", "history": [["Hi", "Hello"]]}], {},
         [[("user", "Hi"), ("assistant", "Hello"), ("user", "And then?")]]),
        ([{"conversations": [{"from": "human", "value": "Why?"}]}], {}, [[("user", "Why?")]]),
        ([{"prompt": "no", "asked": {"text": "yes"}}], {"prompt_column": "asked.text"}, ["yes"]),
        ([{"prompt": "no", "question": "yes", "chosen": "a", "rejected": "b"}], {"prompt_column": "question"}, ["yes"]),
        ([{"q": "Why?", "a": "So."}], {"dataset_adapter": "bare"}, ["Why? (q)"]),
        ([{"q": "Why?", "a": "So."}], {"dataset_adapter": "pair"}, ["Why? (pair)"]),
        ([{"instruction": "Add.", "input": "1", "output": "1"}], {"dataset_format": "instruction"}, ["Add.\n\n1"]),
    ],
)  # fmt: skip
def test_prompts_are_read_whole_and_as_the_flags_say(tmp_path, rows, flags, expected):
    adapter = tmp_path / "adapter.py"
    adapter.write_text(
        "def bare(row): return {'prompt': row['q'] + ' (q)'}\n"
        "def pair(row): return {'prompt': row['q'] + ' (pair)', 'chosen': row['a'], 'rejected': 'No.'}\n"
    )
    if "dataset_adapter" in flags:
        flags = {"dataset_adapter": f"{adapter}:{flags['dataset_adapter']}"}
    read = read_prompts(DataSettings(dataset_name=str(write_lines(tmp_path / "prompts.jsonl", rows)), **flags))
    assert [p if isinstance(p, str) else [tuple(t.values()) for t in p] for p in read.rows["prompt"]] == expected
    assert read.left_out == {}


def test_rows_without_a_prompt_are_counted_by_reason(run_script, tmp_path, tiny_model, scorer_file):
    data = tmp_path / "prompts.jsonl"
    lines = [json.dumps({"prompt": text}) for text in ("Why?", " ", "why?", "How?")]
    data.write_text("\n".join([*lines, json.dumps({"prompt": None}), "{broken"]) + "\n", encoding="utf-8")
    scorer = ("--scorer", f"{scorer_file}:longest")
    code, out, err = generate(run_script, tiny_model, data, tmp_path / "made.jsonl", *scorer)
    assert code == 0, err
    assert "2 left out: 'prompt' is empty (the first: prompts.jsonl line 2)" in out
    assert "1 left out: invalid JSON" in out
    assert "1 are duplicates of an earlier prompt" in out
    assert "2 prompts of" in out


@pytest.mark.parametrize(
    ("flags", "fault"),
    [
        ({"prompt_column": "other"}, "--prompt_column other: no such column"),
        ({"dataset_format": "alpaca"}, "--dataset_format alpaca: no column for its"),
        ({"dataset_adapter": "nothing.py:read"}, "--dataset_adapter nothing.py:read: there is no file"),
        ({}, "no column is recognised as the prompt; it has: text_1. Name it with --prompt_column"),
    ],
)
def test_prompts_that_are_not_where_the_flags_say_are_refused(tmp_path, flags, fault):
    data = write_lines(tmp_path / "prompts.jsonl", [{"text_1": "Why?"}])
    with pytest.raises(UserError, match=re.escape(fault)):
        read_prompts(DataSettings(dataset_name=str(data), **flags))


def test_several_sources_are_refused(run_script, tmp_path, tiny_model, scorer_file):
    code, _, err = generate(run_script, tiny_model, "a.jsonl,b.jsonl", tmp_path / "o.jsonl", "--scorer", "x.py:f")
    assert code == 2
    assert err == "error: --dataset_name a.jsonl,b.jsonl: --generate reads one source at a time; name one\n"


def test_samples_are_kept_on_disk_by_whole_batches(tmp_path):
    path, prompts = tmp_path / "samples.jsonl", [f"prompt {i}" for i in range(20)]
    Samples(path, {"scorer": "that failed"}, prompts[:10])
    samples = Samples(path, {}, prompts[:10])
    assert json.loads(path.read_text(encoding="utf-8")) == {"run": {}}
    samples.add([Sampled(prompt, ["a", "b"], [0.0, 1.0]) for prompt in prompts[:8]])
    samples.add([Sampled(prompt, ["a", "b"], [0.0, 1.0]) for prompt in prompts[8:10]])
    gc.collect()
    assert not any(isinstance(thing, Sampled) for thing in gc.get_objects())
    assert [sampled.prompt for sampled in samples] == prompts[:10]
    written = path.read_bytes()
    for count, done in ((10, 10), (3, 3)):
        again = Samples(path, {}, prompts[:count])
        assert (again.count, len(list(again)), path.read_bytes()) == (done, done, written)
    path.write_bytes(written.removesuffix(b"\n"))  # killed at the very end of a line
    assert Samples(path, {}, prompts[:10]).count == 8
    path.write_bytes(written)
    more = Samples(path, {}, prompts)
    assert (more.count, len(list(more))) == (8, 8)
    assert path.read_bytes() == b"".join(written.splitlines(keepends=True)[:9])


def test_wherever_a_kill_cuts_the_file_the_same_call_ends_in_the_same_pairs(
    run_script, tmp_path, tiny_model, scorer_file
):
    data = write_lines(tmp_path / "prompts.jsonl", [{"prompt": row["prompt"]} for row in make_pairs(10)])
    output, samples = tmp_path / "made.jsonl", tmp_path / "made.jsonl.samples.jsonl"

    def make() -> bytes:
        output.unlink(missing_ok=True)
        code, _, err = generate(run_script, tiny_model, data, output, "--scorer", f"{scorer_file}:longest")
        assert code == 0, err
        return output.read_bytes()

    expected, written = make(), samples.read_bytes()
    ends = [len(b"".join(written.splitlines(keepends=True)[:count])) for count in range(11)]
    for cut in (0, 1, 5, 8, ends[0] - 1, ends[0], ends[0] + 9, ends[8] - 1, ends[8], ends[9] + 3, len(written) - 1):
        samples.write_bytes(written[:cut])
        assert (make(), samples.read_bytes()) == (expected, written), cut
    samples.write_bytes(written[: ends[9]] + bytes(40) + b"\n")  # what a power cut may leave of the last line
    assert (make(), samples.read_bytes()) == (expected, written)


@pytest.mark.parametrize(
    "changed",
    [
        {"scores": [1.0, 2.0, 3.0, 4.0]},
        {"scores": [1.0, "2", 3.0]},
        {"scores": [1.0, None, 3.0]},
        {"scores": [1.0, float("nan"), 3.0]},
        {"scores": 3},
        {"responses": ["a", "b", 3]},
        {"responses": ["a", "b"], "scores": [1.0, 2.0]},
        {"prompt": "another"},
        {"more": 1},
    ],
)
def test_a_sample_that_was_changed_is_named_and_nothing_behind_it_is_lost(tmp_path, changed):
    path, prompts = tmp_path / "samples.jsonl", [f"prompt {i}" for i in range(30)]
    samples = Samples(path, {"num_generations": 3}, prompts)
    samples.add([Sampled(prompt, ["a", "b", "c"], [0.0, 1.0, 2.0]) for prompt in prompts])
    lines = path.read_text(encoding="utf-8").splitlines()
    lines[4] = json.dumps(json.loads(lines[4]) | changed)
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    before = path.read_bytes()
    fault = "holds samples of other prompts" if "prompt" in changed else "line 5: is not a sample of this script"
    with pytest.raises(UserError, match=fault):
        Samples(path, {"num_generations": 3}, prompts)
    assert path.read_bytes() == before


def test_samples_that_cannot_be_appended_are_one_message_and_those_before_are_kept(tmp_path, monkeypatch):
    path, prompts = tmp_path / "samples.jsonl", [f"prompt {i}" for i in range(20)]
    samples = Samples(path, {}, prompts)
    samples.add([Sampled(prompt, ["a", "b"], [0.0, 1.0]) for prompt in prompts[:8]])

    def fail(number):
        raise OSError(28, "No space left on device")

    more = [Sampled(prompt, ["a", "b"], [0.0, 1.0]) for prompt in prompts[8:12]]
    with monkeypatch.context() as patch:
        patch.setattr("utils.responses.making.os.fsync", fail)
        with pytest.raises(UserError, match=r"No space left.*it keeps 8 prompts"):
            samples.add(more)
    assert Samples(path, {}, prompts).count == 8


def test_samples_of_another_model_are_not_gone_on_with_whatever_the_time_of_its_files(tmp_path):
    model = tmp_path / "model"
    model.mkdir()
    weights, record = model / "model.safetensors", model / "run.json"
    weights.write_bytes(b"one")
    record.write_text("{}", encoding="utf-8")
    os.utime(weights, (1, 1))
    former = _hash_files("--model_name_or_path", str(model))
    record.write_text('{"status": "finished"}', encoding="utf-8")  # evaluating the model changes what lies beside it
    assert _hash_files("--model_name_or_path", str(model)) == former
    weights.write_bytes(b"two")
    os.utime(weights, (1, 1))
    assert _hash_files("--model_name_or_path", str(model)) != former


def test_what_makes_no_pair():
    assert pick_pair(Sampled("p", ["a", "a "], [1.0, 2.0])) == "fewer than two different responses"
    assert pick_pair(Sampled("p", ["a", " "], [1.0, 2.0])) == "fewer than two different responses"
    assert pick_pair(Sampled("p", ["a", "b"], [1.0, 1.0])) == "no response scores higher than another"
    assert pick_pair(Sampled("p", ["a", "b"], [0.1 + 0.6, 0.7])) == "no response scores higher than another"
    assert pick_pair(Sampled("p", ["a", "b", ""], [1.0, 2.0, 9.0]))["chosen"] == "b"


@pytest.mark.parametrize(
    ("code", "fault"),
    [
        ("def score(prompts, responses): return [1]", "must return one finite number per response; for 2 responses"),
        ("def score(prompts, responses): return [1, float('nan')]", "some not finite"),
        ("def score(prompts, responses): return 'ab'", "must return a list of numbers; it returned 'ab'"),
        ("def other(): pass", "has no function score"),
        ("import nothing_of_this_name", "cannot be run: ModuleNotFoundError"),
        ("raise SystemExit(0)", "cannot be run: SystemExit: 0 at scorer.py line 1"),
        ("def score(prompts, responses) return", "cannot be run: SyntaxError"),
        ("def score(prompts, responses):\n    return {}['x']", "failed (KeyError: 'x' at scorer.py line 2)"),
        ("import sys\ndef score(prompts, responses): sys.exit(0)", "failed (SystemExit: 0 at scorer.py line 2)"),
        ("def score(prompts, responses):\n    yield 1\n    1 / 0", "failed (ZeroDivisionError: division by zero at"),
        ("def score(prompts, responses): return [10 ** 400, 1]", "must return a list of numbers; it returned [1000"),
    ],
)
def test_functions_that_do_not_score_are_named(tmp_path, code, fault):
    path = tmp_path / "scorer.py"
    path.write_text(code + "\n", encoding="utf-8")
    with pytest.raises(UserError, match=re.escape(fault)):
        load_scorer(f"{path}:score")(["p", "p"], ["a", "b"])


def test_a_reward_model_scores_prompt_and_response(tmp_path):
    import torch
    from transformers import AutoTokenizer

    folder = tmp_path / "reward"
    model = save_tiny_reward_model(folder)
    scores = load_reward_model(str(folder))(["On day one", "On day one"], [" lovely.", " awful."])
    tokenizer = AutoTokenizer.from_pretrained(folder)
    with torch.no_grad():
        expected = [
            model(**tokenizer("On day one" + text, return_tensors="pt")).logits.item()
            for text in (" lovely.", " awful.")
        ]
    assert scores == pytest.approx(expected, abs=1e-6)
    assert scores[0] != scores[1]
    with pytest.raises(UserError, match="no chat template"):
        load_reward_model(str(folder))([[{"role": "user", "content": "hi"}]], ["yes"])
    with pytest.raises(UserError, match="no reward model can be loaded"):
        load_reward_model(str(tmp_path / "nothing"))


def test_a_whole_run_with_a_judge_writes_no_key(run_script, tmp_path, tiny_model, endpoint):
    data = write_lines(tmp_path / "prompts.jsonl", make_pairs(3))
    flags = ("--scorer", endpoint.url, "--judge_model", "judge-1")
    code, out, err = generate(run_script, tiny_model, data, tmp_path / "made.jsonl", *flags, "--max_judge_requests", 4)
    assert code == 2
    assert "--max_judge_requests 4 are used up" in err
    code, out, err = generate(run_script, tiny_model, data, tmp_path / "made.jsonl", *flags)
    assert code == 0, err
    assert re.search(r"\d+ requests to the judge, 0 answers without a verdict", out)
    for pair in read_lines(tmp_path / "made.jsonl"):
        assert len(pair["chosen"]) >= len(pair["rejected"])
    for path in tmp_path.rglob("*"):
        assert not path.is_file() or KEY.encode() not in path.read_bytes()
    assert KEY not in out + err


@pytest.mark.parametrize(
    ("flags", "fault"),
    [
        (["--generate"], "--scorer is missing: name a file.py:function"),
        (["--num_generations", "2"], "--num_generations: has no effect without --generate"),
        (["--generate", "--scorer", "http://x/v1"], "--judge_model is missing: name the model at the endpoint"),
        (
            ["--generate", "--scorer", "http://x/v1?key=SECRET", "--judge_model", "m"],
            "--scorer: its URL has a user, a ?",
        ),
        (["--generate", "--scorer", "http://SECRET@x/v1", "--judge_model", "m"], "--scorer is a URL with a user"),
        (["--generate", "--scorer", "x.py:f", "--judge_model", "m"], "--judge_model: is for an endpoint"),
        (["--generate", "--scorer", "x.py:f", "--report_file", "x.html"], "--generate: makes pairs, checks none"),
        (["--generate", "--group_by", "x"], "--generate: reads only the prompts, so --group_by has no effect"),
        (["--generate", "--strip_citations"], "--generate: reads only the prompts, so --strip_citations has no"),
        (["--generate", "--pairs_per_prompt", "2"], "--generate: reads only the prompts, so --pairs_per_prompt has"),
        (["--temperature", "2"], "--temperature: has no effect without --generate"),
        (["--generate", "--scorer", "x.py:f", "--temperature", "0"], "--temperature is 0: all responses to a prompt"),
        (["--generate", "--num_generations", "1"], "--num_generations is 1: must be 2 or more"),
    ],
)
def test_flags_that_do_not_fit_are_refused(run_script, flags, fault):
    names = ("--model_name_or_path", "m", "--dataset_name", "d.jsonl", "--output_file", "o.jsonl")
    code, out, err = run_script("data", *names, *flags)
    assert code == 2
    assert "SECRET" not in out + err
    assert f"error: {fault}" in err
