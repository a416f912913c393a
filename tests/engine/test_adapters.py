"""LoRA layers in fewer passes: the same outputs and gradients as PEFT's own."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from peft import IA3Config, LoKrConfig, LoraConfig, get_peft_model
from safetensors.torch import load_file
from shared.layouts import build
from shared.runs import read_record
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM

from utils.engine.adapters import speed_up_lora


def adapted(architecture: str = "llama", **changes) -> torch.nn.Module:
    """A tiny model with an adapter that is not zero."""
    options = {"r": 4, "lora_alpha": 12, "target_modules": "all-linear"} | changes
    model = get_peft_model(build(architecture), LoraConfig(**options))
    torch.manual_seed(3)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    return model


def outcome(model) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Logits, and the gradients of a sum in which each of them counts differently."""
    ids = torch.arange(3, 33).view(2, 15)
    logits = model(input_ids=ids).logits.float()
    weights = torch.randn(logits.shape, generator=torch.Generator().manual_seed(1))
    (logits * weights).sum().backward()
    return logits.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def assert_same(left, right, bound=3e-5):
    assert torch.allclose(left[0], right[0], rtol=bound, atol=bound * left[0].abs().max().item())
    assert left[1].keys() == right[1].keys()
    for name, value in left[1].items():
        assert (value - right[1][name]).norm() <= bound * value.norm() + 1e-12, name


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"use_rslora": True},
        {"lora_bias": True},
        {"target_modules": ["q_proj", "down_proj"]},
        {"architecture": "qwen2"},  # has biases
        {"architecture": "gpt2"},  # has weights that lie the other way
    ],
    ids=str,
)
def test_outputs_and_gradients_are_those_of_peft(changes):
    model = adapted(**changes)
    fast = copy.deepcopy(model)
    speed_up_lora(fast)
    assert_same(outcome(model), outcome(fast))


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "gpt2"])
@pytest.mark.parametrize("base", [torch.float32, torch.bfloat16], ids=str)
def test_in_16_bits_too(architecture, base):
    model = adapted(architecture)
    for name, parameter in model.named_parameters():
        if "lora" not in name:
            parameter.data = parameter.data.to(base)
    fast = copy.deepcopy(model)
    speed_up_lora(fast)
    with torch.autocast("cpu", torch.bfloat16):
        assert_same(outcome(model), outcome(fast), bound=0.06 if base == torch.float32 else 0.15)


class Products(TorchDispatchMode):
    """Multiplications of the matrix products that are really computed."""

    total = 0

    def __torch_dispatch__(self, operation, types, arguments=(), options=None):
        if operation.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.addmm_):
            left, right = arguments[-2:]
            self.total += left.numel() * right.size(1)
        return operation(*arguments, **(options or {}))


def test_what_ends_a_recomputed_layer_is_not_computed_again():
    model = adapted(target_modules=["down_proj"])
    speed_up_lora(model)
    model.enable_input_require_grads()  # as with checkpointing
    ids, config = torch.arange(3, 33).view(2, 15), model.config

    def products(backward: bool) -> int:
        with Products() as counted, torch.set_grad_enabled(backward):
            hidden = model.get_base_model().model(input_ids=ids, use_cache=False).last_hidden_state
            if backward:
                hidden.sum().backward()
        return counted.total

    forward, once = products(backward=False), products(backward=True)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.train()
    last_products = ids.numel() * config.intermediate_size * config.hidden_size * config.num_hidden_layers
    assert products(backward=True) - once == forward - last_products


def test_adapters_switched_off_merged_exchanged_or_of_another_kind():
    model = adapted()
    model.add_adapter("other", LoraConfig(r=2, lora_alpha=2, target_modules="all-linear"))
    torch.nn.init.ones_(model.base_model.model.model.layers[0].mlp.up_proj.lora_B["other"].weight)
    fast = copy.deepcopy(model)
    speed_up_lora(fast)
    for change in (
        lambda m: m.set_adapter("other"),
        lambda m: m.base_model.set_adapter(["default", "other"]),
        lambda m: m.base_model.disable_adapter_layers(),
        lambda m: m.base_model.enable_adapter_layers(),
    ):
        change(model)
        change(fast)
        with torch.no_grad():
            ids = torch.arange(3, 20).unsqueeze(0)
            assert torch.allclose(model(ids).logits, fast(ids).logits, atol=1e-5)
    fast.set_adapter("default")
    fast.merge_adapter()
    model.set_adapter("default")
    with torch.no_grad():
        assert torch.allclose(model(ids).logits, fast(ids).logits, atol=1e-4)


def test_dropout_is_kept():
    fast = adapted(lora_dropout=0.5)
    speed_up_lora(fast)
    ids = torch.arange(3, 20).unsqueeze(0)
    fast.train()
    with torch.no_grad():
        assert not torch.allclose(fast(ids).logits, fast(ids).logits)


def test_dora_is_left_alone():
    model = adapted(use_dora=True)
    fast = copy.deepcopy(model)
    speed_up_lora(fast)
    assert_same(outcome(model), outcome(fast))


NOT_ALL_LORA = {
    "ia3": (IA3Config(), "ia3_l"),
    "lokr": (LoKrConfig(r=4, target_modules=["q_proj", "down_proj"]), "lokr_w"),
    "embeddings of some tokens": (
        LoraConfig(r=4, target_modules="all-linear", trainable_token_indices=[*range(3, 40)]),
        "_",
    ),
}


@pytest.mark.parametrize("kind", NOT_ALL_LORA)
def test_an_adapter_that_is_not_all_lora_is_continued(kind, run_script, tiny_model, pairs_file, tmp_path):
    """Against a copy of it."""
    config, own = copy.deepcopy(NOT_ALL_LORA[kind])
    config.task_type = "CAUSAL_LM"
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(tiny_model), config)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and own in name:
            torch.nn.init.normal_(parameter, 1.0 if kind == "ia3" else 0.1, 0.3)
    model.save_pretrained(tmp_path / "start")
    flags = ("--model_name_or_path", tiny_model, "--dataset_name", pairs_file, "--validation_split", 0.2)
    more = ("--adapter_name_or_path", tmp_path / "start", "--max_steps", 2, "--dtype", "float32")
    code, _, err = run_script(*flags, *more, "--output_dir", tmp_path / "run")
    assert code == 0, err
    before = read_record(tmp_path / "run")["metrics"]["held_out_before"]
    assert before["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert before["margin"] == pytest.approx(0, abs=1e-6)
    weights = [load_file(tmp_path / folder / "adapter_model.safetensors") for folder in ("start", "run")]
    assert weights[0].keys() == weights[1].keys()
    assert all(not torch.equal(value, weights[1][name]) for name, value in weights[0].items())
