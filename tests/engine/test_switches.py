"""What every step switches in a model: as the libraries' own contexts do, without a walk through all modules."""

from __future__ import annotations

import collections

import pytest
import torch
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from shared.layouts import build
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer
from trl.trainer.utils import use_adapter

from utils.engine.switches import Switches, trained_already

IDS = torch.arange(3, 33).view(2, 15)


def with_two_adapters(**changes) -> torch.nn.Module:
    """A tiny model with an adapter that is trained and a frozen one, neither of them zero."""
    options = {"r": 4, "target_modules": "all-linear", "init_lora_weights": False} | changes
    model = get_peft_model(build("llama"), LoraConfig(**options))
    model.add_adapter("ref", LoraConfig(**(options | {"r": 2})))
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("default" in name)
        if "modules_to_save" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    return model.eval()


def trained(model: torch.nn.Module) -> list[str]:
    return [name for name, parameter in model.named_parameters() if parameter.requires_grad]


@pytest.mark.parametrize("name", [None, "ref"])
@pytest.mark.parametrize(
    "changes", [{}, {"modules_to_save": ["lm_head"]}, {"trainable_token_indices": [3, 4]}], ids=str
)
@torch.no_grad()
def test_a_model_computes_with_another_adapter_or_none(name, changes):
    model = with_two_adapters(**changes)
    own, before = model(IDS).logits, trained(model)
    with use_adapter(model, name):
        expected = model(IDS).logits
    assert not torch.allclose(own, expected, atol=1e-3)
    for parameter_name, parameter in model.named_parameters():
        parameter.requires_grad_(parameter_name in before)
    switches = Switches(model)
    for _ in range(2):
        with switches.adapter(name):
            assert torch.equal(model(IDS).logits, expected)
            assert trained(model) == before
        assert torch.equal(model(IDS).logits, own)
        assert trained(model) == before


@torch.no_grad()
def test_a_soft_prompt_is_switched_off():
    model = get_peft_model(build("llama"), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)).eval()
    with Switches(model).adapter(None):
        assert model(IDS).logits.shape[1] == IDS.shape[1]
    assert model(IDS).logits.shape[1] == IDS.shape[1] + 4


def test_adapters_are_back_after_an_error():
    model = with_two_adapters()
    own = model(IDS).logits
    for name in (None, "ref"):
        with pytest.raises(KeyError), Switches(model).adapter(name):
            raise KeyError
        assert torch.equal(model(IDS).logits, own)


def test_recomputation_comes_back_as_it_was():
    model = build("llama")
    model.gradient_checkpointing_enable({"use_reentrant": False})
    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    switches = Switches(model)
    switches.keep_last_layer()
    expected = [True] * (len(layers) - 1) + [False]
    assert [layer.gradient_checkpointing for layer in layers] == expected
    with switches.nothing_recomputed():
        assert not any(module.gradient_checkpointing for module in layers)
        assert not model.is_gradient_checkpointing
    assert [layer.gradient_checkpointing for layer in layers] == expected


def test_training_mode_is_set_where_it_is_not():
    model = torch.nn.Sequential(torch.nn.Dropout(), torch.nn.Linear(2, 2))
    with trained_already(model, model[1]):
        model[0].eval()  # nobody looks into a model that is in training mode
        assert model.train() is model
        assert not model[0].training
        model.train(False)
        assert not model[1].training
        model.train()
        assert model[0].training
        assert model[1].training
    model.eval()
    with trained_already(model):
        model.train()
        assert model[0].training
    assert "train" not in vars(model)


@pytest.mark.parametrize("flags", [(), ("--use_lora", "--gradient_checkpointing"), ("--eval_steps", 1)], ids=str)
def test_a_step_does_not_walk_through_the_modules_again_and_again(
    flags, run_script, tiny_model, pairs_file, tmp_path, monkeypatch
):
    """Each walk costs a large model milliseconds in which its device waits: some few remain in the libraries."""
    from utils.training.trainer import PreferenceTrainer

    counts, modes = collections.Counter(), []
    walk, set_mode, count = torch.nn.Module.named_modules, torch.nn.Module.train, PreTrainedModel.num_parameters
    step, others = PreferenceTrainer.training_step, []

    def counted(self, memo=None, *arguments, **options):
        counts["walks"] += memo is None and any(True for _ in self.children())
        yield from walk(self, memo, *arguments, **options)

    def train(self, *arguments):
        counts["modes"] += 1
        return set_mode(self, *arguments)

    def num_parameters(self, *arguments, **options):
        counts["parameters"] += 1
        return count(self, *arguments, **options)

    def taken(self, model, *arguments):
        others.append((counts["modes"], counts["parameters"]))
        before = counts["walks"]
        loss = step(self, model, *arguments)
        modes.append(all(module.training for _, module in walk(model)))
        counts["in_step"] = counts["walks"] - before
        return loss

    monkeypatch.setattr(torch.nn.Module, "named_modules", counted)
    monkeypatch.setattr(torch.nn.Module, "train", train)
    monkeypatch.setattr(PreTrainedModel, "num_parameters", num_parameters)
    monkeypatch.setattr(PreferenceTrainer, "training_step", taken)
    common = ("--model_name_or_path", tiny_model, "--dataset_name", pairs_file, "--validation_split", 0.2)
    code, _, err = run_script(*common, *flags, "--max_steps", 3, "--output_dir", tmp_path / "run")
    assert code == 0, err
    assert len(modes) == 3
    assert all(modes)
    if "--eval_steps" not in flags:  # after an evaluation all modules are set
        assert others[1] == others[2], "nor set their mode, or count their weights (utils/training/machine.py)"
    assert counts["in_step"] <= 1, "look for modules once, not in every step (utils/engine/switches.py)"
