"""Runs that are killed at random moments, given full disks and damaged files: each must end as if nothing had been.

    python benchmarks/torture.py --kills 100         some twenty minutes on two cores
    python benchmarks/torture.py --kills 5 --short   under a minute

A small random model is trained on a few pairs once without disturbance, and then again and again: killed (SIGKILL) or
told to stop (SIGTERM) at random moments, also while it resumes, saves, removes an old checkpoint, evaluates, replaces
another run and finishes; in one process and in two (gloo), of which one or both are killed. After at most nine stops
the run may go to its end, and is compared with the undisturbed one: weights, optimizer, random numbers, metrics,
samples, held-out pairs, warnings, the list of files. Then faults are injected (benchmarks/faults.py). Prints a table
and writes it, with every moment, to runs/bench/.

Most runs are forked from one process that has imported everything (benchmarks/forked.py); some are started anew, by
`python` and by `torchrun`.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import re
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from forked import ROOT, Started, import_everything, start, start_plain, wait_for_moment

BUNDLED = ROOT / "examples" / "demo" / "bundled"
TIMING = {"tokens_per_second", "peak_memory_bytes"}
STEPS = 18
MOST_STOPS = 9  # of one run
ENDED = "it had ended"
COMMON = ["--per_device_train_batch_size", 2, "--max_steps", STEPS, "--dtype", "float32",
          "--save_total_limit", 2, "--max_length", 64]  # fmt: skip
# Names of ways to train -> flags. Between them: every file that a checkpoint may hold, dropout, an early stop.
WAYS = {
    "full": ["--save_steps", 3, "--eval_steps", 5, "--logging_steps", 2, "--sample_during_eval",
             "--num_eval_samples", 2, "--sample_max_new_tokens", 4, "--learning_rate", 5e-3],
    "lora": ["--save_steps", 2, "--eval_steps", 4, "--logging_steps", 3, "--use_lora", "--lora_dropout", 0.3,
             "--learning_rate", 5e-3],
    "early": ["--save_steps", 2, "--eval_steps", 3, "--logging_steps", 1, "--early_stopping_patience", 2,
              "--early_stopping_metric", "margin", "--learning_rate", 0.3],
}  # fmt: skip


@dataclass
class Torture:
    """Where it happens, and what came of it."""

    work: Path
    draw: random.Random
    baselines: dict[tuple[str, int], Path] = field(default_factory=dict)
    usual: dict[tuple[str, int], float] = field(default_factory=dict)  # seconds that an undisturbed run takes
    stops: list[dict[str, Any]] = field(default_factory=list)
    faults: list[dict[str, Any]] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    runs: int = 0

    def flags(self, way: str, folder: Path, *more: object) -> list[object]:
        """The arguments of a run."""
        return ["train", "--model_name_or_path", self.work / "model", "--dataset_name", self.work / "pairs.jsonl",
                "--output_dir", folder, *COMMON, *WAYS[way], *more]  # fmt: skip

    def fresh(self, name: str) -> Path:
        """A folder that is not there yet."""
        self.runs += 1
        return self.work / f"{self.runs}-{name}"

    def baseline(self, way: str, processes: int) -> Path:
        """An undisturbed run."""
        key = (way, processes)
        if key not in self.baselines:
            folder, begun = self.fresh(f"{way}-{processes}"), time.monotonic()
            started = start(self.flags(way, folder), folder, processes)
            if any(started.wait()):
                sys.exit(f"the undisturbed run failed:\n{started.said()}")
            self.usual[key], self.baselines[key] = time.monotonic() - begun, folder
        return self.baselines[key]

    def fail(self, what: str, said: str = "") -> None:
        """Notes something that must not be."""
        self.failures.append(what)
        print(f"FAILED: {what}\n{said[-3000:]}", flush=True)


def make_inputs(work: Path) -> None:
    """A random model of a hundred thousand parameters with the demo's tokenizer, and forty of its pairs, shortened."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = AutoConfig.from_pretrained(BUNDLED / "model", **shape, num_key_value_heads=2, head_dim=16)
    AutoModelForCausalLM.from_config(config).save_pretrained(work / "model")
    AutoTokenizer.from_pretrained(BUNDLED / "model").save_pretrained(work / "model")
    lines = (BUNDLED / "pairs.jsonl").read_text(encoding="utf-8").splitlines()[:40]
    pairs = [{side: text[:60] for side, text in json.loads(line).items()} for line in lines]
    (work / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs), encoding="utf-8")


def torment(torture: Torture, way: str, processes: int, stops: int, plain: bool = False) -> int:
    """One run, stopped up to so many times at random moments, then left alone, then compared. Returns how often it was
    stopped before it had ended."""
    draw, baseline = torture.draw, torture.baseline(way, processes)
    folder = torture.fresh(f"{way}-{processes}-stopped")
    replaces = not plain and draw.random() < 0.2
    if replaces:
        shutil.copytree(baseline, folder, ignore=shutil.ignore_patterns("*.pt"))
        _make_another_run(folder)
    usual = torture.usual[(way, processes)] + (10 if plain else 0)
    last, hit = None, 0
    for number in range(stops + 1):
        more = ["--overwrite_output_dir"] if replaces and _is_another(folder) else ["--resume_from_checkpoint", "auto"]
        go = start_plain if plain else start
        started = go(torture.flags(way, folder, *more), folder.with_name(f"{folder.name}-{number}"), processes)
        if number < stops:
            moment = wait_for_moment(started, folder, draw, usual)
            last = _stop(torture, started, folder, moment, (way, processes, plain, number))
            hit += not last.startswith(ENDED)
            if last.startswith(ENDED) and _record(folder).get("status") == "finished":
                break
        else:
            codes = started.wait()
            if any(codes):
                torture.fail(f"{folder.name} did not resume: exit codes {codes} after {last}", started.said())
                return hit
    for difference in compare(baseline, folder):
        torture.fail(f"{folder.name}, stopped {hit} times, last {last}: {difference}")
    shutil.rmtree(folder, ignore_errors=True)
    return hit


def _stop(torture: Torture, started: Started, folder: Path, moment: str, of: tuple[str, int, bool, int]) -> str:
    """Kills or ends a run, whole or one process of it, and notes what it was doing."""
    way, processes, plain, number = of
    draw = torture.draw
    number_of_signal = signal.SIGTERM if draw.random() < 0.15 else signal.SIGKILL
    ran = started.look()
    which = draw.choice([started.pids, started.pids[:1], started.pids[-1:]])
    started.send(number_of_signal, which)
    late = number_of_signal == signal.SIGKILL and not plain and started.end_others(60.0)
    codes = started.wait()
    said = started.said()
    doing = describe_moment(folder, said, number)
    torture.stops.append(
        {"way": way, "processes": processes, "started": "python" if plain else "fork", "signal": number_of_signal.name,
         "killed": len(which), "moment": moment, "doing": doing if ran else ENDED, "codes": codes}
    )  # fmt: skip
    if None in codes or (late and ("  step" in said or "held out before" in said)):
        # Before the processes have found each other, the launcher alone can tell that one is gone.
        torture.fail(f"{folder.name}: a process did not end when another one was killed ({doing})", said)
    allowed = {0, -signal.SIGKILL, 130, -signal.SIGTERM, -signal.SIGINT} | ({1} if processes > 1 else set())
    if not set(codes) <= allowed | {None}:
        torture.fail(f"{folder.name}: exit codes {codes} while {doing}", said)
    if processes == 1 and "Traceback" in said:
        torture.fail(f"{folder.name}: a traceback while {doing}", said[max(0, said.index("Traceback") - 500) :][:3000])
    if not ran:
        return ENDED
    return f"{number_of_signal.name} to {len(which)} of {len(started.pids)} ({doing})"


def describe_moment(folder: Path, said: str, number: int) -> str:
    """What a run was doing when it was stopped, by what it left."""
    names = os.listdir(folder) if folder.is_dir() else []
    for pattern, doing in ((r"\.checkpoint-\d+\.partial", "saving a checkpoint"),
                           (r"\.checkpoint-.*\.former", "removing an old checkpoint"),
                           (r"\.model\.partial", "saving the model"), (r"\..*\.tmp", "writing a file")):  # fmt: skip
        if any(re.fullmatch(pattern, name) for name in names):
            return doing
    if "replace it" in (_record(folder).get("failure") or ""):
        return "removing the run before"
    if "  step" not in said and "held out before" not in said:
        return "starting" if number == 0 else "resuming"
    steps = [line for line in said.splitlines() if line.startswith(("  step", "  held out", "held out"))]
    if f"step {STEPS}/{STEPS}" in steps[-1] or steps[-1].startswith("held out") or "done in" in said:
        return "finishing"
    return "training, or evaluating"


def _record(folder: Path) -> dict[str, Any]:
    try:
        return json.loads((folder / "run.json").read_text(encoding="utf-8"))
    except OSError:
        return {}


def _make_another_run(folder: Path) -> None:
    """As if a run with another seed had been finished there."""
    record = _record(folder)
    record["settings"]["seed"] = 7
    (folder / "run.json").write_text(json.dumps(record), encoding="utf-8")


def _is_another(folder: Path) -> bool:
    return _record(folder).get("settings", {}).get("seed") == 7


def compare(one: Path, other: Path) -> list[str]:
    """In what a run differs from the undisturbed one; nothing is to."""
    found = []
    if sorted(os.listdir(one)) != sorted(os.listdir(other)):
        found.append(f"files {sorted(set(os.listdir(one)) ^ set(os.listdir(other)))}")
        return found
    for path in sorted(one.rglob("*")):
        name = path.relative_to(one).as_posix()
        if path.is_dir() or name.endswith((".html", "manifest.json", "trainer_state.json", "run.json")):
            continue
        if not (other / name).is_file():
            found.append(f"{name} is missing")
        elif name.endswith("metrics.jsonl"):
            if _read_metrics(path) != _read_metrics(other / name):
                found.append("metrics.jsonl")
        elif path.read_bytes() != (other / name).read_bytes():
            found.append(name)
    records = [_record(folder) for folder in (one, other)]
    found += [
        f"{key} in run.json: {records[0].get(key)} and {records[1].get(key)}"
        for key in ("status", "metrics", "warnings", "early_stopping", "steps")
        if records[0].get(key) != records[1].get(key)
    ]
    return found


def _read_metrics(path: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return [{name: value for name, value in line.items() if name not in TIMING} for line in lines]


def describe(torture: Torture, seconds: float) -> str:
    """The tables."""
    lines = ["| what the run was doing | one process | two processes |", "| --- | --- | --- |"]
    counts = Counter((stop["doing"], stop["processes"]) for stop in torture.stops)
    for doing in sorted({doing for doing, _ in counts}, key=lambda name: -counts[(name, 1)] - counts[(name, 2)]):
        lines.append(f"| {doing} | {counts[(doing, 1)]} | {counts[(doing, 2)]} |")
    by_signal = Counter((stop["signal"], stop["processes"]) for stop in torture.stops)
    lines += [
        f"| *{name}, in all* | {by_signal[(name, 1)]} | {by_signal[(name, 2)]} |" for name in ("SIGKILL", "SIGTERM")
    ]
    if torture.faults:
        lines += ["", "| fault | tried | exit code | found, and gone on from |", "| --- | --- | --- | --- |"]
        for kind in dict.fromkeys(fault["kind"] for fault in torture.faults):
            of_kind = [fault for fault in torture.faults if fault["kind"] == kind]
            codes = ", ".join(sorted({str(fault["code"]) for fault in of_kind if fault["code"] is not None})) or "-"
            good = sum(fault["good"] for fault in of_kind)
            lines.append(f"| {kind} | {len(of_kind)} | {codes} | {good} |")
    verdict = f"{len(torture.failures)} failures" if torture.failures else "every run ended as the undisturbed one did"
    hit = sum(stop["doing"] != ENDED for stop in torture.stops)
    stops = f"{len(torture.stops)} stops, {hit} of them before the run had ended, in {seconds / 60:.1f} minutes"
    return "\n".join(lines) + f"\n\n{stops}: {verdict}\n"


def disturb(torture: Torture, options: argparse.Namespace) -> None:
    """Runs that are stopped, so many times in all, in one process and in two."""
    of_two = options.kills // 4 if options.kills_of_two is None else options.kills_of_two
    for processes, kills in ((1, options.kills), (2, 0 if options.short else of_two)):
        done, ways = 0, list(WAYS)
        while done < kills:
            stops = min(torture.draw.randint(3, MOST_STOPS), kills - done)
            way = ways[torture.runs % len(ways)]
            plain = not options.short and torture.draw.random() < 0.04
            done += torment(torture, way, processes, stops, plain)
            names = "process" if processes == 1 else "processes"
            print(f"{processes} {names}: {done} of {kills} stops, {len(torture.failures)} failures", flush=True)


def main() -> int:
    """Runs all of it; 1 where anything was not as it must be."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=100, help="stops at random moments in one process")
    parser.add_argument(
        "--kills_of_two", type=int, default=None, help="the same in two processes; a quarter of --kills"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--short", action="store_true", help="one process, forked, and one fault of each kind")
    parser.add_argument("--calls", type=int, default=60, help="calls of the system that are made to fail, one in a run")
    parser.add_argument("--no_faults", action="store_true", help="kills alone")
    parser.add_argument("--output_dir", type=Path, default=Path("runs/bench"), help="where the results go")
    options = parser.parse_args()
    os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    begun = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="torture-") as name:
        torture = Torture(Path(name), random.Random(options.seed))
        os.environ["HF_DATASETS_CACHE"] = str(torture.work / "cache")
        import_everything()
        from faults import in_a_child, inject_faults

        in_a_child(lambda: make_inputs(torture.work))
        with contextlib.suppress(KeyboardInterrupt):  # Ctrl-C: the table of what was done
            disturb(torture, options)
            if not options.no_faults:
                inject_faults(torture, options.short, options.calls)
    table = describe(torture, time.monotonic() - begun)
    print(f"\n{table}", end="")
    options.output_dir.mkdir(parents=True, exist_ok=True)
    content = {"stops": torture.stops, "faults": torture.faults, "failures": torture.failures}
    (options.output_dir / "torture.json").write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    (options.output_dir / "torture.md").write_text(table, encoding="utf-8")
    return 1 if torture.failures else 0


if __name__ == "__main__":
    sys.exit(main())
