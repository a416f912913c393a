"""Models that are more than plain stacks of layers: mixtures of experts, image-text models, 4-bit files."""

from __future__ import annotations

import itertools
import json
import math
import re
import shutil

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from shared.models import save_tiny_tokenizer
from shared.pairs import write_lines
from shared.runs import read_metrics, read_record

from utils.models.counting import Counts

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


DAILY = [("mixture", "lora", "float32"), ("mixtral", "full", "float32")]


@pytest.mark.parametrize(
    ("kind", "way", "dtype"),
    [
        pytest.param(*case, marks=[] if case in DAILY else pytest.mark.slow)
        for case in itertools.product(("mixture", "mixtral"), ("lora", "full"), ("float32", "bfloat16"))
    ],
)
def test_a_mixture_of_experts_is_planned(run_script, request, kind, way, dtype):
    model = request.getfixturevalue(kind)
    code, out, err = run_script(
        "plan", "--model_name_or_path", model, *(["--use_lora"] if way == "lora" else []), "--max_length", 32,
        "--dtype", dtype, "--json_file", "-",
    )  # fmt: skip
    assert (code, err) == (0, "")
    asked = json.loads(out[out.index("{") :])["choices"][0]
    assert asked["parameters"] == parameters_in(model)


@pytest.fixture(scope="module")
def in_4bit(tiny_model, tmp_path_factory):
    """A model whose files hold its weights in 4 bits."""
    folder = tmp_path_factory.mktemp("models") / "in_4bit"
    config = transformers.BitsAndBytesConfig(load_in_4bit=True)
    transformers.AutoModelForCausalLM.from_pretrained(tiny_model, quantization_config=config).save_pretrained(folder)
    save_tiny_tokenizer(folder)
    return folder


def test_a_base_that_is_stored_in_4_bits_is_trained_merged_and_evaluated(run_script, in_4bit, pairs_file, tmp_path):
    run, merged = tmp_path / "run", tmp_path / "merged"
    code, out, err = run_script(*names(in_4bit, pairs_file, run), *ADAPTED)
    assert code == 0, err
    assert "4-bit base" in out
    code, out, err = run_script("merge", "--model_name_or_path", run, "--output_dir", merged)
    assert code == 0, err
    assert "in 4 bits (bitsandbytes), dequantized" in out
    model = transformers.AutoModelForCausalLM.from_pretrained(merged)
    assert "quantization_config" not in json.loads((merged / "config.json").read_text())
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    code, out, err = run_script("evaluate", *names(run, pairs_file, tmp_path / "figures"))
    assert code == 0, err


def test_weights_in_4_bits_are_not_trained_as_a_whole(run_script, in_4bit, pairs_file, tmp_path):
    code, _, err = run_script(*names(in_4bit, pairs_file, tmp_path / "run"), "--max_steps", "1")
    assert code == 2
    assert "its files hold the weights in 4 bits (bitsandbytes), which cannot be trained" in err
    asked = ["plan", "--model_name_or_path", in_4bit, "--max_length", "32", "--json_file", "-"]
    code, _, err = run_script(*asked)
    assert code == 2
    assert "which cannot be trained" in err
    code, out, err = run_script(*asked, "--use_lora")
    assert code == 0, err
    assert {choice["name"].partition(",")[0] for choice in json.loads(out)["choices"]} == {"LoRA on 4 bits"}


def with_config(model, folder, **changes):
    """A copy of a model whose config.json says something else."""
    shutil.copytree(model, folder)
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return folder


def test_methods_that_cannot_be_written_out_are_named(run_script, tiny_model, pairs_file, tmp_path):
    quantized = {"quant_method": "gptq", "bits": 4}
    model = with_config(tiny_model, tmp_path / "gptq", quantization_config=quantized)
    code, _, err = run_script(*names(model, pairs_file, tmp_path / "run"), "--use_lora", "--use_4bit")
    assert code == 2
    assert "hold the weights in 4 bits (gptq) already; leave it out" in err


@pytest.mark.parametrize("verb", [["train"], ["plan"]], ids=["train", "plan"])
@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"pad_token_id": 10**9}, "pad_token_id is 1000000000: must be a token of the vocabulary"),
        ({"num_hidden_layers": -1}, "num_hidden_layers is -1: must be at least 1"),
        ({"torch_dtype": "evil"}, 'torch_dtype is "evil": must be a type of PyTorch'),
        ({"use_cache": "maybe"}, "its config"),
        ({"hidden_size": 0}, "hidden_size is 0: must be at least 1"),
        ({"num_attention_heads": 0}, "num_attention_heads is 0: must be at least 1"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_config_that_makes_no_model_is_one_message(run_script, tiny_model, pairs_file, tmp_path, verb, changes, said):
    model = with_config(tiny_model, tmp_path / "model", **changes)
    folder = ["--output_dir", tmp_path / "run"] if verb == ["train"] else []
    code, _, err = run_script(*verb, "--model_name_or_path", model, "--dataset_name", pairs_file, *folder)
    assert code == 2, err
    assert said in err
    assert "its tokenizer" not in err
    assert "Traceback" not in err


@pytest.mark.parametrize("changes", [{"vocab_size": 10}, {"num_key_value_heads": 1}], ids=["rows", "heads"])
def test_weights_of_another_shape_than_the_config_says_are_named(run_script, tiny_model, pairs_file, tmp_path, changes):
    model = with_config(tiny_model, tmp_path / "model", **changes)
    code, _, err = run_script(*names(model, pairs_file, tmp_path / "run"))
    assert code == 2
    assert re.search(r"weight is \[\d+, 32\] in its files and \[\d+, 32\] by its config.json \(and \d more", err)


@pytest.mark.parametrize("adapted", [[], ["--use_lora"]], ids=["full", "lora"])
def test_layers_that_a_config_leaves_out_are_named(run_script, tiny_model, pairs_file, tmp_path, adapted):
    model = with_config(tiny_model, tmp_path / "model", num_hidden_layers=1)
    code, out, err = run_script(*names(model, pairs_file, tmp_path / "run"), "--max_steps", "1", *adapted)
    assert code == 0, err
    (warning,) = read_record(tmp_path / "run")["warnings"]
    assert f"9 weights in the files of {model} have no place in the model of its config.json" in warning
    assert warning in out


def test_a_model_that_reads_no_plain_texts_is_named_by_its_kind(run_script, pairs_file, tmp_path):
    def make(size):
        vision = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
        text = transformers.LlamaConfig(vocab_size=size, **SIZES)
        tower = transformers.CLIPVisionConfig(image_size=28, patch_size=14, **vision)
        return transformers.LlavaForConditionalGeneration(
            transformers.LlavaConfig(vision_config=tower, text_config=text)
        )

    model = save(tmp_path / "llava", make)
    for verb, rest in (("train", ["--dataset_name", pairs_file, "--output_dir", tmp_path / "run"]), ("plan", [])):
        code, _, err = run_script(verb, "--model_name_or_path", model, *rest)
        assert code == 2
        assert "Llava is not a causal language model that transformers can load for text" in err


@pytest.mark.parametrize("changes", [{"output_attentions": True}, {"return_dict": False}], ids=["attentions", "tuple"])
def test_what_a_config_says_of_answers_changes_nothing(run_script, tiny_model, pairs_file, tmp_path, changes):
    losses = []
    for name, model in (("plain", tiny_model), ("odd", with_config(tiny_model, tmp_path / "model", **changes))):
        code, _, err = run_script(*names(model, pairs_file, tmp_path / name), "--max_steps", "2", "--dtype", "float32")
        assert code == 0, err
        losses.append(read_record(tmp_path / name)["metrics"]["held_out"]["loss"])
    assert losses[0] == losses[1]
    assert run_script("plan", "--model_name_or_path", model, "--max_length", "32")[0] == 0


def test_a_reference_with_fewer_positions_is_refused_before_training(run_script, tiny_model, pairs_file, tmp_path):
    def make(size):
        shape = {"n_embd": 32, "n_layer": 1, "n_head": 2, "n_positions": 12}
        return transformers.GPT2LMHeadModel(transformers.GPT2Config(vocab_size=size, **shape))

    short = save(tmp_path / "short", make)
    code, _, err = run_script(
        *names(tiny_model, pairs_file, tmp_path / "run"), "--ref_model_name_or_path", short, "--max_steps", "1"
    )
    assert code == 2
    assert f"the reference {short} reads at most 12 tokens" in err


def test_a_reference_may_read_just_the_longest_pair_of_both_sides(run_script, tiny_model, tmp_path):
    data, long = tmp_path / "data", "a day at the sea"
    data.mkdir()
    write_lines(data / "train.jsonl", [{"prompt": f"a{i}", "chosen": " b.", "rejected": " c."} for i in range(4)])
    write_lines(data / "test.jsonl", [{"prompt": long, "chosen": " b.", "rejected": f" c.{long}"}])

    def against(positions: int) -> tuple[int, str]:
        """A run whose reference reads so many tokens: its exit code, and what it complained of."""
        shape = {"n_embd": 32, "n_layer": 1, "n_head": 2, "n_positions": positions}
        folder = tmp_path / f"reads-{positions}"
        save(folder, lambda size: transformers.GPT2LMHeadModel(transformers.GPT2Config(vocab_size=size, **shape)))
        flags = names(tiny_model, data, tmp_path / f"run-{positions}")
        code, _, err = run_script(*flags, "--ref_model_name_or_path", folder, "--max_steps", "1")
        return code, err

    code, err = against(10)
    assert code == 2
    longest = int(err.partition("the longest pair has ")[2].partition(":")[0])
    assert against(longest - 1)[0] == 2
    code, err = against(longest)
    assert code == 0, err


def test_dropout_that_trl_does_not_look_for_is_off(run_script, pairs_file, tmp_path):
    def make(size):
        shape = {"hidden_size": 32, "ffn_dim": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
        return transformers.OPTForCausalLM(
            transformers.OPTConfig(vocab_size=size, word_embed_proj_dim=32, dropout=0.5, **shape)
        )

    model = save(tmp_path / "model", make)
    code, _, err = run_script(
        *names(model, pairs_file, tmp_path / "run"), *ADAPTED, "--logging_steps", 1, "--validation_split", "none"
    )
    assert code == 0, err
    (line,) = read_metrics(tmp_path / "run")
    assert line["loss"] == pytest.approx(math.log(2), abs=1e-6), "policy and reference are the same before a step"


@pytest.fixture(scope="module")
def adapter(tiny_model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "adapter"
    model = transformers.AutoModelForCausalLM.from_pretrained(tiny_model)
    peft.get_peft_model(model, peft.LoraConfig(r=2, task_type="CAUSAL_LM")).save_pretrained(folder)
    return folder


def change_adapter(adapter, folder, **changes):
    shutil.copytree(adapter, folder)
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return folder


@pytest.mark.parametrize("verb", ["train", "merge"])
def test_adapters_that_do_not_fit_are_explained(run_script, adapter, tiny_model, pairs_file, tmp_path, verb):
    chained = change_adapter(adapter, tmp_path / "chained", base_model_name_or_path=str(adapter))
    data = ["--dataset_name", pairs_file] if verb == "train" else ["--skip_verification"]
    code, _, err = run_script(verb, "--model_name_or_path", chained, *data, "--output_dir", tmp_path / "one")
    assert code == 2
    assert f"{chained}: an adapter for {adapter}, which is an adapter itself; merge that one first" in err

    model = transformers.AutoModelForCausalLM.from_pretrained(tiny_model)
    size = model.config.vocab_size
    model.resize_token_embeddings(size + 2)
    config = peft.LoraConfig(r=2, task_type="CAUSAL_LM", modules_to_save=["embed_tokens", "lm_head"])
    peft.get_peft_model(model, config).save_pretrained(tmp_path / "resized")
    code, _, err = run_script(
        verb, "--model_name_or_path", tmp_path / "resized", *data, "--output_dir", tmp_path / "two"
    )
    assert code == 2
    assert f"was trained with {size + 2} tokens, its base {tiny_model} has {size}" in err


@pytest.mark.parametrize("verb", ["train", "merge", "chat"])
@pytest.mark.parametrize("damage", ["lost", "empty", "renamed", "deeper"])
def test_an_adapter_that_does_not_fill_its_places_is_refused(run_script, adapter, pairs_file, tmp_path, verb, damage):
    change = {
        "lost": lambda name: None if "layers.1." in name else name,
        "empty": lambda name: None,
        "renamed": lambda name: name.replace("q_proj", "z_proj"),
        "deeper": lambda name: name.replace("layers.1.", "layers.7."),
    }[damage]
    folder = shutil.copytree(adapter, tmp_path / "adapter")
    file = folder / "adapter_model.safetensors"
    weights = {change(name): value for name, value in load_file(file).items() if change(name)}
    save_file(weights, file, {"format": "pt"})
    rest = {
        "train": ["--dataset_name", pairs_file, "--output_dir", tmp_path / "run"],
        "merge": ["--skip_verification", "--output_dir", tmp_path / "run"],
        "chat": ["--prompt", "On day one", "--max_new_tokens", "2"],
    }[verb]
    code, _, err = run_script(verb, "--model_name_or_path", folder, *rest)
    assert code == 2
    assert f"the adapter {folder} lacks model.layers.{0 if damage in ('empty', 'renamed') else 1}." in err
    assert (f"the adapter {folder} holds model.layers." in err) == (damage in ("renamed", "deeper"))
    assert not (tmp_path / "run" / "run.json").exists()


def test_an_adapter_that_trains_biases_is_named(run_script, adapter, pairs_file, tmp_path):
    biased = change_adapter(adapter, tmp_path / "biased", bias="all")
    code, _, err = run_script(*names(biased, pairs_file, tmp_path / "run"), "--max_steps", "1")
    assert code == 2
    assert f"{biased}: bias is 'all' in its adapter_config.json" in err


@pytest.mark.parametrize("targets", [["q_proj", "gate_up_proj"], ["q_proj", "gate_proj", "up_proj", "down_proj"]])
def test_experts_can_be_named(run_script, mixture, pairs_file, tmp_path, targets):
    code, _, err = run_script(
        *names(mixture, pairs_file, tmp_path / "run"), *ADAPTED, "--lora_target_modules", *targets
    )
    assert code == 0, err
    saved = " ".join(load_file(tmp_path / "run" / "adapter_model.safetensors"))
    assert "mlp.experts" in saved
    assert "mlp.gate." not in saved


@pytest.fixture(scope="module")
def image_text(tmp_path_factory):
    def make(size):
        text = {"vocab_size": size, "head_dim": 8, **SIZES}
        vision = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
        vision |= {"image_size": 28, "patch_size": 14}
        tokens = {"image_token_index": size - 1, "boi_token_index": size - 2, "eoi_token_index": size - 3}
        config = transformers.Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4, **tokens)
        return transformers.Gemma3ForConditionalGeneration(config)

    return save(tmp_path_factory.mktemp("models") / "image_text", make)


def test_texts_train_the_text_part_of_an_image_text_model(run_script, image_text, pairs_file, tmp_path):
    whole = transformers.Gemma3ForConditionalGeneration
    common = ["--max_steps", "2", "--learning_rate", "1e-2", "--dtype", "float32", "--warmup_steps", "0"]
    code, _, err = run_script(*names(image_text, pairs_file, tmp_path / "lora"), "--use_lora", *common)
    assert code == 0, err
    saved = load_file(tmp_path / "lora" / "adapter_model.safetensors")
    assert saved
    assert all(".language_model." in name for name in saved)
    assert all(value.any() for name, value in saved.items() if "lora_B" in name)
    loaded = peft.PeftModel.from_pretrained(whole.from_pretrained(image_text), tmp_path / "lora")
    assert any(value.any() for name, value in loaded.state_dict().items() if "lora_B" in name)

    code, out, err = run_script(*names(image_text, pairs_file, tmp_path / "full"), *common)
    assert code == 0, err
    before, after = (whole.from_pretrained(place).state_dict() for place in (image_text, tmp_path / "full"))
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved
    assert not any("vision" in name or "projector" in name for name in moved)
    assert read_record(tmp_path / "full")["model"]["trainable_parameters"] == sum(
        value.numel() for name, value in before.items() if "language_model" in name
    )
    assert "texts never reach" in out


def test_trained_parameters_without_a_gradient_are_named(run_script, image_text, pairs_file, tmp_path, monkeypatch):
    monkeypatch.setattr("utils.models.loading.freeze_beyond_text", lambda model: None)
    code, out, err = run_script(
        *names(image_text, pairs_file, tmp_path / "run"), "--max_steps", "1", "--dtype", "float32"
    )
    assert code == 0, err
    (warning,) = [text for text in read_record(tmp_path / "run")["warnings"] if "no gradient in the first step" in text]
    assert "vision_tower" in warning
    assert warning in out


def test_training_in_float16_on_a_cpu_is_refused(run_script, tiny_model, pairs_file, tmp_path):
    if torch.cuda.is_available() or torch.backends.mps.is_available():
        pytest.skip("a processor alone is asked")
    code, _, err = run_script(*names(tiny_model, pairs_file, tmp_path / "run"), "--dtype", "float16")
    assert code == 2
    assert "--dtype float16: is not trained in on a CPU" in err


def test_a_tokenizer_without_a_vocabulary_is_refused(run_script, tiny_model, pairs_file, tmp_path):
    model = shutil.copytree(tiny_model, tmp_path / "model")
    (model / "tokenizer.json").unlink()
    (model / "vocab.json").write_text("{}")
    (model / "tokenizer_config.json").write_text('{"tokenizer_class": "LlamaTokenizer"}')
    code, _, err = run_script(*names(model, pairs_file, tmp_path / "run"), "--max_steps", "1")
    assert code == 2, err
    assert "its tokenizer cannot be loaded" in err


def test_a_base_is_called_one_of_4_bits_where_nearly_all_of_it_is():
    """An adapter's own numbers are none of the base's."""
    assert Counts(1010, 10, 10, in_4bit=900, wide=()).describe_4bit() == " on a 4-bit base"
    fewer = Counts(1010, 10, 10, in_4bit=899, wide=())
    assert fewer.describe_4bit() == " on a 4-bit base (90% of its weights are in 4 bits)"
    assert Counts(1010, 10, 10, in_4bit=0, wide=()).describe_4bit() == ""
