"""Pairs that a model and a scorer make: by function, reward model and endpoint; interrupted and gone on with."""

from __future__ import annotations

import gc
import json
import os
import re
from pathlib import Path

import pytest
from conftest import KEY, make_pairs, save_tiny_reward_model, write_lines

from utils.errors import UserError
from utils.inspection.prompts import read_prompts
from utils.judging import EndpointJudge, JudgeLimits, read_verdict
from utils.making import Sampled, Samples, _hash_files, pick_pair
from utils.scorers import load_reward_model, load_scorer
from utils.settings import DataSettings

BY_LENGTH = "def longest(prompts, responses):\n    return [len(response) for response in responses]\n"


@pytest.fixture
def scorer_file(tmp_path) -> Path:
    path = tmp_path / "scorer.py"
    path.write_text(BY_LENGTH, encoding="utf-8")
    return path


def read_lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


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
    assert "going on after 8 prompts" in out
    assert parted.read_bytes() == whole.read_bytes()
    samples = (tmp_path / "whole.jsonl.samples.jsonl").read_bytes()
    code, out, err = generate(run_script, tiny_model, data, whole, *scorer)
    assert code == 0, err
    assert "going on after 20 prompts" in out
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


def test_a_folder_is_told_by_what_its_files_hold_and_large_ones_by_size_and_time(tmp_path, monkeypatch):
    monkeypatch.setattr("utils.making.LARGEST_READ_BYTES", 8)
    small, large = tmp_path / "config.json", tmp_path / "model.safetensors"

    def hash_after(path: Path, text: str, time: int) -> str | None:
        path.write_text(text, encoding="utf-8")
        os.utime(path, ns=(time, time))
        return _hash_files(str(tmp_path))

    hash_after(small, "{}", 1)
    first = hash_after(large, "many weights", 1)
    assert hash_after(small, "{}", 2) == first
    assert hash_after(small, "[]", 1) != first
    assert hash_after(small, "{}", 1) == first
    assert hash_after(large, "many weights", 2) != first
    assert hash_after(large, "more weights than that", 1) != first
    assert _hash_files("org/name") is None


def test_dialogues_get_messages(run_script, tmp_path, tiny_model, scorer_file):
    prompts = [{"prompt": [{"role": "user", "content": pair["prompt"]}]} for pair in make_pairs(3)]
    data = write_lines(tmp_path / "prompts.jsonl", prompts)
    output = tmp_path / "made.jsonl"
    code, _, err = generate(run_script, tiny_model, data, output, "--scorer", f"{scorer_file}:longest")
    assert code == 0, err
    assert [message["role"] for message in read_lines(output)[0]["chosen"]] == ["assistant"]


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
    assert "1 ask what an earlier one asks" in out
    assert "2 prompts of" in out


@pytest.mark.parametrize(
    ("flags", "fault"),
    [
        ({"prompt_column": "other"}, "--prompt_column other: no such column"),
        ({"dataset_format": "alpaca"}, "--dataset_format alpaca: no column for its"),
        ({"dataset_adapter": "nothing.py:read"}, "--dataset_adapter nothing.py:read: there is no file"),
        ({}, "no column is known as the prompt; it has: text_1. Name it with --prompt_column"),
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


def make_judge(endpoint, cache: Path, waits: list[float] | None = None, **limits) -> EndpointJudge:
    keep = [] if waits is None else waits
    return EndpointJudge(endpoint.url, "judge-1", cache, JudgeLimits(**limits), sleep=keep.append)


def test_a_judge_is_asked_in_both_orders_and_only_once(endpoint, tmp_path):
    judge = make_judge(endpoint, tmp_path)
    prompts, responses = ["p"] * 3 + ["q"] * 2, ["aaa", "bb", "c", "dd", "ee"]
    # "dd" and "ee" are equally long: the answer goes by the order, and both orders together say neither.
    assert judge.score(prompts, responses) == [1.0, 0.5, 0.0, 0.5, 0.5]
    assert judge.asked == len(endpoint.seen) == 8
    path, authorization, body = endpoint.seen[0]
    assert (path, authorization) == ("/v1/chat/completions", f"Bearer {KEY}")
    assert (body["model"], body["temperature"]) == ("judge-1", 0)
    again = make_judge(endpoint, tmp_path)
    assert again.score(prompts, responses) == [1.0, 0.5, 0.0, 0.5, 0.5]
    assert (again.asked, len(endpoint.seen)) == (0, 8)


def test_passing_failures_are_tried_again_after_longer_waits(endpoint, tmp_path):
    endpoint.failures = [(503, {}), (500, {}), (429, {"Retry-After": "7"})]
    waits: list[float] = []
    assert make_judge(endpoint, tmp_path, waits)._ask("p", "longer", "short") == 1.0
    assert waits == [1.0, 2.0, 7.0]
    endpoint.failures = [(502, {})] * 6
    with pytest.raises(UserError, match="no answer in 6 attempts"):
        make_judge(endpoint, tmp_path)._ask("p", "other", "one")


@pytest.mark.parametrize(("code", "fault"), [(401, "refused .401"), (400, "400 Bad Request: no: Bearer ...$")])
def test_lasting_failures_are_said_at_once_and_without_the_key(endpoint, tmp_path, code, fault):
    endpoint.failures = [(code, {})]
    with pytest.raises(UserError, match=fault) as caught:
        make_judge(endpoint, tmp_path)._ask("p", "longer", "short")
    assert KEY not in str(caught.value)
    assert len(endpoint.seen) == 1


@pytest.mark.parametrize("code", [301, 302, 303, 307, 308])
def test_a_redirect_is_refused_and_the_key_goes_nowhere_else(endpoint, tmp_path, code):
    elsewhere = endpoint.url.replace("127.0.0.1", "localhost") + "/elsewhere"
    endpoint.failures = [(code, {"Location": f"{elsewhere}?key={KEY}"})]
    with pytest.raises(UserError, match=f"sends elsewhere .*{elsewhere}.*give the URL that answers") as caught:
        make_judge(endpoint, tmp_path)._ask("p", "longer", "short")
    assert KEY not in str(caught.value)
    assert [path for path, *_ in endpoint.seen] == ["/v1/chat/completions"]


def test_the_number_of_requests_and_their_rate_are_bounded(endpoint, tmp_path):
    waits: list[float] = []
    judge = make_judge(endpoint, tmp_path, waits, requests=3, requests_per_minute=60)
    for text in ("aa", "bbb", "cccc"):
        judge._ask("p", text, "d")
    with pytest.raises(UserError, match="--max_judge_requests 3 are used up"):
        judge._ask("p", "eeeee", "d")
    assert len(endpoint.seen) == 3
    assert waits == [pytest.approx(1, abs=0.2), pytest.approx(2, abs=0.3)]


@pytest.mark.parametrize(
    ("answer", "verdict"),
    [
        ("A", 1.0),
        ("B", 0.0),
        ("TIE", 0.5),
        (" **B**\n", 0.0),
        ("Response A.", 1.0),
        ("Answer: 'B'", 0.0),
        ("**Answer:** Response A", 1.0),
        ("Tie.", 0.5),
        ("B. It gives a better answer", 0.0),
        ("B\n\nResponse A is a list.", 0.0),
        ("A - the other one is a guess.", 1.0),
        ("B is slightly better.", 0.0),
        ("A better answer is given by B", None),
        ("A and B are alike.", None),
        ("B is worse.", None),
        ("a", None),
        ("Both have a point; B is fine", None),
        ("Banana", None),
        ("", None),
    ],
)
def test_a_verdict_is_the_first_word_of_an_answer(answer, verdict):
    assert read_verdict(answer) == verdict


def test_an_answer_without_a_verdict_is_counted_and_is_neither(endpoint, tmp_path):
    endpoint.answer = "Both have their merits."
    judge = make_judge(endpoint, tmp_path)
    assert judge.prefer("p", "one", "two") == 0.5
    assert (judge.unreadable, judge.unreadable_example) == (2, "Both have their merits.")


def test_the_beginning_of_a_long_answer_is_read_and_kept_without_thoughts_and_key(endpoint, tmp_path):
    endpoint.answer = f"<think>A. or B? {KEY}</think>\nB. {KEY} {'It is a better answer. ' * 40}A"
    for _ in range(2):
        judge = make_judge(endpoint, tmp_path)
        assert judge._ask("p", "one", "two") == 0.0
    assert len(endpoint.seen) == 1
    kept = "".join(path.read_text(encoding="utf-8") for path in tmp_path.iterdir())
    assert KEY not in kept
    assert "B. ... It is" in kept


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
        (
            ["--generate", "--scorer", "http://SECRET@x/v1", "--judge_model", "m"],
            "--scorer is an address with a user or password",
        ),
        (["--generate", "--scorer", "x.py:f", "--judge_model", "m"], "--judge_model: is for an endpoint"),
        (["--generate", "--scorer", "x.py:f", "--report_file", "x.html"], "--generate: makes pairs and checks none"),
        (["--generate", "--group_by", "x"], "--generate: reads the prompts alone, so --group_by has no effect"),
        (["--generate", "--strip_citations"], "--generate: reads the prompts alone, so --strip_citations has no"),
        (["--generate", "--pairs_per_prompt", "2"], "--generate: reads the prompts alone, so --pairs_per_prompt has"),
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
