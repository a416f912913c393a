"""argv and --config to Settings: what is accepted, what is refused, and in which words."""

from __future__ import annotations

import dataclasses
import json
import random
import re
import shlex

import pytest

from utils.arguments import check_adapter_flags, command_line, parse_arguments
from utils.arguments.foreign_names import NAMES as FOREIGN
from utils.arguments.parsing import known_flags
from utils.arguments.trainer_fields import OWNED, trainer_fields
from utils.errors import UserError
from utils.settings.registry import VERBS
from utils.settings.training import LoraSettings, flags_of

NAMES = ", ".join(VERBS)


NEEDED = ["--model_name_or_path", "m", "--dataset_name", "d", "--output_dir", "o"]


def parse(text: str = "", verb: str = "train"):
    return parse_arguments([verb, *NEEDED, *shlex.split(text)])


def faults_of(argv: list[str]) -> tuple[str, ...]:
    with pytest.raises(UserError) as error:
        parse_arguments(argv)
    return error.value.faults


def faults(text: str, verb: str = "train") -> tuple[str, ...]:
    return faults_of([verb, *NEEDED, *shlex.split(text)])


def only_fault(text: str, verb: str = "train") -> str:
    (fault,) = faults(text, verb)
    return fault


@pytest.fixture
def config(tmp_path):
    """Writes a config file and returns its path."""

    def write(text: str | bytes, name: str = "run.yaml") -> str:
        path = tmp_path / name
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return str(path)

    return write


# The documented invocations


def test_lora_invocation():
    settings = parse_arguments(
        shlex.split(
            "--model_name_or_path meta-llama/Llama-2-7b-hf --dataset_name trl-lib/ultrafeedback_binarized"
            " --output_dir ./llama2-7b-dpo-lora --use_lora --use_4bit --lora_r 64 --lora_alpha 16 --beta 0.1"
            " --num_train_epochs 1 --logging_steps 10 --save_steps 200 --use_wandb"
        )
    )
    assert settings.verb == "train"
    assert settings.model.model_name_or_path == "meta-llama/Llama-2-7b-hf"
    assert settings.model.use_4bit is True
    assert (settings.lora.use_lora, settings.lora.lora_r, settings.lora.lora_alpha) == (True, 64, 16.0)
    assert (settings.loss.beta, settings.training.num_train_epochs, settings.training.save_steps) == (0.1, 1.0, 200)
    assert (settings.run.use_wandb, settings.run.report_to) == (True, ("wandb",))
    assert settings.trainer_fields == {}
    assert "beta" in settings.given
    assert "seed" not in settings.given


def test_full_finetuning_invocation():
    settings = parse_arguments(
        shlex.split(
            "--model_name_or_path meta-llama/Llama-2-7b-hf --dataset_name trl-lib/ultrafeedback_binarized"
            " --output_dir ./llama2-7b-dpo-lora --use_4bit --beta 0.1 --num_train_epochs 1"
            " --logging_steps 10 --save_steps 200 --use_wandb"
        )
    )
    assert settings.model.use_4bit is True
    assert settings.lora == LoraSettings()


# Values


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ("--use_lora --use_4bit", True),
        ("--use-lora", True),
        ("--use_lora true", True),
        ("--use_lora=YES", True),
        ("--use_lora 1", True),
        ("--use_lora off", False),
        ("--use_lora=false", False),
        ("--use-lora No", False),
    ],
)
def test_yes_no_flag(flags, expected):
    assert parse(flags).lora.use_lora is expected


@pytest.mark.parametrize(
    ("flags", "stage", "name", "expected"),
    [
        ("--learning-rate 5e-5", "training", "learning_rate", 5e-5),
        ("--learning_rate none", "training", "learning_rate", None),
        ("--max_steps -1", "training", "max_steps", -1),
        ("--max_samples null", "data", "max_samples", None),
        ("--gradient_checkpointing", "training", "gradient_checkpointing", True),
        ("--gradient_checkpointing false", "training", "gradient_checkpointing", False),
        ("--loss_type sigmoid,sft", "loss", "loss_type", ("sigmoid", "sft")),
        ("--loss_type sigmoid sft", "loss", "loss_type", ("sigmoid", "sft")),
        ("--loss_type 'sigmoid, sft'", "loss", "loss_type", ("sigmoid", "sft")),
        ("--loss_type=ipo", "loss", "loss_type", ("ipo",)),
        ("--loss_type ipo sft --loss_weights 1,.5", "loss", "loss_weights", (1.0, 0.5)),
        ("--loss_type discopop --discopop_tau 0.1", "loss", "discopop_tau", 0.1),
        ("--ld_alpha 1", "loss", "ld_alpha", 1.0),
        ("--report_to wandb tensorboard", "run", "report_to", ("wandb", "tensorboard")),
        ("--report_to none", "run", "report_to", ()),
        ("--report_to all", "run", "report_to", ("all",)),
        ("--validation_split none", "data", "validation_split", "none"),
        ("--validation_split 0.05", "data", "validation_split", "0.05"),
        ("--validation_split test_prefs", "data", "validation_split", "test_prefs"),
        ("--dataset_config none", "data", "dataset_config", None),
        ("--chat_template={{x}}=1", "model", "chat_template", "{{x}}=1"),
    ],
)
def test_curated_value(flags, stage, name, expected):
    value = getattr(getattr(parse(flags), stage), name)
    assert value == expected
    assert type(value) is type(expected)


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ("--weight_decay 0.01", {"weight_decay": 0.01}),
        ("--ignore-data-skip", {"ignore_data_skip": True}),
        ("--disable_dropout false", {"disable_dropout": False}),
        ("--dataloader_num_workers 2", {"dataloader_num_workers": 2}),
        ("--data_seed none", {"data_seed": None}),
        ("--tf32 true", {"tf32": True}),
        ("--use_cpu", {"use_cpu": True}),
        ("--save_strategy no", {"save_strategy": "no"}),
        ("--optim adamw_torch", {"optim": "adamw_torch"}),
        ("--lr_scheduler_kwargs '{\"min_lr\": 1e-6}'", {"lr_scheduler_kwargs": {"min_lr": 1e-6}}),
        ("--deepspeed zero3.json", {"deepspeed": "zero3.json"}),
        ("--include_for_metrics inputs,loss", {"include_for_metrics": ["inputs", "loss"]}),
        ("--include_for_metrics inputs loss", {"include_for_metrics": ["inputs", "loss"]}),
        ("--include_for_metrics '[\"inputs\"]'", {"include_for_metrics": ["inputs"]}),
        ("--optim_target_modules all-linear", {"optim_target_modules": "all-linear"}),
        ("--optim_target_modules attn mlp", {"optim_target_modules": ["attn", "mlp"]}),
        ("--include_num_input_tokens_seen all", {"include_num_input_tokens_seen": "all"}),
        ("--trackio_static_space_id false", {"trackio_static_space_id": False}),
    ],
)
def test_trainer_field(flags, expected):
    settings = parse(flags)
    assert settings.trainer_fields == expected
    assert [type(value) for value in settings.trainer_fields.values()] == [type(value) for value in expected.values()]
    assert expected.keys() <= settings.given


def test_sft_verb_takes_the_fields_of_its_own_config():
    settings = parse("--loss_type dft --completion_column answer", "sft")
    assert settings.trainer_fields == {"loss_type": "dft"}
    assert settings.data.completion_column == "answer"


def test_trainer_fields_are_those_of_the_installed_trl():
    from trl import DPOConfig, SFTConfig

    for verb, config_class in (("train", DPOConfig), ("sft", SFTConfig)):
        assert set(trainer_fields(verb)) == {field.name for field in dataclasses.fields(config_class) if field.init}


@pytest.mark.parametrize("verb", ["train", "sft"])
def test_every_flag_has_a_type(verb):
    for flag in known_flags(verb).values():
        assert flag.kind.scalars or flag.kind.item, flag.name


def test_known_choices_of_trainer_fields_are_the_enums_of_transformers():
    from transformers.training_args import OptimizerNames, SaveStrategy, SchedulerType

    flags = known_flags("train")
    for name, enum in (
        ("optim", OptimizerNames),
        ("save_strategy", SaveStrategy),
        ("lr_scheduler_type", SchedulerType),
    ):
        assert set(flags[name].choices) == {member.value for member in enum}


@pytest.mark.parametrize(
    ("flag", "said", "never"),
    [
        ("--test_split x", "hold them out with --validation_split", "--dataset_split"),
        ("--rpo_alpha 1", "--loss_type sigmoid sft --loss_weights 1 ALPHA", "--lora_alpha"),
        ("--lora_modules_to_save x", "training whole modules beside LoRA is not supported", "--lora_target_modules"),
        ("--peft_config x", "described by --use_lora", "--fsdp_config"),
        ("--loss_type simpo", "every loss here reads a reference", "did you mean"),
        ("--no_gradient_checkpointing", "; --gradient_checkpointing false turns it off", "did you mean"),
        ("--disable_gradient_checkpointing", "; --gradient_checkpointing false turns it off", "did you mean"),
        ("--no_lora", "; --use_lora false turns it off", "did you mean"),
        ("--no_trust_remote_code", "; --trust_remote_code false turns it off", "did you mean"),
        ("--disable_wandb", "; --use_wandb false turns it off", "did you mean"),
        ("--no_weight_decay", "no such flag (--help lists them)", "--weight_decay?"),
        ("--disable_drpout", "did you mean --disable_dropout?", "false"),
        ("--enable_dropout", "no such flag (--help lists them)", "--disable_dropout"),
        ("--sft_alpha 1", "--loss_type sigmoid sft --loss_weights 1 ALPHA", "--ld_alpha"),
    ],
)
def test_a_name_of_another_tool_is_explained_and_not_matched_by_spelling(flag, said, never):
    fault = only_fault(flag)
    assert said in fault
    assert never not in fault


def test_flags_of_another_verb_in_a_shared_config_are_passed_over_with_one_line(config, capsys):
    path = config("dataset_name: d\non_bad_rows: skip\nbeta: 0.2\n")
    settings = parse_arguments(["data", "--config", path])
    assert settings.given == {"dataset_name"}
    (line,) = capsys.readouterr().err.splitlines()
    assert line == f"note: {path}: ignored, as data has no such flags: on_bad_rows, beta"
    assert faults_of(["data", "--dataset_name", "d", "--on_bad_rows", "skip"]) == (
        "--on_bad_rows: is a flag of the verb train, sft and evaluate, not of data",
    )


# Faults


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ("--beta 0", "--beta is 0.0: must be above 0 (0.1 is usual)"),
        ("--use_lora --lora_r 0", "--lora_r is 0: must be 1 or more (8 to 64 is usual)"),
        ("--use_4bit --bnb_4bit_quant_type int4", "--bnb_4bit_quant_type is 'int4': must be one of nf4, fp4"),
        ("--lerning_rate 1", "--lerning_rate: no such flag; did you mean --learning_rate?"),
        ("--weight_deacy 0", "--weight_deacy: no such flag; did you mean --weight_decay?"),
        ("--xyzzy 1", "--xyzzy: no such flag (--help lists them)"),
        ("--max_samples 1e3", "--max_samples is '1e3': must be a whole number"),
        ("--max_samples 1_000", "--max_samples is '1_000': must be a whole number"),
        ("--beta nan", "--beta is 'nan': must be a number"),
        ("--beta -inf", "--beta is '-inf': must be a number"),
        ("--weight_decay inf", "--weight_decay is 'inf': must be a number"),
        ("--beta 1e999", "--beta is '1e999': must be a number"),
        ("--seed " + "9" * 5000, None),
        ("--beta none", "--beta is 'none': must be a number"),
        ("--use_lora sft", "--use_lora is 'sft': must be true or false"),
        ("--use_lora=", None),
        ("--seed", "--seed has no value: give it a whole number"),
        ("--model_revision --seed 3", "--model_revision has no value: give it text"),
        ("--model_revision=", "--model_revision has an empty value: give it text"),
        ("--loss_type", "--loss_type has no value: give it one or more of: text"),
        ("--loss_type=,", "--loss_type is empty: must be one or more of: text"),
        ("--beta 0.1 0.2", "'0.2': is an unexpected value; write --name value"),
        ("--beta=0.1 0.2", "'0.2': is an unexpected value; write --name value"),
        ("--beta 0.1 --beta 0.2", "--beta is given twice: leave one of them out"),
        ("--use_lora --use-lora", "--use-lora is given twice: leave one of them out"),
        ("-beta 1", "-beta: is not a flag; flags start with two dashes and a name (--help lists them)"),
        ("--", "--: is not a flag; flags start with two dashes and a name (--help lists them)"),
        ("--verb sft", "--verb: no such flag; the verb comes first, without dashes"),
        ("--text_column t", "--text_column: is a flag of the verb sft, not of train"),
        ("--run_name x", "--run_name: cannot be set here: use --wandb_run_name"),
        ("--padding_free", "--padding_free: cannot be set here: TRL's DPO trainer accepts it and switches it off"),
        ("--save_safetensors false", "--save_safetensors: cannot be set here: only safetensors are written"),
        ("--save_strategy often", "--save_strategy is 'often': must be one of no, steps, epoch, best"),
        ("--lr_scheduler_kwargs '{1}'", None),
        ("--loss_weights a", "--loss_weights is 'a': must be a number"),
    ],
)
def test_fault_of_one_flag(flags, expected):
    fault = only_fault(flags)
    assert fault.startswith("--" if expected is None else expected)
    assert expected is None or fault == expected


@pytest.mark.parametrize(
    ("flags", "start"),
    [
        ("--lora_r 8", "--lora_r: has no effect without --use_lora"),
        ("--use_lora false --use_dora", "--use_dora: has no effect without --use_lora"),
        ("--bnb_4bit_quant_type fp4", "--bnb_4bit_quant_type: has no effect without --use_4bit"),
        ("--use_wandb false --report_to wandb tensorboard", "--use_wandb is false, but --report_to is wandb"),
        ("--use_wandb --report_to none", "--use_wandb: --report_to none means no tracker"),
        ("--use_wandb --report_to all", "--use_wandb: --report_to all already includes W&B"),
        ("--wandb_project x", "--wandb_project: has no effect without --use_wandb"),
        ("--report_to tensorboard --wandb_run_name x", "--wandb_run_name: has no effect without --use_wandb"),
        ("--report_to tensorbord", "--report_to is 'tensorbord': did you mean tensorboard?"),
        ("--report_to none,mlflow", "--report_to is none mlflow: none cannot be combined with others"),
        ("--resume_from_checkpoint auto --overwrite_output_dir", "--resume_from_checkpoint: --overwrite_output_dir"),
        ("--resume_from_checkpoint auto --dry_run", "--resume_from_checkpoint: --dry_run"),
        ("--loss_type ipo --loss_weights 1 2", "--loss_weights has 2 for 1 losses (ipo)"),
        ("--loss_type ipo ipo", "--loss_type: ipo is given twice"),
        ("--loss_type dpo sigmoid", "--loss_type: dpo and sigmoid are the same loss"),
        ("--loss_type ipo --label_smoothing 0.1", "--label_smoothing: has no effect on ipo"),
        ("--loss_type cdpo", "--loss_type cdpo: needs --label_smoothing above 0 (0.1 is usual)"),
        ("--loss_type exo_pair", "--loss_type exo_pair: needs --label_smoothing above 0 (1e-3 is usual)"),
        ("--label_smoothing 0.5", "--label_smoothing is 0.5: must be at least 0 and below 0.5"),
        ("--discopop_tau 0.1", "--discopop_tau: has no effect without --loss_type discopop"),
        ("--f_alpha_divergence_coef 1", "--f_alpha_divergence_coef: has no effect without --f_divergence_type"),
        ("--f_divergence_type alfa", "--f_divergence_type is 'alfa': must be one of reverse_kl"),
        ("--f_divergence_type forward_kl --loss_type nca_pair", "--f_divergence_type forward_kl: is not defined"),
        ("--use_weighting --loss_type aot", "--use_weighting: cannot weigh the pairs of aot"),
        ("--ld_alpha 1.5", "--ld_alpha is 1.5: must be between 0 and 1"),
        ("--sync_ref_model --use_lora", "--sync_ref_model: needs a full model"),
        ("--sync_ref_model --precompute_ref_log_probs", "--sync_ref_model: updates the reference"),
        ("--ref_model_sync_steps 5", "--ref_model_sync_steps: has no effect without --sync_ref_model"),
        ("--validation_split 1.5", "--validation_split is 1.5: must be a fraction above 0 and below 1"),
        ("--validation_split 0", "--validation_split is 0: must be a fraction above 0 and below 1"),
        ("--validation_split 1", "--validation_split is 1: must be a fraction above 0 and below 1"),
        ("--validation_split nan", "--validation_split is nan: must be a fraction above 0 and below 1"),
        ("--validation_split test --dataset_split test", "--validation_split is test: is also the split to train on"),
        ("--validation_split none --eval_steps 5", "--eval_steps: there is nothing to evaluate"),
        ("--validation_split none --eval_strategy epoch", "--eval_strategy: there is nothing to evaluate"),
        ("--max_steps 0", "--max_steps is 0: must be above 0 (or -1 for no limit)"),
        (
            "--early_stopping_patience 1 --eval_steps 5 --save_strategy no",
            "--early_stopping_patience: cannot keep the best model with --save_strategy no",
        ),
    ],
)
def test_contradiction(flags, start):
    assert only_fault(flags).startswith(start)


@pytest.mark.parametrize(
    ("flags", "start"),
    [
        ("--use_4bit", "--use_4bit: 4-bit weights cannot be trained; add --use_lora"),
        ("--beta 0.1", "--beta: is a flag of the verb train and evaluate, not of sft"),
        ("--text_column t --prompt_column p", "--prompt_column: --text_column already holds the whole text"),
        ("--completion_column a --chosen_column b", "--completion_column: --chosen_column names the response too"),
        ("--loss_type sigmoid", "--loss_type is 'sigmoid': must be one of nll, dft"),
        ("--dataset_text_field t", "--dataset_text_field: cannot be set here: use --text_column"),
        ("--neftune_noise_alpha -1", "--neftune_noise_alpha is -1.0: must be at least 0"),
    ],
)
def test_contradiction_in_sft(flags, start):
    assert only_fault(flags, "sft").startswith(start)


@pytest.mark.parametrize(
    ("flags", "verb"),
    [
        ("--adapter_name_or_path a --lora_r 8", "train"),
        ("--use_4bit --adapter_name_or_path a", "sft"),
        ("--use_4bit --use_lora", "sft"),
        ("--use_4bit", "train"),
        ("--use_dora false", "train"),
        ("--loss_type cdpo --label_smoothing 0.1", "train"),
        ("--loss_type robust", "train"),
        ("--report_to wandb --wandb_project x", "train"),
        ("--f_divergence_type alpha_divergence --f_alpha_divergence_coef 1", "train"),
        ("--neftune_noise_alpha 0", "sft"),
        ("--allow_changes weight_decay beta data --resume_from_checkpoint auto", "train"),
        ("--early_stopping_patience 1 --eval_steps 5 --save_strategy steps", "train"),
    ],
)
def test_settings_that_fit_together(flags, verb):
    assert parse(flags, verb).verb == verb


def test_a_model_folder_with_an_adapter_counts_as_adapter(tmp_path):
    argv = ["sft", "--model_name_or_path", str(tmp_path), *NEEDED[2:], "--use_4bit", "--lora_r", "8"]
    assert len(faults_of(argv)) == 2
    (tmp_path / "adapter_config.json").write_text("{}")
    assert parse_arguments(argv).lora.lora_r == 8


def test_required_flags():
    assert [fault.split(":")[0] for fault in faults_of(["train"])] == [
        "--model_name_or_path is missing",
        "--dataset_name is missing",
        "--output_dir is missing",
    ]
    assert parse_arguments([*NEEDED[:4], "--dry_run"]).run.output_dir is None


def test_a_value_that_could_not_be_read_is_not_also_missing():
    assert faults_of([*NEEDED[:4], "--output_dir="]) == ("--output_dir has an empty value: give it text",)


def test_what_a_hub_model_holds_is_checked_once_it_is_known():
    flags = "sft --model_name_or_path owner/name --dataset_name d --output_dir o --use_4bit --lora_r 8"
    settings = parse_arguments(shlex.split(flags))
    check_adapter_flags(settings, adapter_found=True)
    with pytest.raises(UserError) as error:
        check_adapter_flags(settings, adapter_found=False)
    assert error.value.faults == (
        "--lora_r: has no effect without --use_lora; add it or leave this out",
        "--use_4bit: 4-bit weights cannot be trained; add --use_lora",
    )


def test_all_faults_at_once(config):
    path = config("beta: 0\nlora_r: x\nsede: 3\n")
    assert faults_of(["sft", "stray", "--config", path, "--use_dora", "--lerning_rate", "1", "--seed", "-1"]) == (
        "'stray': is an unexpected value; write --name value",
        f"{path}: lora_r is 'x': must be a whole number",
        f"{path}: sede: no such flag; did you mean --seed?",
        "--lerning_rate: no such flag; did you mean --learning_rate?",
        "--seed is -1: must be between 0 and 4294967295",
        "--model_name_or_path is missing: name a hub model, a folder with a model, or a folder with an adapter",
        "--dataset_name is missing: name a hub dataset, a folder or a file",
        "--output_dir is missing: name the folder for the results (or pass --dry_run, which saves nothing)",
        f"{path}: lora_r: has no effect without --use_lora; add it or leave this out",
        "--use_dora: has no effect without --use_lora; add it or leave this out",
    )


def test_unknown_verb_names_the_nearest_and_goes_on():
    assert faults_of(["stf", *NEEDED, "--seed", "x"]) == (
        f"'stf': no such verb; did you mean sft? the verbs are {NAMES}",
        "--seed is 'x': must be a whole number",
    )
    assert faults_of(["gpt2"]) == (f"'gpt2': no such verb; the verbs are {NAMES}",)


def test_verb_after_the_flags_is_explained():
    assert "the verb comes first" in only_fault("--seed 1 sft")


def test_every_owned_field_is_refused():
    for name in OWNED.keys() - FOREIGN.keys():
        assert only_fault(f"--{name} x").startswith(f"--{name}: cannot be set here: ")


# Trackers


@pytest.mark.parametrize(
    ("flags", "report_to", "use_wandb"),
    [
        ("", (), False),
        ("--use_wandb", ("wandb",), True),
        ("--use_wandb false", (), False),
        ("--report_to wandb", ("wandb",), True),
        ("--report_to tensorboard --use_wandb", ("tensorboard", "wandb"), True),
        ("--report_to wandb,tensorboard --use_wandb", ("wandb", "tensorboard"), True),
        ("--report_to tensorboard --use_wandb false", ("tensorboard",), False),
    ],
)
def test_wandb_is_reported_to_exactly_when_it_is_used(flags, report_to, use_wandb):
    run = parse(flags).run
    assert (run.report_to, run.use_wandb) == (report_to, use_wandb)


# Config files


YAML = """\
# a run
model-name-or-path: m
dataset_name: d
output_dir: o
verb: sft
learning_rate: 5e-5
seed: 7
use_lora: yes
lora_target_modules: [q_proj, v_proj]
gradient_checkpointing: no
validation_split: none
max_samples: null
save_strategy: no
lr_scheduler_kwargs: {min_lr: 1e-6, on_plateau: true}
include_for_metrics:
  - inputs
"""


def test_yaml_config(config):
    settings = parse_arguments(["--config", config(YAML)])
    assert settings.verb == "sft"
    assert (settings.model.model_name_or_path, settings.run.output_dir) == ("m", "o")
    assert (settings.training.learning_rate, settings.training.seed) == (5e-5, 7)
    assert (settings.lora.use_lora, settings.lora.lora_target_modules) == (True, ("q_proj", "v_proj"))
    assert settings.training.gradient_checkpointing is False
    assert (settings.data.validation_split, settings.data.max_samples) == ("none", None)
    assert settings.trainer_fields == {
        "save_strategy": "no",
        "lr_scheduler_kwargs": {"min_lr": 1e-6, "on_plateau": True},
        "include_for_metrics": ["inputs"],
    }
    assert {"max_samples", "seed", "save_strategy"} <= settings.given
    assert "verb" not in settings.given


def test_json_config_means_the_same_as_yaml(config):
    values = {
        "model_name_or_path": "m",
        "dataset_name": "d",
        "output_dir": "o",
        "verb": "sft",
        "learning_rate": 5e-5,
        "seed": 7,
        "use_lora": True,
        "lora_target_modules": ["q_proj", "v_proj"],
        "gradient-checkpointing": False,
        "validation_split": "none",
        "max_samples": None,
        "save_strategy": "no",
        "lr_scheduler_kwargs": {"min_lr": 1e-6, "on_plateau": True},
        "include_for_metrics": ["inputs"],
    }
    path = config(json.dumps(values), "run.json")
    assert parse_arguments(["--config", path]) == parse_arguments(["--config", config(YAML)])


def test_flags_win_over_the_config(config):
    path = config("seed: 7\nverb: sft\nbeta: 0.5\nuse_lora: true\nvalidation_split: 0.2\n")
    settings = parse(f"--config {path} --seed 8 --use-lora false")
    assert (settings.verb, settings.training.seed, settings.lora.use_lora) == ("train", 8, False)
    assert (settings.loss.beta, settings.data.validation_split) == (0.5, "0.2")


def test_byte_order_mark(config):
    assert parse(f"--config {config(chr(0xFEFF) + 'seed: 7')}").training.seed == 7


@pytest.mark.parametrize(
    ("text", "name", "expected"),
    [
        ("beta: 0", "run.yaml", ": beta is 0.0: must be above 0 (0.1 is usual)"),
        ("lora-r: 1.5\nuse_lora: on", "run.yaml", ": lora-r is '1.5': must be a whole number"),
        ("lerning_rate: 1", "run.yaml", ": lerning_rate: no such flag; did you mean --learning_rate?"),
        ("max_lenght: 1", "run.yaml", ": max_lenght: no such flag; did you mean --max_length?"),
        ("run_name: x", "run.yaml", ": run_name: cannot be set here: use --wandb_run_name"),
        ("beta: [0.1]", "run.yaml", ": beta is a list: must be a number"),
        ("beta: {a: 1}", "run.yaml", ": beta is a mapping: must be a number"),
        ("beta:", "run.yaml", ": beta is null: must be a number; leave it out for the default"),
        ("beta: true", "run.yaml", ": beta is 'true': must be a number"),
        ("use_lora: 2", "run.yaml", ": use_lora is '2': must be true or false"),
        ("loss_type: []", "run.yaml", ": loss_type is empty: must be one or more of: text"),
        (
            "wandb_project: x",
            "run.yaml",
            ": wandb_project: has no effect without --use_wandb; add it or leave this out",
        ),
        ("seed: 1\nbeta: 1\nseed: 2", "run.yaml", " line 3: seed is given twice (also on line 1)"),
        ("use-lora: 1\nuse_lora: 1", "run.yaml", ": use_lora is given twice"),
        ("- beta", "run.yaml", ": must be a mapping, one `name: value` per line"),
        ("", "run.yaml", ": must be a mapping, one `name: value` per line"),
        ("a: 1\nb: [1\nc: 2\n", "run.yaml", " line 3: is not valid YAML (expected ',' or ']', but got ':')"),
        ("lr_scheduler_kwargs:\n  a: 1\n  a: 2\n", "run.yaml", " line 2: is not valid YAML (a is given twice)"),
        ("[1]: 2", "run.yaml", " line 1: the key must be the name of a setting"),
        ("x: !!python/name:os.system y", "run.yaml", None),
        ("lr_scheduler_kwargs: {since: 2020-01-01}", "run.yaml", None),
        ("a: &a {b: *a}", "run.yaml", None),
        *[
            (f"lr_scheduler_kwargs: {{a: {value}}}", "run.yaml", None)
            for value in ("!!bool foo", "!!int ''", "!!int '-'", "!!float ''", "!!timestamp foo")
        ],
        (
            "".join(f"k{n}: 1\n" for n in range(5000)),
            "run.yaml",
            ": holds 5,000 settings, more than exist; --config takes those of one run",
        ),
        ("[" * 5000, "run.json", ": is nested too deeply"),
        ('{"a": 1,\n "b" 2}', "run.json", " line 2: is not valid JSON (Expecting ':' delimiter)"),
        ('{"seed": 1, "seed": 2}', "run.json", ": seed is given twice"),
        ("[1]", "run.json", ': must be a mapping such as {"beta": 0.1}'),
        ('{"beta": NaN}', "run.json", ": beta is 'nan': must be a number"),
        (b"beta: \xff\xfe", "run.yaml", ": is not UTF-8 text; --config takes a YAML or JSON file"),
    ],
)
def test_fault_in_the_config(config, text, name, expected):
    path = config(text, name)
    fault = only_fault(f"--config {path}")
    assert fault.startswith(path)
    assert expected is None or fault == path + expected


def test_unreadable_config_does_not_hide_the_other_faults(tmp_path):
    missing = str(tmp_path / "no.yaml")
    advice = "--config takes a YAML or JSON file"
    assert faults_of(["--config", missing, "--seed", "x", "--text_column", "t"]) == (
        f"{missing}: cannot be read (No such file or directory); {advice}",
        "--seed is 'x': must be a whole number",
    )
    assert faults_of(["--config", str(tmp_path)]) == (f"{tmp_path}: cannot be read (Is a directory); {advice}",)
    assert faults_of(["--config"]) == ("--config has no value: name a YAML or JSON file",)


def test_misspelled_verb_in_the_config(config):
    path = config("verb: tran")
    (fault,) = faults_of([*NEEDED, "--config", path])
    assert fault == f"{path}: verb is 'tran': no such verb; did you mean train? the verbs are {NAMES}"


# The copyable command


@pytest.mark.parametrize(
    ("flags", "verb"),
    [
        ("", "train"),
        ("--use-lora --use_4bit=false --lora_alpha 1e-3 --lora_target_modules q,k", "train"),
        ("--validation_split none --dataset_config null --learning_rate none --max_steps -1", "train"),
        ("--chat_template='-{{ x }} \n \"y\"' --prompt_column 'a b'", "train"),
        ("--report_to none --use_wandb false", "train"),
        ("--report_to tensorboard --use_wandb", "train"),
        ("--loss_type sigmoid sft --loss_weights 1 0.25", "train"),
        ("--optim_target_modules '[\"a{1,2}\"]' --include_for_metrics loss --debug=", "train"),
        ('--lr_scheduler_kwargs \'{"a": [1, null, "x y"]}\' --trackio_static_space_id false', "train"),
        ("--loss_type dft --text_column t", "sft"),
    ],
)
def test_command_line_gives_the_same_settings(flags, verb):
    settings = parse(flags, verb)
    assert parse_arguments(shlex.split(shlex.join(command_line(settings)))) == settings


def test_command_line_turns_config_values_into_flags(config):
    settings = parse_arguments(["--config", config(YAML)])
    command = command_line(settings)
    assert parse_arguments(command) == settings
    assert command[0] == "sft"
    assert "--config" not in command
    assert command[command.index("--learning_rate") + 1] == "5e-05"


def test_command_line_names_only_what_was_given():
    assert command_line(parse("--use_lora")) == [
        *("train", "--model_name_or_path", "m", "--use_lora", "--dataset_name", "d", "--output_dir", "o"),
    ]


# Help and speed


def shown(capsys, *words: str) -> str:
    """What is printed in answer to these words."""
    with pytest.raises(SystemExit) as stop:
        parse_arguments([*words])
    assert stop.value.code == 0
    return capsys.readouterr().out


def flags_in(text: str) -> set[str]:
    return {line.split()[0].removeprefix("--") for line in text.splitlines() if line.startswith("  --")}


@pytest.mark.parametrize("width", [60, 100])
@pytest.mark.parametrize("verb", VERBS)
def test_help_shows_what_matters_first_and_all_on_request(verb, width, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", str(width))
    words = verb.split()
    first, everything = shown(capsys, *words, "--help"), shown(capsys, *words, "--seed", "x", "--help", "all")
    assert max(len(line) for line in first.split("example:")[0].splitlines()) <= width
    assert first == shown(capsys, "help", *words)
    assert everything == shown(capsys, "help", *words, "all")
    assert flags_in(everything) == set(flags_of(verb))
    assert flags_in(first) == {"config", *(VERBS[verb].first or flags_of(verb))}
    assert len(VERBS[verb].first) <= 13
    if "seed" in flags_of(verb):
        assert "(default: 42)" in everything


def test_help_shows_one_group_or_one_flag(capsys):
    assert flags_in(shown(capsys, "--help", "lora")) == {field.name for field in dataclasses.fields(LoraSettings)}
    assert flags_in(shown(capsys, "data", "--help", "generation")) == {"generate", "scorer", "num_generations"}
    assert flags_in(shown(capsys, "help", "beta")) == {"beta"} == flags_in(shown(capsys, "--help", "beta"))
    assert "strength of the KL penalty; higher stays closer to the reference" in shown(capsys, "help", "beta")
    (fault,) = faults_of(["chat", "--help", "beta"])
    assert fault.startswith("--help beta: neither a flag of chat nor a group of its flags; the groups are model, ")
    assert faults_of(["help", "plam"])[0].startswith("--help plam: ")


def test_a_flag_says_what_it_means_for_the_verb(capsys):
    texts = {verb: " ".join(shown(capsys, verb, "--help", "model_name_or_path").split()) for verb in ("sft", "chat")}
    assert "the model to tune" in texts["sft"]
    assert "the model to tune" not in texts["chat"]
    for verb in VERBS:
        for field in flags_of(verb).values():
            assert set(field.metadata["says"]) <= VERBS.keys()


def test_version_and_a_call_without_words(capsys):
    assert re.fullmatch(r"advanced_dpo_script.py \d+\.\d+\.\d+ \(Python .*, torch \d.*\)\n", shown(capsys, "--version"))
    with pytest.raises(SystemExit) as stop:
        parse_arguments([])
    assert stop.value.code == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.startswith("usage: python advanced_dpo_script.py [VERB] [flags]\n")
    assert all(f"\n  {verb} " in said.err for verb in VERBS)


@pytest.mark.parametrize(
    ("words", "settings"),
    [
        ("evaluate runs/demo", {"model_name_or_path": "runs/demo"}),
        ("chat --use_4bit runs/demo --seed 3", {"model_name_or_path": "runs/demo", "seed": 3}),
        ("chat runs/demo --temperature 0", {"model_name_or_path": "runs/demo", "temperature": 0}),
        ("merge runs/demo out", {"model_name_or_path": "runs/demo", "output_dir": "out"}),
        ("merge --output_dir out runs/demo", {"model_name_or_path": "runs/demo", "output_dir": "out"}),
        ("data pairs.jsonl", {"dataset_name": "pairs.jsonl"}),
        ("compare runs/demo other", {"model_name_or_path": "runs/demo", "baseline": "other"}),
        ("compare runs/demo --judge vote", {"model_name_or_path": "runs/demo", "judge": ("vote",)}),
        ("chat --load_in_4bit runs/demo", {"model_name_or_path": "runs/demo", "use_4bit": True}),
        ("chat --torch_dtype float32 runs/demo", {"model_name_or_path": "runs/demo", "dtype": "float32"}),
        ("report runs/demo", {"run": "runs/demo"}),
        ("status runs/", {"folder": "runs/"}),
    ],
)
def test_what_a_verb_is_about_needs_no_flag(words, settings):
    values = parse_arguments(words.split()).flat()
    assert {name: values[name] for name in settings} == settings


def test_what_is_named_twice_or_by_a_verb_without_objects_is_a_fault():
    assert faults_of(["evaluate", "a", "b"]) == ("'b': is an unexpected value; write --name value",)
    assert faults_of(["chat", "a", "--model_name_or_path", "b"]) == (
        "--model_name_or_path is given twice: leave one of them out",
    )
    assert faults_of(["report"]) == ("--run is missing: name the folder of a run, as in `report runs/demo`",)


@pytest.mark.parametrize("verb", ["train", "sft"])
def test_the_example_in_the_help_works(verb, capsys):
    with pytest.raises(SystemExit):
        parse_arguments([verb, "--help"])
    example = capsys.readouterr().out.split("example:\n")[1].replace("\\\n", " ")
    words = shlex.split(example)
    assert words[:2] == ["python", "advanced_dpo_script.py"]
    assert parse_arguments(words[2:]).verb == verb


# Anything at all

JUNK = [
    "",
    " ",
    "-",
    "--",
    "---",
    "-x",
    "--=",
    "=",
    "--=1",
    "--a=",
    "{",
    "[",
    "[1",
    '{"a": 1}',
    "[null]",
    "~",
    "é",
    "\0",
]
VALUES = [
    "0",
    "1",
    "-1",
    "0.5",
    "1e3",
    "nan",
    "none",
    "true",
    "auto",
    "sft",
    "train",
    "a,b",
    ",",
    "wandb",
    "test",
    "sigmoid",
]


def random_argv(dice: random.Random) -> list[str]:
    verb = dice.choice(["train", "sft", "", "stf"])
    flags = list(known_flags("sft" if verb == "sft" else "train"))
    argv = [verb] if verb else []
    if dice.random() < 0.7:
        argv += NEEDED
    for _ in range(dice.randrange(8)):
        name = dice.choice(flags) if dice.random() < 0.9 else dice.choice(["", "config", "help_", "beta-", "\udc80"])
        argv.append(dice.choice([f"--{name}", f"--{name.replace('_', '-')}", f"--{name}={dice.choice(VALUES + JUNK)}"]))
        argv += dice.choices(VALUES if dice.random() < 0.8 else JUNK, k=dice.choice([0, 1, 1, 1, 2]))
    return argv


def test_any_argv_gives_settings_or_a_user_error():
    dice = random.Random(0)
    accepted, lines = 0, []
    for _ in range(2000):
        argv = random_argv(dice) or ["train"]
        try:
            settings = parse_arguments(argv)
        except UserError as error:
            lines += error.faults
            continue
        accepted += 1
        assert parse_arguments(command_line(settings)) == settings, argv
    assert accepted > 100
    assert all(line and "\n" not in line for line in lines)


def test_any_config_gives_settings_or_a_user_error(config):
    dice = random.Random(1)
    odd = ["[1, 2]", "[]", "{a: 1}", "!!int x", "2020-01-01", "*x", "&x y", "null", "| \n  a\n  b", "yes", "'none'"]
    accepted = 0
    for _ in range(300):
        name, other = dice.sample(list(known_flags("train")), 2)
        value, more = dice.choice([*VALUES, *odd, *JUNK]), dice.choice([f"\n{other}: 1", "", ""])
        path = config(f"{name}: {value}{more}", dice.choice(["run.yaml", "run.yaml", "run.json"]))
        try:
            settings = parse_arguments([*NEEDED[:4], "--dry_run", "--config", path])
        except UserError:
            continue
        accepted += 1
        assert parse_arguments(command_line(settings)) == settings, (name, value)
    assert accepted > 20
