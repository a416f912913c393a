"""Models that are more than plain stacks of layers: mixtures of experts, image-text models, 4-bit files."""

from __future__ import annotations

import json

import pytest
import torch
import transformers
from conftest import read_record, save_tiny_tokenizer

SIZES = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 128, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2,
}  # fmt: skip
ADAPTED = ["--use_lora", "--max_steps", "1", "--dtype", "float32"]


def save(folder, make):
    """Saves the model that `make` builds for a vocabulary of so many tokens, with that tokenizer."""
    size = save_tiny_tokenizer(folder)
    torch.manual_seed(0)
    make(size).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def mixture(tmp_path_factory):
    """A Qwen3-MoE whose weights are nearly all in experts."""

    def make(size):
        experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "head_dim": 8}
        return transformers.Qwen3MoeForCausalLM(transformers.Qwen3MoeConfig(vocab_size=size, **experts, **SIZES))

    return save(tmp_path_factory.mktemp("models") / "mixture", make)


@pytest.fixture(scope="module")
def mixtral(tmp_path_factory):
    def make(size):
        experts = {"num_local_experts": 4, "num_experts_per_tok": 2}
        return transformers.MixtralForCausalLM(transformers.MixtralConfig(vocab_size=size, **experts, **SIZES))

    return save(tmp_path_factory.mktemp("models") / "mixtral", make)


def names(model, data, folder):
    return ["--model_name_or_path", model, "--dataset_name", data, "--output_dir", folder]


def parameters_in(folder) -> int:
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    return sum(parameter.numel() for parameter in model.parameters())


def test_packed_weights_count_as_the_parameters_that_they_stand_for(run_script, tiny_model, pairs_file, tmp_path):
    code, out, err = run_script(*names(tiny_model, pairs_file, tmp_path / "run"), *ADAPTED, "--use_4bit")
    assert code == 0, err
    model = read_record(tmp_path / "run")["model"]
    assert model["parameters"] == parameters_in(tiny_model) + model["trainable_parameters"]
    assert f"{model['trainable_parameters']:,} of {model['parameters']:,} parameters trained" in out


def test_experts_that_stay_in_16_bits_are_not_called_4_bits(run_script, mixture, pairs_file, tmp_path, recwarn):
    code, out, err = run_script(*names(mixture, pairs_file, tmp_path / "run"), *ADAPTED, "--use_4bit")
    assert code == 0, err
    record = read_record(tmp_path / "run")
    attention = 2 * (2 * 32 * 32 + 2 * 32 * 16)  # of each layer q and o, k and v
    assert record["model"]["parameters_in_4bit"] == attention
    share = attention / parameters_in(mixture)
    assert record["model"]["share_in_4bit"] == pytest.approx(share)
    assert f"({share:.0%} of its weights are in 4 bits)" in out
    assert any("mlp.experts.gate_up_proj" in warning for warning in record["warnings"])
    assert not [text for text in recwarn if "pattern keys" in str(text.message)]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("adapted", [True, False], ids=["lora", "full"])
@pytest.mark.parametrize("kind", ["mixture", "mixtral"])
def test_a_mixture_of_experts_is_planned(run_script, request, kind, adapted, dtype):
    model = request.getfixturevalue(kind)
    code, out, err = run_script(
        "plan", "--model_name_or_path", model, *(["--use_lora"] if adapted else []), "--max_length", 32,
        "--dtype", dtype, "--json_file", "-",
    )  # fmt: skip
    assert (code, err) == (0, "")
    asked = json.loads(out[out.index("{") :])["choices"][0]
    assert asked["parameters"] == parameters_in(model)
