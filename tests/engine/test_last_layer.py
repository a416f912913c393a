"""What the last layer leaves out of packed rows, and when it must not."""

from __future__ import annotations

import contextlib
import functools
from typing import Any

import pytest
import torch
from shared.layouts import ARCHITECTURES, build, one_by_one, packed, padded, random_pairs
from shared.runs import read_record

from utils.engine import last_layer
from utils.engine.last_layer import leave_out_prompts
from utils.engine.scoring import score_tokens
from utils.engine.shared_prefix import PairLayout, shared_prefix_active

WHOLE_MLP = {"qwen3_moe", "mixtral", "deepseek_v3", "gpt_oss", "opt"}  # of experts, or without a module of its own


def rows_computed(model, batch) -> dict[str, int]:
    """For how many tokens parts of the last layer with a weight computed something, where that is fewer than all."""
    layer = [m for m in model.modules() if isinstance(m, last_layer.GradientCheckpointingLayer)][-1]
    seen = {}

    def note(name: str, module: torch.nn.Module, inputs: Any, output: Any) -> None:
        output = output[0] if isinstance(output, tuple) else output  # of a router
        seen[name] = int(output.reshape(-1, output.size(-1)).any(dim=1).sum())  # the others are zero, or were not given

    with contextlib.ExitStack() as stack:
        for name, module in layer.named_modules():
            if hasattr(module, "weight"):
                handle = module.register_forward_hook(functools.partial(note, name))
                stack.callback(handle.remove)
        with shared_prefix_active(model) if "layout" in batch else contextlib.nullcontext():
            score_tokens(model, batch)
    whole = batch["input_ids"].numel()
    return {name: rows for name, rows in seen.items() if rows != whole}


@pytest.mark.parametrize("name", ARCHITECTURES)
@torch.no_grad()
def test_the_last_layer_computes_what_is_read(name, monkeypatch):
    monkeypatch.setattr("utils.engine.shared_prefix.READ_MULTIPLE", 1)
    model, pairs = build(name), random_pairs()
    expected, batch = one_by_one(model, pairs), packed(pairs)
    assert not {part for part in rows_computed(model, batch) if "norm" not in part and "mlp" not in part}
    left_out = leave_out_prompts(model)
    read = len(set(batch["layout"].predictors().tolist()))
    computed = rows_computed(model, batch)
    if name not in WHOLE_MLP:
        assert {rows for part, rows in computed.items() if "mlp" in part} == {read}
    outputs = [part for part in computed if part.split(".")[-1] in last_layer.OUTPUTS and "mlp" not in part]
    assert len(outputs) == 1
    assert computed[outputs[0]] == read
    with shared_prefix_active(model):
        scores = score_tokens(model, batch)
    for one, row, mask in zip(expected, scores.log_probs, scores.mask, strict=True):
        assert torch.allclose(one, row[mask.bool()], atol=5e-6)
    # What is not a packed row is computed as ever, also right after one.
    for one, other in zip(expected, one_by_one(model, pairs), strict=True):
        assert torch.equal(one, other)
    plain = score_tokens(model, padded(pairs)).log_probs
    left_out.undo()
    assert torch.equal(score_tokens(model, padded(pairs)).log_probs, plain)
    assert not any("forward" in module.__dict__ for module in model.modules())


@pytest.mark.parametrize(("prompt", "leaves_out"), [(40, True), (10, False)])
@torch.no_grad()
def test_where_nearly_all_is_read_nothing_is_left_out_but_for_a_trial(prompt, leaves_out):
    model = build("llama")
    pair = {"prompt_ids": [5] * prompt, "chosen_ids": [6] * 30, "rejected_ids": [7] * 35}
    left_out = leave_out_prompts(model)
    assert rows_computed(model, packed([pair]))
    left_out.where_it_pays = True
    assert bool(rows_computed(model, packed([pair]))) is leaves_out


def test_rows_are_filled_up_with_tokens_that_nobody_reads():
    layout = PairLayout(((40, 5, 3), (30, 2, 30)))
    rows = layout.read_rows()
    assert len(rows) == 64
    assert rows.tolist() == sorted(set(rows.tolist()))
    assert set(layout.predictors().tolist()) <= set(rows.tolist())
    few = PairLayout(((1, 8, 9),), filling=14)
    assert set(few.read_rows().tolist()) == set(range(32))


@pytest.mark.parametrize("fault", ["none", "values", "gradient"])
def test_a_last_layer_that_may_not_leave_anything_out_stays_whole(
    fault, monkeypatch, run_script, tiny_model, pairs_file, tmp_path
):
    right = last_layer._InPart.__call__
    wrong = {
        "none": lambda made: made,
        "values": lambda made: made + 0.1,
        "gradient": lambda made: made.detach() + 0.9 * (made - made.detach()),
    }

    def compute(self, hidden: torch.Tensor) -> torch.Tensor:
        made = right(self, hidden)
        return made if self.left_out.rows_read(hidden) is None else wrong[fault](made)

    monkeypatch.setattr(last_layer._InPart, "__call__", compute)
    flags = ("--model_name_or_path", tiny_model, "--dataset_name", pairs_file, "--max_steps", 1)
    code, _, err = run_script(*flags, "--output_dir", tmp_path / "run")
    assert code == 0, err
    engine = read_record(tmp_path / "run")["engine"]
    assert engine["shared_prefix"] is True
    assert engine["last_layer_in_part"] is (fault == "none")
