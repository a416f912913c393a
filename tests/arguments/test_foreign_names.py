"""Names of flags, verbs and losses as other tools have them: what each is read as, or answered with."""

from __future__ import annotations

import re
import shlex

import pytest

from utils.arguments import parse_arguments
from utils.arguments.config_file import Entry
from utils.arguments.foreign_names import NAMES, OTHER_LOSSES, OTHER_VERBS, SHORT_DATASETS, read_as_ours
from utils.arguments.parsing import known_flags
from utils.errors import UserError
from utils.settings.registry import VERBS

NEEDED = {"model_name_or_path": "m", "dataset_name": "d", "output_dir": "o"}
FLAGS = {name for verb in VERBS for name in known_flags(verb)}

# what is typed -> the settings that it gives
READ = {
    "--lr 1e-5 --epochs 3 --batch_size 2": {
        "learning_rate": 1e-5,
        "num_train_epochs": 3,
        "per_device_train_batch_size": 2,
    },
    "--model x --dataset y --output z": {"model_name_or_path": "x", "dataset_name": "y", "output_dir": "z"},
    "dpo --use_peft --load_in_4bit": {"use_lora": True, "use_4bit": True},
    "dpo --use_peft=false --load_in_8bit false": {"use_lora": False, "use_4bit": False},
    "--torch_dtype bfloat16": {"dtype": "bfloat16"},
    "--torch_dtype torch.float16": {"dtype": "float16"},
    "--mixed_precision no": {"dtype": "float32"},
    "--bf16": {"dtype": "bfloat16"},
    "--bf16 true --fp16 false": {"dtype": "bfloat16"},
    "--bf16 false --fp16": {"dtype": "float16"},
    "--bf16 false": {"dtype": "float32"},
    "--bf16 false --fp16 false": {"dtype": "float32"},
    "--bf16 auto": {"dtype": "auto"},
    "--fp16 false": {"dtype": "auto"},
    "--warmup_ratio 0.03": {"warmup_steps": 0.03},
    "--warmup_ratio 0": {"warmup_steps": 0},
    "--dataset_train_split train_prefs --dataset_test_split test_prefs": {
        "dataset_split": "train_prefs",
        "validation_split": "test_prefs",
    },
    "--train_split x": {"dataset_split": "x", "validation_split": None},
    "--val_set_size 0": {"validation_split": "none"},
    "--val_size 0.05": {"validation_split": "0.05"},
    "--wandb": {"use_wandb": True},
    "--wandb mine": {"use_wandb": True, "wandb_project": "mine"},
    "--adapter qlora": {"use_lora": True, "use_4bit": True},
    "--adapter qlora --load_in_4bit": {"use_lora": True, "use_4bit": True},
    "--finetuning_type full": {"use_lora": False},
    "--tuner_type lora --lora_rank 8": {"use_lora": True, "lora_r": 8},
    "--pref_loss ipo --pref_beta 0.2": {"loss_type": ("ipo",), "beta": 0.2},
    "--rlhf_type dpo": {},
    "--quantization_bit 4 --use_peft": {"use_4bit": True},
    "--flash_attn fa2": {"attn_implementation": "flash_attention_2"},
    "--flash_attention": {"attn_implementation": "flash_attention_2"},
    "--resume": {"resume_from_checkpoint": "auto"},
    "--resume false": {"resume_from_checkpoint": None},
    "--group_by_length": {"train_sampling_strategy": "group_by_length"},
    "--dataset hh-rlhf": {"dataset_name": "Anthropic/hh-rlhf"},
    "--max_seq_length 512 --sequence_len 512": {"max_length": 512},
}


def parse(typed: str):
    """The settings, with what every run needs where it was not typed."""
    words = shlex.split(typed)
    read, _ = read_as_ours([Entry(word[2:], word, ("x",)) for word in words if word.startswith("--")], FLAGS, [])
    missing = NEEDED.keys() - {entry.name for entry in read}
    return parse_arguments([*words, *(word for name in sorted(missing) for word in (f"--{name}", NEEDED[name]))])


@pytest.mark.parametrize("typed", READ)
def test_a_name_of_another_tool_is_read_as_the_flag_that_means_the_same(typed, capsys):
    values = parse(typed).flat()
    assert {name: values[name] for name in READ[typed] if name in values} == READ[typed]
    lines = capsys.readouterr().err.splitlines()
    names = [word.partition("=")[0] for word in shlex.split(typed)]
    foreign = [name for name in names if (name.lstrip("-") in NAMES and name[0] == "-") or name == "dpo" == names[0]]
    assert len(lines) == len(foreign) > 0
    for name, line in zip(sorted(foreign), sorted(lines), strict=True):
        assert re.fullmatch(rf"note: {name}: (read as .+|has no effect here; ignored)", line)


# what is typed -> what its one fault says, and what it must not
REFUSED = {
    "--test_split x": ("hold them out with --validation_split", "--dataset_split"),
    "--train_split 0.9": ("the fraction of rows that is held out is --validation_split", "--dataset_split"),
    "--rpo_alpha 1": ("--loss_type sigmoid sft --loss_weights 1 ALPHA", "--lora_alpha"),
    "--pref_ftx 0.1": ("--loss_type sigmoid sft --loss_weights 1 X", "did you mean"),
    "--pref_loss simpo": ("every loss here reads a reference", "ipo;"),
    "--rlhf_type kto": ("learns from unpaired responses", "did you mean"),
    "--max_prompt_length 512": ("--max_length limits prompt and response together", "did you mean"),
    "--load_in_8bit": ("--use_4bit holds the base in 4 bits", "did you mean"),
    "--quantization_bit 8": ("training on 8-bit weights is not supported", "did you mean"),
    "--val_size 1": ("takes a fraction such as 0.05", "did you mean"),
    "--val_size 500": ("takes a fraction such as 0.05", "did you mean"),
    "--warmup_ratio 1": ("a number of steps is --warmup_steps", "did you mean"),
    "--warmup_ratio 20": ("a number of steps is --warmup_steps", "did you mean"),
    "--bf16 x": ("--bf16 x: must be true or false", "--dtype"),
    "--torch_dtype float16 bfloat16": ("--torch_dtype: takes one value", "did you mean"),
    "--torch_dtype int8": ("use --dtype auto, float32, bfloat16 or float16", "did you mean"),
    "--stage dpo": ("the verb is train (DPO) or sft", "did you mean"),
    "--lr 1 --learning_rate 2": ("--lr sets --learning_rate too; leave one of them out", "did you mean"),
    "--lr x": ("--lr is 'x': must be a number", "did you mean"),
    "training.beta=0.2": ("'training.beta=0.2': write --beta 0.2;", "verb"),
    "+beta=0.2": ("write --beta 0.2;", "verb"),
    "--use_lora lr=1e-5": ("'lr=1e-5': write --lr 1e-5;", "true or false"),
    "--seed 3 num_train_epochs=2": ("write --num_train_epochs 2;", "verb"),
    "--splits x": ("no such flag (--help lists them)", "did you mean"),
    "--beta_schedule x": ("no such flag (--help lists them)", "did you mean"),
    "--lora_beta x": ("no such flag (--help lists them)", "did you mean"),
}


@pytest.mark.parametrize("typed", REFUSED)
def test_what_is_not_read_is_answered_with_what_to_write(typed):
    said, never = REFUSED[typed]
    with pytest.raises(UserError) as error:
        parse(typed)
    (fault,) = error.value.faults
    assert said in fault
    assert never not in fault


@pytest.mark.parametrize(
    ("typed", "answer"),
    [
        (
            "prepare-dataset --source webgpt --limit 1000",
            "data --dataset_name openai/webgpt_comparisons --output_file pairs.jsonl --max_samples 1000",
        ),
        ("export --adapter_path a", "merge --model_name_or_path RUN --output_dir MERGED --adapter_name_or_path a"),
        ("grpo", "it is not supported"),
    ],
)
def test_a_verb_of_another_tool_is_answered_with_the_command(typed, answer):
    with pytest.raises(UserError) as error:
        parse_arguments(shlex.split(typed))
    (fault,) = error.value.faults
    assert answer in fault


def test_keys_of_a_config_are_read_alike_and_a_flag_wins_over_them(tmp_path, capsys):
    path = tmp_path / "run.yaml"
    path.write_text(
        "model: m\ndataset: d\noutput: o\nlr: 1e-5\nbf16: true\nfp16: false\nload_in_8bit: null\ntorch_dtype: null\n"
    )
    settings = parse_arguments(["--config", str(path), "--learning_rate", "2e-5", "--fp16"])
    assert (settings.training.learning_rate, settings.model.dtype) == (2e-5, "float16")
    lines = capsys.readouterr().err.splitlines()
    assert f"note: {path}: lr: read as --learning_rate 1e-5" in lines
    assert f"note: {path}: torch_dtype: has no effect here; ignored" in lines
    path.write_text("test_split: x\nlr: y\n")
    with pytest.raises(UserError) as error:
        parse_arguments(["--config", str(path), "--dry_run", "--model", "m", "--dataset", "d"])
    assert [fault.split(";")[0] for fault in error.value.faults] == [
        f"{path}: test_split: no such flag",
        f"{path}: lr is 'y': must be a number",
    ]


VALUES = ("true", "false", "0.5", "0", "4", "8", "lora", "dpo", "bf16", "auto", "x")


def test_a_folder_of_that_name_is_meant_before_a_data_set_of_the_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert parse("--dataset hh").data.dataset_name == "Anthropic/hh-rlhf"
    (tmp_path / "hh").mkdir()
    assert parse("--dataset hh").data.dataset_name == "hh"


def test_a_name_that_a_library_gives_to_a_flag_is_that_flag():
    entry = Entry("lr", "--lr", ("1",))
    assert read_as_ours([entry], {*FLAGS, "lr"}, []) == ([entry], [])


def test_the_table_leads_to_flags_that_there_are():
    assert FLAGS.isdisjoint(NAMES)
    assert len(NAMES) > 80
    reasons = [*OTHER_LOSSES.values(), *OTHER_VERBS.values()]
    for name, to in NAMES.items():
        if isinstance(to, str) and not to.startswith("!"):
            assert to in FLAGS, name
            continue
        for value in VALUES:
            faults: list[str] = []
            read, lines = read_as_ours([Entry(name, f"--{name}", (value,))], FLAGS, faults)
            assert {entry.name for entry in read} <= FLAGS, name
            assert len(faults) + len(lines) == 1
            reasons += [fault.partition(": ")[2] for fault in faults]
    assert {name for text in reasons for name in re.findall(r"--(\w+)", text)} <= FLAGS
    assert all("/" in name for name in SHORT_DATASETS.values())
    assert OTHER_VERBS.keys().isdisjoint(VERBS)
    for command in filter(None, OTHER_VERBS.values()):
        verb, *words = shlex.split(command)
        assert {word[2:] for word in words if word.startswith("--")} <= set(known_flags(verb))
