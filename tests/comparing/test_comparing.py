"""The verb `compare`: two models on the same prompts, each judge against hand counts, and what cannot be compared."""

from __future__ import annotations

import json
import re
import shutil
import socket
import threading
import urllib.parse
import urllib.request
from pathlib import Path

import pytest
import torch
from peft import AutoPeftModelForCausalLM
from shared.endpoint import KEY
from shared.models import save_tiny_reward_model
from shared.pairs import make_pairs, write_lines
from shared.runs import ROOT
from transformers import AutoModelForCausalLM, AutoTokenizer

from utils.arguments import parse_arguments
from utils.comparing import rewards
from utils.comparing.judges import Judge, ask, by_scores, count_orders, join_orders
from utils.comparing.measures import (
    count_outcomes,
    describe_responses,
    find_words,
    share_distinct,
    share_repeated,
    wilson_interval,
)
from utils.comparing.questions import Questions
from utils.comparing.rewards import implicit_rewards
from utils.comparing.summary import describe_result
from utils.models.side_by_side import Contender
from utils.responses.generation import Continuation, sample_continuations
from utils.responses.scorers import load_reward_model, load_scorer
from utils.settings.verbs import SamplingSettings

SHORT = ("--max_new_tokens", 12, "--num_prompts", 8, "--dtype", "float32")
BY_LENGTH = "def longest(prompts, responses):\n    return [len(response) for response in responses]\n"


@pytest.fixture(scope="module")
def runs(tiny_model, pairs_file, tmp_path_factory) -> dict[str, Path]:
    """A preference run with an adapter and one in 4 bits, some steps long."""
    import advanced_dpo_script

    root = tmp_path_factory.mktemp("runs")

    def run(name: str, *flags) -> Path:
        common = ["--model_name_or_path", tiny_model, "--dataset_name", pairs_file, "--output_dir", root / name,
                  "--max_steps", 6, "--save_steps", 4, "--learning_rate", 2e-2, "--dtype", "float32", "--use_lora",
                  "--validation_split", 0.3]  # fmt: skip
        assert advanced_dpo_script.main([str(text) for text in (*common, *flags)]) == 0
        return root / name

    return {"lora": run("lora"), "4-bit": run("quantized", "--use_4bit")}


@pytest.fixture
def scorer_file(tmp_path) -> Path:
    path = tmp_path / "scorer.py"
    path.write_text(BY_LENGTH, encoding="utf-8")
    return path


def read_results(folder: Path) -> tuple[dict, list[dict]]:
    """The record and the rows of a comparison."""
    lines = (folder / "comparison.jsonl").read_text(encoding="utf-8").splitlines()
    return json.loads((folder / "comparison.json").read_text(encoding="utf-8")), [json.loads(line) for line in lines]


def compare(run_script, model: Path, folder: Path, *flags) -> tuple[str, dict, list[dict]]:
    """What a comparison printed, its record and its rows."""
    code, out, err = run_script("compare", "--model_name_or_path", model, "--output_dir", folder, *SHORT, *flags)
    assert (code, err) == (0, "")
    return out, *read_results(folder)


def test_a_run_is_compared_with_its_reference_on_what_it_held_out(run_script, runs, tiny_model):
    judge = ("--judge", "implicit_reward")
    code, out, err = run_script("compare", "--model_name_or_path", runs["lora"], *SHORT, *judge)
    assert (code, err) == (0, "")
    record, rows = read_results(runs["lora"] / "comparison")
    held_out = [json.loads(line)["row"] for line in (runs["lora"] / "held_out_pairs.jsonl").read_text().splitlines()]
    assert [row["prompt"] for row in rows] == [make_pairs(60)[place]["prompt"] for place in held_out][:8]
    assert (record["model"]["name"], record["baseline"]["name"]) == (str(runs["lora"]), str(tiny_model))
    assert (runs["lora"] / "comparison" / "comparison.html").is_file()
    assert "Not a judgement: by its own reward the model wins" in out
    assert "It only says how far" in " ".join(out.split())
    assert f"record (comparison.json): {runs['lora'] / 'comparison'}" in out

    # The responses are those of models loaded apart, and the reward is the arithmetic of their log-probs.
    tokenizer = AutoTokenizer.from_pretrained(runs["lora"])
    models = [AutoPeftModelForCausalLM.from_pretrained(runs["lora"]), AutoModelForCausalLM.from_pretrained(tiny_model)]
    prompts = [row["prompt"] for row in rows]
    for model, key in zip(models, ("", "baseline_"), strict=True):
        written = sample_continuations(model.eval(), tokenizer, prompts, SamplingSettings(max_new_tokens=12), seed=42)
        assert [row[key + "response"] for row in rows] == [one.text for one in written]
        assert [row[key + "ended"] for row in rows] == [one.ended for one in written]
        for row, one in zip(rows, written, strict=True):
            start = tokenizer(row["prompt"])["input_ids"]
            response = one.ids + ([one.end] if one.ended else [])
            with torch.no_grad():
                logs = [model(torch.tensor([start + response])).logits[0].log_softmax(-1) for model in models]
            sums = [sum(log[len(start) - 1 + i, token] for i, token in enumerate(response)) for log in logs]
            reward = row["judges"]["implicit_reward"][key + "score"]
            assert reward == pytest.approx(0.1 * float(sums[0] - sums[1]), abs=1e-5)
    outcomes = [row["judges"]["implicit_reward"] for row in rows]
    assert [one["outcome"] for one in outcomes] == [
        0.5 if one["score"] == one["baseline_score"] else float(one["score"] > one["baseline_score"])
        for one in outcomes
    ]
    judged = record["judges"][0]
    assert judged["wins"] + judged["ties"] + judged["losses"] == judged["judged"] == 8
    assert judged["win_rate"] == sum(one["outcome"] for one in outcomes) / 8
    assert len({row["response"] for row in rows}) > 4


def test_functions_and_reward_models_judge_together(run_script, runs, tmp_path, scorer_file):
    reward = tmp_path / "reward"
    save_tiny_reward_model(reward)
    judges = (f"{scorer_file}:longest", str(reward))
    out, record, rows = compare(run_script, runs["lora"], tmp_path / "out", "--judge", *judges)
    score = load_reward_model(str(reward))
    for row in rows:
        own, other = row["response"], row["baseline_response"]
        by_length, by_model = (row["judges"][judge] for judge in judges)
        assert by_length["outcome"] == (0.5 if len(own) == len(other) else float(len(own) > len(other)))
        assert (by_length["score"], by_length["baseline_score"]) == (len(own), len(other))
        assert [by_model["score"], by_model["baseline_score"]] == score([row["prompt"]] * 2, [own, other])
        assert by_model["outcome"] == (0.5 if own == other else float(by_model["score"] > by_model["baseline_score"]))
    assert [judged["judge"] for judged in record["judges"]] == list(judges)
    for judged in record["judges"]:
        outcomes = [row["judges"][judged["judge"]]["outcome"] for row in rows]
        assert [judged[name] for name in ("wins", "ties", "losses")] == [outcomes.count(value) for value in (1, 0.5, 0)]
        assert f"{judged['win_rate']:.1%}" in out


def test_an_endpoint_is_asked_in_both_orders_and_only_once(run_script, runs, tmp_path, endpoint):
    flags = ("--judge", endpoint.url, "--judge_model", "judge-1", "--seed", 3)
    code, out, err = run_script(
        "compare", "--model_name_or_path", runs["lora"], "--output_dir", tmp_path / "out", *SHORT, *flags,
        "--max_judge_requests", 4,
    )  # fmt: skip
    assert code == 2
    assert err.count("--max_judge_requests 4 are used up") == 1
    assert len(endpoint.seen) == 4
    out, _, rows = compare(run_script, runs["lora"], tmp_path / "out", *flags)
    different = [row for row in rows if row["response"] != row["baseline_response"]]
    assert len(endpoint.seen) == 2 * len(different) > 4
    lengths = [(len(row["response"].strip("\n")), len(row["baseline_response"].strip("\n"))) for row in rows]
    expected = [0.5 if own == other else float(own > other) for own, other in lengths]
    assert [row["judges"][endpoint.url]["outcome"] for row in rows] == expected
    assert f"{len(endpoint.seen) - 4} requests sent, 0 answers without a verdict" in out
    again, _, same = compare(run_script, runs["lora"], tmp_path / "out", *flags)
    assert len(endpoint.seen) == 2 * len(different)
    assert "0 requests sent" in again
    assert same == rows
    for path in tmp_path.rglob("*"):
        assert not path.is_file() or KEY.encode() not in path.read_bytes()


@pytest.mark.parametrize(("answer", "swayed"), [("A", "first"), ("B", "second")])
def test_a_judge_that_goes_by_the_order_is_found_out(run_script, runs, tmp_path, endpoint, answer, swayed):
    endpoint.answer = answer
    flags = ("--judge", endpoint.url, "--judge_model", f"always {answer}")
    out, record, rows = compare(run_script, runs["lora"], tmp_path / "out", *flags)
    details = record["judges"][0]["details"]
    different = sum(row["response"] != row["baseline_response"] for row in rows)
    assert details[f"{swayed}_in_both_orders"] == details["matches_with_both"] == different
    assert record["judges"][0]["ties"] == len(rows)
    assert f"the verdict followed the order in {different} (100.0%)" in " ".join(out.split())


def test_responses_that_are_the_same_are_a_tie_that_nobody_is_asked_about(endpoint, tmp_path):
    settings = parse_arguments(["compare", "m", "--judge", endpoint.url, "--judge_model", "same"])
    judge = Judge(endpoint.url, "an endpoint")
    asked = Questions("", ["q", "q"], [{}, {}])
    found = ask(judge, asked, ["a long one", "same"], ["short", "same"], tmp_path, settings)
    assert found.outcomes == [1, 0.5]
    assert (found.details["matches_with_both"], found.details["same_in_both_orders"]) == (1, 1)
    assert len(endpoint.seen) == 2


def test_answers_without_a_verdict_count_for_neither_side(run_script, runs, tmp_path, endpoint):
    endpoint.answer = "I cannot say which one I like more."
    flags = ("--judge", endpoint.url, "--judge_model", "shy")
    out, record, rows = compare(run_script, runs["lora"], tmp_path / "out", *flags)
    judged = record["judges"][0]
    different = sum(row["response"] != row["baseline_response"] for row in rows)
    assert (judged["not_judged"], judged["details"]["unreadable_answers"]) == (different, 2 * different)
    assert judged["wins"] == judged["losses"] == 0
    assert "such as 'I cannot say which" in out


def test_a_judge_that_fails_or_is_silent_ends_the_comparison_in_one_line(
    run_script, runs, tmp_path, endpoint, monkeypatch
):
    monkeypatch.setattr("utils.responses.judging.ATTEMPTS", 1)
    names = ("compare", "--model_name_or_path", runs["lora"], "--output_dir", tmp_path / "out", *SHORT)
    endpoint.failures = [(503, {})] * 4
    code, _, err = run_script(*names, "--judge", endpoint.url, "--judge_model", "failing")
    assert code == 2
    assert (
        err
        == f"error: --judge {endpoint.url}: no answer in 1 attempts (503 Service Unavailable); run again to resume\n"
    )
    endpoint.failures = [(401, {})] * 4
    code, _, err = run_script(*names, "--judge", endpoint.url, "--judge_model", "refusing")
    assert (code, err.count("\n")) == (2, 1)
    assert "refused (401 Unauthorized); set OPENAI_API_KEY" in err
    monkeypatch.setattr("utils.responses.judging.TIMEOUT_SECONDS", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}/v1"
        code, _, err = run_script(*names, "--judge", url, "--judge_model", "silent")
    assert (code, err.count("\n")) == (2, 1)
    assert "no answer in 1 attempts (no complete answer within 0.2 seconds)" in err
    assert not (tmp_path / "out" / "comparison.json").exists()


def vote_left(page: str) -> None:
    """Prefers the response on the left in every match."""
    content, places = "", re.compile(r'name="match" value="(\w+)"')
    while "Thank you" not in content:
        form = {"match": places.search(content)[1], "choice": "left"} if content else None
        body = urllib.parse.urlencode(form).encode() if form else None
        with urllib.request.urlopen(page, body, timeout=60) as answer:
            content = answer.read().decode()


@pytest.fixture
def votes_left(monkeypatch) -> None:
    """A person at the page that `--judge vote` serves."""

    def say(text: str) -> None:
        print(text)
        if text.startswith("  http"):
            threading.Thread(target=vote_left, args=[text.strip()], daemon=True).start()

    monkeypatch.setattr("utils.responses.voting.say", say)


def test_a_person_judges_and_the_votes_are_trained_on(run_script, runs, tiny_model, tmp_path, votes_left):
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    flags = ("--judge", "vote", "--seed", 3, "--vote_port", port)
    out, record, rows = compare(run_script, runs["lora"], tmp_path / "out", *flags)
    assert f"http://127.0.0.1:{port}/" in out
    votes = [json.loads(line) for line in (tmp_path / "out" / "votes.jsonl").read_text().strip().split("\n")]
    won = {row["prompt"]: (row["judges"]["vote"]["outcome"], row["response"], row["baseline_response"]) for row in rows}
    assert len(votes) == sum(outcome != 0.5 for outcome, *_ in won.values())
    for vote in votes:
        outcome, own, other = won[vote["prompt"]]
        assert (vote["chosen"], vote["rejected"]) == ((own, other) if outcome == 1 else (other, own))
    judged = record["judges"][0]
    assert (judged["wins"] + judged["losses"], judged["judged"]) == (len(votes), 8)
    again, _, same = compare(run_script, runs["lora"], tmp_path / "out", *flags)
    assert ("open this page" in again, same) == (False, rows)
    compare(run_script, runs["lora"], tmp_path / "out", "--judge", "vote", "--seed", 4)
    data = tmp_path / "out" / "votes.jsonl"
    assert data.read_text().startswith("".join(json.dumps(vote, ensure_ascii=False) + "\n" for vote in votes))
    code, out, err = run_script(
        "--model_name_or_path", tiny_model, "--dataset_name", data, "--output_dir", tmp_path / "run",
        "--max_steps", 1, "--validation_split", "none",
    )  # fmt: skip
    assert code == 0, err
    assert f"{len(data.read_text().strip().splitlines()):,} rows to train on" in out


def test_what_was_not_voted_on_counts_for_neither(run_script, runs, tmp_path, monkeypatch):
    votes = [1, 0, 0.5, None, 1, 1, None, 1]
    monkeypatch.setattr("utils.comparing.judges.collect_votes", lambda *_: votes)
    out, record, rows = compare(run_script, runs["lora"], tmp_path / "out", "--judge", "vote")
    assert [row["judges"]["vote"]["outcome"] for row in rows] == votes
    judged = record["judges"][0]
    assert [judged[name] for name in ("wins", "ties", "losses", "not_judged")] == [4, 1, 1, 2]
    assert judged["win_rate"] == 4.5 / 6
    assert "2 prompts without a verdict" in out


def test_a_baseline_with_another_tokenizer_is_scored_as_text(run_script, runs, tiny_model, tmp_path):
    other = shutil.copytree(tiny_model, tmp_path / "bytes")
    tokenizer = json.loads((other / "tokenizer.json").read_text(encoding="utf-8"))
    tokenizer["model"]["merges"] = tokenizer["model"]["merges"][:20]
    kept = 259 + 20
    tokenizer["model"]["vocab"] = {word: i for word, i in tokenizer["model"]["vocab"].items() if i < kept}
    (other / "tokenizer.json").write_text(json.dumps(tokenizer), encoding="utf-8")
    prompts = [{"prompt": [{"role": "user", "content": pair["prompt"]}]} for pair in make_pairs(4)]
    data = write_lines(tmp_path / "prompts.jsonl", prompts)
    flags = ("--baseline", other, "--prompts", data, "--judge", "implicit_reward")
    out, _, rows = compare(run_script, runs["lora"], tmp_path / "out", *flags)
    assert "each uses its own tokenizer, so token counts cannot be compared" in out
    assert [row["prompt"][0]["role"] for row in rows] == ["user"] * 4
    own = AutoTokenizer.from_pretrained(runs["lora"])
    models = [AutoPeftModelForCausalLM.from_pretrained(runs["lora"]), AutoModelForCausalLM.from_pretrained(tiny_model)]
    for row in rows:
        asked = f"<s>User: {row['prompt'][0]['content']}\n\nAssistant:"
        texts = [asked, f"{asked} {row['baseline_response']}"]
        start, whole = own(texts, add_special_tokens=False)["input_ids"]
        response = whole[len(start) :]
        response += [own.eos_token_id] * row["baseline_ended"]
        with torch.no_grad():
            logs = [model(torch.tensor([start + response])).logits[0].log_softmax(-1) for model in models]
        sums = [sum(log[len(start) - 1 + i, token] for i, token in enumerate(response)) for log in logs]
        score = row["judges"]["implicit_reward"]["baseline_score"]
        assert score == pytest.approx(0.1 * float(sums[0] - sums[1]), abs=1e-5)


def test_a_run_in_4_bits_shares_its_base_with_the_baseline(run_script, runs, tiny_model, tmp_path):
    _, record, _ = compare(run_script, runs["4-bit"], tmp_path / "out", "--baseline", tiny_model)
    assert (record["model"]["in_4bit"], record["baseline"]["in_4bit"]) == (True, True)
    _, own, rows = compare(run_script, runs["4-bit"], tmp_path / "default")
    assert read_results(tmp_path / "out")[1] == rows
    assert own["baseline"]["what"] == "the reference of the run"
    # Nobody is asked to judge: the responses stand side by side, and what to type for a vote is said.
    out, own, _ = compare(run_script, runs["4-bit"], tmp_path / "default")
    assert own["judges"] == []
    assert "No judge was named." in out
    assert "--judge vote\n" in out
    page = (tmp_path / "default" / "comparison.html").read_text(encoding="utf-8")
    assert "No judge was named: read" in page
    assert "Better: " not in page


def test_a_checkpoint_a_text_file_and_greedy_answers(run_script, runs, tmp_path, scorer_file):
    path = tmp_path / "questions.txt"
    path.write_text("\ufeffOn day 3 we\n\n  on DAY 3 we \nThe <script>alert(1)</script> was\n" + "so " * 300 + "\n")
    code, out, err = run_script(
        "compare", "--model_name_or_path", runs["lora"] / "checkpoint-4", "--prompts", path, *SHORT,
        "--temperature", 0, "--judge", f"{scorer_file}:longest",
    )  # fmt: skip
    assert (code, err) == (0, "")
    record, rows = read_results(runs["lora"] / "comparison-checkpoint-4")
    assert [row["prompt"] for row in rows] == ["On day 3 we", "The <script>alert(1)</script> was"]
    assert record["prompts"] == {"source": "questions.txt", "count": 2, "without_room": 1}
    assert "1 left out: too long" in out
    page = (runs["lora"] / "comparison-checkpoint-4" / "comparison.html").read_text(encoding="utf-8")
    assert "<script" not in page
    assert "The &lt;script&gt;alert(1)&lt;/script&gt; was" in page
    assert page.count('<article class="card">') == 2


def test_prompts_with_tools_are_answered_with_the_tools_shown(run_script, runs, tiny_model, tmp_path, votes_left):
    tool = {
        "type": "function",
        "function": {"name": "look_up", "parameters": {"properties": {"word": {"type": "string"}}}},
    }
    rows = [{"prompt": [{"role": "user", "content": "a tree?"}], "tools": [tool]} for _ in range(2)]
    rows[1]["tools"] = [{"type": "function", "function": {"name": "add"}}]
    template = "{{ tools | tojson if tools }}{% for m in messages %}{{ m['content'] }}\n{% endfor %}"
    data = write_lines(tmp_path / "asked.jsonl", rows)
    flags = (
        "--prompts",
        data,
        "--chat_template",
        template,
        "--judge",
        "vote",
        "implicit_reward",
    )
    _, _, answers = compare(run_script, runs["lora"], tmp_path / "compared", *flags)
    assert [json.loads(answer["tools"]) for answer in answers] == [row["tools"] for row in rows]
    assert answers[0]["response"] != answers[1]["response"], "the model was not shown its tools"
    votes = [json.loads(line) for line in (tmp_path / "compared" / "votes.jsonl").read_text().splitlines()]
    assert [vote["tools"] for vote in votes] == [answer["tools"] for answer in answers if vote_counts(answer)]
    page = (tmp_path / "compared" / "comparison.html").read_text(encoding="utf-8")
    assert "look_up(word?: string)" in page


def vote_counts(answer: dict) -> bool:
    return answer["judges"]["vote"]["outcome"] in (0, 1) and answer["response"] and answer["baseline_response"]


def test_only_an_own_comparison_is_replaced(run_script, runs, tmp_path, scorer_file):
    names = ("compare", "--model_name_or_path", runs["lora"], "--output_dir", tmp_path / "out", *SHORT)
    judge = ("--judge", f"{scorer_file}:longest")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes.txt").write_text("mine")
    assert run_script(*names, *judge)[0] == 0
    assert run_script(*names, *judge, "--seed", 9)[0] == 0
    assert read_results(tmp_path / "out")[0]["sampling"]["seed"] == 9
    assert (tmp_path / "out" / "notes.txt").read_text() == "mine"
    (tmp_path / "out" / "comparison.json").write_text('{"verb": "mine"}')
    code, _, err = run_script(*names, *judge)
    assert code == 2
    assert "its comparison.json is not from a comparison of this script" in err
    assert (tmp_path / "out" / "comparison.json").read_text() == '{"verb": "mine"}'


def test_what_cannot_be_compared_is_said_in_one_line(run_script, runs, tiny_model, other_model, tmp_path):
    empty = tmp_path / "empty.txt"
    empty.write_text("\n \n")
    unfinished = shutil.copytree(runs["lora"], tmp_path / "unfinished")
    record = json.loads((unfinished / "run.json").read_text())
    (unfinished / "run.json").write_text(json.dumps(record | {"status": "interrupted"}))
    moved = shutil.copytree(runs["lora"], tmp_path / "moved")
    gone = record["settings"] | {"dataset_name": str(tmp_path / "gone.jsonl")}
    (moved / "run.json").write_text(json.dumps(record | {"settings": gone}))
    nothing = shutil.copytree(runs["lora"], tmp_path / "nothing")
    none_held_out = record["settings"] | {"validation_split": "none"}
    (nothing / "run.json").write_text(json.dumps(record | {"settings": none_held_out}))
    long = write_lines(tmp_path / "long.jsonl", [{"prompt": "so " * 300}])
    run = runs["lora"]
    cases = [
        ((unfinished,), "a run that did not finish (interrupted); name its newest checkpoint"),
        ((moved,), "--prompts is missing, and the data of the run cannot be read (--dataset_name"),
        ((nothing,), "--prompts is missing, and the run held out none"),
        ((run, "--baseline", run), "--baseline ...: is the model itself; name another one"),
        ((run, "--baseline", tmp_path / "no"), "--baseline ...: no such folder"),
        ((run, "--prompts", empty), "--prompts ...: has no prompts; write one on each line"),
        ((run, "--prompts", long, "--max_new_tokens", 100), "--max_new_tokens 100: none of 1 prompts leaves room"),
        ((run, "--judge", tiny_model), "--judge ...: a reward model has a head that scores; this one is a LlamaFor"),
        ((run, "--judge", "nothing.py:f"), "--judge nothing.py:f: there is no file"),
        ((tiny_model,), "--baseline is missing: ... is not a run of this script"),
        (
            (tiny_model, "--baseline", other_model, "--prompts", long, "--judge", "implicit_reward"),
            "--judge implicit_reward: ... is not a preference run",
        ),
        ((tiny_model, "--baseline", other_model, "--judge", "vote"), "--prompts is missing: ... is not a run of this"),
        ((run, "--prompts", long, "--chat_template", "{{ messages }}"), "--chat_template: these prompts are plain"),
    ]
    for (model, *flags), fault in cases:
        names = ("compare", "--model_name_or_path", model, "--output_dir", tmp_path / "out")
        code, _, err = run_script(*names, *flags)
        assert code == 2, flags
        assert err.count("\n") == 1, err
        assert all(part in err for part in fault.split("...")), err
    assert not (tmp_path / "out").exists()
    code, _, err = run_script("compare", "--model_name_or_path", tiny_model, "--baseline", other_model)
    assert code == 2
    assert [line.split(":")[1].split()[0] for line in err.splitlines()] == ["--output_dir", "--prompts"]


def test_several_processes_are_refused(run_script, runs, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    status, _, err = run_script("compare", "--model_name_or_path", runs["lora"], "--output_dir", tmp_path / "out")
    assert (status, err) == (2, "error: compare runs in one process; start it with plain python, not with a launcher\n")


@pytest.mark.parametrize("verb", ["compare", "merge"])
def test_code_does_not_run_because_a_record_names_it(run_script, runs, tmp_path, verb):
    code = tmp_path / "adapt.py"
    code.write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\ndef pairs(row):\n    return row\n")
    run = shutil.copytree(runs["lora"], tmp_path / "run")
    record = json.loads((run / "run.json").read_text())
    record["settings"]["dataset_adapter"] = f"{code}:pairs"
    (run / "run.json").write_text(json.dumps(record))
    status, _, err = run_script(verb, "--model_name_or_path", run, "--output_dir", tmp_path / "out")
    assert (status, err.count("\n")) == (2, 1)
    assert f"the run read its data with the function {code}:pairs" in err
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("flags", "fault"),
    [
        ((), "--model_name_or_path is missing: name the folder of a run, as in `compare runs/demo`, or any model"),
        (("--judge", "vote", "vote"), "--judge: vote is given twice; name each judge once"),
        (("--judge", "http://x/v1"), "--judge_model is missing: name the model at the endpoint"),
        (("--judge", "http://SECRET@x/v1", "--judge_model", "m"), "--judge is a URL with a user or password"),
        (("--judge", "http://x/1", "http://x/2", "--judge_model", "m"), "--judge: names 2 endpoints"),
        (("--judge", "vote", "--judge_model", "m"), "--judge_model: is for an endpoint, and --judge names none"),
        (("--vote_port", "80"), "--vote_port: has no effect without --judge vote"),
        (("--vote_port", "0", "--judge", "vote"), "--vote_port is 0: must be between 1 and 65535"),
        (("--temperature", "0", "--top_p", "0.5"), "--top_p: has no effect with --temperature 0"),
        (("--top_p", "0"), "--top_p is 0.0: must be above 0 and at most 1"),
        (("--prompt_column", "x"), "--prompt_column: has no effect without --prompts"),
        (("--dataset_name", "x"), "--dataset_name: is a flag of the verb train, sft, data, "),
    ],
)
def test_flags_that_do_not_fit_are_refused(run_script, flags, fault):
    names = ("--model_name_or_path", "m") if flags else ()
    code, out, err = run_script("compare", *names, *flags)
    assert code == 2
    assert "SECRET" not in out + err
    assert f"error: {fault}" in err


def test_the_scorer_of_the_demo_is_a_judge():
    score = load_scorer(str(ROOT / "examples" / "demo" / "judge.py") + ":sentiment")
    bad, good = score(["We had lunch."] * 2, [" The soup was awful.", " The soup was wonderful."])
    assert bad < 0 < good


def test_rounding_decides_nothing():
    judge = Judge("j.py:f", "scores by a function")
    assert by_scores(judge, [0.1 + 0.6, 0.7, -0.0, 1e-30], [0.7, 0.70001, 0.0, 0.0]).outcomes == [0.5, 0, 0.5, 0.5]


def test_equal_responses_get_the_same_reward_whatever_stands_beside_them(tiny_model, monkeypatch):
    torch.manual_seed(0)
    models = [AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.bfloat16) for _ in range(2)]
    for weights in models[0].parameters():
        weights.data += 0.02 * torch.randn_like(weights)
    policy, reference = (Contender(model.eval(), None) for model in models)
    monkeypatch.setattr("utils.comparing.rewards.TOKENS_PER_BATCH", 64)
    equal = [([5, 6, 7], list(range(10, 10 + size))) for size in (3, 9, 14, 20, 27)]
    other = [([5, 6, 7, 8], list(range(40, 40 + size))) for size in (2, 8, 16, 24, 30)]
    rewards = implicit_rewards(policy, reference, [*equal, *other, *equal], 0.1, 0)
    assert rewards[:5] == rewards[10:]
    assert len(set(rewards)) == 10


def test_responses_are_scored_in_batches_that_the_limit_of_tokens_allows(monkeypatch):
    monkeypatch.setattr(rewards, "TOKENS_PER_BATCH", 12)
    rows = [([1] * prompt, [2] * response) for prompt, response in ((2, 2), (1, 3), (2, 0), (3, 1), (2, 2), (20, 1))]
    assert list(rewards._batches(rows)) == [[0, 1, 3], [4], [5]], "padded to the longest; one without a response has 0"


def test_wins_and_their_interval():
    counted = count_outcomes([1, 1, 0.5, 0, None, 1])
    assert [counted[name] for name in ("wins", "ties", "losses", "judged", "not_judged")] == [3, 1, 1, 5, 1]
    assert counted["win_rate"] == 0.7
    assert count_outcomes([None])["win_rate"] is None
    # Wilson's interval of 8 in 10, as in the textbooks, and of all of 10.
    assert wilson_interval(0.8, 10) == pytest.approx((0.4902, 0.9433), abs=1e-4)
    assert wilson_interval(1.0, 10) == pytest.approx((0.7225, 1.0), abs=1e-4)


def test_an_interval_stays_within_0_and_1():
    for count in range(1, 200):
        assert wilson_interval(0, count)[0] >= 0
        assert wilson_interval(1, count)[1] <= 1


def test_an_interval_that_holds_a_half_says_nothing():
    said = {"judge": "f.py:g", "judged": 9, "win_rate": 0.6}
    begins = {(0.5, 0.7): "No", (0.501, 0.7): "Better", (0.3, 0.5): "No", (0.3, 0.499): "Worse", (0.4, 0.6): "No"}
    for interval, word in begins.items():
        assert describe_result(said | {"interval": interval}).startswith(word), interval


def test_both_orders_are_joined():
    assert [join_orders(*pair) for pair in [(1, 1), (1, 0.5), (1, 0), (0.5, 0.5), (0.5, 0), (0, 0), (None, 1)]] == [
        1, 1, 0.5, 0.5, 0, 0, None,
    ]  # fmt: skip
    counts = count_orders([(1, 1), (1, 0), (1, 0), (0, 1), (0.5, 1), (None, 0), (0.5, 0.5)])
    assert counts == {
        "matches_with_both": 6,
        "same_in_both_orders": 2,
        "first_in_both_orders": 2,
        "second_in_both_orders": 1,
        "tie_in_one_order": 1,
    }


def test_how_responses_read():
    assert find_words("Don't stop: été, 猫が!") == ["don", "t", "stop", "été", "猫", "が"]
    assert share_repeated(["a", "b", "c", "d", "a", "b", "c", "d"]) == pytest.approx(1 / 5)  # the last of five runs
    assert share_repeated(["a", "b", "c"]) is None
    assert share_distinct([["a", "b"], ["a", "c"]], 1) == 3 / 4
    assert share_distinct([["a", "b"], ["a", "b"]], 2) == 1 / 2
    assert share_distinct([[], ["a"]], 2) is None
    written = [
        Continuation("I'm sorry, but I can't help with that.", [1, 2, 3], 0),
        Continuation("one two", [1], None),
        Continuation(" \n", [], 0),
    ]
    read = describe_responses(written)
    assert (read["mean_tokens"], read["median_tokens"]) == (4 / 3, 1)
    assert (read["ended"], read["empty"], read["refusals"]) == pytest.approx((2 / 3, 1 / 3, 1 / 3))
