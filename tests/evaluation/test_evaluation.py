"""The verb `evaluate`: a run's own figures again, each figure in a second way, intervals that hold what they say."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.stats import permutation_test
from shared.pairs import make_pairs, write_lines
from shared.runs import ROOT, read_record
from sklearn.metrics import brier_score_loss, roc_auc_score
from transformers import AutoModelForCausalLM, AutoTokenizer

from utils.errors import UserError
from utils.evaluation.folder import find_results_folder
from utils.evaluation.measures import PairTable, make_buckets, measure
from utils.evaluation.page import make_edges
from utils.evaluation.resampling import Bootstrap, flip_signs, make_figure
from utils.models.sources import ModelSource
from utils.models.trained import TrainedModel
from utils.run.folder import clear_run
from utils.run.names import COMPARISON_FILES, EVALUATION_FILES
from utils.run.results import write_results

QUICK = ["--max_steps", 6, "--learning_rate", 5e-3, "--dtype", "float32", "--validation_split", 0.3, "--save_steps", 4]


@pytest.fixture(scope="module")
def train(tiny_model, pairs_file, tmp_path_factory):
    """Trains once for each set of flags; returns the run's folder."""
    import advanced_dpo_script

    root, made = tmp_path_factory.mktemp("runs"), {}

    def run(*flags, verb: str = "train", model: Path = tiny_model, data: Path = pairs_file) -> Path:
        key = (verb, model, data, flags)
        if key not in made:
            folder = root / f"run-{len(made)}"
            common = ["--model_name_or_path", model, "--dataset_name", data, "--output_dir", folder, *QUICK]
            assert advanced_dpo_script.main([str(text) for text in (verb, *common, *flags)]) == 0
            made[key] = folder
        return made[key]

    return run


@pytest.fixture
def evaluate(run_script, tmp_path):
    """Evaluates into a fresh folder: returns the record, the rows and what was printed."""

    def run(model, *flags, folder: str = "found") -> tuple[dict, list[dict], str]:
        flags = ("--bootstrap_samples", 200, *flags)
        code, out, err = run_script(
            "evaluate", "--model_name_or_path", model, "--output_dir", tmp_path / folder, *flags
        )
        assert (code, err) == (0, ""), out + err
        rows = (tmp_path / folder / "evaluation_pairs.jsonl").read_text(encoding="utf-8").splitlines()
        record = json.loads((tmp_path / folder / "evaluation.json").read_text(encoding="utf-8"))
        return record, list(map(json.loads, rows)), out

    return run


def make_run(way: str, train, other_model: Path) -> Path:
    if way == "continued adapter":
        first = train("--use_lora", "--lora_r", 4, verb="sft")
        return train(model=first)
    flags = {
        "full": [],
        "full, both models": ["--precompute_ref_log_probs", "false"],
        "full, reference in 4 bits": ["--use_4bit"],
        "lora": ["--use_lora"],
        "lora on 4 bits": ["--use_lora", "--use_4bit"],
        "separate reference": ["--use_lora", "--ref_model_name_or_path", other_model],
        "another loss, cut to length": [
            *("--use_lora", "--loss_type", "ipo", "sft", "--beta", 0.3, "--ld_alpha", 0.5, "--max_length", 20)
        ],
        "padded": ["--use_lora", "--engine", "padded"],
    }
    return train(*flags[way])


@pytest.mark.parametrize(
    "way",
    ["full", "lora", "lora on 4 bits", "continued adapter", "separate reference", "another loss, cut to length",
     pytest.param("full, both models", marks=pytest.mark.slow),
     pytest.param("full, reference in 4 bits", marks=pytest.mark.slow),
     pytest.param("padded", marks=pytest.mark.slow)],
)  # fmt: skip
def test_a_run_has_the_figures_that_it_recorded_when_it_ended(way, train, evaluate, other_model):
    folder = make_run(way, train, other_model)
    recorded = read_record(folder)["metrics"]["held_out"]
    found, rows, out = evaluate(folder)
    assert found["metrics"] == pytest.approx(recorded, rel=1e-5, abs=1e-6)
    assert abs(recorded["margin"]) > 1e-3, "the policy has moved"
    kept = [json.loads(line) for line in (folder / "held_out_pairs.jsonl").read_text().splitlines()]
    assert len(rows) == len(kept) == found["pairs"] > 8
    for row, known in zip(rows, kept, strict=True):
        names = ("id", "place", "row")
        assert [row[name] for name in names] == [known[name] for name in names]
        assert {name: row[name] for name in known if name not in names} == pytest.approx(
            {name: value for name, value in known.items() if name not in names}, rel=1e-5, abs=1e-4
        )
    assert found["recorded"]["same"] is True
    assert "warning: not what run.json recorded" not in out
    *_, margin, reference, calibration, length, files = out.splitlines()
    labels = [line.split("  ")[1].strip() for line in (margin, calibration, length, files)]
    assert labels == ["margin", "calibration", "length", "all figures"]
    assert reference.startswith("  vs reference by log-prob ")
    assert "the data are unchanged" in out


def test_a_checkpoint_is_evaluated_in_a_folder_of_its_own(train, run_script):
    run = train("--use_lora")
    code, out, _ = run_script("evaluate", "--model_name_or_path", run / "checkpoint-4")
    assert code == 0
    found = json.loads((run / "evaluation-checkpoint-4" / "evaluation.json").read_text())
    assert found["recorded"] is None
    assert found["metrics"]["margin"] != read_record(run)["metrics"]["held_out"]["margin"]
    assert str(run / "evaluation-checkpoint-4") in out


def test_any_model_against_any_reference(tiny_model, other_model, evaluate, tmp_path):
    pairs = make_pairs(12, seed=5)
    data = write_lines(tmp_path / "new.jsonl", pairs)
    flags = ("--dataset_name", data, "--dtype", "float32", "--beta", 0.2)
    found, rows, out = evaluate(tiny_model, "--ref_model_name_or_path", other_model, *flags)
    _, turned, _ = evaluate(other_model, "--ref_model_name_or_path", tiny_model, *flags, folder="turned")
    assert found["pairs"] == 12
    assert [row["margin"] for row in rows] == pytest.approx([-row["margin"] for row in turned], abs=1e-4)
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    models = [AutoModelForCausalLM.from_pretrained(folder) for folder in (tiny_model, other_model)]
    for row, pair in zip(rows, pairs, strict=True):
        for side in ("chosen", "rejected"):
            start = len(tokenizer(pair["prompt"])["input_ids"])
            ids = torch.tensor([[*tokenizer(pair["prompt"] + pair[side])["input_ids"], tokenizer.eos_token_id]])
            with torch.no_grad():
                logps = [m(ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None]) for m in models]
            policy, reference = (values[start - 1 :].sum().item() for values in logps)
            assert (row[f"{side}_logps"], row[f"ref_{side}_logps"]) == pytest.approx((policy, reference), abs=2e-4)
            assert row[f"{side}_reward"] == pytest.approx(0.2 * (policy - reference), abs=1e-4)
    assert f"reference: {other_model}" in out


@pytest.mark.parametrize("kind", ["base", "adapter"])
def test_a_reference_on_the_same_base_is_not_loaded_again(kind, train, evaluate, tiny_model, monkeypatch):
    import utils.models.loading

    policy = train("--use_lora")
    reference = tiny_model if kind == "base" else train("--use_lora", "--lora_r", 4, "--lora_target_modules", "q_proj")
    loads = []
    plain = utils.models.loading._load_base
    monkeypatch.setattr(utils.models.loading, "_load_base", lambda *a: loads.append(a) or plain(*a))
    found, rows, _ = evaluate(policy, "--ref_model_name_or_path", reference)
    assert len(loads) == 1
    if kind == "base":
        assert found["recorded"]["same"] is True
        return
    _, own, _ = evaluate(reference, folder="own")
    assert [row["ref_chosen_logps"] for row in rows] == pytest.approx([row["chosen_logps"] for row in own], abs=1e-4)


# The figures, from rows that were not scored by any model.


def make_rows(count: int = 300, seed: int = 0, prompts: int = 120) -> list[dict]:
    draw = np.random.default_rng(seed)
    rows = []
    for _ in range(count):
        lengths = dict(zip(("chosen_tokens", "rejected_tokens"), draw.integers(3, 40, 2).tolist(), strict=True))
        values = draw.normal(0, 1, 4)
        row = {
            "prompt_number": int(draw.integers(prompts)),
            "chosen_logps": -lengths["chosen_tokens"] * 1.1 + values[0],
            "rejected_logps": -lengths["rejected_tokens"] * 1.3 + values[1],
            "ref_chosen_logps": -lengths["chosen_tokens"] * 1.2 + values[2],
            "ref_rejected_logps": -lengths["rejected_tokens"] * 1.2 + values[3],
            "chosen_kl": abs(values[0]),
            "rejected_kl": abs(values[1]),
        }
        for side in ("chosen", "rejected"):
            row[f"{side}_reward"] = 0.5 * (row[f"{side}_logps"] - row[f"ref_{side}_logps"])
        row["margin"] = row["chosen_reward"] - row["rejected_reward"]
        row["accuracy"] = float(row["margin"] > 0)
        row["loss"] = float(np.log1p(np.exp(-row["margin"])))
        rows.append(row | lengths)
    return rows


def table_of(rows: list[dict], **others) -> PairTable:
    numbers = np.array([row.get("prompt_number", place) for place, row in enumerate(rows)])
    return PairTable(rows, numbers, others.get("sources"), others.get("trained_on"))


def test_every_figure_is_what_a_second_way_gives():
    rows = make_rows()
    table = table_of(rows)
    found = measure(table, 200, 0)
    values = {name: figure["value"] for name, figure in found["measures"].items()}
    margins, right = table["margin"], table["accuracy"]
    for name in ("accuracy", "margin", "chosen_reward", "rejected_reward", "loss", "chosen_kl", "rejected_kl"):
        assert values[name] == pytest.approx(sum(row[name] for row in rows) / len(rows))
    labels = np.repeat([1, 0], len(rows))
    rewards = np.concatenate([table["chosen_reward"], table["rejected_reward"]])
    assert values["roc_auc"] == pytest.approx(roc_auc_score(labels, rewards))
    tokens = table["chosen_tokens"].sum()
    assert values["perplexity"] == pytest.approx(np.exp(-table["chosen_logps"].sum() / tokens))
    assert values["reference_perplexity"] == pytest.approx(np.exp(-table["ref_chosen_logps"].sum() / tokens))
    longer = table["chosen_tokens"] > table["rejected_tokens"]
    shorter = table["chosen_tokens"] < table["rejected_tokens"]
    assert values["length_controlled_accuracy"] == pytest.approx((right[longer].mean() + right[shorter].mean()) / 2)

    # Both orders of every pair, bins over the whole of 0 to 1.
    says = 1 / (1 + np.exp(-np.concatenate([margins, -margins])))
    assert found["calibration"]["brier_score"]["value"] == pytest.approx(brier_score_loss(labels, says))
    bins = np.floor(says * 20)
    gaps = [abs((labels - says)[bins == number].sum()) for number in np.unique(bins)]
    assert found["calibration"]["expected_calibration_error"]["value"] == pytest.approx(sum(gaps) / len(says))
    assert sum(place["pairs"] for place in found["calibration"]["curve"]) == len(rows)
    for place in found["calibration"]["curve"]:
        sure = np.maximum(says[: len(rows)], 1 - says[: len(rows)])
        inside = (sure >= place["from"]) & (sure < place["to"])
        assert place["confidence"] == pytest.approx(sure[inside].mean())
        assert place["accuracy"]["value"] == pytest.approx(right[inside].mean())

    by_log_prob = found["against_reference"]["per_token"]
    policy = table["chosen_logps"] / table["chosen_tokens"] > table["rejected_logps"] / table["rejected_tokens"]
    reference = (
        table["ref_chosen_logps"] / table["chosen_tokens"] > table["ref_rejected_logps"] / table["rejected_tokens"]
    )
    assert by_log_prob["policy"]["value"] == pytest.approx(policy.mean())
    assert by_log_prob["difference"]["value"] == pytest.approx(policy.mean() - reference.mean())
    assert by_log_prob["only_policy_right"] == (policy & ~reference).sum()
    prefers = (longer & (margins > 0)) | (shorter & (margins < 0))
    assert found["length"]["prefers_longer"]["value"] == pytest.approx(prefers.sum() / (longer | shorter).sum())
    assert found["length"]["longer_is_chosen"]["value"] == pytest.approx(longer.sum() / (longer | shorter).sum())
    for groups in (found["length"]["by_difference"], found["length"]["by_longer_side"], found["by_length"]):
        assert sum(group["pairs"] for group in groups) == len(rows)
        total = sum(group["pairs"] * group["accuracy"]["value"] for group in groups)
        assert total == pytest.approx(right.sum())


def test_four_pairs_by_hand():
    lengths = [(4, 2), (6, 3), (2, 4), (5, 5)]  # chosen, rejected
    margins = [np.log(3), -np.log(3), np.log(4), 0.0]  # sure to 3/4, 3/4 (of the other side), 4/5 and 1/2
    rights, rewards = [1, 0, 1, 0.5], [2, 0, 1, 5]
    rows = [
        {
            "margin": margin, "accuracy": right, "chosen_reward": reward, "rejected_reward": reward - margin,
            "loss": 0.0, "chosen_tokens": chosen, "rejected_tokens": rejected,
            "chosen_logps": -1.0 * chosen, "rejected_logps": -2.0 * rejected,
            "ref_chosen_logps": -2.0 * chosen, "ref_rejected_logps": -1.0 * rejected,
        }
        for margin, right, reward, (chosen, rejected) in zip(margins, rights, rewards, lengths, strict=True)
    ]  # fmt: skip
    found = measure(table_of(rows), 200, 0)
    calibration, measures = found["calibration"], found["measures"]
    assert measures["accuracy"]["value"] == 2.5 / 4
    assert measures["length_controlled_accuracy"]["value"] == (1 / 2 + 1) / 2
    assert calibration["brier_score"]["value"] == pytest.approx((1 / 16 + 9 / 16 + 1 / 25 + 1 / 4) / 4)
    assert calibration["confidence"]["value"] == pytest.approx((0.75 + 0.75 + 0.8 + 0.5) / 4)
    # Bins: 0.5 (one, a half right), 0.75 (two, one right), 0.8 (one, right).
    error = (abs(0.5 - 0.5) + abs(1 - 1.5) + abs(1 - 0.8)) / 4
    assert calibration["expected_calibration_error"]["value"] == pytest.approx(error)
    # Chosen 2, 0, 1, 5 beside rejected 0.90, 1.10, -0.39, 5: 2 > three, 0 > one, 1 > two, 5 > three and a tie.
    assert measures["roc_auc"]["value"] == pytest.approx((3 + 1 + 2 + 3.5) / 16)
    assert (measures["perplexity"]["value"], measures["reference_perplexity"]["value"]) == pytest.approx(np.exp([1, 2]))
    assert "chosen_kl" not in measures
    # By log-prob: -4 and -4 (a tie), -6 and -6 (a tie), -2 and -8, -5 and -10. The reference: -8 and -2, -12 and -3,
    # -4 and -4 (a tie), -10 and -5.
    ranked = found["against_reference"]["summed"]
    assert (ranked["policy"]["value"], ranked["reference"]["value"]) == (3 / 4, 0.5 / 4)
    assert found["length"]["prefers_longer"]["value"] == pytest.approx(1 / 3)


def test_how_far_a_calibrated_model_would_be_off_by_chance():
    """A single pair of which it is sure to 4/5: in one of five draws it is wrong, and off by 4/5 in place of 1/5."""
    calibration = measure(table_of([make_rows(1)[0] | {"margin": np.log(4)}]), 100, 0)["calibration"]
    by_chance = calibration["expected_calibration_error_by_chance"]
    assert by_chance["mean"] == pytest.approx(0.8 * 0.2 + 0.2 * 0.8, abs=0.06)
    assert by_chance["high"] == pytest.approx(0.8), "which happens in more than one case of twenty"
    calibration = measure(table_of([make_rows(1)[0] | {"margin": np.log(27)}]), 100, 1)["calibration"]
    by_chance = calibration["expected_calibration_error_by_chance"]
    assert by_chance["high"] == pytest.approx(1 / 28), "to be wrong happens in fewer than one case of twenty"


def test_a_share_of_all_has_the_interval_of_the_side_with_fewer_prompts():
    lengths = [(9, 4)] * 9 + [(4, 9)] * 3
    rows = [row | {"chosen_tokens": chosen, "rejected_tokens": rejected, "accuracy": 1.0}
            for row, (chosen, rejected) in zip(make_rows(12), lengths, strict=True)]  # fmt: skip
    rows = [row | {"prompt_number": number} for number, row in enumerate(rows)]
    found = measure(table_of(rows), 100, 0)["measures"]["length_controlled_accuracy"]
    # Three of three: the share at which that happens in one of forty cases.
    assert (found["value"], found["low"], found["high"]) == pytest.approx((1, 0.025 ** (1 / 3), 1))


def test_a_model_that_picks_the_longer_response_is_at_chance_when_length_is_controlled():
    rows = make_rows(400)
    for row in rows:
        row["margin"] = float(row["chosen_tokens"] - row["rejected_tokens"])
        row["accuracy"] = (1 + np.sign(row["margin"])) / 2
    measures = measure(table_of(rows[:40] + [row for row in rows[40:] if row["margin"] > 0]), 100, 0)["measures"]
    assert measures["accuracy"]["value"] > 0.8
    assert measures["length_controlled_accuracy"]["value"] == 0.5


def test_groups_of_pairs_are_told_apart():
    rows = make_rows(60)
    names, seen = ["a.jsonl", "b.jsonl", "b.jsonl"] * 20, np.arange(60) < 15
    found = measure(table_of(rows, sources=names, trained_on=seen), 100, 0)
    for group, mask in zip(
        found["by_source"], (np.array(names) == "a.jsonl", np.array(names) == "b.jsonl"), strict=True
    ):
        assert group["pairs"] == mask.sum()
        assert group["margin"]["value"] == pytest.approx(np.array([row["margin"] for row in rows])[mask].mean())
    assert [group["pairs"] for group in found["by_training"]] == [15, 45]
    assert measure(table_of(rows, trained_on=np.zeros(60, bool)), 10, 0)["by_training"] == []


def test_a_bucket_is_named_by_the_lengths_in_it():
    assert [name for name, _ in make_buckets(np.array([4.0]))] == ["4"]
    buckets = make_buckets(np.array([-3, -3, -3, -1, 0, 2, 2, 9, 9, 9.0]), signed=True)
    assert [(name, int(mask.sum())) for name, mask in buckets] == [("-3", 3), ("-1 to 0", 2), ("+2", 2), ("+9", 3)]


# Intervals and tests.


def test_an_interval_is_as_wide_as_theory_says():
    values = np.random.default_rng(1).normal(2, 1, 400)
    sums = Bootstrap(np.arange(400), 4000, 0).sums({"value": values, "pairs": np.ones(400)})
    figure = make_figure(sums["value"] / sums["pairs"])
    error = values.std() / 20
    assert figure["value"] == pytest.approx(values.mean())
    assert (figure["low"], figure["high"]) == pytest.approx(
        (values.mean() - 1.96 * error, values.mean() + 1.96 * error), abs=0.1 * error
    )


def test_an_interval_holds_the_truth_as_often_as_it_says_where_pairs_share_prompts():
    """Each prompt has six pairs that are nearly alike. Intervals over pairs would hold it in some 60% of cases."""
    draw = np.random.default_rng(0)
    held = {"prompts": 0, "pairs": 0}
    for trial in range(300):
        prompts = np.repeat(np.arange(60), 6)
        right = (draw.normal(0.5, 1, 60)[prompts] + draw.normal(0, 0.2, 360) > 0).astype(float)
        for name, groups in (("prompts", prompts), ("pairs", np.arange(360))):
            sums = Bootstrap(groups, 200, trial).sums({"right": right, "pairs": np.ones(360)})
            figure = make_figure(sums["right"] / sums["pairs"])
            held[name] += figure["low"] <= 0.6881 <= figure["high"]  # P(N(0.5, 1.04) > 0)
    assert 0.91 <= held["prompts"] / 300 <= 0.98
    assert held["pairs"] / 300 < 0.8


def test_a_share_of_all_or_none_has_the_exact_interval():
    rows = make_rows(40)
    for number, row in enumerate(rows):
        row |= {"margin": 1.0, "accuracy": 1.0, "chosen_reward": 1.0, "rejected_reward": 0.0, "prompt_number": number}
        row |= {"chosen_tokens": 4.0, "rejected_tokens": 2.0}
    found = measure(table_of(rows), 100, 0)
    figures = [found["measures"]["accuracy"], found["measures"]["roc_auc"], found["length"]["prefers_longer"]]
    for figure in [*figures, found["length"]["longer_is_chosen"]]:
        assert (figure["value"], figure["low"], figure["high"]) == pytest.approx((1, 0.025 ** (1 / 40), 1))
    none = measure(table_of([row | {"margin": -1.0, "accuracy": 0.0} for row in rows]), 100, 0)["measures"]["accuracy"]
    assert (none["value"], none["low"], none["high"]) == pytest.approx((0, 0, 1 - 0.025 ** (1 / 40)))


def test_what_a_single_prompt_says_is_said_with_care(tiny_model, other_model, evaluate, tmp_path):
    data = write_lines(tmp_path / "one.jsonl", make_pairs(1))
    found, _, out = evaluate(tiny_model, "--ref_model_name_or_path", other_model, "--dataset_name", data)
    assert "of 1 pair ranked correctly" in out
    assert "warning: a single prompt gives intervals that are too narrow" in out
    assert len(found["warnings"]) == 1


def test_the_curve_of_every_draw_is_that_of_its_weights():
    rows = make_rows(50, prompts=12)
    prompts = np.array([row["prompt_number"] for row in rows])
    chosen, rejected = (np.round([row[f"{side}_reward"] for row in rows], 1) for side in ("chosen", "rejected"))
    bootstrap = Bootstrap(prompts, 20, 3)
    areas = bootstrap.roc_auc(chosen, rejected)
    numbers = np.unique(prompts)
    sums = bootstrap.sums({number: (prompts == number) / (prompts == number).sum() for number in numbers})
    for draw in range(21):
        weights = np.array([sums[number][draw] for number in prompts])
        known = roc_auc_score(
            np.repeat([1, 0], 50), np.concatenate([chosen, rejected]), sample_weight=np.tile(weights, 2)
        )
        assert areas[draw] == pytest.approx(known)
    assert len(np.unique(areas)) > 15


def leaves(value: object, name: str = "") -> dict[str, float]:
    """Every number of nested figures, by its place."""
    if not isinstance(value, dict | list):
        return {name: value} if isinstance(value, int | float) else {}
    parts = value.items() if isinstance(value, dict) else enumerate(value)
    return {place: leaf for key, part in parts for place, leaf in leaves(part, f"{name}/{key}").items()}


def test_draws_do_not_depend_on_how_many_are_made_at_a_time(monkeypatch):
    rows = table_of(make_rows(50))
    whole = measure(rows, 150, 7)
    monkeypatch.setattr("utils.evaluation.resampling.CHUNK", 500)
    again, other = measure(rows, 150, 7), measure(rows, 150, 8)
    # To the rounding of sums, which may depend on how many rows a product has.
    assert leaves(again) == pytest.approx(leaves(whole), rel=1e-12, abs=1e-12)
    assert leaves(other) != pytest.approx(leaves(whole), rel=1e-6)


@pytest.mark.parametrize("alternative", ["greater", "two-sided"])
def test_flipped_signs_give_the_p_value_of_a_library(alternative):
    draw = np.random.default_rng(2)
    for values in (draw.normal(0.5, 1, 9), draw.normal(0.15, 1, 200)):
        known = permutation_test(
            (values,), np.mean, permutation_type="samples", n_resamples=9999, alternative=alternative
        ).pvalue
        assert flip_signs(values, alternative, 0)["p_value"] == pytest.approx(
            known, abs=0 if len(values) < 10 else 0.02
        )
    # McNemar: of 10 pairs that differ one is only the other's; 2 (1 + 10) / 2^10.
    differences = np.array([1.0] * 9 + [-1.0] + [0.0] * 20)
    p = 11 / 1024 * (2 if alternative == "two-sided" else 1)
    assert flip_signs(differences, alternative, 0)["p_value"] == pytest.approx(p)


@pytest.mark.parametrize("alternative", ["greater", "two-sided"])
def test_sums_that_are_equal_but_for_rounding_are_as_far_out(alternative):
    draw = np.random.default_rng(3)
    for _ in range(20):
        whole = draw.integers(-5, 8, 9)
        tenths = flip_signs(whole * 0.1, alternative, 0)  # 0.1 + 0.2 is not 0.3
        assert tenths["p_value"] == flip_signs(whole.astype(float), alternative, 0)["p_value"]


def test_signs_are_flipped_in_every_way_as_long_as_there_are_few_and_no_draw_makes_certain():
    every_way, at_random = (flip_signs(np.arange(1.0, 1 + count), "greater", 0) for count in (13, 60))
    assert every_way["test"] == "signs flipped by prompt, in all 8,192 ways"
    assert every_way["p_value"] == 1 / 8192
    assert at_random["test"] == "signs flipped by prompt, 9,999 times at random"
    assert at_random["p_value"] == 1 / 10000, "of 9,999 draws none is as far out, and the values as they are count too"


# Which pairs.


def test_other_pairs_are_all_evaluated_and_those_seen_in_training_are_told_apart(train, evaluate, tmp_path):
    run = train("--use_lora")
    held_out = {json.loads(line)["row"] for line in (run / "held_out_pairs.jsonl").read_text().splitlines()}
    own, new = make_pairs(60), make_pairs(25, seed=9)[:20]
    for number, pair in enumerate(new):
        pair["prompt"] = f"Another {number} " + pair["prompt"]
    data = write_lines(tmp_path / "others.jsonl", [*own[:30], *new])
    found, rows, out = evaluate(run, "--dataset_name", data)
    assert found["pairs"] == 50
    seen = 30 - len(held_out & set(range(30)))
    assert [row["trained_on"] for row in rows] == [number < 30 and number not in held_out for number in range(50)]
    assert [group["pairs"] for group in found["by_training"]] == [seen, 50 - seen]
    assert found["data"]["prompts_trained_on"] == seen
    assert f"{seen / 50:.0%} of these pairs have prompts that the run was trained on" in out


def test_the_evaluation_split_of_data_is_what_is_evaluated(tiny_model, other_model, evaluate, tmp_path):
    folder = tmp_path / "splits"
    folder.mkdir()
    write_lines(folder / "train.jsonl", make_pairs(20))
    write_lines(folder / "test.jsonl", make_pairs(7, seed=3))
    flags = ("--ref_model_name_or_path", other_model, "--dataset_name", folder, "--dtype", "float32")
    assert evaluate(tiny_model, *flags)[0]["pairs"] == 7
    assert evaluate(tiny_model, *flags, "--dataset_split", "train", folder="train")[0]["pairs"] == 20
    several = f"{folder},{write_lines(tmp_path / 'more.jsonl', make_pairs(5, seed=4))}"
    found = evaluate(tiny_model, "--ref_model_name_or_path", other_model, "--dataset_name", several, folder="two")[0]
    assert [(Path(group["name"]).name, group["pairs"]) for group in found["by_source"]] == [
        ("splits", 7), ("more.jsonl", 5),
    ]  # fmt: skip


def test_data_that_have_moved_are_known_again_and_data_that_have_changed_too(train, evaluate, run_script, tmp_path):
    data = write_lines(tmp_path / "mine.jsonl", make_pairs(40, seed=8))
    run = train("--use_lora", data=data)
    held_out = read_record(run)["data"]["held_out_pairs"]
    moved = Path(shutil.move(data, tmp_path / "moved.jsonl"))
    code, _, err = run_script("evaluate", "--model_name_or_path", run)
    assert code == 2
    assert "mine.jsonl: no such file" in err
    assert "if they have moved, say where with --dataset_name" in err
    found, rows, _ = evaluate(run, "--dataset_name", moved)
    assert (len(rows), found["data"]["held_out_by_the_run"], found["recorded"]["same"]) == (held_out, True, True)
    every_pair = evaluate(run, "--dataset_name", moved, "--dataset_split", "train", folder="all")[0]
    assert every_pair["pairs"] == 40
    write_lines(data, [*make_pairs(40, seed=8)[5:], *make_pairs(10, seed=10)])
    found, _, out = evaluate(run, folder="changed")
    assert found["data"]["unchanged_since_training"] is False
    assert "warning: the data of the run have changed since" in out
    assert "not what run.json recorded" in out


def test_a_function_that_read_the_data_is_run_again_only_by_name(train, evaluate, run_script, tmp_path):
    code = tmp_path / "adapt.py"
    code.write_text("def pairs(row):\n    return {'prompt': row['q'], 'chosen': row['a'], 'rejected': row['b']}\n")
    rows = [{"q": pair["prompt"], "a": pair["chosen"], "b": pair["rejected"]} for pair in make_pairs(30)]
    run = train("--use_lora", "--dataset_adapter", f"{code}:pairs", data=write_lines(tmp_path / "odd.jsonl", rows))
    status, _, err = run_script("evaluate", "--model_name_or_path", run)
    assert status == 2
    assert f"the run read its data with the function {code}:pairs" in err
    assert evaluate(run, "--dataset_adapter", f"{code}:pairs")[0]["recorded"]["same"] is True


# Files.


def test_results_replace_earlier_ones_and_nothing_else(train, run_script, tmp_path):
    run = train("--use_lora")
    flags = ("evaluate", "--model_name_or_path", run, "--bootstrap_samples", 100)
    for _ in range(2):
        assert run_script(*flags)[0] == 0
    assert {path.name for path in (run / "evaluation").iterdir()} == {
        "evaluation.json", "evaluation_pairs.jsonl", "evaluation.html",
    }  # fmt: skip
    (tmp_path / "mine.txt").write_text("mine")
    for folder, said in (
        (run, "not empty, and not an evaluation"),
        (tmp_path / "mine.txt", "a file of that name exists"),
    ):
        before = sorted(folder.parent.rglob("*"))
        code, _, err = run_script(*flags, "--output_dir", folder)
        assert code == 2
        assert said in err
        assert sorted(folder.parent.rglob("*")) == before


def test_a_run_that_is_replaced_takes_its_evaluation_with_it(run_script, tiny_model, pairs_file, tmp_path):
    flags = ("--model_name_or_path", tiny_model, "--dataset_name", pairs_file, "--output_dir", tmp_path / "run")
    assert run_script(*flags, "--use_lora", *QUICK)[0] == 0
    assert run_script("evaluate", "--model_name_or_path", tmp_path / "run", "--bootstrap_samples", 100)[0] == 0
    (tmp_path / "run" / "evaluation" / "notes.txt").write_text("mine")
    assert run_script(*flags, "--use_lora", *QUICK, "--overwrite_output_dir")[0] == 0
    assert [path.name for path in (tmp_path / "run" / "evaluation").iterdir()] == ["notes.txt"]


def test_a_run_that_is_replaced_takes_its_comparison_with_it_but_no_votes(tmp_path):
    (tmp_path / "comparison").mkdir()
    (tmp_path / "comparison-checkpoint-4").mkdir()
    for folder in (tmp_path / "comparison", tmp_path / "comparison-checkpoint-4"):
        write_results(folder, COMPARISON_FILES, {"verb": "compare"}, [], "")
    (tmp_path / "comparison" / "ballots.jsonl").write_text("{}")
    clear_run(tmp_path)
    assert [path.name for path in tmp_path.rglob("*")] == ["comparison", "ballots.jsonl"]


def test_results_that_could_not_be_written_whole_are_written_again(tmp_path, monkeypatch):
    write_results(tmp_path, EVALUATION_FILES, {"verb": "evaluate", "of": "old"}, [{"id": "old"}], "old")
    with monkeypatch.context() as broken:
        broken.setattr("utils.run.results.write_json_lines", fail)
        with pytest.raises(UserError, match="No space left on device"):
            write_results(tmp_path, EVALUATION_FILES, {"verb": "evaluate", "of": "new"}, [{"id": "new"}], "new")
    assert [path.name for path in tmp_path.iterdir()] == ["evaluation.json"]  # nothing of the old beside the new
    nothing = TrainedModel(ModelSource("model", None, None, "model"))
    assert find_results_folder(str(tmp_path), nothing) == tmp_path


def fail(*_):
    raise OSError(28, "No space left on device")


class Reader(HTMLParser):
    def __init__(self, text: str):
        super().__init__()
        self.tags, self.text = set(), ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        assert not any(name.startswith("on") or name == "src" for name, _ in attrs)
        assert all(value.startswith("#") for name, value in attrs if name == "href")

    def handle_data(self, data):
        self.text += data


def test_the_page_says_what_the_record_says_and_runs_nothing(tiny_model, other_model, evaluate, tmp_path):
    pairs = make_pairs(30)
    hostile = "</dd><script>alert(1)</script><img src=x onerror=alert(1)> & \x07"
    for pair in pairs:
        pair["chosen"] += hostile
        pair["rejected"] = hostile + pair["rejected"]
    data = write_lines(tmp_path / "pairs.jsonl", pairs)
    found, rows, _ = evaluate(tiny_model, "--ref_model_name_or_path", other_model, "--dataset_name", data)
    page = Reader((tmp_path / "found" / "evaluation.html").read_text(encoding="utf-8"))
    assert not {"script", "img"} & page.tags
    assert f"{found['measures']['accuracy']['value']:.1%} of 30 pairs ranked correctly" in page.text
    worst = min(rows, key=lambda row: row["margin"])
    assert worst["margin"] < 0
    assert f"margin {worst['margin']:+.3f}, {worst['place']}" in page.text
    assert "<script>alert(1)</script>" in page.text


def test_bins_of_margins_have_round_edges_and_one_at_0():
    for values in (np.random.default_rng(0).normal(3, 4, 500), np.zeros(5), np.array([0.003, 0.001])):
        edges = make_edges(values)
        assert 0 in edges
        assert 2 < len(edges) < 40
        assert edges[0] <= np.quantile(values, 0.01)
        assert edges[-1] >= np.quantile(values, 0.99)


# What can be fixed.


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ("--dataset_name DATA --output_dir OUT", ["--ref_model_name_or_path is missing: MODEL is not the folder of a"]),
        ("--ref_model_name_or_path OTHER --output_dir OUT", ["--dataset_name is missing: MODEL is not the folder of"]),
        ("--ref_model_name_or_path OTHER --dataset_name DATA", ["--output_dir is missing: MODEL is not the folder"]),
        ("", ["--output_dir is missing", "--ref_model_name_or_path is missing", "--dataset_name is missing"]),
        ("--ref_model_name_or_path OTHER --dataset_name DATA --output_dir OUT --max_length 9 --truncation error",
         ["--max_length 9 is too short for 60 of 60 rows"]),
        ("--ref_model_name_or_path ALIEN --dataset_name DATA --output_dir OUT", ["differs from the policy's"]),
        ("--ref_model_name_or_path OTHER --dataset_name BAD --output_dir OUT", ["'chosen' is empty in 1 row (bad"]),
        ("--ref_model_name_or_path OTHER --dataset_name EMPTY --output_dir OUT", ["EMPTY"]),
        ("--max_samples 3", ["--max_samples: says how --dataset_name is read; add it"]),
        ("--bootstrap_samples 5", ["--bootstrap_samples is 5: must be 100 or more"]),
        ("--learning_rate 1", ["--learning_rate: is a flag of the verb train and sft, not of evaluate"]),
    ],
)  # fmt: skip
def test_a_fault_is_one_line(flags, said, run_script, tiny_model, other_model, pairs_file, tmp_path):
    from shared.models import save_tiny_model

    places = {"MODEL": tiny_model, "OTHER": other_model, "DATA": pairs_file, "OUT": tmp_path / "out",
              "BAD": write_lines(tmp_path / "bad.jsonl", [*make_pairs(2), make_pairs(1)[0] | {"chosen": " "}]),
              "EMPTY": write_lines(tmp_path / "empty.jsonl", []), "ALIEN": tmp_path / "alien"}  # fmt: skip
    if "ALIEN" in flags:
        alien = save_tiny_model(places["ALIEN"], seed=3) / "tokenizer.json"
        alien.write_text(alien.read_text().replace('"</s>": 1', '"<end>": 1').replace('"</s>"', '"<end>"'))
    for name, place in places.items():
        flags = flags.replace(name, str(place))
    code, out, err = run_script("evaluate", "--model_name_or_path", tiny_model, *flags.split())
    assert code == 2, out + err
    lines = err.splitlines()
    assert len(lines) == len(said)
    for line, words in zip(lines, said, strict=True):
        assert line.startswith("error: ")
        for name, place in places.items():
            words = words.replace(name, str(place))
        assert words in line
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("verb", ["evaluate", "compare"])
def test_a_model_whose_numbers_are_broken_is_said_in_one_line(verb, train, run_script, tmp_path):
    from safetensors.torch import load_file, save_file

    copy = shutil.copytree(train(), tmp_path / "copy")
    weights = load_file(copy / "model.safetensors")
    weights["model.layers.0.mlp.down_proj.weight"][0, 0] = float("nan")
    save_file(weights, copy / "model.safetensors", metadata={"format": "pt"})
    (copy / "run.json").write_text(json.dumps(read_record(copy) | {"files": {}}))  # else damage is what is found
    flags = () if verb == "evaluate" else ("--temperature", 0, "--max_new_tokens", 4)
    code, _, err = run_script(verb, "--model_name_or_path", copy, "--output_dir", tmp_path / "out", *flags)
    assert (code, err.count("\n")) == (2, 1)
    assert "not finite; its weights are broken (a run that diverged?)" in err
    assert not (tmp_path / "out").exists()


def test_runs_that_cannot_be_evaluated_are_refused(train, run_script, tiny_model, pairs_file, tmp_path):
    copy = shutil.copytree(train("--use_lora"), tmp_path / "copy")
    record = read_record(copy)

    def refused(**change) -> str:
        (copy / "run.json").write_text(json.dumps(record | change))
        code, _, err = run_script("evaluate", "--model_name_or_path", copy)
        assert code == 2
        return err

    assert "a run that did not finish (interrupted)" in refused(status="interrupted")
    gone = record["reference_model"] | {"adapter": str(tmp_path / "gone")}
    assert f"its reference {tmp_path / 'gone'} is no longer there" in refused(reference_model=gone)
    assert "does not say what its reference was" in refused(start=None, reference_model=None)
    assert "is a run of sft, which has no preference pairs" in refused(verb="sft")
    held_none = record["settings"] | {"validation_split": "none"}
    assert "held nothing out" in refused(settings=held_none)
    (copy / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(tmp_path / "gone")}))
    assert "which is no longer there" in refused()


@pytest.mark.slow
@pytest.mark.parametrize("way", ["lora", "full"])
def test_two_processes_find_what_one_finds(way, train, evaluate, tmp_path):
    run = train(*(["--use_lora"] if way == "lora" else []))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2",
               "advanced_dpo_script.py", "evaluate", "--model_name_or_path", run, "--bootstrap_samples", "200",
               "--output_dir", tmp_path / "two"]  # fmt: skip
    done = subprocess.run(list(map(str, command)), cwd=ROOT, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr
    two = json.loads((tmp_path / "two" / "evaluation.json").read_text())
    one, _, _ = evaluate(run)
    assert two["metrics"] == pytest.approx(one["metrics"], rel=1e-5, abs=1e-5)
    assert done.stdout.count("ranked correctly (95% interval") == 1


def test_a_folder_that_nobody_named_is_not_put_on_a_flag(tmp_path):
    source = ModelSource(str(tmp_path), None, None, str(tmp_path))
    trained = TrainedModel(source, tmp_path, {})
    (tmp_path / "evaluation").mkdir()
    (tmp_path / "evaluation" / "mine.txt").touch()
    with pytest.raises(UserError) as error:
        find_results_folder(None, trained)
    assert str(error.value).startswith(f"the folder for the results, {tmp_path.resolve() / 'evaluation'}: not empty")
    assert str(error.value).endswith("(--output_dir names another)")
    with pytest.raises(UserError, match=r"^--output_dir .*: not empty"):
        find_results_folder(str(tmp_path / "evaluation"), trained)
