"""The settings of the data: what is read and how, what is done with findings, how pairs are made."""

from __future__ import annotations

from dataclasses import dataclass

from ..data.layouts import PAIR_FORMATS, SFT_FORMATS
from .flags import AT_LEAST_ONE, AT_LEAST_TWO, AT_LEAST_ZERO, READS_DATA, READS_PAIRS, SCORES_ROWS, SPLITS_DATA, flag


@dataclass(frozen=True)
class DataSettings:
    """data"""

    dataset_name: str | None = flag(
        None,
        "hub name, folder, or .jsonl[.gz], .json, .csv or .parquet file; several separated by commas, each with "
        "an optional fraction or number of its pairs: a.jsonl,b.jsonl:0.3,org/c:5000",
        verbs=(READS_DATA, "init"),
    )
    dataset_config: str | None = flag(None, "configuration (subset) of a hub dataset", verbs=READS_DATA)
    dataset_split: str | None = flag(
        None,
        "split to train on (default: train, train_prefs, or the only one)",
        verbs=READS_DATA,
        says={
            "data": "split to check (default: train, train_prefs, or the only one)",
            "evaluate": "split to evaluate on (default: test or validation where there is one)",
        },
    )
    dataset_format: str | None = flag(
        None,
        f"how to read the rows: {', '.join(PAIR_FORMATS)}; for sft also {', '.join(SFT_FORMATS)} "
        "(default: by their columns)",
        choices=(*PAIR_FORMATS, *SFT_FORMATS),
        verbs=READS_DATA,
    )
    dataset_adapter: str | None = flag(
        None,
        "your own file.py:function: takes a row (a dict), returns a pair (a dict), a list of pairs, or None",
        verbs=READS_DATA,
    )
    prompt_column: str | None = flag(
        None, "column with the prompt; dots reach into nested fields", verbs=(READS_DATA, "compare")
    )
    chosen_column: str | None = flag(None, "column with the preferred response", verbs=READS_DATA)
    rejected_column: str | None = flag(None, "column with the other response", verbs=READS_PAIRS)
    completion_column: str | None = flag(None, "column with the response to train on", verbs="sft")
    text_column: str | None = flag(None, "column with whole texts to train on", verbs="sft")
    pairs_per_prompt: int | None = flag(
        None,
        "rows with several answers: maximum pairs per prompt, the best against lower-scored ones (default: 1)",
        bound=AT_LEAST_ONE,
        verbs=READS_PAIRS,
    )
    min_score_gap: float | None = flag(
        None,
        "rows with scores: minimum score gap between chosen and rejected",
        bound=AT_LEAST_ZERO,
        verbs=READS_PAIRS,
    )
    min_score_ratio: float | None = flag(
        None, "rows with a score_ratio (SHP): minimum ratio", bound=AT_LEAST_ONE, usual="2 is usual", verbs=READS_PAIRS
    )
    strip_citations: bool = flag(
        False, "webgpt: remove citations such as [1] or [2, 3] from the answers", verbs=READS_DATA
    )
    group_by: str | None = flag(
        None, "column whose equal values stay on one side of the split (default: the prompt)", verbs=SPLITS_DATA
    )
    validation_split: str | None = flag(
        None,
        "held-out data: a fraction, the name of a split, or none "
        "(default: the data's own test or validation split, else 0.1 of the prompts, at most 1000 rows evaluated)",
        verbs=SPLITS_DATA,
    )
    streaming: bool = flag(False, "for data too large to read in full: stream only the rows that --max_steps trains on")
    max_samples: int | None = flag(
        None,
        "use the first N good rows, in file order (of each source)",
        bound=AT_LEAST_ONE,
        verbs=READS_DATA,
        says={"merge": "check on the first N pairs (default: 64)"},
    )
    on_bad_rows: str = flag(
        "skip_few",
        "rows that cannot be trained on: skip_few leaves them out where they are fewer than 1% of the rows, and stops "
        "otherwise; skip leaves out any number; error stops at one. All are counted",
        choices=("skip_few", "skip", "error"),
        verbs=SCORES_ROWS,
    )
    max_length: int | None = flag(
        None,
        "tokens per prompt + response (default: 1024, or the model's context if shorter)",
        bound=AT_LEAST_TWO,
        verbs=READS_DATA,
    )
    truncation: str = flag(
        "shorten_prompt",
        "for longer pairs: shorten_prompt from its left, then truncate the response (which then gets no EOS token); "
        "drop the pair; or stop with an error. All are counted",
        choices=("shorten_prompt", "drop", "error"),
        verbs=SCORES_ROWS,
    )


REMOVABLE = (
    "ties",
    "score_contradictions",
    "near_duplicates",
    "broken_text",
    "bad_calls",
    "held_out_prompts",
    "overlap",
    "too_long",
)


@dataclass(frozen=True)
class InspectionSettings:
    """what to do with the findings"""

    report_file: str | None = flag(None, "write the findings as a page that opens in any browser (.html)", verbs="data")
    json_file: str | None = flag(
        None, "write every number as JSON; - prints it instead of the summary", verbs=("data", "plan")
    )
    output_file: str | None = flag(
        None,
        "write the clean pairs (.jsonl or .parquet): without bad rows, duplicates and pairs with contradictory labels",
        verbs="data",
    )
    remove: tuple[str, ...] | None = flag(
        None,
        f"what else to leave out of --output_file: {', '.join(REMOVABLE)}",
        choices=REMOVABLE,
        many=True,
        verbs="data",
    )
    compare: str | None = flag(
        None,
        "data to check for prompt overlap, such as an evaluation set; NAME[SPLIT] names a split",
        verbs="data",
    )


@dataclass(frozen=True)
class GenerationSettings:
    """pair generation: a model answers prompts, a scorer ranks the answers"""

    generate: bool = flag(
        False,
        "make pairs instead: answer the prompts of --dataset_name with --model_name_or_path, score the responses, and "
        "write the best and the worst of each prompt to --output_file; the same command resumes after an interruption",
    )
    scorer: str | None = flag(
        None,
        "file.py:function(prompts, responses) that returns scores; the folder or hub name of a reward model; or the "
        "URL of an OpenAI-compatible endpoint, whose key is read from OPENAI_API_KEY",
    )
    num_generations: int = flag(4, "responses per prompt", bound=AT_LEAST_TWO)
