"""The verb `merge`: adapters of every kind become models that plain transformers loads and that compute the same."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, PromptTuningConfig, get_peft_model
from shared.hub import created_on, files_sent
from shared.models import save_tiny_model, save_tiny_tokenizer
from shared.pairs import write_lines
from shared.runs import ROOT
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel

from utils.errors import UserError
from utils.merging import folder as folder_room
from utils.merging import merging
from utils.merging.folder import folder_beside
from utils.merging.pairs import CheckedTexts
from utils.merging.verifying import Difference, judge, measure_accuracy, move_weights

TUNED = ["--use_lora", "--max_steps", 3, "--save_steps", 2, "--learning_rate", 5e-2, "--dtype", "float32"]
IDS = torch.tensor([[0, 5, 9, 30, 7, 44, 12]])


@pytest.fixture(scope="module")
def tied_model(tmp_path_factory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("models") / "tied", seed=3, tie_word_embeddings=True)


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory) -> Path:
    """Its linear layers are Conv1D, which keep their weights the other way round."""
    folder = tmp_path_factory.mktemp("models") / "gpt2"
    size = save_tiny_tokenizer(folder)
    torch.manual_seed(4)
    config = GPT2Config(
        vocab_size=size, n_embd=32, n_layer=2, n_head=4, n_positions=128, bos_token_id=0, eos_token_id=1, pad_token_id=2
    )
    GPT2LMHeadModel(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def runs(tiny_model, tied_model, gpt2, pairs_file, tmp_path_factory) -> dict[str, Path]:
    import advanced_dpo_script

    root = tmp_path_factory.mktemp("runs")

    def run(name: str, *flags, model: Path = tied_model, verb: str = "train") -> Path:
        common = ["--model_name_or_path", model, "--dataset_name", pairs_file, "--output_dir", root / name]
        assert advanced_dpo_script.main([str(text) for text in (verb, *common, *TUNED, *flags)]) == 0
        return root / name

    made = {"lora": run("lora"), "dora": run("dora", "--use_dora"), "rslora": run("rslora", "--use_rslora")}
    made |= {"quantized": run("quantized", "--use_4bit", model=tiny_model), "gpt2": run("gpt2", model=gpt2)}
    made |= {"sft": run("sft", verb="sft")}
    return made | {"continued": run("continued", model=made["sft"])}


def read_merge(folder: Path) -> dict:
    return json.loads((folder / "merge.json").read_text(encoding="utf-8"))


def logits_of(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits


def adapter_on_base(run: Path) -> torch.nn.Module:
    """By plain PEFT, on the base's own weights."""
    base = json.loads((run / "adapter_config.json").read_text())["base_model_name_or_path"]
    return PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), run)


@pytest.mark.parametrize("name", ["lora", "dora", "rslora", "gpt2", "continued", "sft", "quantized"])
def test_every_adapter_becomes_a_model_that_computes_the_same(runs, run_script, tmp_path, name):
    code, out, err = run_script("merge", "--model_name_or_path", runs[name], "--output_dir", tmp_path / "m")
    assert code == 0, err
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "m")
    own = adapter_on_base(runs[name])
    torch.testing.assert_close(logits_of(merged), logits_of(own), rtol=1e-4, atol=1e-5)
    with own.disable_adapter():
        assert (logits_of(merged) - logits_of(own)).abs().max() > 1e-2
    check = read_merge(tmp_path / "m")["verification"]
    assert check["difference"]["mean"] < 1e-5 < 1e-3 < check["effect"]["mean"]
    assert ("trained_on_4bit" in check) == (name == "quantized")
    assert f"merged model, tokenizer and record (merge.json): {tmp_path / 'm'}" in out
    assert not any(path.name.startswith(".") for path in tmp_path.iterdir())
    tied = merged.get_input_embeddings().weight.data_ptr() == merged.get_output_embeddings().weight.data_ptr()
    assert tied == (name != "quantized") == merged.config.tie_word_embeddings


def test_a_checkpoint_merges_as_a_run_does(runs, run_script, tmp_path):
    checkpoint = runs["lora"] / "checkpoint-2"
    code, _, err = run_script("merge", "--model_name_or_path", checkpoint, "--output_dir", tmp_path / "m")
    assert code == 0, err
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "m")
    torch.testing.assert_close(logits_of(merged), logits_of(adapter_on_base(checkpoint)), rtol=1e-4, atol=1e-5)


def test_a_run_on_four_bits_merges_into_either_base(runs, run_script, tmp_path):
    flags = ("merge", "--model_name_or_path", runs["quantized"], "--output_dir", tmp_path / "m")
    code, out, err = run_script(*flags)
    assert code == 0, err
    into_base = read_merge(tmp_path / "m")["verification"]["trained_on_4bit"]
    assert into_base["mean"] > 1e-3
    assert "that is quantization, not merging" in out
    code, out, err = run_script(*flags, "--merge_into", "quantized", "--overwrite_output_dir")
    assert code == 0, err
    record = read_merge(tmp_path / "m")
    trained = record["verification"]["trained_on_4bit"]
    assert trained["mean"] < 1e-5
    # In float32, as the run computed: the held-out rewards are those that the run recorded.
    recorded = json.loads((runs["quantized"] / "run.json").read_text())["metrics"]["held_out"]["accuracy"]
    assert trained["accuracy_as_trained"] == trained["accuracy_merged"] == pytest.approx(recorded)
    assert not hasattr(AutoModelForCausalLM.from_pretrained(tmp_path / "m").config, "quantization_config")


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_weights_are_rounded_once(runs, run_script, tmp_path, dtype):
    for kind, folder in (("auto", "exact"), (dtype, "short")):
        code, _, err = run_script("merge", "--model_name_or_path", runs["dora"], "--output_dir", tmp_path / folder,
                                  "--dtype", kind, "--safe_merge")  # fmt: skip
        assert code == 0, err
    exact, short = (AutoModelForCausalLM.from_pretrained(tmp_path / name).state_dict() for name in ("exact", "short"))
    for name, weight in exact.items():
        assert short[name].dtype == getattr(torch, dtype)
        assert torch.equal(short[name], weight.to(short[name].dtype))
    check = read_merge(tmp_path / "short")["verification"]
    assert 0 < check["difference"]["mean"] <= check["bound"]["mean"]


@pytest.mark.parametrize("dora", [False, True])
def test_where_memory_is_short_the_weights_are_the_same(
    tied_model, pairs_file, run_script, tmp_path, monkeypatch, dora
):
    base = tmp_path / "base"
    AutoModelForCausalLM.from_pretrained(tied_model, dtype=torch.bfloat16).save_pretrained(base)
    AutoTokenizer.from_pretrained(tied_model).save_pretrained(base)
    adapter = make_adapter(base, tmp_path / "adapter", use_dora=dora)
    flags = ("merge", "--model_name_or_path", adapter, "--dataset_name", pairs_file, "--output_dir")
    code, out, err = run_script(*flags, tmp_path / "m")
    assert code == 0, err
    assert "saved as bfloat16 (the format of its files)" in out
    monkeypatch.setattr("utils.merging.weights.free_memory_bytes", lambda _: 1000)
    code, out, err = run_script(*flags, tmp_path / "short")
    assert code == 0, err
    assert "comparing in bfloat16" in out
    one, other = (AutoModelForCausalLM.from_pretrained(tmp_path / name).state_dict() for name in ("m", "short"))
    assert all(torch.equal(one[name], other[name]) for name in one)
    if dora:
        return
    own = adapter_on_base(adapter)
    layer = own.base_model.model.model.layers[0].mlp.up_proj
    exact = layer.base_layer.weight.float() + layer.get_delta_weight("default").float()
    assert torch.equal(one["model.layers.0.mlp.up_proj.weight"], exact.to(torch.bfloat16))


def test_the_folder_is_complete_and_a_reply_ends_where_training_ended_it(tied_model, pairs_file, run_script, tmp_path):
    base, run = shutil.copytree(tied_model, tmp_path / "base"), tmp_path / "run"
    (base / "generation_config.json").write_text('{"eos_token_id": [3, 4]}')
    rows = [json.loads(line) for line in pairs_file.read_text().splitlines()]
    turns = [
        {name: [{"role": "user" if name == "prompt" else "assistant", "content": row[name]}] for name in row}
        for row in rows
    ]
    data = write_lines(tmp_path / "turns.jsonl", turns)
    code, _, err = run_script("--model_name_or_path", base, "--dataset_name", data, "--output_dir", run, *TUNED)
    assert code == 0, err
    code, _, err = run_script("merge", "--model_name_or_path", run, "--output_dir", tmp_path / "m",
                              "--max_shard_size", "20KB", "--max_samples", 2)  # fmt: skip
    assert code == 0, err
    assert read_merge(tmp_path / "m")["verification"]["texts"] == "2 pairs"
    assert len(list((tmp_path / "m").glob("model-*-of-*.safetensors"))) > 1
    tokenizer, model = (kind.from_pretrained(tmp_path / "m") for kind in (AutoTokenizer, AutoModelForCausalLM))
    assert tokenizer.chat_template == AutoTokenizer.from_pretrained(run).chat_template is not None
    assert model.generation_config.eos_token_id == [1, 3, 4]
    with torch.no_grad():
        for end in (1, 3, 4):
            model.lm_head.weight.zero_()
            model.lm_head.weight[end] = 1.0
            ids = {model.generate(IDS, max_new_tokens=5, do_sample=False)[0, IDS.shape[1]].item()}
            states = model.model(IDS).last_hidden_state[0, -1]
            assert ids == {end} or states.sum() <= 0
    assert sorted(read_merge(tmp_path / "m")["files"]) == sorted(
        path.name for path in (tmp_path / "m").iterdir() if path.name != "merge.json"
    )


def make_adapter(base: Path, folder: Path, scale: float = 0.05, **config) -> Path:
    """An adapter that another trainer might have left: no record, no tokenizer."""
    torch.manual_seed(5)
    config = {"target_modules": "all-linear", "task_type": "CAUSAL_LM"} | config
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), LoraConfig(**config))
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = torch.randn(parameter.shape) * scale
    model.save_pretrained(folder)
    return folder


def test_an_adapter_from_elsewhere_is_checked_on_pairs_that_are_named(tied_model, pairs_file, run_script, tmp_path):
    adapter = make_adapter(tied_model, tmp_path / "adapter")
    flags = ("merge", "--model_name_or_path", adapter, "--output_dir", tmp_path / "m")
    code, _, err = run_script(*flags)
    assert code == 2
    assert "--dataset_name is missing" in err
    assert not (tmp_path / "m").exists()
    code, out, err = run_script(*flags, "--skip_verification")
    assert code == 0, err
    assert "warning: --skip_verification: the merged model is not compared" in out
    assert read_merge(tmp_path / "m")["verification"] is None
    code, out, err = run_script(*flags, "--dataset_name", pairs_file, "--overwrite_output_dir")
    assert code == 0, err
    assert read_merge(tmp_path / "m")["verification"]["texts"] == "60 pairs"
    code, _, err = run_script(*flags, "--merge_into", "quantized", "--dataset_name", pairs_file)
    assert code == 2
    assert "no record says that its base was held in 4 bits" in err


@pytest.mark.parametrize("target", ["embed_tokens", "lm_head"])
def test_an_adapter_on_one_of_two_tied_weights_changes_that_one(tied_model, pairs_file, run_script, tmp_path, target):
    adapter = make_adapter(tied_model, tmp_path / "adapter", target_modules=["q_proj", target])
    flags = ("--output_dir", tmp_path / "m", "--dataset_name", pairs_file)
    code, _, err = run_script("merge", "--model_name_or_path", adapter, *flags)
    assert code == 0, err
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "m")
    torch.testing.assert_close(logits_of(merged), logits_of(adapter_on_base(adapter)), rtol=1e-4, atol=1e-5)
    assert not merged.config.tie_word_embeddings


def damage_layer(model: torch.nn.Module) -> None:
    model.model.layers[0].mlp.down_proj.weight.data[0].neg_()


def forget_layer(model: torch.nn.Module) -> None:
    model.model.layers[1].self_attn.q_proj.weight.data.zero_()


@pytest.mark.parametrize("damage", [damage_layer, forget_layer])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_damaged_merge_is_refused_and_nothing_is_left(runs, run_script, tmp_path, monkeypatch, damage, dtype):
    save = merging.save_merged

    def save_damaged(model, *rest):
        damage(model)
        return save(model, *rest)

    monkeypatch.setattr(merging, "save_merged", save_damaged)
    target = tmp_path / "deep" / "m"
    code, _, err = run_script("merge", "--model_name_or_path", runs["lora"], "--output_dir", target, "--dtype", dtype)
    assert code == 2
    assert "error: the merged model is not the adapter on its base: log-probs differ by" in err
    assert list(tmp_path.iterdir()) == []


def test_a_merge_without_the_adapter_is_refused_in_any_format():
    torch.manual_seed(6)
    without = torch.randn(1000)
    adapted = without + 0.01 * torch.randn(1000)
    coarse = without + 0.1 * torch.randn(1000)  # rounding that would hide the difference
    verdict = judge(adapted, without, without, coarse)
    assert verdict.difference.mean < verdict.bound.mean
    assert "smaller than the resolution of the saved weights" in verdict.faults()[0]
    assert judge(adapted, without, adapted, coarse).faults() == []
    assert judge(adapted, without, adapted * torch.nan, coarse).faults()


def test_an_adapter_that_changes_hardly_anything_may_lose_it_to_rounding():
    """Below a hundred-thousandth of a nat two ways of computing the same may differ, whatever share of it that is."""
    without = torch.zeros(1000)
    adapted, merged = without + 8e-6, without + 1e-6
    assert judge(adapted, without, merged, merged).lost > 0.8
    assert judge(adapted, without, merged, merged).faults() == []


def test_weights_are_moved_by_a_step_at_most_and_only_where_they_were_merged():
    model = torch.nn.ModuleDict({name: torch.nn.Linear(40, 40) for name in ("merged", "other")})
    before = {name: value.clone() for name, value in model.state_dict().items()}
    move_weights(model, 0.01, {"merged"})
    for name, value in model.state_dict().items():
        factors = (value / before[name] - 1).abs().round(decimals=4).unique().tolist()
        assert factors == pytest.approx([0.0, 0.01] if name.startswith("merged") else [0.0], abs=1e-6)
    move_weights(model, 0.01, None)
    assert not torch.equal(model["other"].weight, before["other.weight"])


def test_a_tie_of_rewards_is_half_right():
    log_probs = torch.tensor([-1.0, -2.0, -3.0, -1.0, -2.0, -5.0])  # three chosen sides, three rejected ones
    reference = [-1.0, -3.0, -3.0, -1.0, -3.0, -4.0]  # rewards 0, 1, 0 beside 0, 1, -1
    texts = CheckedTexts("pairs", [[1]] * 6, [[2]] * 6, 3, reference)
    assert measure_accuracy(log_probs, texts, reference) == pytest.approx((0.5 + 0.5 + 1) / 3)


def test_weights_beyond_the_format_are_refused(tied_model, pairs_file, run_script, tmp_path):
    adapter = make_adapter(tied_model, tmp_path / "adapter", scale=300.0)
    flags = ("merge", "--model_name_or_path", adapter, "--output_dir", tmp_path / "m", "--dataset_name", pairs_file)
    code, _, err = run_script(*flags, "--dtype", "float16")
    assert code == 2
    assert "--dtype float16: has a maximum of 65504, and model.layers.0" in err
    broken = make_adapter(tied_model, tmp_path / "broken", scale=float("nan"))
    for safe in ([], ["--safe_merge"]):
        code, _, err = run_script(*flags[:2], broken, *flags[3:], *safe)
        assert code == 2
        assert ("NaNs detected" if safe else "weights that are not finite") in err
    assert not (tmp_path / "m").exists()


def test_an_adapter_without_weights_to_add_is_refused(tied_model, pairs_file, run_script, tmp_path):
    config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    get_peft_model(AutoModelForCausalLM.from_pretrained(tied_model), config).save_pretrained(tmp_path / "adapter")
    flags = ("--output_dir", tmp_path / "m", "--dataset_name", pairs_file)
    code, _, err = run_script("merge", "--model_name_or_path", tmp_path / "adapter", *flags)
    assert code == 2
    assert "PROMPT_TUNING has no weights that can be merged into its base" in err
    assert not (tmp_path / "m").exists()


def test_only_an_earlier_merge_is_replaced(runs, run_script, tmp_path):
    flags = ("merge", "--model_name_or_path", runs["lora"], "--max_samples", 2, "--output_dir")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    code, _, err = run_script(*flags, tmp_path / "full", "--overwrite_output_dir")
    assert code == 2
    assert "not empty, and not a merged model of this script" in err
    assert run_script(*flags, tmp_path / "m")[0] == 0
    code, _, err = run_script(*flags, tmp_path / "m")
    assert code == 2
    assert "holds a merged model (of " in err
    (tmp_path / "m" / "notes.txt").write_text("mine")
    code, _, err = run_script(*flags, tmp_path / "m", "--overwrite_output_dir")
    assert code == 2
    assert "notes.txt were not written by a merge" in err
    (tmp_path / "m" / "notes.txt").unlink()
    before = read_merge(tmp_path / "m")
    code, _, err = run_script(*flags, tmp_path / "m", "--overwrite_output_dir", "--dtype", "bfloat16")
    assert code == 0, err
    assert (before["dtype"], read_merge(tmp_path / "m")["dtype"]) == ("float32", "bfloat16")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["full", "m"]


def test_a_failed_merge_leaves_the_earlier_one(runs, run_script, tmp_path, monkeypatch):
    flags = ("merge", "--model_name_or_path", runs["lora"], "--max_samples", 2, "--output_dir", tmp_path / "m")
    assert run_script(*flags)[0] == 0
    before = read_merge(tmp_path / "m")
    monkeypatch.setattr(merging, "judge", lambda *_: judge(*(torch.arange(4.0) * n for n in (1, 2, 3, 3))))
    code, _, err = run_script(*flags, "--overwrite_output_dir")
    assert code == 2, err
    assert read_merge(tmp_path / "m") == before


@pytest.fixture
def moved(runs, tmp_path):
    """A copy of a run, to be changed."""
    return shutil.copytree(runs["lora"], tmp_path / "run")


def edit(path: Path, **changes) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_what_cannot_be_merged_is_refused_in_a_line(moved, tied_model, runs, run_script, tmp_path):
    def refused(model: Path, *flags, output: Path = tmp_path / "m") -> str:
        code, _, err = run_script("merge", "--model_name_or_path", model, "--output_dir", output, *flags)
        assert code == 2
        assert "Traceback" not in err
        assert not (tmp_path / "m").exists()
        return err

    assert "a full model, not an adapter" in refused(tied_model)
    assert "is inside" in refused(moved, output=moved / "merged")
    assert "is inside" in refused(moved, output=moved)
    assert "its run did not hold its base in 4 bits" in refused(moved, "--merge_into", "quantized")
    assert "--validation_split: the run's own data are read as in the run" in refused(moved, "--validation_split", 0.5)
    assert "--max_samples: has no effect with --skip_verification" in refused(
        moved, "--skip_verification", "--max_samples", 3
    )
    assert "--max_shard_size is 'big': must be a size" in refused(moved, "--max_shard_size", "big")
    record = json.loads((moved / "run.json").read_text())
    gone = str(tmp_path / "gone.jsonl")
    edit(moved / "run.json", settings=record["settings"] | {"dataset_name": gone})
    err = refused(moved)
    assert gone in err
    assert "name pairs to check on with --dataset_name" in err
    edit(moved / "run.json", settings=record["settings"], status="interrupted")
    assert "a run that did not finish (interrupted)" in refused(moved)
    edit(moved / "run.json", status="finished", start=record["start"] | {"base": str(tmp_path)}, identity={})
    assert "but its run trained it on" in refused(moved)
    edit(moved / "run.json", start=record["start"])
    edit(moved / "adapter_config.json", base_model_name_or_path=str(tmp_path / "nowhere"))
    assert "which is no longer there" in refused(moved)
    assert run_script("merge", "--model_name_or_path", runs["lora"], "--output_dir", tmp_path / "m")[0] == 0
    code, _, err = run_script("merge", "--model_name_or_path", tmp_path / "m", "--output_dir", tmp_path / "n")
    assert code == 2
    assert "is merged already (of " in err


def test_without_a_login_or_a_network_the_merge_stays(runs, run_script, tmp_path, monkeypatch):
    flags = ("merge", "--model_name_or_path", runs["lora"], "--max_samples", 2, "--push_to_hub", "me/merged")
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    code, _, err = run_script(*flags, "--output_dir", tmp_path / "m")
    assert code == 2
    assert "--push_to_hub me/merged: there is no login here" in err
    assert read_merge(tmp_path / "m")["verification"]
    monkeypatch.setattr("huggingface_hub.get_token", lambda: "hf_nobody")
    monkeypatch.setenv("HF_TOKEN", "hf_nobody")
    code, _, err = run_script(*flags, "--output_dir", tmp_path / "n")
    assert code == 2
    assert "--push_to_hub me/merged: the hub cannot be reached" in err
    assert f"the merged model is in {tmp_path / 'n'}" in err
    assert read_merge(tmp_path / "n")["verification"]


def test_the_folder_is_uploaded(runs, run_script, tmp_path, monkeypatch, hub):
    flags = ("merge", "--model_name_or_path", runs["lora"], "--max_samples", 2, "--push_to_hub", "me/merged")
    code, out, err = run_script(*flags, "--output_dir", tmp_path / "m")
    assert code == 0, err
    assert "uploaded to " in out
    assert created_on(hub)["visibility"] == "private"
    assert files_sent(hub) == {path.name for path in (tmp_path / "m").iterdir()}
    monkeypatch.setenv("HF_TOKEN", "hf_other")
    code, out, err = run_script(*flags, "--output_dir", tmp_path / "n")
    assert code == 2
    assert "--push_to_hub me/merged: the hub refuses it (Invalid username or password.)" in err
    assert read_merge(tmp_path / "n")["verification"]


def test_half_made_folders_are_removed(tmp_path):
    def interrupted() -> None:
        with folder_room.folder_beside(tmp_path / "a" / "b") as beside:
            (beside / "model.safetensors").write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert list(tmp_path.iterdir()) == []


def test_a_difference_is_told_in_nats():
    assert str(Difference.between(torch.tensor([0.0, -1.0]), torch.tensor([0.0, -1.5]))) == (
        "0.25 on average, 0.5 at most"
    )


@pytest.mark.parametrize("call", ["os.fsync", "os.replace", "pathlib.Path.mkdir", "utils.merging.weights.save"])
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EFBIG, errno.ESTALE])
def test_a_disk_that_fails_while_it_merges_is_one_message_and_leaves_nothing(
    runs, run_script, tmp_path, monkeypatch, call, number
):
    def fail(*arguments, **options):
        if call == "utils.merging.weights.save":  # as safetensors says it
            raise RuntimeError(f"Error while serializing: I/O error: ... (os error {number})")
        raise OSError(number, os.strerror(number))

    if call == "utils.merging.weights.save":
        monkeypatch.setattr("transformers.PreTrainedModel.save_pretrained", fail)
    else:
        monkeypatch.setattr(call, fail)
    folder = tmp_path / "new" / "m"
    code, _, err = run_script("merge", "--model_name_or_path", runs["lora"], "--output_dir", folder)
    monkeypatch.undo()
    assert code == 2
    (line,) = err.splitlines()
    assert line.startswith(f"error: --output_dir {folder}: ")
    assert line.endswith("then run again")
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_merge_left_is_removed_and_other_folders_stay(runs, run_script, tmp_path):
    gone = subprocess.run(
        [sys.executable, "-c", "import json; from utils.run.processes import *; print(json.dumps(identify_process()))"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    places = [".m.0123456789abcdef.tmp", f".m.{os.getpid()}.tmp", ".other.0123456789abcdef.tmp", ".m.txt.tmp"]
    for name in places:
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text("of somebody")
    for name in (places[0], places[2]):
        (tmp_path / name / "run.lock").write_text(gone)
    former = tmp_path / ".m.0123456789abcdef.old"
    former.mkdir()
    (former / "merge.json").write_text(json.dumps({"adapter": "an earlier one", "files": ["config.json"]}))
    flags = ("merge", "--model_name_or_path", runs["lora"], "--output_dir", tmp_path / "m", "--skip_verification")
    code, out, err = run_script(*flags, "--overwrite_output_dir")
    assert code == 0, err
    assert f"removed {tmp_path / places[0]}, left behind by a killed merge" in out
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(["m", *places[1:]])
    assert read_merge(tmp_path / "m")["adapter"] == str(runs["lora"])
    assert "run.lock" not in read_merge(tmp_path / "m")["files"]
    assert not (tmp_path / "m" / "run.lock").exists()


KILLED = """
import os, signal, sys
from pathlib import Path
from utils.merging import folder
setattr(folder, sys.argv[2], lambda path: os.kill(os.getpid(), signal.SIGKILL))
with folder.folder_beside(Path(sys.argv[1])) as beside:
    (beside / "model").write_text("of the killed one")
"""


@pytest.mark.skipif(os.name != "posix", reason="SIGKILL")
@pytest.mark.parametrize("moment", ["flush_files", "flush_folder"])
def test_a_merge_killed_as_it_ends_leaves_nothing_that_stays(tmp_path, moment):
    folder = tmp_path / "m"
    killed = subprocess.run([sys.executable, "-c", KILLED, folder, moment], cwd=ROOT, capture_output=True, check=False)
    assert killed.returncode == -9, killed.stderr
    assert len(list(tmp_path.iterdir())) == 1
    with folder_beside(folder) as beside:
        (beside / "model").write_text("of the next one")
    assert [path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*")] == ["m", "m/model"]
    assert (folder / "model").read_text() == "of the next one"


@pytest.mark.parametrize("there", [False, True])
def test_a_merge_that_cannot_be_flushed_leaves_what_was_there(tmp_path, monkeypatch, there):
    def fail(folder):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    folder = tmp_path / "m"
    if there:
        folder.mkdir()
        (folder / "model").write_text("the former one")
    monkeypatch.setattr("utils.merging.folder.flush_folder", fail)
    with (
        pytest.raises(UserError, match="disk error; nothing of the merge was kept"),
        folder_beside(folder) as beside,
    ):
        (beside / "model").write_text("the next one")
    assert [path.read_text() for path in tmp_path.rglob("model")] == ["the former one"] * there
    assert len(list(tmp_path.iterdir())) == there


@pytest.mark.parametrize("content", ["[" * 10**5, '{"files": [["a"]]}', '{"files": [{}]}', '{"files": "a"}', "5"])
def test_a_record_with_odd_content_is_none_of_a_merge(content, tmp_path):
    (tmp_path / "merge.json").write_text(content, encoding="utf-8")
    assert folder_room.read_merge_record(tmp_path) is None
