"""Models to look at: the record that a run leaves says where its policy and its reference are."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from shared.runs import read_record

from utils.errors import UserError
from utils.models.side_by_side import Wanted, load_side_by_side
from utils.models.sources import ModelSource
from utils.models.trained import find_trained
from utils.runtime import Precision
from utils.settings.training import ModelSettings

FLOAT32 = Precision(torch.float32, torch.device("cpu"), "")
FLAG = "--model_name_or_path"


@pytest.fixture(scope="module")
def runs(tiny_model, other_model, pairs_file, tmp_path_factory) -> dict[str, Path]:
    """A run of each kind, some steps long."""
    import advanced_dpo_script

    root = tmp_path_factory.mktemp("runs")

    def run(name: str, *flags, verb: str = "train", model: Path = tiny_model) -> Path:
        common = ["--model_name_or_path", model, "--dataset_name", pairs_file, "--output_dir", root / name,
                  "--max_steps", 3, "--save_steps", 2, "--learning_rate", 5e-3, "--dtype", "float32"]  # fmt: skip
        assert advanced_dpo_script.main([str(text) for text in (verb, *common, *flags)]) == 0
        return root / name

    made = {
        "sft": run("sft", "--use_lora", verb="sft"),
        "full": run("full"),
        "lora on 4 bits": run("quantized", "--use_lora", "--use_4bit"),
        "separate": run("separate", "--use_lora", "--ref_model_name_or_path", other_model),
    }
    return made | {"continued": run("continued", model=made["sft"])}


def test_a_record_names_policy_start_and_reference(runs, tiny_model, other_model):
    base = ModelSource(str(tiny_model), None, None, str(tiny_model))
    full, quantized, separate, continued, sft = (
        find_trained(FLAG, str(runs[name])) for name in ("full", "lora on 4 bits", "separate", "continued", "sft")
    )
    assert (full.source.base, full.start, full.reference) == (str(runs["full"]), base, base)
    assert (quantized.source.base, quantized.source.adapter) == (str(tiny_model), str(runs["lora on 4 bits"]))
    assert (quantized.reference, quantized.in_4bit, quantized.reference_in_4bit) == (base, True, True)
    assert (separate.reference.base, separate.reference_in_4bit) == (str(other_model), False)
    assert continued.reference.adapter == str(runs["sft"])
    assert (sft.reference, sft.in_4bit) == (base, False)
    assert full.setting("learning_rate") == 5e-3
    assert read_record(runs["full"])["precision"] == "float32"


def test_a_checkpoint_has_the_record_of_its_run(runs):
    trained = find_trained(FLAG, str(runs["full"] / "checkpoint-2"))
    assert trained.source.base == str(runs["full"] / "checkpoint-2")
    assert trained.folder == runs["full"]
    assert trained.reference == find_trained(FLAG, str(runs["full"])).reference


def test_any_other_model_has_no_record(tiny_model):
    trained = find_trained(FLAG, str(tiny_model))
    assert (trained.folder, trained.reference, trained.in_4bit) == (None, None, False)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"status": "interrupted"}, "did not finish (interrupted); name its newest checkpoint, "),
        ({"settings": None}, "run.json is not a valid record of a run"),
        ({"start": {"base": "/tmp", "adapter": None}, "identity": {}}, "but its run trained it on /tmp"),
        ({"settings": {"use_lora": False}}, "the files of two runs are mixed"),
    ],
)
def test_a_run_that_cannot_be_looked_at_is_refused(runs, tmp_path, change, said):
    copy = shutil.copytree(runs["lora on 4 bits"], tmp_path / "copy")
    (copy / "run.json").write_text(json.dumps(read_record(copy) | change))
    with pytest.raises(UserError) as refused:
        find_trained(FLAG, str(copy))
    assert said in str(refused.value)


def test_a_run_whose_base_was_moved_is_found_by_its_adapter_config(runs, tiny_model, tmp_path):
    copy, base = shutil.copytree(runs["lora on 4 bits"], tmp_path / "copy"), tmp_path / "base"
    gone = read_record(copy)
    for place in ("start", "reference_model"):
        gone[place] |= {"base": str(tmp_path / "gone"), "tokenizer": str(tmp_path / "gone")}
    (copy / "run.json").write_text(json.dumps(gone))
    config = json.loads((copy / "adapter_config.json").read_text())
    (copy / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": str(tmp_path / "gone")}))
    with pytest.raises(UserError, match="which is no longer there"):
        find_trained(FLAG, str(copy))
    shutil.copytree(tiny_model, base)
    (copy / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": str(base)}))
    trained = find_trained(FLAG, str(copy))
    assert trained.reference == ModelSource(str(base), None, None, str(base))


@pytest.mark.parametrize("name", ["continued", "lora on 4 bits", "full"])
def test_models_on_one_base_share_it_and_compute_as_alone(runs, name):
    trained = find_trained(FLAG, str(runs[name]))
    wanted = {
        "policy": Wanted(FLAG, trained.source, trained.in_4bit),
        "reference": Wanted(FLAG, trained.reference, trained.reference_in_4bit),
    }
    if trained.source.adapter is not None:
        wanted["base"] = Wanted(FLAG, replace(trained.source, adapter=None), trained.in_4bit)
    together = load_side_by_side(wanted, ModelSettings(), FLOAT32)
    held = {id(contender.model) for contender in together.values()}
    assert len(held) == (2 if name == "full" else 1)
    ids, seen = torch.tensor([[0, 5, 9, 30, 7]]), []
    for which, wish in wanted.items():
        alone = load_side_by_side({which: wish}, ModelSettings(), FLOAT32)[which]
        with torch.no_grad(), together[which].active() as shared, alone.active() as own:
            seen.append(shared(input_ids=ids).logits)
            torch.testing.assert_close(seen[-1], own(input_ids=ids).logits, rtol=0, atol=0)
    assert all(not torch.equal(seen[0], other) for other in seen[1:])
