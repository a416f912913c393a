"""Which other tool a config file is of."""

from __future__ import annotations

from collections.abc import Iterable

from ..run.program import join_command

# tool -> keys of which one must be there, with those that must all be
TOOLS: dict[str, tuple[set[str], set[str]]] = {
    "Axolotl": ({"datasets", "rl", "sequence_len", "micro_batch_size", "adapter"}, {"base_model"}),
    "LLaMA-Factory": ({"finetuning_type", "cutoff_len", "pref_beta", "pref_loss", "template"}, {"stage"}),
    "ms-swift": ({"rlhf_type", "tuner_type", "train_type", "split_dataset_ratio", "quant_bits"}, {"model"}),
    "alignment-handbook": ({"dataset_mixer", "dataset_mixture"}, set()),
    "TRL": ({"use_peft", "load_in_4bit", "dataset_train_split", "dataset_test_split", "datasets"}, set()),
}
LIKE_OURS = "TRL"  # the tool whose flat keys are read as they are


def tool_of(names: Iterable[str]) -> str | None:
    """The tool whose config has these keys; None for one of ours."""
    names = set(names)
    return next((tool for tool, (any_of, all_of) in TOOLS.items() if names & any_of and names >= all_of), None)


def describe_foreign(path: str, tool: str) -> str:
    """That a file given as --config is of another tool, and the command that writes ours."""
    article = "an" if tool[0] in "Aam" else "a"
    command = join_command(["init", "--from", path, "--output_file", "config.yaml"])
    return f"{path}: is {article} {tool} config; translate it with {command}"
