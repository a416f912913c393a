"""Going on with a run: what would make it another is refused by name; what is allowed takes effect and is recorded."""

from __future__ import annotations

import json
import shutil
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from shared.models import save_tiny_model
from shared.pairs import make_pairs, write_lines
from shared.runs import read_metrics, read_record

from utils.models.identity import BLOCK, BLOCKS, identify_model
from utils.models.sources import find_model
from utils.run.state import load_state, read_kept
from utils.settings.changes import FREE_TO_CHANGE, GROUPS
from utils.settings.data import DataSettings
from utils.settings.training import LoraSettings, LossSettings, ModelSettings, TrainingSettings
from utils.training.carrying_on import apply_settings
from utils.training.differences import describe_free_changes, differing_versions, find_changes

NOW = {
    "settings": {"seed": 1, "learning_rate": 5e-6, "output_dir": "a", "max_length": 100, "dataset_name": "d",
                 "lora_target_modules": ["q", "v"], "beta": 0.1},
    "data": "abc", "rows": [55, 5], "ids": ["1", "2"], "tokenizer": "t",
    "model": {"config": "c", "weights": "w"}, "reference": None, "precision": "float32", "device": "cpu",
    "batch": [4, 2, 1], "versions": {"torch": "2.13.0+cpu", "trl": "1.16.0"},
}  # fmt: skip


def changed(**changes) -> dict[str, str]:
    """What is found of a run that was like NOW and differs so now."""
    settings = changes.pop("settings", {})
    return find_changes(NOW, {**NOW, **changes, "settings": NOW["settings"] | settings})


def test_the_same_run_has_no_changes():
    assert changed() == {}


@pytest.mark.parametrize("name", sorted(FREE_TO_CHANGE))
def test_a_setting_that_does_not_change_the_numbers_may_differ(name):
    assert changed(settings={name: "now"}) == {}


def test_of_what_is_computed_nothing_may_differ_freely():
    groups = (ModelSettings, LoraSettings, LossSettings, DataSettings, TrainingSettings)
    settings = {field.name for group in groups for field in fields(group)}
    how_often = {"logging_steps", "eval_steps", "save_steps", "save_total_limit"}
    in_which_batches = {"per_device_eval_batch_size", "max_tokens_per_batch", "auto_batch_size"}
    assert settings & FREE_TO_CHANGE == how_often | in_which_batches | {"skip_bad_batches", "on_bad_rows"}


def test_every_other_setting_is_named_with_both_values():
    assert changed(settings={"seed": 2, "beta": 0.2}) == {
        "seed": "--seed was 1, is 2",
        "beta": "--beta was 0.1, is 0.2",
    }
    assert changed(settings={"loss_weights": [1.0, 2.0]}) == {
        "loss_weights": "--loss_weights was not given, is 1.0 2.0"
    }
    assert "beta" in changed(settings={"beta": None})
    assert "label_smoothing" in changed(settings={"label_smoothing": 0.1})
    assert changed(settings={"a_flag_of_a_later_version": None}) == {}
    assert changed(settings={"discopop_tau": 0.05}) == {}, "a flag that the run did not have, at its default"
    assert changed(settings={"a_field_of_the_trainer": False}) == {}, "which has its default elsewhere"
    assert changed(settings={"warmup_steps": 0}) == {"warmup_steps": "--warmup_steps was not given, is 0"}
    assert changed(settings={"loss_type": ["sigmoid"]}) == {}
    assert changed(settings={"discopop_tau": 0.1}) == {"discopop_tau": "--discopop_tau was not given, is 0.1"}


@pytest.mark.parametrize(
    ("changes", "names"),
    [
        ({"data": "x", "ids": ["3", "4"]}, {"data"}),
        ({"data": "x", "ids": ["3", "4"], "tokenizer": "u"}, {"data", "tokenizer"}),
        ({"ids": ["3", "2"], "tokenizer": "u"}, {"tokenizer"}),
        ({"tokenizer": "u"}, set()),  # the ids of all rows are the same
        ({"settings": {"max_length": 50}, "ids": ["3", "4"]}, {"max_length"}),
        ({"settings": {"max_length": 50}, "ids": ["3", "4"], "data": "x"}, {"max_length", "data"}),
        ({"settings": {"seed": 2}, "ids": ["3", "4"], "data": "x"}, {"seed"}),
        ({"model": {"config": "c", "weights": "v"}}, {"model"}),
        ({"model": {"config": "d", "weights": "v"}}, {"architecture"}),
        ({"reference": {"config": "c", "weights": "w"}}, {"reference"}),
        ({"precision": "bfloat16"}, {"precision"}),
        ({"batch": [4, 2, 2]}, {"world"}),
        ({"batch": [4, 1, 2]}, set()),
        ({"settings": {"dataset_name": "moved"}}, set()),
    ],
)
def test_what_makes_it_another_run(changes, names):
    assert set(changed(**changes)) == names


def test_other_ways_to_divide_a_step_and_moved_files_are_said():
    (line,) = describe_free_changes(NOW, NOW | {"batch": [4, 1, 2]})
    assert line.startswith("the 8 rows of an optimizer step are divided differently (4 x 1 x 2 processes, before 4")
    (line,) = describe_free_changes(NOW, NOW | {"settings": NOW["settings"] | {"dataset_name": "e"}})
    assert line == "--dataset_name was d, is e: its content is the same"
    (line,) = describe_free_changes(NOW, NOW | {"device": "cuda"})
    assert "begun on cpu, resumed on cuda" in line
    assert list(describe_free_changes(NOW, NOW)) == []


def test_other_libraries_are_said_and_no_reason_to_stop():
    assert list(differing_versions(NOW, NOW | {"versions": {"torch": "2.13.1", "trl": "1.16.0"}})) == []
    (line,) = differing_versions(NOW, NOW | {"versions": {"torch": "2.14.0", "trl": "1.16.0"}})
    assert line.startswith("other versions (torch 2.13.0+cpu before, 2.14.0 now)")
    assert changed(versions={"torch": "9"}) == {}


# Models


def test_a_model_is_known_wherever_it_lies(tiny_model, other_model, tmp_path):
    shutil.copytree(tiny_model, tmp_path / "copy")
    first = identify_model(find_model("", str(tiny_model)))
    assert identify_model(find_model("", str(tmp_path / "copy"))) == first
    other = identify_model(find_model("", str(other_model)))
    assert (other["config"], other["weights"] == first["weights"]) == (first["config"], False)
    narrow = identify_model(find_model("", str(save_tiny_model(tmp_path / "n", seed=1, hidden_size=16))))
    assert narrow["config"] != first["config"]


def test_large_weights_are_told_apart_by_their_header_and_by_blocks(tiny_model, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(tiny_model, folder)
    weights = load_file(folder / "model.safetensors")
    large = torch.zeros(3 * BLOCK * BLOCKS // 4)

    def identify(name="zz", change=None):  # written last
        value = large.clone()
        if change is not None:
            value[change] = 1
        save_file({**weights, name: value}, folder / "model.safetensors", {"format": "pt"})
        return identify_model(find_model("", str(folder)))["weights"]

    first = identify()
    assert identify() == first
    assert identify(name="other") != first
    assert identify(change=slice(None)) != first
    assert identify(change=-1) != first, "the last block is read"


def test_weights_in_parts_and_adapters_are_read_too(tiny_model, tmp_path):
    from transformers import AutoModelForCausalLM

    for name, scale in (("a", 1), ("b", 2)):
        model = AutoModelForCausalLM.from_pretrained(tiny_model)
        model.model.layers[1].mlp.down_proj.weight.data *= scale
        model.save_pretrained(tmp_path / name, max_shard_size="40KB")
        shutil.copy(tiny_model / "tokenizer.json", tmp_path / name)
    assert len(list((tmp_path / "a").glob("model-*"))) > 1
    a, b = (identify_model(find_model("", str(tmp_path / name))) for name in ("a", "b"))
    assert a["config"] == b["config"]
    assert a["weights"] != b["weights"]


# With real runs


@pytest.fixture(scope="module")
def first_parts(tmp_path_factory) -> Path:
    """Where whole runs are kept, to begin the tests from: for each kind one."""
    return tmp_path_factory.mktemp("parts")


@pytest.fixture
def place(first_parts):
    """An empty folder, the same for all tests of this file, since runs know where they are."""
    folder = first_parts / "place"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    return folder


@pytest.fixture
def begun(run_script, tiny_model, first_parts, place):
    """A run that was killed after step 4 of 8; a function that goes on with it, with other flags."""
    usual = {"model_name_or_path": tiny_model, "dataset_name": place / "pairs.jsonl", "max_steps": 8,
             "per_device_train_batch_size": 4, "learning_rate": 5e-3, "save_steps": 4, "logging_steps": 2,
             "validation_split": 0.1, "output_dir": place / "run", "dtype": "float32"}  # fmt: skip
    write_lines(place / "pairs.jsonl", make_pairs(60))

    def run(resume="auto", verb="train", **flags):
        values = usual | flags | ({"resume_from_checkpoint": resume} if resume else {})
        words = [part for name, value in values.items() for part in (f"--{name}", *(() if value is True else (value,)))]
        code, out, err = run_script(verb, *words)
        return code, out, err, place / "run"

    def start(verb="train", **flags):
        usual.update(flags)
        folder, kept = place / "run", first_parts / f"{verb} {flags}"
        if not kept.exists():
            code, _, err, _ = run(resume=None, verb=verb)
            assert code == 0, err
            folder.rename(kept)
        shutil.copytree(kept, folder)
        shutil.copytree(kept, place / "whole")
        shutil.rmtree(folder / "checkpoint-8")
        for path in folder.glob("*.safetensors"):
            path.unlink()
        (folder / "run.json").write_text(json.dumps(read_record(folder) | {"status": "running"}))
        return run

    return start


def names_refused(err: str) -> set[str]:
    lines = [line for line in err.splitlines() if line.strip()]
    assert all("--resume_from_checkpoint: checkpoint-4 is of a run that differs" in line for line in lines)
    return {line.partition("--allow_changes ")[2].partition(" ")[0] for line in lines}


def same_weights(one: Path, other: Path) -> bool:
    a, b = (load_file(folder / "model.safetensors") for folder in (one, other))
    return all(torch.equal(a[name], b[name]) for name in a)


def test_moved_files_are_the_same_run(begun, tiny_model, place):
    go_on = begun()
    shutil.copytree(tiny_model, place / "moved")
    (place / "pairs.jsonl").rename(place / "renamed.jsonl")
    code, out, err, folder = go_on(model_name_or_path=place / "moved", dataset_name=place / "renamed.jsonl")
    assert code == 0, err
    assert f"note: --dataset_name was {place / 'pairs.jsonl'}, is {place / 'renamed.jsonl'}" in out
    assert same_weights(folder, place / "whole")
    assert read_record(folder)["warnings"] == []


def test_other_content_is_refused_by_name_and_all_at_once(begun, tiny_model, other_model, place):
    go_on = begun()
    before = sorted((place / "run").rglob("*"))
    rows = make_pairs(60)
    rows[30]["chosen"] += "!"
    write_lines(place / "other.jsonl", rows)
    code, _, err, folder = go_on(
        dataset_name=place / "other.jsonl", model_name_or_path=other_model, ref_model_name_or_path=tiny_model,
        beta=0.3, dtype="bfloat16", per_device_train_batch_size=8,
    )  # fmt: skip
    assert code == 2
    assert names_refused(err) == {"data", "model", "beta", "reference", "precision", "dtype", "world"}
    assert "32 rows" not in err
    assert "4 rows per optimizer step before (4 x 1 x 1 process), 8 now" in err
    assert sorted(folder.rglob("*")) == before
    code, _, err, _ = go_on(model_name_or_path=save_tiny_model(place / "n", seed=1, hidden_size=16))
    assert code == 2
    assert "start a new run in another folder" in err


def test_another_tokenizer_is_seen_by_the_ids_it_gives(begun, tiny_model, place):
    go_on = begun()
    folder = place / "retokenized"
    shutil.copytree(tiny_model, folder)
    content = json.loads((folder / "tokenizer.json").read_text())
    content["model"]["merges"] = content["model"]["merges"][:-40]
    (folder / "tokenizer.json").write_text(json.dumps(content))
    code, _, err, _ = go_on(model_name_or_path=folder)
    assert code == 2
    assert names_refused(err) == {"tokenizer"}
    code, out, err, _ = go_on(model_name_or_path=folder, allow_changes="tokenizer")
    assert code == 0, err
    assert "by --allow_changes: the tokenizer gives different ids for the same texts" in out


def test_what_is_allowed_passes_is_said_and_stays_recorded(begun, place):
    go_on = begun()
    rows = make_pairs(60)
    rows[30]["chosen"] += "!"
    write_lines(place / "pairs.jsonl", rows)
    code, _, err, _ = go_on(beta=0.3, allow_changes="data,precision")
    assert code == 2
    assert names_refused(err) == {"beta"}
    code, out, err, folder = go_on(beta=0.3, allow_changes="data,beta,precision")
    assert code == 0, err
    warnings = read_record(folder)["warnings"]
    assert [warning.partition(": ")[2].partition(" (")[0] for warning in warnings] == [
        "--beta was 0.1, is 0.3", "the dataset has changed"]  # fmt: skip
    assert all(f"warning: {warning}" in out for warning in warnings)
    assert "warning: --allow_changes precision: nothing of it has changed" in out
    assert read_kept(folder / "checkpoint-8")["changes"] == warnings
    # A later part knows of it, and its checkpoints need no leave again.
    code, out, err, folder = go_on(beta=0.3)
    assert code == 0, err
    assert read_record(folder)["warnings"] == warnings
    # An earlier checkpoint is of the run as it was then, whatever run.json says by now.
    code, _, err, _ = go_on(beta=0.3, resume=folder / "checkpoint-4")
    assert code == 2
    assert names_refused(err) == {"beta", "data"}
    code, _, err, _ = go_on(beta=0.3, max_steps=9, allow_changes="max_steps")
    assert code == 0, err
    changes = read_kept(folder / "checkpoint-9")["changes"]
    assert changes == [*warnings, "from checkpoint-8 on, by --allow_changes: --max_steps was 8, is 9"]
    assert not same_weights(folder, folder / "checkpoint-8"), "at the rate of the longer schedule, not at its end's"


@pytest.mark.parametrize("verb", ["train", pytest.param("sft", marks=pytest.mark.slow)])
def test_an_allowed_learning_rate_takes_effect(verb, begun, place):
    go_on = begun(verb=verb, lr_scheduler_type="cosine", weight_decay=0.01)
    code, _, err, folder = go_on(verb=verb, learning_rate=1e-3, weight_decay=0.1, adam_beta2=0.9,
                                 allow_changes="settings")  # fmt: skip
    assert code == 0, err
    old, new = (
        {line["step"]: line["learning_rate"] for line in read_metrics(path) if "loss" in line}
        for path in (place / "whole", folder)
    )
    assert new[4] == old[4]
    assert [new[step] for step in (6, 8)] == pytest.approx([old[step] / 5 for step in (6, 8)])
    group = load_state(folder / "checkpoint-8", "optimizer")["optimizer"]["param_groups"][0]
    assert (group["weight_decay"], group["betas"][1]) == (0.1, 0.9)


def test_changed_settings_take_the_place_of_those_of_the_checkpoint():
    def optimizer_and_schedule(steps: int):
        groups = [{"params": [torch.nn.Parameter(torch.ones(1))], "weight_decay": decay} for decay in (0.01, 0.0)]
        optimizer = torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.999), eps=1e-8)
        return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)

    class Arguments:
        adam_beta1, adam_beta2, adam_epsilon, weight_decay, learning_rate = 0.8, 0.99, 1e-6, 0.1, 3e-3

    saved, schedule = optimizer_and_schedule(steps=4)
    for _ in range(3):
        saved.step()
        schedule.step()
    names = frozenset({"adam_beta2", "adam_epsilon", "weight_decay", "learning_rate", "max_steps"})
    for changed, found in (
        (names, (3e-3 * (1 - 3 / 30), (0.8, 0.99), 1e-6, 0.1)),
        (frozenset({"max_steps"}), (1e-3 * (1 - 3 / 30), (0.9, 0.999), 1e-8, 0.01)),
        (frozenset({"adam_beta1"}), (1e-3 * (1 - 3 / 30), (0.8, 0.99), 1e-8, 0.01)),
    ):
        optimizer, longer = optimizer_and_schedule(steps=30)
        optimizer.load_state_dict(saved.state_dict())
        longer.load_state_dict(schedule.state_dict())
        apply_settings(changed, Arguments, optimizer, longer)
        decayed, others = optimizer.param_groups
        rate, *rest = found
        assert decayed["lr"] == pytest.approx(rate)
        assert [decayed[name] for name in ("betas", "eps", "weight_decay")] == rest
        assert (others["lr"], others["weight_decay"]) == (decayed["lr"], 0.0)
        assert longer.get_last_lr() == [decayed["lr"]] * 2


def test_more_steps_may_be_allowed(begun):
    go_on = begun()
    code, _, err, folder = go_on(max_steps=12, allow_changes="max_steps")
    assert code == 0, err
    record = read_record(folder)
    assert (record["status"], record["step"]) == ("finished", 12)
    assert [line["learning_rate"] > 0 for line in read_metrics(folder) if line.get("step") == 10] == [True]


def test_the_rows_of_a_step_may_be_divided_otherwise(begun, place):
    go_on = begun()
    code, out, err, folder = go_on(per_device_train_batch_size=2, gradient_accumulation_steps=2)
    assert code == 0, err
    assert "note: the 4 rows of an optimizer step are divided differently (2 x 2 x 1 process, before 4" in out
    for line, other in zip(read_metrics(folder), read_metrics(place / "whole"), strict=True):
        assert line.get("loss") == pytest.approx(other.get("loss"), abs=1e-4)


def test_a_checkpoint_that_holds_nothing_of_this_is_compared_with_the_record(begun):
    go_on = begun()
    code, _, err, folder = go_on(allow_changes="data")
    assert code == 0, err
    shutil.rmtree(folder / "checkpoint-8")
    state = json.loads((folder / "checkpoint-4" / "trainer_state.json").read_text())
    state["stateful_callbacks"].pop("dpo_run")
    (folder / "checkpoint-4" / "trainer_state.json").write_text(json.dumps(state))
    (folder / "checkpoint-4" / "manifest.json").unlink(missing_ok=True)  # such a checkpoint has none
    code, _, err, _ = go_on(beta=0.3)
    assert code == 2
    assert names_refused(err) == {"beta"}
    code, _, err, _ = go_on()
    assert code == 0, err


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--allow_changes", "data"], "--allow_changes: has no effect without --resume_from_checkpoint"),
        (["--allow_changes", "dota", "--resume_from_checkpoint", "auto"], "is 'dota': did you mean data?"),
        *(
            (["--allow_changes", name, "--resume_from_checkpoint", "auto"], f"{name}: a checkpoint cannot be loaded")
            for name in ("use_lora", "lora_r", "lora_target_modules", "use_dora", "optim")
        ),
    ],
)
def test_names_that_cannot_be_allowed(flags, said, run_script, tmp_path):
    code, _, err = run_script(
        "--model_name_or_path", "m", "--dataset_name", "d", "--output_dir", tmp_path / "o", *flags
    )
    assert code == 2
    assert said in err


def test_no_checkpoint_yet_leaves_nothing_to_allow(run_script, tiny_model, pairs_file, tmp_path):
    flags = ["--model_name_or_path", tiny_model, "--dataset_name", pairs_file, "--max_steps", 1]
    flags += ["--output_dir", tmp_path / "o", "--resume_from_checkpoint", "auto"]
    code, out, err = run_script(*flags, "--allow_changes", "model", "logging_steps")
    assert code == 0, err
    assert "warning: --allow_changes model: nothing of it has changed\n" in out
    assert "warning: --allow_changes logging_steps: may change without it\n" in out
    assert read_record(tmp_path / "o")["warnings"] == []


def test_every_group_is_explained():
    assert set(GROUPS) == {"data", "tokenizer", "model", "reference", "precision", "world"}
