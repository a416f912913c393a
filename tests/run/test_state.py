"""States on disk: every value comes back as it was, training goes on bit for bit, and nothing is a pickle."""

from __future__ import annotations

import math
import pickle
import random
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

from utils.run.state import load_state, read_random_state, save_state, set_random_state


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def same(left, right) -> bool:
    """Equal in value and in type, all the way down."""
    if type(left) is not type(right):
        return False
    if isinstance(left, dict):
        return list(left) == list(right) and all(same(left[key], right[key]) for key in left)
    if isinstance(left, list | tuple):
        return len(left) == len(right) and all(map(same, left, right))
    if isinstance(left, torch.Tensor):
        return left.dtype == right.dtype and left.shape == right.shape and torch.equal(left, right)
    if isinstance(left, np.ndarray):
        return left.dtype == right.dtype and left.shape == right.shape and np.array_equal(left, right)
    return left == right or (left != left and right != right)


def round_trip(folder: Path, state):
    save_state(folder, "state", state)
    assert names(folder) == {"state.json", "state.safetensors"}
    return load_state(folder, "state")


@pytest.mark.parametrize(
    "state",
    [
        {},
        [],
        (),
        None,
        3,
        "text\n é",
        {"a": {"b": [1, (2, [3.5, None]), True]}, 0: "zero", "0": "text zero", (1, 2): "pair", 2.5: "half"},
        {"tensor": 1, "array": [2], "items": {"list": (), "tuple": []}},
        [1e300, 0.1, -0.0, math.inf, -math.inf, math.nan, 2**80],
        {True: 1, None: 2},
    ],
    ids=repr,
)
def test_nested_state_comes_back(state, tmp_path):
    assert same(round_trip(tmp_path / "new", state), state)


@pytest.mark.parametrize(
    "dtype",
    [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.uint8, torch.bool],
)
def test_tensors_come_back(dtype, tmp_path):
    matrix = torch.arange(6).reshape(2, 3).to(dtype)
    state = {"m": matrix, "scalar": matrix[1, 2], "empty": matrix[:0], "view": matrix.T, "again": [matrix, matrix]}
    assert same(round_trip(tmp_path, state), state)


def test_trained_parameters_come_back_as_values(tmp_path):
    parameter = torch.nn.Parameter(torch.tensor([1.5, -2.0]))
    assert same(round_trip(tmp_path, parameter), torch.tensor([1.5, -2.0]))


@pytest.mark.parametrize(
    "array",
    [
        np.array([0.25, -1e-9, np.pi]),
        np.array([0.1], dtype=np.float32),
        np.array([2**32 - 1, 0], dtype=np.uint32),
        np.array([2**64 - 1, 1], dtype=np.uint64),
        np.array([[-5, 3]], dtype=np.int16),
        np.array([True, False]),
        np.array(7),
        np.zeros((0, 2)),
        np.arange(6).reshape(2, 3).T,
    ],
    ids=lambda array: f"{array.dtype}{array.shape}",
)
def test_arrays_come_back(array, tmp_path):
    assert same(round_trip(tmp_path, {"array": array}), {"array": array})


def test_numbers_of_numpy_come_back_as_numbers(tmp_path):
    assert same(round_trip(tmp_path, [np.float32(0.5), np.int64(3), np.bool_(True)]), [0.5, 3, True])


def test_what_cannot_be_kept_is_refused(tmp_path):
    for value in ({1, 2}, object(), lambda: None):
        with pytest.raises(TypeError, match="cannot be saved in a checkpoint"):
            save_state(tmp_path, "state", {"deep": [value]})
    assert names(tmp_path) == set()


def test_state_whose_tensors_fail_to_be_written_leaves_the_old_one(tmp_path, monkeypatch):
    save_state(tmp_path, "state", {"m": torch.ones(2)})

    def fail(tensors, path):
        Path(path).write_text("half")
        raise OSError("the disk is full")

    monkeypatch.setattr("safetensors.torch.save_file", fail)
    with pytest.raises(OSError, match="disk is full"):
        save_state(tmp_path, "state", {"m": torch.zeros(3)})
    assert same(load_state(tmp_path, "state"), {"m": torch.ones(2)})
    assert names(tmp_path) == {"state.json", "state.safetensors"}


def train_steps(model, optimizer, scheduler, steps: int) -> None:
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.randn(4, 3)).square().mean().backward()
        optimizer.step()
        scheduler.step()


def make_training(seed: int):
    torch.manual_seed(seed)
    model = torch.nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(
        [{"params": [model.weight], "weight_decay": 0.1}, {"params": [model.bias], "lr": 0.02}], lr=0.01
    )
    return model, optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))


def test_training_goes_on_as_if_it_had_not_stopped(tmp_path):
    model, optimizer, scheduler = make_training(1)
    train_steps(model, optimizer, scheduler, 3)
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    states = {"optimizer": optimizer.state_dict(), "scheduler": scheduler.state_dict()}
    save_state(tmp_path, "optimizer", states)
    save_state(tmp_path, "random", read_random_state())
    restored = load_state(tmp_path, "optimizer")
    assert same(restored, states)
    train_steps(model, optimizer, scheduler, 3)

    other, other_optimizer, other_scheduler = make_training(2)
    other.load_state_dict(weights)
    other_optimizer.load_state_dict(restored["optimizer"])
    other_scheduler.load_state_dict(restored["scheduler"])
    set_random_state(load_state(tmp_path, "random"))
    train_steps(other, other_optimizer, other_scheduler, 3)
    assert torch.equal(other.weight, model.weight)
    assert torch.equal(other.bias, model.bias)
    assert other_scheduler.get_last_lr() == scheduler.get_last_lr()


def draw_numbers() -> list:
    # The odd count of normal numbers leaves one in the generators' pockets.
    return [
        random.random(),
        random.gauss(0, 1),
        np.random.rand(),
        np.random.randn(3).tolist(),
        torch.rand(2).tolist(),
        torch.randn(3).tolist(),
        torch.randperm(20).tolist(),
        torch.nn.functional.dropout(torch.ones(20)).tolist(),
    ]


def test_random_states_come_back(tmp_path):
    random.seed(3)
    np.random.seed(4)
    torch.manual_seed(5)
    draw_numbers()
    save_state(tmp_path, "random", read_random_state())
    expected = [draw_numbers() for _ in range(3)]
    assert expected[0] != expected[1]
    set_random_state(load_state(tmp_path, "random"))
    assert [draw_numbers() for _ in range(3)] == expected


def test_no_file_is_a_pickle(tmp_path):
    model, optimizer, scheduler = make_training(1)
    train_steps(model, optimizer, scheduler, 1)
    save_state(tmp_path, "optimizer", {"optimizer": optimizer.state_dict(), "scheduler": scheduler.state_dict()})
    save_state(tmp_path, "random", read_random_state())
    assert {path.suffix for path in tmp_path.iterdir()} == {".json", ".safetensors"}
    for path in tmp_path.iterdir():
        assert not zipfile.is_zipfile(path)  # torch.save's form
        with pytest.raises((pickle.UnpicklingError, ValueError, EOFError, IndexError, KeyError, AttributeError)):
            pickle.loads(path.read_bytes())
