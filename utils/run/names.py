"""The names of the files and folders of a run."""

from __future__ import annotations

import re
from fnmatch import fnmatchcase

RECORD = "run.json"
LOCK = "run.lock"
METRICS = "metrics.jsonl"
PAIRS = "held_out_pairs.jsonl"
EXAMPLES = "held_out_examples.jsonl"
SAMPLES = "samples.jsonl"
BAD_PAIRS = "bad_pairs.jsonl"
REPORT = "report.html"
EVALUATION_FILES = ("evaluation.json", "evaluation_pairs.jsonl", "evaluation.html")  # record, rows, page
COMPARISON_FILES = ("comparison.json", "comparison.jsonl", "comparison.html")
RESULTS = {"evaluate": EVALUATION_FILES, "compare": COMPARISON_FILES}
TRAINER_STATE = "trainer_state.json"
ADAPTER_CONFIG = "adapter_config.json"
PICKLE_ENDINGS = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".npy", ".npz", ".joblib")
CHECKPOINT = re.compile(r"checkpoint-(\d+)")
SET_ASIDE = re.compile(r"checkpoint-\d+\.damaged(-\d+)?")
UNFINISHED_MODEL = ".model.partial"
HALF_MADE = re.compile(rf"\.checkpoint-\d+(\.damaged(-\d+)?)?\.(partial|former)|{re.escape(UNFINISHED_MODEL)}")
HALF_WRITTEN = re.compile(r"\.(.+)\.[0-9a-f]+\.tmp")  # see `unused_name`
RESULT_FOLDER = re.compile(r"(evaluation|comparison)(-checkpoint-\d+)?")
# A model or adapter with its tokenizer, as patterns: what is used elsewhere and may be uploaded. Records name hosts and
# paths, and pages hold texts of the data.
MODEL_FILES = (
    *("model.safetensors", f"model-{'[0-9]' * 5}-of-{'[0-9]' * 5}.safetensors", "model.safetensors.index.json"),
    *("config.json", "adapter_model.safetensors", ADAPTER_CONFIG, "generation_config.json"),
    *("chat_template.jinja", "tokenizer.json", "tokenizer.model", "tokenizer_config.json"),
    *("special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt"),
)
OWN_FILES = (RECORD, LOCK, METRICS, PAIRS, EXAMPLES, SAMPLES, BAD_PAIRS, REPORT, "README.md", *MODEL_FILES)


def is_own(name: str) -> bool:
    """Whether a run puts a file of this name into its folder, and so whether --overwrite_output_dir may remove it."""
    return any(fnmatchcase(name, pattern) for pattern in OWN_FILES)


def step_in_name(checkpoint: str) -> int:
    """The step of a checkpoint, by the name of its folder."""
    return int(checkpoint.rpartition("-")[2])
