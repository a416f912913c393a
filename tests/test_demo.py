"""The demo's own parts: its grammar, its scorer and the files it ships with."""

from __future__ import annotations

import importlib.util
import json
import random
import subprocess
import sys
from pathlib import Path

import pytest
from shared.runs import ROOT

DEMO = Path(__file__).resolve().parents[1] / "examples" / "demo"
BUNDLED = DEMO / "bundled"
BUNDLE_LIMIT_BYTES = 6_000_000


def load(name: str):
    spec = importlib.util.spec_from_file_location(f"demo_{name}", DEMO / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up by name
    spec.loader.exec_module(module)
    return module


grammar = load("grammar")
scorer = load("scorer")


def reviews(count: int, seed: int, **options) -> list:
    rng = random.Random(seed)
    return [grammar.write_review(rng, **options) for _ in range(count)]


def rows(name: str) -> list[dict[str, str]]:
    return [json.loads(line) for line in (BUNDLED / name).read_text(encoding="utf-8").splitlines()]


needs_bundle = pytest.mark.skipif(not (BUNDLED / "pairs.jsonl").exists(), reason="the bundle is not built")


def test_the_same_seed_writes_the_same_reviews():
    assert reviews(50, seed=5) == reviews(50, seed=5)
    assert reviews(50, seed=5) != reviews(50, seed=6)


def test_reviews_are_varied_and_balanced():
    written = reviews(20_000, seed=11)
    assert len({review.text for review in written}) > 19_900
    assert 0.48 < sum(review.sentiment == grammar.POSITIVE for review in written) / len(written) < 0.52
    assert {review.sentiment for review in written} == {grammar.POSITIVE, grammar.NEGATIVE}


def test_reviews_are_well_formed():
    for review in reviews(3_000, seed=12):
        assert review.prompt.endswith(".")
        assert review.prompt[0].isupper()
        assert review.completion.startswith(" ")
        assert review.completion.endswith(".")
        assert 1 <= review.completion.count(". ") + 1 <= grammar.MAX_SENTENCES
        assert "  " not in review.text
        assert not set(review.text) & set("{}|^*+_")


def test_the_sentiment_is_decided_after_the_prompt():
    good = reviews(500, seed=13, sentiment=grammar.POSITIVE, domain="hotel")
    bad = reviews(500, seed=13, sentiment=grammar.NEGATIVE, domain="hotel")
    assert good[0].prompt == bad[0].prompt
    assert {review.sentiment for review in good + bad} == {1, -1}


def test_one_prompt_in_twenty_is_held_out():
    prompts = {review.prompt for review in reviews(20_000, seed=14)}
    assert 0.04 < sum(map(grammar.is_held_out, prompts)) / len(prompts) < 0.06


def test_the_scorer_agrees_with_the_grammar():
    written = reviews(5_000, seed=987_654)
    agreeing = sum(scorer.score(r.prompt, r.completion) * r.sentiment > 0 for r in written)
    assert agreeing / len(written) >= 0.995


def test_prompts_and_neutral_reviews_score_zero():
    for review in reviews(2_000, seed=15, sentiment=grammar.NEUTRAL):
        assert scorer.score("", review.prompt) == 0
        assert scorer.score(review.prompt, review.completion) == 0
        assert not scorer.is_positive(review.prompt, review.completion)


@pytest.mark.parametrize(
    "text",
    [
        "The soup was delicious.",
        "The soup was not bad.",
        "It was never dull.",
        "The plot was anything but predictable.",
        "The waiter was far from rude.",
        "The service was slow, but the food was wonderful.",
        "Although the room was small and dusty, the staff were charming.",
        "The staff were charming, although the room was dusty.",
        "I loved it. The food was fresh. Still, the bill was steep.",
        "I would recommend it to anyone.",
        "I have no complaints.",
        "It could not have been better.",
        "I give it nine out of ten.",
        "The room was neither dirty nor noisy.",
        "Not only was the food tasty, the staff were friendly as well.",
        "I would do it again without a doubt.",
    ],
)
def test_positive_sentences(text):
    assert scorer.score("", text) > 0.1
    assert scorer.is_positive("", text)


@pytest.mark.parametrize(
    "text",
    [
        "The soup was disgusting.",
        "The film was hardly impressive.",
        "The waiter was not very friendly.",
        "The plot was anything but clever.",
        "The food was wonderful, but the service was slow.",
        "Although the staff were charming, the room was dusty.",
        "I would not recommend it to anyone.",
        "I will never go back.",
        "I want my money back.",
        "It could not have been worse.",
        "Two out of ten from me.",
        "It was a waste of 40 pounds.",
    ],
)
def test_negative_sentences(text):
    assert scorer.score("", text) < -0.1
    assert not scorer.is_positive("", text)


@pytest.mark.parametrize(
    "text", ["", " ", "We sat near the window.", "Colourless green ideas sleep.", "\n\n...", "日本"]
)
def test_texts_without_opinion_score_zero(text):
    assert scorer.score("", text) == 0


def test_degrees_and_negations_order_the_scores():
    graded = ["awful", "very bland", "bland", "a bit bland", "not bland", "tasty", "very tasty", "delicious"]
    scores = [scorer.score("", f"The soup was {words}.") for words in graded]
    assert scores == sorted(scores)
    assert len(set(scores)) == len(scores)


def test_unknown_sentences_do_not_dilute_a_score():
    assert scorer.score("", "It was superb. We came by train.") == scorer.score("", "It was superb.")


def test_scores_stay_within_bounds():
    for review in reviews(2_000, seed=16):
        assert -1 <= scorer.score(review.prompt, review.completion) <= 1
    assert scorer.score("", "Absolutely superb, truly wonderful, simply perfect and extremely brilliant.") <= 1


@needs_bundle
def test_bundled_pairs_are_good_against_bad():
    pairs = rows("pairs.jsonl")
    assert 1_500 <= len(pairs) <= 2_500
    assert len({pair["prompt"] for pair in pairs}) == len(pairs)
    for pair in pairs:
        assert list(pair) == ["prompt", "chosen", "rejected"]
        assert pair["prompt"].endswith(".")
        assert pair["chosen"][0] == pair["rejected"][0] == " "
        assert "</s>" not in pair["chosen"] + pair["rejected"]
        assert scorer.score(pair["prompt"], pair["chosen"]) > 0 > scorer.score(pair["prompt"], pair["rejected"])


@needs_bundle
def test_bundled_prompts_are_unseen():
    prompts = [row["prompt"] for row in rows("prompts.jsonl")]
    assert len(set(prompts)) == len(prompts) >= 100
    assert all(map(grammar.is_held_out, prompts))
    assert not any(grammar.is_held_out(pair["prompt"]) for pair in rows("pairs.jsonl"))


@needs_bundle
def test_the_bundle_is_small_and_documented():
    sizes = {path.relative_to(BUNDLED).as_posix(): path.stat().st_size for path in BUNDLED.rglob("*") if path.is_file()}
    assert sum(sizes.values()) < BUNDLE_LIMIT_BYTES
    notes = (BUNDLED / "README.md").read_text(encoding="utf-8")
    assert "MIT" in notes
    assert "build.py" in notes
    assert {"model/config.json", "model/model.safetensors", "model/tokenizer.json"} <= set(sizes)


@needs_bundle
def test_the_bundled_tokenizer_begins_texts_and_leaves_their_end_open():
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(BUNDLED / "model")
    text = "We tried the bakery on Mill Street. The bread was very good."
    ids = tokenizer(text)["input_ids"]
    assert ids[0] == tokenizer.bos_token_id
    assert tokenizer.eos_token_id not in ids
    assert tokenizer.decode(ids, skip_special_tokens=True) == text
    assert len({tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id}) == 3


@needs_bundle
@pytest.mark.slow
def test_the_base_model_writes_reviews_of_both_kinds():
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(BUNDLED / "model", padding_side="left")
    model = AutoModelForCausalLM.from_pretrained(BUNDLED / "model").eval()
    prompts = [row["prompt"] for row in rows("prompts.jsonl")]
    inputs = tokenizer(prompts, return_tensors="pt", padding=True, return_token_type_ids=False)
    torch.manual_seed(0)
    ids = model.generate(**inputs, do_sample=True, top_k=0, max_new_tokens=100)[:, inputs["input_ids"].shape[1] :]
    texts = tokenizer.batch_decode(ids, skip_special_tokens=True)
    positive = sum(scorer.is_positive(prompt, text) for prompt, text in zip(prompts, texts, strict=True))
    assert 0.35 < positive / len(prompts) < 0.65
    assert (ids == tokenizer.eos_token_id).any(dim=1).float().mean() > 0.97


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_frontier_can_be_measured_again(tmp_path):
    """Quickly: DPO has more true reward than SFT on the preferred side, and both more than the base."""
    command = [sys.executable, "benchmarks/frontier.py", "--quick", "--output_dir", tmp_path]
    done = subprocess.run(list(map(str, command)), cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    points = json.loads((tmp_path / "frontier.json").read_text())["points"]
    rewards = {(point["name"], point["beta"]): point["reward"] for point in points if not point["noisy"]}
    assert rewards["base", None] < rewards["SFT on preferred", None] < rewards["DPO", 0.1]
    assert all(point["kl"] > 0 for point in points[1:])
    assert {path.name for path in tmp_path.iterdir()} >= {"frontier.md", "frontier.svg", "frontier.json"}
