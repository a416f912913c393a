"""Reward against distance: how much true sentiment each loss buys for how far it moves from the base model.

    python benchmarks/frontier.py [--quick] [--output_dir runs/frontier]

The setting is that of the paper's central figure (arXiv 2305.18290, figure 2, left), in miniature. The bundled base
model continues openings of reviews twice each; the scorer of the demo, which knows the grammar of the reviews, is the
true reward and says which of the two is preferred. Every policy is trained by the script itself from the same base on
the same pairs. Then it continues openings that nothing was trained on: its reward is the scorer's mean over what it
writes, its distance is KL(policy || base) per continuation, exact over the next-token distributions along them.

The second half trains on the same pairs with a fifth of the labels flipped.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import random
import shutil
import statistics
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
DEMO = ROOT / "examples" / "demo"
BASE = DEMO / "bundled" / "model"
SEED = 11
NOISE = 0.2
LONGEST_CONTINUATION_TOKENS = 100
COMMON = {
    "model_name_or_path": BASE,
    "dtype": "float32",
    "per_device_train_batch_size": 32,
    "per_device_eval_batch_size": 64,
    "validation_split": 0.05,
    "lr_scheduler_type": "constant_with_warmup",
    "warmup_steps": 10,
    "logging_steps": 50,
    "seed": SEED,
}


@dataclass(frozen=True)
class Size:
    """How much is computed."""

    prompts: int  # that are continued twice for a pair
    epochs: int
    checkpoints: int  # of each run that are measured, the last one included
    samples: int  # continuations that a policy is measured on
    betas: dict[str, tuple[float, ...]]  # by loss, on true labels
    noisy_betas: dict[str, tuple[float, ...]]  # by loss, where a share of the labels is flipped


FULL = Size(
    prompts=1600,
    epochs=3,
    checkpoints=3,
    samples=400,
    betas={"DPO": (0.1, 0.3, 1.0, 3.0), "cDPO": (0.1, 0.3), "IPO": (0.5, 2.0)},
    noisy_betas={"DPO": (0.1, 0.3, 1.0), "cDPO": (0.1, 0.3), "robust": (0.1, 0.3, 1.0), "IPO": (0.5, 2.0)},
)
QUICK = Size(
    prompts=500,
    epochs=1,
    checkpoints=1,
    samples=150,
    betas={"DPO": (0.1, 1.0), "IPO": (1.0,)},
    noisy_betas={"DPO": (0.3,), "cDPO": (0.3,), "robust": (0.3,)},
)
LOSSES = {
    "DPO": (),
    "cDPO": ("--loss_type", "cdpo", "--label_smoothing", str(NOISE)),
    "robust": ("--loss_type", "robust", "--label_smoothing", str(NOISE)),
    "IPO": ("--loss_type", "ipo"),
}


@dataclass(frozen=True)
class Policy:
    """A way of training: `name` is its line in the plot."""

    name: str
    flags: tuple[str, ...]
    verb: str = "train"
    beta: float | None = None
    noisy: bool = False

    @property
    def label(self) -> str:
        """A name for its folder."""
        words = [self.name, *([f"beta {self.beta:g}"] if self.beta else []), *(["noisy"] if self.noisy else [])]
        return " ".join(words).replace(" ", "-").lower()


@dataclass(frozen=True)
class Point:
    """A policy after some steps, measured on what it writes."""

    name: str
    beta: float | None
    noisy: bool
    step: int
    reward: float
    reward_error: float  # standard error of the mean
    kl: float
    positive: float  # share of continuations with a reward above 0
    ends: float  # share that come to an end


def main() -> None:
    """Makes the pairs, trains and measures every policy, and writes table, plot and numbers."""
    arguments = parse_arguments()
    sys.path[:0] = [str(ROOT), str(DEMO)]
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    size, folder = (QUICK if arguments.quick else FULL), Path(arguments.output_dir).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    began = time.perf_counter()
    pairs = write_pairs(folder, size.prompts)
    print(f"{pairs} pairs in {time.perf_counter() - began:.0f} s", flush=True)
    judge = Judge(size.samples)
    points = [judge.measure(BASE, "base", None, False, 0)]
    print(describe(points[0]), flush=True)
    for policy in policies(size):
        for point in train_and_measure(policy, folder, size, judge):
            points.append(point)
            print(describe(point), flush=True)
    seconds = time.perf_counter() - began
    content = {"seconds": seconds, "size": asdict(size), "pairs": pairs, "points": [asdict(point) for point in points]}
    (folder / "frontier.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    (folder / "frontier.md").write_text(table(points), encoding="utf-8")
    draw(points, folder / "frontier.svg")
    print(f"\n{table(points)}\nin {seconds / 60:.1f} minutes; numbers, table and plot: {folder}")


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="fewer policies and samples, for a look")
    parser.add_argument("--output_dir", default=str(ROOT / "runs" / "frontier"))
    return parser.parse_args()


def policies(size: Size) -> Iterator[Policy]:
    """Everything that is trained: on true labels, then on labels of which some are flipped."""
    for noisy, betas_of in ((False, size.betas), (True, size.noisy_betas)):
        yield Policy("SFT on preferred", (), "sft", noisy=noisy)
        for name, betas in betas_of.items():
            for beta in betas:
                yield Policy(name, ("--beta", str(beta), *LOSSES[name]), beta=beta, noisy=noisy)


def write_pairs(folder: Path, prompts: int) -> int:
    """Writes `pairs.jsonl` and, with a share of its labels flipped, `noisy.jsonl`. Returns how many pairs there are."""
    import grammar
    import scorer
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from utils.responses.generation import sample_continuations
    from utils.settings.verbs import SamplingSettings

    sampling = SamplingSettings(max_new_tokens=LONGEST_CONTINUATION_TOKENS)
    draw = random.Random(SEED)
    openings: dict[str, None] = {}
    while len(openings) < prompts:
        opening = grammar.write_prompt(draw)
        if not grammar.is_held_out(opening):
            openings[opening] = None
    model, tokenizer = AutoModelForCausalLM.from_pretrained(BASE), AutoTokenizer.from_pretrained(BASE)
    written = [sample_continuations(model, tokenizer, list(openings), sampling, seed=seed) for seed in (SEED, SEED + 1)]
    rows, flipped = [], []
    for opening, one, other in zip(openings, *written, strict=True):
        rewards = [scorer.score(opening, text.text) for text in (one, other)]
        if rewards[0] == rewards[1] or not (one.ended and other.ended):
            continue
        better, worse = (one, other) if rewards[0] > rewards[1] else (other, one)
        row = {"prompt": opening, "chosen": better.text, "rejected": worse.text}
        swapped = {"prompt": opening, "chosen": worse.text, "rejected": better.text}
        rows.append(row)
        flipped.append(swapped if draw.random() < NOISE else row)
    for name, lines in (("pairs", rows), ("noisy", flipped)):
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (folder / f"{name}.jsonl").write_text(text, encoding="utf-8")
    return len(rows)


class Judge:
    """Measures policies on openings that nothing was trained on, several continuations of each."""

    def __init__(self, samples: int):
        from transformers import AutoModelForCausalLM, AutoTokenizer

        lines = (DEMO / "bundled" / "prompts.jsonl").read_text(encoding="utf-8").splitlines()
        prompts = [json.loads(line)["prompt"] for line in lines]
        self.prompts = [prompts[index % len(prompts)] for index in range(samples)]
        self.base = AutoModelForCausalLM.from_pretrained(BASE)
        self.tokenizer = AutoTokenizer.from_pretrained(BASE)

    def measure(self, folder: Path, name: str, beta: float | None, noisy: bool, step: int) -> Point:
        """The reward and the distance of the model in a folder."""
        import scorer
        from transformers import AutoModelForCausalLM

        from utils.responses.generation import kl_estimate, sample_continuations
        from utils.settings.verbs import SamplingSettings

        model = AutoModelForCausalLM.from_pretrained(folder)
        sampling = SamplingSettings(max_new_tokens=LONGEST_CONTINUATION_TOKENS)
        texts = sample_continuations(model, self.tokenizer, self.prompts, sampling, seed=SEED, batch_size=400)
        rewards = [scorer.score(prompt, text.text) for prompt, text in zip(self.prompts, texts, strict=True)]
        return Point(
            name=name,
            beta=beta,
            noisy=noisy,
            step=step,
            reward=statistics.mean(rewards),
            reward_error=statistics.stdev(rewards) / math.sqrt(len(rewards)),
            kl=kl_estimate(model, self.base, self.tokenizer, self.prompts, texts),
            positive=statistics.mean(reward > 0 for reward in rewards),
            ends=statistics.mean(text.ended for text in texts),
        )


def train_and_measure(policy: Policy, folder: Path, size: Size, judge: Judge) -> Iterator[Point]:
    """Trains a policy with the script and measures its checkpoints; its folder is removed again."""
    import advanced_dpo_script

    data = folder / ("noisy.jsonl" if policy.noisy else "pairs.jsonl")
    rows = sum(1 for _ in data.open(encoding="utf-8"))
    steps = rows * 19 // 20 * size.epochs // COMMON["per_device_train_batch_size"]
    every = steps // size.checkpoints
    output = folder / policy.label
    options = COMMON | {
        "dataset_name": data,
        "output_dir": output,
        "max_steps": every * size.checkpoints,
        "save_steps": every,
        "learning_rate": 2e-4,
    }
    flags = [part for name, value in options.items() for part in (f"--{name}", str(value))]
    with quiet_console():
        code = advanced_dpo_script.main([policy.verb, *flags, "--overwrite_output_dir", *policy.flags])
    if code:
        sys.exit(code)
    for checkpoint in sorted(output.glob("checkpoint-*"), key=lambda path: int(path.name.rpartition("-")[2])):
        step = int(checkpoint.name.rpartition("-")[2])
        yield judge.measure(checkpoint, policy.name, policy.beta, policy.noisy, step)
    shutil.rmtree(output)


@contextlib.contextmanager
def quiet_console() -> Iterator[None]:
    """Keeps the script's lines out of sight."""
    with open(os.devnull, "w", encoding="utf-8") as nowhere, contextlib.redirect_stdout(nowhere):
        yield


def describe(point: Point) -> str:
    """One line for the person who waits."""
    beta = f"beta {point.beta:<4g}" if point.beta else " " * 9
    return (
        f"{point.name:<17}{beta}  {'20% flipped' if point.noisy else 'true labels'}  step {point.step:>4}  "
        f"reward {point.reward:+.3f} +- {point.reward_error:.3f}  KL {point.kl:6.2f}  positive {point.positive:4.0%}"
    )


def table(points: list[Point]) -> str:
    """The end of each run in Markdown."""
    last: dict[tuple, Point] = {}
    for point in points:
        last[point.name, point.beta, point.noisy] = point
    lines = ["| labels | loss | beta | reward | KL, nats | positive | come to an end |", "|-|-|-|-|-|-|-|"]
    for point in last.values():
        labels = "-" if point.name == "base" else "20% flipped" if point.noisy else "true"
        beta = f"{point.beta:g}" if point.beta else "-"
        lines.append(
            f"| {labels} | {point.name} | {beta} | {point.reward:+.3f} ± {point.reward_error:.3f} | {point.kl:.2f} "
            f"| {point.positive:.0%} | {point.ends:.0%} |"
        )
    return "\n".join(lines) + "\n"


LOOKS = {  # line of the plot: colour, marker
    "base": ("#000000", "*"),
    "DPO": ("#0072b2", "o"),
    "cDPO": ("#e69f00", "s"),
    "robust": ("#009e73", "D"),
    "IPO": ("#cc79a7", "^"),
    "SFT on preferred": ("#6b6b6b", "X"),
}


def draw(points: list[Point], path: Path) -> None:
    """The two plots, reward against the root of the distance, every measured checkpoint a point."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    matplotlib.rcParams["svg.hashsalt"] = "frontier"
    figure, panels = pyplot.subplots(1, 2, figsize=(11, 4.6), sharex=True, sharey=True, layout="constrained")
    for panel, noisy in zip(panels, (False, True), strict=True):
        for name, (colour, marker) in LOOKS.items():
            shown = [point for point in points if point.name == name and (point.noisy == noisy or name == "base")]
            if not shown:
                continue
            places = [math.sqrt(max(point.kl, 0)) for point in shown], [point.reward for point in shown]
            panel.scatter(*places, color=colour, marker=marker, s=34, label=name, zorder=3)
            for beta in sorted({point.beta for point in shown if point.beta}):
                run = [point for point in shown if point.beta == beta]
                panel.plot([math.sqrt(p.kl) for p in run], [p.reward for p in run], color=colour, linewidth=0.8)
                panel.annotate(f"{beta:g}", (math.sqrt(run[-1].kl), run[-1].reward), fontsize=7, xytext=(4, -8),
                               textcoords="offset points", color=colour)  # fmt: skip
        panel.set_title("a fifth of the labels flipped" if noisy else "true labels")
        panel.set_xlabel("distance from the base model: square root of KL, nats")
        panel.grid(color="#dddddd", linewidth=0.6)
    panels[0].set_ylabel("true reward: mean sentiment, -1 to 1")
    panels[0].legend(loc="lower right")
    panels[1].legend(loc="lower right")
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)


if __name__ == "__main__":
    main()
