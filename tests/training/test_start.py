"""Where a run starts: the policy is its reference, whatever adapter, precision or files it starts from."""

from __future__ import annotations

import json
import math
from itertools import chain

import pytest
import torch
from safetensors.torch import load_file
from shared.models import save_tiny_model
from shared.runs import read_record

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
    from utils.settings.training import ModelSettings

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
    assert "which differ in 4 or 8 bits; leave --use_4bit out, or merge it first" in err


def train(run_script, model, data, folder, *flags, learning_rate=1e-2):
    """The record of a run of two steps."""
    code, _, err = run_script(
        *("--model_name_or_path", model, "--dataset_name", data, "--output_dir", folder, "--max_steps", 2),
        *("--learning_rate", learning_rate, "--warmup_steps", 0, *flags),
    )
    assert code == 0, err
    return read_record(folder)


@pytest.mark.parametrize("flags", [[], ["--use_4bit"], ["--engine", "padded"]], ids=" ".join)
def test_dora_starts_at_its_reference_in_16_bits(run_script, tiny_model, pairs_file, tmp_path, flags):
    dora = ("--use_lora", "--use_dora", "--dtype", "bfloat16")
    record = train(run_script, tiny_model, pairs_file, tmp_path / "run", *dora, *flags, learning_rate=1e-12)
    if "--use_4bit" not in flags:  # whose base is another
        base, saved = load_file(tiny_model / "model.safetensors"), load_file(tmp_path / "run/adapter_model.safetensors")
        name = "model.layers.0.mlp.down_proj"
        magnitude = saved[f"base_model.model.{name}.lora_magnitude_vector"]
        held = base[f"{name}.weight"].bfloat16().float()
        assert torch.allclose(magnitude, held.norm(dim=1), rtol=1e-5), "which is not rounded to 16 bits itself"
    assert record["metrics"]["held_out_before"]["loss"] == pytest.approx(math.log(2), abs=1e-7)
    assert record["metrics"]["held_out_before"]["chosen_kl"] == pytest.approx(0, abs=1e-7)
    assert record["warnings"] == []


def test_a_dora_adapter_trained_in_16_bits_computes_the_same_in_plain_peft(
    run_script, tiny_model, pairs_file, pairs, tokenizer, tmp_path
):
    run = tmp_path / "run"
    dora = ("--use_lora", "--use_dora", "--dtype", "bfloat16")
    metrics = train(run_script, tiny_model, pairs_file, run, *dora, learning_rate=1e-3)["metrics"]["held_out"]
    held_out = [pairs[row["row"]] for row in read_rows(run)]
    chosen, rejected = (mean(side) for side in plain_log_probs(run, held_out, tokenizer))
    assert [metrics["chosen_logps"], metrics["rejected_logps"]] == pytest.approx([chosen, rejected], abs=0.02)
    start = [mean(side) for side in plain_log_probs(tiny_model, held_out, tokenizer)]
    assert metrics["chosen_reward"] == pytest.approx(0.1 * (chosen - start[0]), abs=2e-3)
    assert metrics["rejected_reward"] == pytest.approx(0.1 * (rejected - start[1]), abs=2e-3)


def test_all_weights_with_4_bits_are_measured_against_themselves(run_script, tiny_model, pairs_file, tmp_path):
    plain = train(run_script, tiny_model, pairs_file, tmp_path / "plain", "--precompute_ref_log_probs", "false")
    record = train(run_script, tiny_model, pairs_file, tmp_path / "run", "--use_4bit")
    assert record["reference"] == "the initial weights, scored once before training"
    assert record["reference_model"]["in_4bit"] is False
    assert record["metrics"]["held_out_before"]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    for name in ("held_out_before", "held_out", "train"):
        assert record["metrics"][name] == pytest.approx(plain["metrics"][name], abs=1e-5)
    assert record["metrics"]["held_out"]["chosen_kl"] > 1e-3
    code, _, err = run_script("evaluate", "--model_name_or_path", tmp_path / "run")
    assert code == 0, err
    assert json.loads((tmp_path / "run" / "evaluation" / "evaluation.json").read_text())["recorded"]["same"] is True


def test_a_reference_that_stays_in_4_bits_is_said_to_be_another(run_script, tiny_model, pairs_file, tmp_path):
    flags = ("--use_4bit", "--precompute_ref_log_probs", "false")
    record = train(run_script, tiny_model, pairs_file, tmp_path / "run", *flags)
    assert record["reference"] == "a frozen copy of the initial weights in 4 bits"
    (warning,) = record["warnings"]
    assert "the 4-bit reference differs slightly from the policy: before the first step the first loss is 0." in warning
    assert " instead of 0.6931, and log-probs of a response differ by " in warning


LOSSES = {  # what each is where policy and reference agree
    "sigmoid": (["--beta", 0.3], math.log(2)),
    "sigmoid --label_smoothing": (["--label_smoothing", 0.2], math.log(2)),
    "ipo": (["--loss_type", "ipo", "--beta", 0.25], 1 / (4 * 0.25**2)),
    "hinge": (["--loss_type", "hinge"], 1.0),
    "apo_zero": (["--loss_type", "apo_zero"], 1.0),
    "sppo_hard": (["--loss_type", "sppo_hard"], 2 * (1 / (2 * 0.1)) ** 2),
    "a sum": (["--loss_type", "sigmoid", "hinge", "--loss_weights", 1, 0.5], math.log(2) + 0.5),
}


@pytest.fixture
def wrong_reference(monkeypatch):
    """References whose log-probs of chosen responses are a little off, as many a fault would make them."""
    from utils.training.reference import ReferenceScores

    compute = ReferenceScores.compute

    def compute_wrongly(self, inputs, keep=False):
        scores, logits = compute(self, inputs, keep)
        scores[: len(scores) // 2] += 0.2
        return scores, logits

    monkeypatch.setattr(ReferenceScores, "compute", compute_wrongly)


@pytest.mark.parametrize("loss", LOSSES)
def test_a_first_loss_that_is_not_the_known_one_is_said(
    run_script, tiny_model, pairs_file, tmp_path, loss, wrong_reference
):
    flags, known = LOSSES[loss]
    record = train(run_script, tiny_model, pairs_file, tmp_path / "run", "--use_lora", *flags)
    (warning,) = [text for text in record["warnings"] if "differ before the first step" in text]
    assert f" instead of {known:.4f}, and log-probs of a response differ by 0.14 nats" in warning


@pytest.mark.parametrize(
    "flags",
    [
        ["--use_lora", "--validation_split", "none", "--dtype", "bfloat16"],
        ["--precompute_ref_log_probs", "--validation_split", "none"],
        ["--precompute_ref_log_probs", "false", "--max_tokens_per_batch", "80"],
        ["--use_4bit"],
        ["--use_lora", "--use_4bit", "--engine", "padded"],
    ],
    ids=" ".join,
)
def test_the_first_loss_is_looked_at_in_every_way_of_training(
    run_script, tiny_model, pairs_file, tmp_path, monkeypatch, request, flags
):
    flags = [str(flag) for flag in flags]
    assert train(run_script, tiny_model, pairs_file, tmp_path / "right", *flags)["warnings"] == []
    request.getfixturevalue("wrong_reference")
    monkeypatch.setattr("utils.training.reference.load_columns", lambda *_: None)
    warnings = train(run_script, tiny_model, pairs_file, tmp_path / "wrong", *flags)["warnings"]
    assert ["differ before the first step" in text for text in warnings] == [True]


def test_a_first_loss_that_is_not_known_is_not_looked_at(
    run_script, tiny_model, other_model, pairs_file, tmp_path, wrong_reference
):
    """With another model as reference, and in a run that goes on."""
    flags = ("--use_lora", "--ref_model_name_or_path", other_model, "--save_steps", 1)
    assert train(run_script, tiny_model, pairs_file, tmp_path / "other", *flags)["warnings"] == []
    resumed = (*flags, "--resume_from_checkpoint", tmp_path / "other" / "checkpoint-1")
    assert train(run_script, tiny_model, pairs_file, tmp_path / "other", *resumed)["warnings"] == []


def test_rounding_of_norms_is_what_the_first_loss_shows(run_script, pairs_file, tmp_path, monkeypatch):
    """DoRA as PEFT computes it in 16 bits, on a model that is as sure of its tokens as trained ones are."""
    model = save_tiny_model(tmp_path / "model", seed=1, initializer_range=0.2)
    for name in ("keep_dora_norms", "start_dora_magnitudes"):
        monkeypatch.setattr(f"utils.training.trainer.{name}", lambda model: None)
    flags = ("--use_lora", "--use_dora", "--dtype", "bfloat16")
    (warning,) = train(run_script, model, pairs_file, tmp_path / "run", *flags)["warnings"]
    assert "differ before the first step" in warning


def saved_in(dtype, folder):
    """A model that is as sure of its tokens as trained ones are, saved in another format."""
    from transformers import AutoModelForCausalLM

    save_tiny_model(folder, seed=1, initializer_range=0.2)
    AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("files", "ahead"), [(torch.float16, "true"), (torch.float16, "false"), (torch.bfloat16, "true")], ids=str
)
def test_a_small_step_in_16_bits_is_shown_as_small(run_script, pairs_file, tmp_path, files, ahead):
    """Whatever the format of the files: what is computed does not run ahead of what is saved."""
    model, run = saved_in(files, tmp_path / "model"), tmp_path / "run"
    flags = ("--dtype", "bfloat16", "--precompute_ref_log_probs", ahead)
    record = train(run_script, model, pairs_file, run, *flags, learning_rate=1e-6)
    metrics = record["metrics"]
    assert metrics["held_out_before"]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert [("half-way between two numbers of bfloat16" in text) for text in record["warnings"]] == (
        [True] if files == torch.float16 else []
    )
    begun, ended = (load_file(folder / "model.safetensors") for folder in (model, run))
    for name, value in ended.items():
        start = begun[name].to(torch.bfloat16) if files == torch.float16 else begun[name]
        assert value.dtype == torch.float32
        assert (value - start.float()).abs().max() < 3e-6, "two steps of 1e-6"
    code, _, err = run_script("evaluate", "--model_name_or_path", run)
    assert code == 0, err
    assert json.loads((run / "evaluation" / "evaluation.json").read_text())["recorded"]["same"] is True
    flags = ("--dtype", "float32", "--output_dir", tmp_path / "exact")
    code, _, err = run_script("evaluate", "--model_name_or_path", run, *flags)
    assert code == 0, err
    exact = json.loads((tmp_path / "exact" / "evaluation.json").read_text())["metrics"]
    assert metrics["held_out"]["margin"] == pytest.approx(exact["margin"], abs=2e-3)
    assert metrics["held_out"]["chosen_kl"] < 1e-3
