"""Where a run starts: the policy is its reference, whatever adapter, precision or files it starts from."""

from __future__ import annotations

import json
import math
from itertools import chain

import pytest
import torch
from conftest import read_record

SIDES = ("chosen", "rejected")
CHANGING = {
    "pissa": {"init_lora_weights": "pissa"},
    "olora": {"init_lora_weights": "olora"},
    "kasa": {"kasa_config": True},
    "repeated layers": {"layer_replication": [[0, 2], [1, 2]]},
}


def make_adapter(base, folder, **config):
    """An adapter of rank 4 that PEFT made with this config, as if trained for a while."""
    from peft import KasaConfig, LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.manual_seed(0)
    if "kasa_config" in config:
        config["kasa_config"] = KasaConfig()
    settings = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"} | config
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), LoraConfig(**settings))
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.02 * torch.randn_like(parameter)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(base).save_pretrained(folder)
    return folder


def plain_model(name):
    """A model or an adapter as plain transformers and PEFT load it."""
    from peft import AutoPeftModelForCausalLM
    from transformers import AutoModelForCausalLM

    loads = AutoPeftModelForCausalLM if (name / "adapter_config.json").is_file() else AutoModelForCausalLM
    return loads.from_pretrained(name, dtype=torch.float32).eval()


@torch.no_grad()
def score(model, tokenizer, prompt, completion):
    """The log-prob of each token of a completion and of its end token, nats."""
    before, after = tokenizer(prompt).input_ids, tokenizer(completion, add_special_tokens=False).input_ids
    ids = torch.tensor([[*before, *after, tokenizer.eos_token_id]])
    log_probs = model(ids).logits[0, :-1].log_softmax(-1)
    return log_probs.gather(1, ids[0, 1:, None])[len(before) - 1 :, 0]


def plain_scores(name, pairs, tokenizer):
    """The log-probs of the tokens of each completion, all chosen sides and all rejected ones."""
    model = plain_model(name)
    return [[score(model, tokenizer, pair["prompt"], pair[side]) for pair in pairs] for side in SIDES]


def plain_log_probs(name, pairs, tokenizer):
    """The summed log-prob of the chosen and of the rejected side of each pair."""
    return [[tokens.sum().item() for tokens in side] for side in plain_scores(name, pairs, tokenizer)]


def mean(values):
    return sum(values) / len(values)


def read_rows(run):
    return [json.loads(line) for line in (run / "held_out_pairs.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def pairs(pairs_file):
    return [json.loads(line) for line in pairs_file.read_text().splitlines()]


@pytest.fixture(scope="module")
def tokenizer(tiny_model):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(tiny_model)


@pytest.mark.parametrize("kind", CHANGING)
def test_an_adapter_that_changes_its_base_is_trained_and_measured_as_peft_loads_it(
    run_script, tiny_model, pairs_file, pairs, tokenizer, tmp_path, kind
):
    adapter, run = make_adapter(tiny_model, tmp_path / "adapter", **CHANGING[kind]), tmp_path / "run"
    code, _, err = run_script(
        *("--model_name_or_path", adapter, "--dataset_name", pairs_file, "--output_dir", run, "--max_steps", 2),
        *("--learning_rate", 1e-2, "--warmup_steps", 0),
    )
    assert code == 0, err
    rows, metrics = read_rows(run), read_record(run)["metrics"]
    held_out = [pairs[row["row"]] for row in rows]
    start, end, base = (plain_log_probs(name, held_out, tokenizer) for name in (adapter, run, tiny_model))
    before, after = metrics["held_out_before"], metrics["held_out"]
    assert before["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert [before["chosen_logps"], before["rejected_logps"]] == pytest.approx([mean(side) for side in start], abs=1e-3)
    assert [after["chosen_logps"], after["rejected_logps"]] == pytest.approx([mean(side) for side in end], abs=1e-3)
    assert [row["ref_chosen_logps"] for row in rows] == pytest.approx(start[0], abs=1e-3)
    assert mean(end[0]) - mean(start[0]) > 0.01  # it was trained

    for number, (reference, flags) in enumerate(((start, []), (base, ["--ref_model_name_or_path", tiny_model]))):
        folder = tmp_path / f"evaluation{number}"
        code, _, err = run_script("evaluate", "--model_name_or_path", run, "--output_dir", folder, *flags)
        assert code == 0, err
        measured = json.loads((folder / "evaluation.json").read_text())["metrics"]
        rewards = [0.1 * (mean(own) - mean(other)) for own, other in zip(end, reference, strict=True)]
        assert [measured["chosen_reward"], measured["rejected_reward"]] == pytest.approx(rewards, abs=1e-4)


@pytest.mark.parametrize("kind", ["pissa", "repeated layers"])
def test_merging_says_what_an_adapter_that_changes_its_base_makes_of_the_base(
    run_script, tiny_model, pairs_file, pairs, tokenizer, tmp_path, kind
):
    adapter, merged = make_adapter(tiny_model, tmp_path / "adapter", **CHANGING[kind]), tmp_path / "merged"
    flags = ("merge", "--model_name_or_path", adapter, "--dataset_name", pairs_file, "--max_samples", 20)
    code, _, err = run_script(*flags, "--output_dir", merged)
    assert code == 0, err
    effect = json.loads((merged / "merge.json").read_text())["verification"]["effect"]["mean"]
    adapted, base, whole = (
        torch.cat(list(chain(*plain_scores(name, pairs[:20], tokenizer)))) for name in (adapter, tiny_model, merged)
    )
    assert effect == pytest.approx((adapted - base).abs().mean().item(), rel=1e-3)
    torch.testing.assert_close(whole, adapted, rtol=0, atol=1e-3)


def test_models_beside_an_adapter_that_changes_its_base_compute_as_alone(tiny_model, tmp_path):
    from utils.models.side_by_side import Wanted, load_side_by_side
    from utils.models.sources import find_model
    from utils.runtime import Precision
    from utils.settings import ModelSettings

    folders = {kind: make_adapter(tiny_model, tmp_path / kind, **CHANGING[kind]) for kind in ("pissa", "olora")}
    folders |= {"plain": make_adapter(tiny_model, tmp_path / "plain"), "base": tiny_model}
    wanted = {name: Wanted("--flag", find_model("--flag", str(folder))) for name, folder in folders.items()}
    precision, ids = Precision(torch.float32, torch.device("cpu"), ""), torch.tensor([[0, 5, 9, 30, 7]])
    together = load_side_by_side(wanted, ModelSettings(), precision)
    for name, folder in folders.items():
        with torch.no_grad(), together[name].active() as model:
            torch.testing.assert_close(model(ids).logits, plain_model(folder)(ids).logits, rtol=0, atol=1e-5)
    assert together["plain"].model is together["base"].model


@pytest.mark.parametrize(
    ("verb", "start"),
    [
        *(("train", start) for start in ("pissa_niter_4", "corda", "loftq", "lora_ga", "a start of tomorrow")),
        *((verb, "corda") for verb in ("sft", "evaluate", "merge", "chat", "compare")),
    ],
)
def test_an_adapter_whose_base_cannot_be_made_again_is_refused_everywhere(
    run_script, tiny_model, pairs_file, tmp_path, verb, start
):
    adapter = make_adapter(tiny_model, tmp_path / "adapter")
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(config | {"init_lora_weights": start}))
    data, output = ["--dataset_name", pairs_file], ["--output_dir", tmp_path / "out"]
    flags = {
        "chat": ["--prompt", "Hello"],
        "compare": ["--prompts", pairs_file, "--baseline", tiny_model, *output],
        "evaluate": ["--ref_model_name_or_path", tiny_model, *data, *output],
    }.get(verb, data + output)
    code, _, err = run_script(verb, "--model_name_or_path", adapter, *flags)
    assert code == 2
    assert f"{adapter}: init_lora_weights in its adapter_config.json is {start!r}: PEFT changed the base" in err
    assert "path_initial_model_for_weight_conversion" in err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("verb", ["train", "evaluate"])
def test_parts_of_a_base_are_not_taken_out_of_its_4_bit_weights(run_script, tiny_model, pairs_file, tmp_path, verb):
    adapter = make_adapter(tiny_model, tmp_path / "adapter", init_lora_weights="olora")
    flags = ["--model_name_or_path", adapter, "--dataset_name", pairs_file, "--output_dir", tmp_path / "out"]
    more = ["--ref_model_name_or_path", tiny_model] if verb == "evaluate" else []
    code, _, err = run_script(verb, *flags, *more, "--use_4bit")
    assert code == 2
    assert "which are others in 4 or 8 bits; leave --use_4bit out, or merge it first" in err
