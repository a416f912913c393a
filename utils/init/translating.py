"""A config of another tool as one of ours: each line translated, or commented with the reason why it is not."""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..arguments import parse_arguments
from ..arguments.config_file import Entry, read_config
from ..arguments.flag_values import YES_NO
from ..arguments.foreign_configs import LIKE_OURS, TOOLS, tool_of
from ..arguments.foreign_names import KTO, REFERENCE_FREE, read_as_ours
from ..arguments.parsing import known_flags, why_unknown
from ..errors import UserError
from ..settings.registry import DEFAULT_VERB

NOT_HERE = {"orpo": REFERENCE_FREE, "simpo": REFERENCE_FREE, "cpo": REFERENCE_FREE, "kto": KTO}
SHOWN = 80  # characters of a value that is not taken over

# key of a tool -> why its line is not taken over
REASONS = {
    "ddp_find_unused_parameters": "the launch sets it",
    "chat_template": "a name of that tool; the tokenizer's template is used, or --chat_template FILE",
    "columns": "rows are recognised by their columns",
    "dataset_dir": "part of dataset_name",
    "deepspeed": "launch with a config of examples/accelerate",
    "do_eval": "held-out pairs are always evaluated before and after; eval_steps adds more",
    "eval_dataset": "held-out data is validation_split",
    "fsdp": "launch with examples/accelerate/fsdp2.yaml",
    "fsdp_config": "launch with examples/accelerate/fsdp2.yaml",
    "gradient_checkpointing_kwargs": "checkpointing is always non-reentrant",
    "image_max_pixels": "only text is supported",
    "lora_fan_in_fan_out": "it follows from the model's layers",
    "model_type": "it is read from the model's config.json",
    "overwrite_cache": "caches are checked, and rebuilt when the data change",
    "pad_to_sequence_len": "nothing is padded",
    "plot_loss": "report.html has the curves",
    "sample_packing": "each prompt is computed once and nothing is padded",
    "packing": "each prompt is computed once and nothing is padded",
    "special_tokens": "the tokenizer's own are used",
    "roles": "rows are recognised by their columns",
    "strict": "unknown settings are always refused",
    "template": "the tokenizer's own chat template is used",
    "test_datasets": "held-out data is validation_split",
    "tokenizer_type": "it is read from the tokenizer's files",
    "train_on_inputs": "prompts never enter the loss",
    "video_max_pixels": "only text is supported",
    "wandb_log_model": "models are not uploaded to a tracker",
    "wandb_watch": "gradients are not sent to a tracker",
}


@dataclass(frozen=True)
class Translation:
    """Our config as text, what it is of, and what is still to be filled in."""

    tool: str
    verb: str
    text: str
    faults: tuple[str, ...]


Line = tuple[str | None, str, str]  # our setting (None for a comment), the text, and the comment behind it
Setting = tuple[str, tuple[str, ...]]  # name and texts, as --config reads them


class _NotTaken(Exception):
    """Why a line is not taken over."""


def translate_config(path: str) -> Translation:
    """Our config for a file of another tool.

    Raises:
        UserError: the file cannot be read, is of no tool that is known, or trains in a way that is not done here.
    """
    entries = {entry.name: entry for entry in read_config(path)}
    tool = tool_of(entries)
    if tool is None:
        known = ", ".join(TOOLS)
        raise UserError(
            f"--from {path}: is not a config of a known tool ({known}); --config reads a config of this script"
        )
    verb = _verb_of(path, entries)
    lines = _translate(tool, verb, entries, Path(path).expanduser().parent)
    faults: tuple[str, ...] = ()
    for _ in range(3):  # what has no effect with what is left is left out too
        faults = _check(lines, verb)
        bad = {match[1]: fault for fault in faults if (match := re.match(r"config: (\w+)", fault))}
        if not bad:
            break
        for number, (name, text, _) in enumerate(lines):
            if name in bad:
                lines[number] = (None, f"# {text}", _reason(bad[name], name))
    head = [
        f"# Translated from {Path(path).name}, a config of {tool}: each line, or the reason why it is left out.",
        *([f"verb: {verb}"] if verb != DEFAULT_VERB else []),
    ]
    body = [f"{text}  # {comment}" if comment else text for _, text, comment in lines]
    return Translation(tool, verb, "\n".join([*head, *body, ""]), faults)


def _reason(fault: str, name: str) -> str:
    return fault.removeprefix(f"config: {name}").lstrip(": ")


def _check(lines: list[Line], verb: str) -> tuple[str, ...]:
    """The faults of the config that the lines make, as if it were called config."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "config.yaml"
        path.write_text("\n".join([f"verb: {verb}", *(text for _, text, _ in lines)]), encoding="utf-8")
        try:
            parse_arguments(["--config", str(path)])
        except UserError as error:
            return tuple(fault.replace(str(path), "config") for fault in error.faults)
    return ()


def _verb_of(path: str, entries: Mapping[str, Entry]) -> str:
    for name in ("rl", "stage", "rlhf_type"):
        word = " ".join(entries[name].texts).lower() if name in entries else ""
        if word in NOT_HERE or word in ("pt", "rm", "ppo", "grpo", "gkd"):
            raise UserError(f"--from {path}: {name} is {word}: {NOT_HERE.get(word, 'it is not supported')}")
        if word and name != "stage":
            return "train"
        if word:
            return "sft" if word == "sft" else "train"
    of_sft = {"packing", "completion_only_loss", "assistant_only_loss", "dataset_text_field", "train_on_inputs"}
    preference = {"beta", "loss_type", "rlhf_type", "max_prompt_length", "precompute_ref_log_probs"}
    if "base_model" in entries and "rl" not in entries:
        return "sft"
    return "sft" if of_sft & entries.keys() and not preference & entries.keys() else "train"


def _translate(tool: str, verb: str, entries: Mapping[str, Entry], folder: Path) -> list[Line]:
    """Of each line: the name of our setting (None for a comment), the text, and the comment behind it."""
    flags = known_flags(verb)
    lines: list[Line] = []
    said: dict[str, tuple[str, ...]] = {}
    for name, entry in entries.items():
        written = f"# {name}: {_shown(entry)}"
        try:
            settings = _settings_of(tool, entry, entries, folder, flags)
        except _NotTaken as reason:
            lines.append((None, written, str(reason)))
            continue
        new = [(ours, texts) for ours, texts in settings if ours not in said]
        if any(said.get(ours, texts) != texts for ours, texts in settings):
            lines.append((None, written, "a line above sets it otherwise"))
        elif not new:
            lines.append((None, written, "set above" if settings else "already the default"))
        for ours, texts in new:
            said[ours] = texts
            comment = name if ours != name else ""
            lines.append((ours, f"{ours}: {_as_yaml(texts, entry if ours == name else None)}", comment))
    return lines


def _settings_of(
    tool: str, entry: Entry, entries: Mapping[str, Entry], folder: Path, flags: Mapping[str, Any]
) -> list[Setting]:
    """What one line of the tool's config stands for here. Raises _NotTaken with the reason where it is nothing."""
    name, texts = entry.name, entry.texts
    if entry.shape == "null":
        raise _NotTaken("not set")
    if (special := SPECIAL.get(name)) is not None:
        try:
            return special(entry, entries, folder)
        except (ValueError, LookupError, TypeError, AttributeError):
            raise _NotTaken("has an unknown form") from None
    if name in REASONS and not (name in flags and tool == LIKE_OURS and name != "chat_template"):
        raise _NotTaken(REASONS[name])
    if name == "fp16" and _is_true(entries.get("bf16")) and not _is_true(entry):
        return []
    if name == "bf16" and not _is_true(entry) and texts[:1] != ("auto",) and _is_true(entries.get("fp16")):
        return []
    if name in flags:
        return [(name, texts)]
    faults: list[str] = []
    read, _ = read_as_ours([entry], flags, faults)
    if faults:
        raise _NotTaken(faults[0].removeprefix(entry.label).lstrip(": ").removeprefix("no such flag; "))
    if any(made.name not in flags for made in read):
        raise _NotTaken(why_unknown(DEFAULT_VERB, read[0].name))
    return [(made.name, made.texts or ("true",)) for made in read]


def _is_true(entry: Entry | None) -> bool:
    return entry is not None and YES_NO.get(" ".join(entry.texts).lower()) is True


def _items(entry: Entry) -> list[Any]:
    """The items of a list, mappings among them as such."""
    return [json.loads(text) if text.startswith(("{", "[")) else text for text in entry.texts]


def _joined(names: list[str]) -> list[Setting]:
    return [("dataset_name", (",".join(dict.fromkeys(names)),))] if names else []


def _same(values: Iterable[Any], ours: str) -> list[Setting]:
    """A setting that all sources share; nothing where they differ or have none."""
    found = {str(value) for value in values if value is not None}
    return [(ours, tuple(found))] if len(found) == 1 else []


def _datasets(entry: Entry, entries: Mapping[str, Entry], folder: Path) -> list[Setting]:
    """The list of Axolotl and TRL: path, split, name (the configuration), data_files, and the names of columns."""
    sources = [item if isinstance(item, dict) else {"path": item} for item in _items(entry)]
    names = []
    for source in sources:
        files = source.get("data_files")
        files = [files] if isinstance(files, str) else list(files or ())
        share = f":{source['fraction']}" if source.get("fraction") else ""
        names += [name + share for name in files or [str(source.get("path"))]]
    return [
        *_joined(names),
        *_same((source.get("split") for source in sources), "dataset_split"),
        *_same((source.get("name") for source in sources), "dataset_config"),
        *_same((source.get("field_prompt") or source.get("field_messages") for source in sources), "prompt_column"),
        *_same((source.get("field_chosen") for source in sources), "chosen_column"),
        *_same((source.get("field_rejected") for source in sources), "rejected_column"),
    ]


def _mixer(entry: Entry, entries: Mapping[str, Entry], folder: Path) -> list[Setting]:
    shares = json.loads(entry.texts[0])
    return _joined([name if float(share) == 1 else f"{name}:{share}" for name, share in shares.items()])


def _mixture(entry: Entry, entries: Mapping[str, Entry], folder: Path) -> list[Setting]:
    value = json.loads(entry.texts[0])
    sources = value.get("datasets") or []
    names = [
        source["id"] if float(source.get("weight") or 1) == 1 else f"{source['id']}:{source['weight']}"
        for source in sources
    ]
    held_out = value.get("test_split_size")
    return [
        *_joined(names),
        *_same((source.get("config") for source in sources), "dataset_config"),
        *_same((source.get("split") for source in sources), "dataset_split"),
        *([("validation_split", (str(held_out),))] if held_out else []),
    ]


def _splits(entry: Entry, entries: Mapping[str, Entry], folder: Path) -> list[Setting]:
    train = [name for name in entry.texts if name.startswith("train")]
    held_out = [name for name in entry.texts if not name.startswith("train")]
    return [
        *([("dataset_split", (train[0],))] if train else []),
        *([("validation_split", (held_out[0],))] if held_out else []),
    ]


def _dataset(entry: Entry, entries: Mapping[str, Entry], folder: Path) -> list[Setting]:
    """LLaMA-Factory's names of dataset_info.json, or ms-swift's NAME:CONFIG#COUNT."""
    words = [word.strip() for text in entry.texts for word in text.split(",") if word.strip()]
    if "stage" not in entries:
        names, configs = [], []
        for word in words:
            name, _, count = word.partition("#")
            name, _, config = name.partition(":")
            names.append(f"{name}:{count}" if count else name)
            configs.append(config or None)
        return [*_joined(names), *_same(configs, "dataset_config")]
    where = entries["dataset_dir"].texts[0] if "dataset_dir" in entries else "data"
    info = next(
        (path for base in (Path(where), folder / where, folder) if (path := base / "dataset_info.json").is_file()), None
    )
    if info is None:
        raise _NotTaken(f"there is no dataset_info.json in {where}, which says what it is")
    try:
        known = json.loads(info.read_text(encoding="utf-8"))
        rows = [known[word] for word in words]
    except (ValueError, KeyError, OSError) as error:
        raise _NotTaken(f"{info}: does not describe it ({type(error).__name__}: {error})") from None
    names = [str(info.parent / row["file_name"]) if "file_name" in row else row.get("hf_hub_url", "?") for row in rows]
    names = [
        f"{name}:{row['num_samples']}" if "num_samples" in row else name for name, row in zip(names, rows, strict=True)
    ]
    columns = [row.get("columns") or {} for row in rows]
    plain = not any("messages" in each for each in columns)
    return [
        *_joined(names),
        *_same((row.get("subset") for row in rows), "dataset_config"),
        *_same((row.get("split") for row in rows), "dataset_split"),
        *(_same((each.get("prompt") for each in columns), "prompt_column") if plain else []),
        *(_same((each.get("chosen") for each in columns), "chosen_column") if plain else []),
        *(_same((each.get("rejected") for each in columns), "rejected_column") if plain else []),
    ]


def _per_epoch(ours: str) -> Callable[[Entry, Mapping[str, Entry], Path], list[Setting]]:
    """How often in an epoch, as a share of all steps."""

    def convert(entry: Entry, entries: Mapping[str, Entry], folder: Path) -> list[Setting]:
        epochs = entries.get("num_epochs")
        count = float(entry.texts[0]) * float(epochs.texts[0] if epochs else 1)
        if count <= 1:
            raise _NotTaken("always once, at the end")
        return [(ours, (f"{1 / count:.4g}",))]

    return convert


def _target(entry: Entry, entries: Mapping[str, Entry], folder: Path) -> list[Setting]:
    texts = tuple(word for text in entry.texts for word in re.split(r"[,\s]+", text) if word)
    return [("lora_target_modules", ("all-linear",) if texts in (("all",), ("all-linear",)) else texts)]


def _target_linear(entry: Entry, entries: Mapping[str, Entry], folder: Path) -> list[Setting]:
    return [("lora_target_modules", ("all-linear",))] if _is_true(entry) else []


def _tracker(ours: str) -> Callable[[Entry, Mapping[str, Entry], Path], list[Setting]]:
    def convert(entry: Entry, entries: Mapping[str, Entry], folder: Path) -> list[Setting]:
        reports = entries.get("report_to")
        wandb = reports is not None and "wandb" in reports.texts
        if "base_model" not in entries and not wandb:
            raise _NotTaken("there is no --report_to wandb that would use it")
        on: list[Setting] = [] if wandb else [("use_wandb", ("true",))]
        return [*on, (ours, entry.texts)]

    return convert


def _loss_of_rl(entry: Entry, entries: Mapping[str, Entry], folder: Path) -> list[Setting]:
    word = entry.texts[0].lower()
    return [] if word == "dpo" else [("loss_type", (word,))]


def _nothing(entry: Entry, entries: Mapping[str, Entry], folder: Path) -> list[Setting]:
    return []


SPECIAL: dict[str, Callable[[Entry, Mapping[str, Entry], Path], list[Setting]]] = {
    "datasets": _datasets,
    "dataset_mixer": _mixer,
    "dataset_mixture": _mixture,
    "dataset_splits": _splits,
    "dataset": _dataset,
    "evals_per_epoch": _per_epoch("eval_steps"),
    "saves_per_epoch": _per_epoch("save_steps"),
    "lora_model_dir": lambda entry, *_: [("adapter_name_or_path", entry.texts)],
    "lora_target": _target,
    "lora_target_linear": _target_linear,
    "preprocessing_num_workers": lambda entry, *_: [("dataset_num_proc", entry.texts)],
    "rl": _loss_of_rl,
    "rl_beta": lambda entry, *_: [("beta", entry.texts)],
    "run_name": _tracker("wandb_run_name"),
    "stage": _nothing,
    "target_modules": _target,
    "wandb_name": _tracker("wandb_run_name"),
    "wandb_project": _tracker("wandb_project"),
}


def _shown(entry: Entry) -> str:
    if entry.shape == "null":
        return "null"
    text = " ".join(entry.texts) if entry.shape != "list" else f"[{', '.join(entry.texts)}]"
    text = " ".join(text.split())
    return text if len(text) <= SHOWN else f"{text[: SHOWN - 3]}..."


def _as_yaml(texts: tuple[str, ...], entry: Entry | None) -> str:
    if entry is not None and entry.shape == "mapping":
        return texts[0]
    words = [_quoted(text) for text in texts]
    return words[0] if len(words) == 1 and (entry is None or entry.shape == "text") else f"[{', '.join(words)}]"


def _quoted(text: str) -> str:
    plain = re.fullmatch(r"[A-Za-z0-9./+-][\w./+-]*", text) and text.lower() not in ("null", "nan")
    return text if plain else json.dumps(text, ensure_ascii=False)
