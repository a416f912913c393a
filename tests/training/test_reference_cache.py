"""Scored once: the reference's log-probs are found again by what can change them, and by nothing else."""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from shared.pairs import make_pairs, write_lines
from shared.runs import read_record

from utils.training import reference_cache
from utils.training.batches import REFERENCE_COLUMNS
from utils.training.reference_cache import cache_folder, hash_rows, load_columns, save_columns

FOUND = "found on the disk"


@pytest.fixture
def train(run_script, tiny_model, pairs_file, tmp_path, monkeypatch):
    """Trains for a step with an empty cache; returns what was printed."""
    monkeypatch.setattr(reference_cache.datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")

    def run(*flags, model=tiny_model, data=pairs_file) -> str:
        output = tmp_path / "run"
        code, out, err = run_script(
            "--model_name_or_path", model, "--dataset_name", data, "--output_dir", output,
            "--overwrite_output_dir", *(() if "--max_steps" in flags else ("--max_steps", 1)), *flags,
        )  # fmt: skip
        assert code == 0, err
        return out

    return run


AHEAD = "--precompute_ref_log_probs"


def test_a_sweep_scores_the_reference_once(train):
    assert FOUND not in train(AHEAD)
    assert FOUND in train(AHEAD, "--beta", 0.5, "--loss_type", "ipo", "--learning_rate", 1e-3, "--logging_steps", 1)
    # As the base of an adapter the same weights are the same reference.
    assert FOUND in train(AHEAD, "--use_lora")


def test_what_can_change_the_numbers_is_scored_anew(train, tiny_model, tmp_path):
    train(AHEAD)
    changed = tmp_path / "changed"
    shutil.copytree(tiny_model, changed)
    weights = load_file(changed / "model.safetensors")
    weights["model.layers.0.mlp.up_proj.weight"][0, 0] += 1e-3
    save_file(weights, changed / "model.safetensors", metadata={"format": "pt"})
    assert FOUND not in train(AHEAD, model=changed)
    shutil.copyfile(tiny_model / "model.safetensors", changed / "model.safetensors")
    assert FOUND in train(AHEAD, model=changed)
    config = (changed / "config.json").read_text()
    (changed / "config.json").write_text(config.replace('"rms_norm_eps": 1e-06', '"rms_norm_eps": 1e-05'))
    assert FOUND not in train(AHEAD, model=changed)
    rows = make_pairs(60)
    rows[7]["rejected"] += " not"
    assert FOUND not in train(AHEAD, data=write_lines(tmp_path / "other.jsonl", rows))
    for flags in (
        ["--ld_alpha", 0.5], ["--max_length", 16], ["--dtype", "bfloat16"], ["--engine", "padded"],
        ["--attn_implementation", "eager"], ["--use_4bit"], ["--use_4bit", "--bnb_4bit_quant_type", "fp4"],
    ):  # fmt: skip
        assert FOUND not in train(AHEAD, *flags), flags
    # Under --use_4bit the weights that are trained score themselves.
    save_file(weights, changed / "model.safetensors", metadata={"format": "pt"})
    (changed / "config.json").write_text(config)
    assert FOUND in train(AHEAD, "--use_4bit")
    assert FOUND not in train(AHEAD, "--use_4bit", model=changed)


def rewrite(path: Path, change) -> None:
    """The entry with its columns changed, by a library that knows nothing of ours but keeps what the file says."""
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    save_file({name: value.contiguous() for name, value in change(load_file(path)).items()}, path, metadata)


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-9] ^= 1
    path.write_bytes(content)


def put_folder(path: Path) -> None:
    path.unlink()
    (path / "inner").mkdir(parents=True)


def put_other_entry(path: Path) -> None:
    """One of the two entries, of training and held-out pairs, in the place of both."""
    shutil.copyfile(min(path.parent.iterdir()), path.with_suffix(".new"))
    os.replace(path.with_suffix(".new"), path)


DAMAGES = {
    "no safetensors": lambda path: path.write_bytes(b"not a tensor"),
    "empty": lambda path: path.write_bytes(b""),
    "cut": lambda path: os.truncate(path, path.stat().st_size - 8),
    "flipped": flip,
    "a folder": put_folder,
    "columns exchanged": lambda path: rewrite(path, lambda c: dict(zip(c, reversed(list(c.values())), strict=True))),
    "float32": lambda path: rewrite(path, lambda c: {name: value.float() for name, value in c.items()}),
    "int32": lambda path: rewrite(path, lambda c: {name: value.int() for name, value in c.items()}),
    "fewer rows": lambda path: rewrite(path, lambda c: {name: value[1:] for name, value in c.items()}),
    "a column less": lambda path: rewrite(path, lambda c: dict(list(c.items())[1:])),
    "other names": lambda path: rewrite(path, lambda c: {f"{name}_": value for name, value in c.items()}),
    "another shape": lambda path: rewrite(path, lambda c: {name: value[:, None] for name, value in c.items()}),
    "no hash": lambda path: save_file(load_file(path), path),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_an_entry_that_is_not_what_was_saved_is_scored_anew(damage, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(reference_cache.datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    columns = {name: np.random.default_rng(i).normal(size=7) for i, name in enumerate(REFERENCE_COLUMNS)}
    save_columns("key", columns)
    (path,) = cache_folder().iterdir()
    assert load_columns("other", REFERENCE_COLUMNS, 7) is None
    assert capsys.readouterr().out == ""
    DAMAGES[damage](path)
    assert load_columns("key", REFERENCE_COLUMNS, 7) is None
    assert len(capsys.readouterr().out.splitlines()) == 1
    save_columns("key", columns)
    found = load_columns("key", REFERENCE_COLUMNS, 7)
    assert all((found[name] == columns[name]).all() for name in REFERENCE_COLUMNS)
    assert capsys.readouterr().out == ""


def test_damaged_entries_do_not_change_what_is_trained(train, tmp_path):
    """Each of a few bits of every entry: the run says so, and trains the same weights."""

    def trained(*flags):
        said = train(AHEAD, "--learning_rate", 1e-3, *flags)
        return said, load_file(tmp_path / "run" / "model.safetensors")

    _, sound = trained()
    for damage in (flip, put_other_entry):
        for path in cache_folder().iterdir():
            damage(path)
        said, weights = trained()
        assert "they are scored again" in said
        assert all(torch.equal(weights[name], value) for name, value in sound.items())
    assert FOUND in trained()[0]


@pytest.mark.parametrize("call", ["mkdir", "open", "fsync", "replace"])
@pytest.mark.parametrize("code", ["ENOSPC", "EIO", "EROFS", "EACCES", "EDQUOT"])
def test_scores_that_cannot_be_saved_are_used_all_the_same(call, code, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(reference_cache.datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")

    def fail(*_, **__):
        raise OSError(getattr(errno, code), os.strerror(getattr(errno, code)))

    if call == "open":
        monkeypatch.setattr(Path, "write_bytes", fail)
    else:
        monkeypatch.setattr(os, call, fail)
    save_columns("key", {name: np.zeros(3) for name in REFERENCE_COLUMNS})
    said = capsys.readouterr().out
    assert os.strerror(getattr(errno, code)) in said
    assert len(said.splitlines()) == 1


def test_a_reference_is_scored_ahead_where_that_pays(train, tmp_path):
    """One pass ahead costs no more than one in every step: it saves a model, or under LoRA the later passes'."""
    for steps, lora, ahead in ((7, [], True), (2, [], False), (7, ["--use_lora"], False), (14, ["--use_lora"], True)):
        flags = ["--max_steps", steps, *lora]
        assert ("scoring all pairs" in train(*flags)) == ahead
        assert ("scored once before training" in read_record(tmp_path / "run")["reference"]) == ahead
    assert "scoring all pairs" not in train("--max_steps", 7, AHEAD, "false")


def test_the_key_tells_rows_apart():
    rows = {"prompt_ids": [[1, 2], [3]], "chosen_ids": [[4], [5, 6]]}
    names = list(rows)
    key = hash_rows(Dataset.from_dict(rows), names)
    assert hash_rows(Dataset.from_dict(rows | {"row": [0, 1]}), names) == key
    moved = {"prompt_ids": [[1], [2, 3]], "chosen_ids": rows["chosen_ids"]}
    assert hash_rows(Dataset.from_dict(moved), names) != key
    assert hash_rows(Dataset.from_dict(rows).select([1, 0]), names) != key
    assert hash_rows(Dataset.from_dict(rows).select([1, 0]).select([1, 0]), names) == key


def test_nothing_is_left_half_written(train):
    train(AHEAD)
    assert {path.suffix for path in Path(cache_folder()).iterdir()} == {".safetensors"}
    for path in cache_folder().iterdir():
        columns = load_file(path)
        assert all(torch.isfinite(values).all() for values in columns.values())
