"""The groups of settings that are not of a training run: a verb has those that its row in registry.py lists."""

from __future__ import annotations

from dataclasses import dataclass

from .flags import ABOVE_ZERO, AT_LEAST_ONE, AT_LEAST_ZERO, CLOSED_UNIT, PORT, SHARE_ABOVE_ZERO, Bound, flag

# How the pairs of --dataset_name are read. A run's own pairs are read as the run read them.
READ_WITH = (
    *("dataset_config", "dataset_split", "dataset_format", "prompt_column", "chosen_column", "rejected_column"),
    *("pairs_per_prompt", "min_score_gap", "min_score_ratio", "strip_citations", "max_samples", "on_bad_rows"),
)
ENOUGH_DRAWS = Bound("100 or more", lambda value: value >= 100)
SHARDINGS = ("none", "zero1", "zero2", "zero3", "fsdp2")


@dataclass(frozen=True)
class ComparisonSettings:
    """comparison: two models answer the same prompts, judges pick the better responses"""

    baseline: str | None = flag(
        None,
        "hub name or folder of the model to compare with (default: the reference of the run)",
    )
    prompts: str | None = flag(
        None,
        "prompts for both models: a hub name, a folder, a .txt file with one prompt per line, or .jsonl, .json, .csv, "
        ".parquet; NAME[SPLIT] names a split (default: the prompts that the run held out)",
    )
    judge: tuple[str, ...] | None = flag(
        None,
        "implicit_reward (of the run); file.py:function(prompts, responses) that returns scores; the folder or hub "
        "name of a reward model; the URL of an OpenAI-compatible endpoint, whose key is read from OPENAI_API_KEY; or "
        "vote, to judge yourself; several are allowed (default: none, the page shows the responses side by side)",
        many=True,
    )
    vote_port: int | None = flag(
        None,
        "local port of the voting page (default: any free one)",
        bound=PORT,
    )


@dataclass(frozen=True)
class SamplingSettings:
    """how responses are sampled"""

    num_prompts: int | None = flag(
        None,
        "use the first N different prompts (default: all)",
        bound=AT_LEAST_ONE,
        verbs=("data", "compare"),
        says={"compare": "use the first N different prompts (default: 100)"},
    )
    max_new_tokens: int = flag(
        256,
        "maximum new tokens per response",
        bound=AT_LEAST_ONE,
        says={"compare": "maximum new tokens per response (default: 256, and at most half of a model's context)"},
    )
    temperature: float = flag(
        1.0,
        "sampling temperature; 0 is greedy decoding",
        bound=AT_LEAST_ZERO,
    )
    top_p: float = flag(
        1.0,
        "nucleus sampling: the most likely tokens with this total probability",
        bound=SHARE_ABOVE_ZERO,
    )
    top_k: int = flag(0, "sample from the N most likely tokens (default: 0, all)", bound=AT_LEAST_ZERO)
    repetition_penalty: float = flag(
        1.0,
        "above 1, tokens that already occurred (in the prompt too) become less likely",
        bound=ABOVE_ZERO,
        usual="1.1 is usual",
    )


@dataclass(frozen=True)
class StatusSettings:
    """runs"""

    folder: str = flag(
        "runs",
        "folder with the runs, up to four levels deep; --folder itself may be omitted",
    )
    json: bool = flag(False, "print all that is known of each run as JSON")
    report: str | None = flag(
        None,
        "write a page that compares the runs: curves, metrics, and the settings that differ (.html)",
    )


@dataclass(frozen=True)
class ReportSettings:
    """run"""

    run: str | None = flag(None, "the folder of the run; --run itself may be omitted")


SITUATIONS = {
    "cpu_trial": "a trial on a CPU, with the bundled model and pairs",
    "one_24gb_qlora": "7B or 8B on one 24 GB GPU: LoRA on a 4-bit base",
    "one_80gb_lora": "7B to 14B on one 80 GB GPU: LoRA",
    "eight_gpus_full": "full fine-tuning of 7B or 8B on 8 GPUs",
}


@dataclass(frozen=True)
class InitSettings:
    """the config to write"""

    situation: str | None = flag(
        None,
        "; ".join(f"{name}: {what}" for name, what in SITUATIONS.items()),
        choices=tuple(SITUATIONS),
    )
    from_file: str | None = flag(
        None,
        "a config of Axolotl, LLaMA-Factory, alignment-handbook, ms-swift or TRL to translate; also --from FILE",
    )
    output_file: str = flag("config.yaml", "the file to write; an existing file is not overwritten")


@dataclass(frozen=True)
class JudgeSettings:
    """a judge behind an endpoint"""

    judge_model: str | None = flag(None, "name of the model at the endpoint")
    max_judge_requests: int | None = flag(
        None,
        "stop after N requests to the endpoint (default: no limit)",
        bound=AT_LEAST_ONE,
    )
    judge_requests_per_minute: float | None = flag(
        None,
        "maximum requests to the endpoint per minute (default: no limit)",
        bound=ABOVE_ZERO,
    )


@dataclass(frozen=True)
class PlanSettings:
    """plan"""

    gpu: str | None = flag(
        None,
        "type of GPU to plan for: RTX 4090, A100 80GB, H100 80GB, ... (default: this machine)",
    )
    gpu_memory: float | None = flag(
        None,
        "memory of each device in GiB, for a GPU that is not in the list",
        bound=ABOVE_ZERO,
    )
    gpu_tflops: float | None = flag(
        None,
        "its 16-bit matmul rate in TFLOP/s, for a GPU that is not in the list",
        bound=ABOVE_ZERO,
    )
    num_devices: int = flag(1, "devices that train together", bound=AT_LEAST_ONE)
    sharding: str | None = flag(
        None,
        "what is sharded across devices: none (DDP), zero1, zero2, zero3, fsdp2 (default: the least that fits)",
        choices=SHARDINGS,
    )
    offload: str | None = flag(
        None,
        "what is offloaded to CPU memory: optimizer (with the gradients; zero2, zero3), weights (zero3 and fsdp2; with "
        "gradients and optimizer)",
        choices=("optimizer", "weights"),
    )
    efficiency: float = flag(
        0.4,
        "share of the peak matmul rate that training reaches (MFU)",
        bound=CLOSED_UNIT,
    )
    measure: bool = flag(
        False,
        "take two real steps on the longest pairs here, and correct the estimate with them",
    )


@dataclass(frozen=True)
class MergeSettings:
    """merge"""

    merge_into: str = flag(
        "base",
        "what the adapter is merged into: base (the base's own weights), or, where it was trained on 4 bits, quantized "
        "(the dequantized 4-bit weights: exactly the model that was trained)",
        choices=("base", "quantized"),
    )
    safe_merge: bool = flag(False, "let PEFT check each merged matrix for NaN")
    max_shard_size: str = flag("50GB", "maximum size of one weights file: 5GB, 500MB, ...")
    skip_verification: bool = flag(
        False,
        "do not compare the merged model with the adapter on its base; merge.json records that",
    )
    push_to_hub: str | None = flag(
        None,
        "also upload the merged model to this hub repository (private if it is new)",
    )


@dataclass(frozen=True)
class ChatSettings:
    """the conversation"""

    system_prompt: str | None = flag(None, "system prompt of the conversation")
    tools: str | None = flag(
        None, "JSON file with a list of tools that the model may call, in OpenAI's form; /tool TEXT answers a call"
    )
    prompt: str | None = flag(
        None,
        "answer one message on stdout and exit (as with a piped message)",
    )
    compare_with: str | None = flag(
        None,
        "a second model that answers each message too: a hub name or folder, or reference (what the run was measured "
        "against)",
    )


@dataclass(frozen=True)
class EvaluationSettings:
    """intervals"""

    bootstrap_samples: int = flag(
        2000,
        "bootstrap resamples of the prompts for the 95% intervals and the tests",
        bound=ENOUGH_DRAWS,
        usual="1000 to 10000 is usual",
    )
