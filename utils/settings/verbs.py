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
    """comparing: two models answer the same prompts, judges say whose answers are better"""

    baseline: str | None = flag(
        None,
        "hub name or folder of the model to compare with (default: the reference of the run)",
    )
    prompts: str | None = flag(
        None,
        "what both are asked: a hub name, a folder, a .txt file with a prompt on each line, or .jsonl, .json, .csv, "
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
        "port of the page to vote on, on this machine (default: any free one)",
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
        "most tokens of a response",
        bound=AT_LEAST_ONE,
        says={"compare": "most tokens of a response (default: 256, and at most half of a model's context)"},
    )
    temperature: float = flag(
        1.0,
        "how freely responses are sampled; 0 takes the likeliest token each time",
        bound=AT_LEAST_ZERO,
    )
    top_p: float = flag(
        1.0,
        "sample from the likeliest tokens that have this share of all",
        bound=SHARE_ABOVE_ZERO,
    )
    top_k: int = flag(0, "sample from the N likeliest tokens (default: 0, all)", bound=AT_LEAST_ZERO)
    repetition_penalty: float = flag(
        1.0,
        "above 1, tokens that occurred before, in the prompt too, become less likely",
        bound=ABOVE_ZERO,
        usual="1.1 is usual",
    )


@dataclass(frozen=True)
class StatusSettings:
    """runs"""

    folder: str = flag(
        "runs",
        "the folder that the runs are in, up to four levels below it; may stand without --folder",
    )
    json: bool = flag(False, "print everything that is known of each run as JSON")
    report: str | None = flag(
        None,
        "write a page that compares the runs: curves, metrics, and the settings that differ (.html)",
    )


@dataclass(frozen=True)
class ReportSettings:
    """run"""

    run: str | None = flag(None, "the folder of the run; may stand without --run")


SITUATIONS = {
    "cpu_trial": "a look on a CPU, with the model and pairs that come with the script",
    "one_24gb_qlora": "7B or 8B on one 24 GB GPU: LoRA on a 4-bit base",
    "one_80gb_lora": "7B to 14B on one 80 GB GPU: LoRA",
    "eight_gpus_full": "all weights of 7B or 8B on 8 GPUs",
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
    output_file: str = flag("config.yaml", "the file to write; one that exists is left alone")


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
        "most requests to the endpoint in a minute (default: no limit)",
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
        "memory of each device in GiB, for a type that is not known",
        bound=ABOVE_ZERO,
    )
    gpu_tflops: float | None = flag(
        None,
        "its 16-bit matrix products in TFLOP/s, for a type that is not known",
        bound=ABOVE_ZERO,
    )
    num_devices: int = flag(1, "devices that train together", bound=AT_LEAST_ONE)
    sharding: str | None = flag(
        None,
        "what is divided among several devices: none (DDP), zero1, zero2, zero3, fsdp2 (default: the least that fits)",
        choices=SHARDINGS,
    )
    offload: str | None = flag(
        None,
        "what waits in main memory: optimizer (with the gradients; zero2, zero3), weights (of zero3 and fsdp2, and all "
        "that belongs to them)",
        choices=("optimizer", "weights"),
    )
    efficiency: float = flag(
        0.4,
        "share of the devices' matrix-product rate that training reaches",
        bound=CLOSED_UNIT,
    )
    measure: bool = flag(
        False,
        "take two real steps on the longest pairs here, and correct the plan by them",
    )


@dataclass(frozen=True)
class MergeSettings:
    """how an adapter becomes part of its model"""

    merge_into: str = flag(
        "base",
        "what the adapter is added to: base (the base's own weights), or, where it was trained on 4 bits, quantized "
        "(the 4-bit weights written out, exactly the model that was trained)",
        choices=("base", "quantized"),
    )
    safe_merge: bool = flag(False, "let PEFT look for NaN in each matrix before it is replaced")
    max_shard_size: str = flag("50GB", "most of one file of weights: 5GB, 500MB, ...")
    skip_verification: bool = flag(
        False,
        "do not compare the merged model with the adapter on its base; merge.json says so",
    )
    push_to_hub: str | None = flag(
        None,
        "also upload the merged model to this hub repository, made private if it is new",
    )


@dataclass(frozen=True)
class ChatSettings:
    """the conversation"""

    system_prompt: str | None = flag(None, "what the model is told before the conversation begins")
    prompt: str | None = flag(
        None,
        "one message: the answer alone goes to stdout, then the chat ends (as with a message piped in)",
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
        "how often the prompts are drawn anew for the 95% intervals and the tests",
        bound=ENOUGH_DRAWS,
        usual="1000 to 10000 is usual",
    )
