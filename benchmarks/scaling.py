"""What a run costs as its work grows: micro-batch, length, model, number of pairs, processes.

    python benchmarks/scaling.py                        every axis (an hour on two cores that others use too)
    python benchmarks/scaling.py --quick                the small end of each, two to three minutes
    python benchmarks/scaling.py --axes pairs --pairs 1000 10000 100000

Every point is a run of the script from its command line on, on CPUs, one thread per process, with random Llamas and
random words. The steps of a point are all of the same work; the first two are not counted, of the others in all rounds
the quickest counts. Seconds of CPU are those that the process computed, which other programs on the machine lengthen
less than seconds of the clock. Each growth is compared with that of the operations that the work needs at least, or
with the number of pairs. Writes tables, every number and a plot to runs/bench/scaling.*; with --axes, what stands there
of the other axes is kept.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

from plan import SHAPES
from run import HERE, describe_machine, save_model, useful_flops, write_pairs
from scaling_summary import draw, make_tables

ROOT = HERE.parent
SHAPES["0.3M"] = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1,
    "intermediate_size": 96, "vocab_size": 8000, "tie_word_embeddings": True,
}  # fmt: skip
SHAPES["125M"] = {
    "hidden_size": 768, "num_hidden_layers": 16, "num_attention_heads": 12, "num_key_value_heads": 4,
    "intermediate_size": 2048, "vocab_size": 32000, "tie_word_embeddings": True,
}  # fmt: skip
AXES = {
    "batch": [1, 2, 4, 8, 16, 32],  # pairs of 128 tokens
    "length": [64, 128, 256, 512, 1024, 2048],  # tokens of a pair, two pairs; for longer ones there is long_pairs.py
    "model": ["0.3M", "3M", "31M", "125M"],  # all weights, two pairs of 128 tokens
    "pairs": [1_000, 10_000, 100_000, 1_000_000],  # in the data
    "processes": [1, 2, 4],
}
QUICK = {
    "batch": [1, 4, 16],
    "length": [64, 256, 1024],
    "model": ["0.3M", "3M"],
    "pairs": [1_000, 10_000],
    "processes": [1, 2],
}
USUAL = 128  # tokens of a pair: half of it prompt, a quarter each response
SMALL, MIDDLE = "0.3M", "3M"  # models for axes that are not about the model
WARM_UP, COUNTED = 2, 3  # steps
PAIRS_OF_STEP = 8  # of the processes' axis: of each process, or of all
MANY = 10_000  # pairs; starts with more are measured once
SAMPLED_EVERY = 0.005  # seconds, of a process's memory


def main() -> None:
    """Measures each axis, prints the tables and writes them."""
    options = parse_arguments()
    points = dict(QUICK if options.quick else AXES)
    points["pairs"] = options.pairs or points["pairs"]
    results: dict[str, Any] = read_earlier(options) | {"machine": describe_cores()}
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        for shape in {SMALL, MIDDLE, *(points["model"] if "model" in options.axes else ())}:
            save_model(work / shape, shape)
        steps = [axis for axis in ("batch", "length", "model") if axis in options.axes]
        if steps:
            cases = [make_case(work, axis, value) for axis in steps for value in points[axis]]
            results |= measure_steps(work, cases, options.rounds)
        if "pairs" in options.axes:
            results["pairs"] = [measure_starts(work, count, options.rounds) for count in points["pairs"]]
        if "processes" in options.axes:
            results["processes"] = measure_processes(work, points["processes"], options.rounds)
    tables = make_tables(results)
    print(tables)
    options.output_dir.mkdir(parents=True, exist_ok=True)
    (options.output_dir / "scaling.json").write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    (options.output_dir / "scaling.md").write_text(tables, encoding="utf-8")
    draw(results, options.output_dir / "scaling.svg")
    print(f"written to {options.output_dir}/scaling.md, scaling.json and scaling.svg")


def read_earlier(options: argparse.Namespace) -> dict[str, Any]:
    """Where some axes are asked for, what an earlier run of this machine found of the others."""
    path = options.output_dir / "scaling.json"
    if set(options.axes) == set(AXES) or not path.is_file():
        return {}
    earlier = json.loads(path.read_text(encoding="utf-8"))
    return earlier if earlier["machine"] == describe_cores() else {}


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="the small end of each axis, once")
    parser.add_argument("--axes", nargs="+", choices=AXES, default=list(AXES), help="which to measure")
    parser.add_argument("--pairs", nargs="+", type=int, help="numbers of pairs in the data")
    parser.add_argument("--rounds", type=int, help="how often each point is measured (default: 2, with --quick 1)")
    parser.add_argument("--output_dir", type=Path, default=Path("runs/bench"), help="where the results go")
    options = parser.parse_args()
    options.rounds = options.rounds or (1 if options.quick else 2)
    return options


def describe_cores() -> str:
    """What computes."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{cores} cores, one thread per process; {describe_machine().partition('; ')[2]}"


def make_case(work: Path, axis: str, value: Any) -> dict[str, Any]:
    """A point of one of the axes that are about a step: its flags, and what a step needs at least."""
    model = value if axis == "model" else MIDDLE
    tokens = value if axis == "length" else USUAL
    batch = value if axis == "batch" else 2
    lengths = [(tokens // 2, tokens // 4, tokens // 4)] * batch
    path = work / f"{axis}-{value}.jsonl"
    write_pairs(path, lengths * (WARM_UP + COUNTED))
    lora = axis != "model"
    flags = make_flags(work, model, path, batch, tokens, lora)
    flops = useful_flops(lengths, work / model, lora)
    return {"axis": axis, "value": value, "pairs": batch, "tokens": batch * tokens, "flops": flops, "flags": flags}


def make_flags(work: Path, model: str, data: Path, batch: int, tokens: int, lora: bool) -> list[str]:
    """The command line of a run."""
    flags = {
        "model_name_or_path": work / model,
        "dataset_name": data,
        "output_dir": work / "run",
        "overwrite_output_dir": "true",
        "validation_split": "none",
        "max_steps": WARM_UP + COUNTED,
        "per_device_train_batch_size": batch,
        "max_length": tokens,
        "dtype": "float32",
        "use_lora": str(lora).lower(),
        "train_sampling_strategy": "sequential",
        "precompute_ref_log_probs": "false",  # a step then computes both models, whatever the axis
        "save_strategy": "no",
    }
    return [str(part) for name, value in flags.items() for part in (f"--{name}", value)]


def measure_steps(work: Path, cases: list[dict[str, Any]], rounds: int) -> dict[str, list[dict[str, Any]]]:
    """Axis -> its points: seconds of a step, of the clock and of the CPU, and bytes beyond the start at the peak."""
    answers = []
    for number in range(rounds):
        answers.append(call_worker(work, cases)[0])
        print(f"round {number + 1} of {rounds}: {len(cases)} points", flush=True)
    measured: dict[str, list[dict[str, Any]]] = {}
    for number, case in enumerate(cases):
        own = [found[number] for found in answers]
        wall, cpu = (
            min(step[kind] for answer in own for step in answer["steps"][WARM_UP:]) for kind in ("wall", "cpu")
        )
        point = {name: value for name, value in case.items() if name not in ("flags", "axis")}
        point |= {"wall": wall, "cpu": cpu, "bytes": min(answer["own_beyond"] for answer in own)}
        measured.setdefault(case["axis"], []).append(point)
        print(f"{case['axis']} {case['value']}: {cpu:.3f} s of CPU a step", flush=True)
    return measured


def measure_starts(work: Path, count: int, rounds: int) -> dict[str, Any]:
    """Starts on so many short pairs until the first step: with an empty cache, with a full one, and --streaming."""
    data = work / f"pairs-{count}.jsonl"
    write_many_pairs(data, count)
    case = {"flags": make_flags(work, SMALL, data, 4, 64, lora=True)}
    for name, value in (("--max_steps", "2"), ("--train_sampling_strategy", "random")):
        case["flags"][case["flags"].index(name) + 1] = value
    held_out = case["flags"].index("--validation_split") + 1
    case["flags"][held_out] = "0.0001"  # every prompt is hashed, few are evaluated
    streamed = {"flags": [*case["flags"], "--streaming"]}
    streamed["flags"][held_out] = "none"
    point: dict[str, Any] = {"value": count, "file_bytes": data.stat().st_size}
    found: dict[str, list[dict[str, Any]]] = {"first": [], "second": [], "streaming": []}
    for number in range(rounds if count <= MANY else 1):
        for kind, own in (("first", case), ("second", case), ("streaming", streamed)):
            found[kind].append(call_worker(work, [own], cache=f"cache-{count}-{number}")[0][0])
    for kind, answers in found.items():
        point[kind] = {name: min(answer[name] for answer in answers) for name in STARTS}
        print(f"{count:,} pairs, {kind}: {point[kind]['start_cpu']:.1f} s of CPU before the first step", flush=True)
    data.unlink()
    return point


STARTS = ("start_wall", "start_cpu", "own_peak", "peak")


def write_many_pairs(path: Path, count: int) -> None:
    """Pairs of 32 words, all different, cut from a pool of random words."""
    draw = random.Random(count)
    pool = [f"w{draw.randrange(7000)}" for _ in range(100_000)]

    def say(words: int) -> str:
        begin = draw.randrange(len(pool) - words)
        return " ".join(pool[begin : begin + words])

    with path.open("w", encoding="utf-8") as file:
        for number in range(count):
            prompt = f"{say(13)} w{number % 7000} w{number // 7000}"
            file.write(f'{{"prompt": "{prompt}", "chosen": " {say(8)}", "rejected": " {say(9)}"}}\n')


def measure_processes(work: Path, counts: list[int], rounds: int) -> list[dict[str, Any]]:
    """Processes started by torchrun, over gloo: with the same work in each, and with the same work in all."""
    points = []
    for count in counts:
        for kind, own in (("each", PAIRS_OF_STEP), ("all", PAIRS_OF_STEP // count)):
            if count == 1 and kind == "all":
                continue  # the same run
            path = work / f"processes-{own * count}.jsonl"
            write_pairs(path, [(USUAL // 2, USUAL // 4, USUAL // 4)] * own * count * (WARM_UP + COUNTED))
            case = {"flags": make_flags(work, MIDDLE, path, own, USUAL, lora=False)}
            runs = [call_worker(work, [case], processes=count) for _ in range(rounds)]
            steps = [list(zip(*(rank[0]["steps"][WARM_UP:] for rank in run), strict=True)) for run in runs]
            point = {
                "value": count,
                "fixed_in": kind,
                "pairs": own * count,
                "wall": min(max(rank["wall"] for rank in step) for run in steps for step in run),
                "cpu": min(sum(rank["cpu"] for rank in step) for run in steps for step in run),
                "bytes": min(max(rank[0]["own_peak"] for rank in run) for run in runs),
            }
            points.append(point)
            print(f"{count} processes, the same work in {kind}: {point['cpu'] / point['pairs']:.4f} s of CPU a pair")
    return points


def call_worker(
    work: Path, cases: list[dict[str, Any]], processes: int | None = None, cache: str = "cache"
) -> list[list[dict[str, Any]]]:
    """What each process of a worker says of each case, by process."""
    (work / "cases.json").write_text(json.dumps(cases), encoding="utf-8")
    for old in work.glob("answers-*"):
        old.unlink()
    launcher = [sys.executable]
    if processes is not None:
        launcher += ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    environment = os.environ | {
        "OMP_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "CUDA_VISIBLE_DEVICES": "",
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_CACHE": str(work / cache),
    }
    command = [*launcher, __file__, "--as_worker", str(work)]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    answers = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(work.glob("answers-*"))]
    if done.returncode or len(answers) != (processes or 1):
        sys.exit(done.stdout[-5000:])
    return answers


class Watch:
    """A process's memory while it runs: the most it held, and the most that was its own (no mapped files), bytes."""

    def __init__(self) -> None:
        import psutil

        self._process = psutil.Process()
        self._ended = threading.Event()
        self.peak = self.own = 0

    def read(self) -> tuple[int, int]:
        """Bytes now: all, and its own."""
        info: Any = self._process.memory_info()
        return info.rss, info.rss - getattr(info, "shared", 0)

    def __enter__(self) -> Watch:
        self.own_before = self.read()[1]
        self._thread = threading.Thread(target=self._look, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()

    def _look(self) -> None:
        while True:
            ended = self._ended.wait(SAMPLED_EVERY)
            peak, own = self.read()
            self.peak, self.own = max(self.peak, peak), max(self.own, own)
            if ended:
                return


def work_through(work: Path) -> None:
    """The script with the flags of one case after the other, in this process."""
    begun = time.time()
    sys.path.insert(0, str(ROOT))
    from transformers import TrainerCallback
    from transformers import trainer as transformers_trainer

    import advanced_dpo_script
    from utils.engine.memory import release_memory

    steps: list[dict[str, float]] = []
    starts: list[tuple[float, float]] = []

    class Clock(TrainerCallback):
        def on_step_begin(self, *_, **__):
            if not starts:
                starts.append((time.time() - begun, time.process_time()))
            self.since = time.perf_counter(), time.process_time()

        def on_step_end(self, *_, **__):
            wall, cpu = self.since
            steps.append({"wall": time.perf_counter() - wall, "cpu": time.process_time() - cpu})

    transformers_trainer.DEFAULT_CALLBACKS.append(Clock)
    answers = []
    for case in json.loads((work / "cases.json").read_text(encoding="utf-8")):
        steps.clear()
        starts.clear()
        release_memory()
        with Watch() as watch:
            code = advanced_dpo_script.main(case["flags"])
        if code:
            sys.exit(code)
        answer = {"steps": list(steps), "own_peak": watch.own, "peak": watch.peak}
        answer |= {"own_beyond": watch.own - watch.own_before, "start_wall": starts[0][0], "start_cpu": starts[0][1]}
        answers.append(answer)
    rank = os.environ.get("RANK", "0")
    (work / f"answers-{rank}.json").write_text(json.dumps(answers), encoding="utf-8")


if __name__ == "__main__":
    if "--as_worker" in sys.argv[1:2]:
        work_through(Path(sys.argv[2]))
    else:
        main()
