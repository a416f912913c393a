"""What a run made, used later: its files, its base and its reference are compared with what its record says of them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file
from shared.models import save_tiny_model
from shared.runs import ROOT, read_record


def flip(path: Path, place: int = -3) -> None:
    content = bytearray(path.read_bytes())
    content[place] ^= 4
    path.write_bytes(content)


@pytest.fixture(scope="module")
def made(tmp_path_factory, pairs_file):
    """The folder of a base, and of a LoRA run and a full run that began from it."""
    import advanced_dpo_script

    folder = tmp_path_factory.mktemp("made")
    save_tiny_model(folder / "base", seed=4)
    names = ("--model_name_or_path", folder / "base", "--dataset_name", pairs_file, "--max_steps", 2)
    for name, flags in (("lora", ("--use_lora",)), ("full", ())):
        assert advanced_dpo_script.main(list(map(str, (*names, *flags, "--output_dir", folder / name)))) == 0
    return folder


@pytest.fixture
def place(made, tmp_path):
    """A copy that may be damaged, whose base is where the copy's adapter looks for it."""
    folder = Path(shutil.copytree(made, tmp_path / "copy"))
    path = folder / "lora" / "adapter_config.json"
    path.write_text(path.read_text(encoding="utf-8").replace(str(made), str(folder)), encoding="utf-8")
    for name in ("lora", "full"):
        path = folder / name / "run.json"
        path.write_text(path.read_text(encoding="utf-8").replace(str(made), str(folder)), encoding="utf-8")
    return folder


def uses(run: Path, tmp_path: Path) -> dict[str, tuple]:
    """A call of each verb that reads the model of a run."""
    name = ("--model_name_or_path", run)
    return {
        "merge": ("merge", *name, "--output_dir", tmp_path / "merged"),
        "chat": ("chat", *name, "--prompt", "On day one", "--max_new_tokens", 2),
        "evaluate": ("evaluate", *name, "--output_dir", tmp_path / "evaluated"),
        "compare": ("compare", *name, "--output_dir", tmp_path / "compared", "--num_prompts", 1),
    }


@pytest.mark.parametrize("verb", ["merge", "chat", "evaluate", "compare"])
@pytest.mark.parametrize("file", ["adapter_model.safetensors", "tokenizer.json", "missing"])
def test_a_finished_adapter_that_was_damaged_is_used_by_no_verb(run_script, place, tmp_path, verb, file):
    run = place / "lora"
    if file == "missing":
        (run / "tokenizer.json").unlink()
        shutil.copy(place / "base" / "tokenizer.json", run / "tokenizer.model")  # so that it is a tokenizer's folder
        file = "tokenizer.json"
    else:
        flip(run / file)
    code, _, err = run_script(*uses(run, tmp_path)[verb])
    assert code == 2
    assert f"error: --model_name_or_path {run}: not the model that its run saved: {file} " in err
    assert not (tmp_path / "merged").exists()


@pytest.mark.parametrize("verb", ["chat", "evaluate", "compare"])
def test_a_finished_model_that_was_damaged_is_used_by_no_verb(run_script, place, tmp_path, verb):
    flip(place / "full" / "model.safetensors")
    code, _, err = run_script(*uses(place / "full", tmp_path)[verb])
    assert code == 2
    assert "model.safetensors has changed since it was saved (its SHA-256 differs)" in err


@pytest.mark.parametrize("verb", ["merge", "chat", "evaluate", "compare"])
def test_a_base_that_was_changed_in_place_is_not_taken_for_the_one_of_the_run(run_script, place, tmp_path, verb):
    path = place / "base" / "model.safetensors"
    weights = load_file(path)
    weights["model.norm.weight"][3] += 0.5
    save_file(weights, path, {"format": "pt"})
    code, _, err = run_script(*uses(place / "lora", tmp_path)[verb])
    assert code == 2
    assert f"{place / 'base'}, has different weights than when the run began; restore the original ones" in err
    assert not (tmp_path / "merged").exists()


@pytest.mark.parametrize("verb", ["evaluate", "compare"])
def test_a_reference_that_was_replaced_is_not_measured_against(run_script, place, tmp_path, verb):
    shutil.rmtree(place / "base")
    save_tiny_model(place / "base", seed=5)
    code, _, err = run_script(*uses(place / "full", tmp_path)[verb])
    assert code == 2
    assert f"{place / 'base'}, has different weights than when the run began; restore the original ones" in err
    # Of another model it is not said to be the reference of the run, and may be named.
    flag = {"evaluate": "--ref_model_name_or_path", "compare": "--baseline"}[verb]
    judge = ("--judge", f"{ROOT / 'examples' / 'demo' / 'judge.py'}:sentiment") if verb == "compare" else ()
    code, _, err = run_script(*uses(place / "full", tmp_path)[verb], flag, place / "base", *judge)
    assert code == 0, err


@pytest.mark.parametrize("flag", ["--model_name_or_path", "--adapter_name_or_path"])
def test_training_does_not_go_on_from_a_damaged_adapter(run_script, place, pairs_file, flag):
    flip(place / "lora" / "adapter_model.safetensors")
    base = ("--model_name_or_path", place / "base") if flag.startswith("--adapter") else ()
    code, _, err = run_script(flag, place / "lora", *base, "--dataset_name", pairs_file, "--dry_run")
    assert code == 2
    assert f"{flag} {place / 'lora'}: not the model that its run saved" in err


def test_what_may_be_meant_is_said_and_used(run_script, place, tmp_path):
    run = place / "lora"
    for path, key in ((run / "generation_config.json", "top_k"), (place / "base" / "config.json", "rope_scale")):
        content = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        path.write_text(json.dumps(content | {key: 3}), encoding="utf-8")
    code, out, err = run_script(*uses(run, tmp_path)["chat"])
    assert code == 0, err
    assert "its config.json has changed since the run began" in out + err


@pytest.mark.parametrize("file", ["chat_template.jinja", "added_tokens.json"])
def test_a_file_that_was_put_beside_a_finished_model_is_said(run_script, place, tmp_path, file):
    (place / "lora" / file).write_text("{}", encoding="utf-8")
    for verb, call in uses(place / "lora", tmp_path).items():
        code, out, err = run_script(*call)
        assert code == 0, (verb, err)
        assert f"note: lora: {file} was not saved by its run, but is loaded" in out + err


def test_a_run_that_is_moved_with_its_base_is_what_it_was(run_script, place, tmp_path):
    for verb, call in uses(place / "lora", tmp_path).items():
        code, _, err = run_script(*call)
        assert code == 0, (verb, err)


@pytest.mark.parametrize("verb", ["merge", "chat", "evaluate", "compare"])
def test_a_copy_of_the_base_elsewhere_serves_as_well(run_script, place, tmp_path, verb):
    shutil.copytree(place / "base", place / "copy")
    path = place / "lora" / "adapter_config.json"
    path.write_text(path.read_text(encoding="utf-8").replace(str(place / "base"), str(place / "copy")), "utf-8")
    code, _, err = run_script(*uses(place / "lora", tmp_path)[verb])
    assert code == 0, err
    flip(place / "copy" / "model.safetensors")
    code, _, err = run_script(*uses(place / "lora", tmp_path / "again")[verb])
    assert code == 2
    assert f"{place / 'copy'}, has different weights than when the run began" in err


def test_the_record_holds_the_files_of_the_finished_model_and_what_it_began_from(made):
    for name, weights in (("lora", "adapter_model.safetensors"), ("full", "model.safetensors")):
        record = read_record(made / name)
        assert weights in record["files"]
        assert not {"run.json", "metrics.jsonl", "report.html"} & set(record["files"])
        for file, (size, _) in record["files"].items():
            assert (made / name / file).stat().st_size == size
        assert set(record["identity"]["model"]) == {"config", "weights"}
