"""A long run at a tiny size: whether its memory, open files, threads and files stay as they are.

    python benchmarks/soak.py                        20,000 optimizer steps (some minutes on two cores)
    python benchmarks/soak.py --minutes 30           as many as there is time for
    python benchmarks/soak.py -- --report_to tensorboard --skip_bad_batches 3     more flags of the run

A random model of two layers learns from pairs of a few tokens: a line of metrics every 10 steps, a checkpoint every 500
of which two are kept, an evaluation every 1,000. The run is looked at from outside while it goes on. Prints a table and
by how many bytes a step the memory grew once the run was warm; writes all samples to runs/soak/.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil
from run import HERE, SHAPES, save_model, write_pairs

SCRIPT = HERE.parent / "advanced_dpo_script.py"
SHAPES["soak"] = {
    "hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2,
    "intermediate_size": 16, "vocab_size": 200, "tie_word_embeddings": True,
}  # fmt: skip
PAIRS = 512
COLUMNS = {
    "step": "step",
    "memory_mib": "memory, MiB",
    "open_files": "open files",
    "threads": "threads",
    "checkpoints": "checkpoints",
    "metrics_kib": "metrics.jsonl, KiB",
    "record_kib": "run.json, KiB",
    "report_kib": "report.html, KiB",
    "state_kib": "trainer_state.json, KiB",
    "folder_mib": "folder, MiB",
    "ms_per_step": "ms/step",
}
WARM = 0.5  # of the steps, after which everything that is bounded has reached its bound
STOPPED = 130  # the exit code of a run that was asked to stop
FLAT = 64.0  # bytes per step: 1.2 MiB over 20,000 steps


def main() -> int:
    """Runs, samples, and prints the table. Returns 1 where the memory grew, or the run failed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=20_000, help="optimizer steps")
    parser.add_argument("--minutes", type=float, help="stop the run in good order after so long (default: no limit)")
    parser.add_argument("--rows", type=int, default=20, help="of the table")
    parser.add_argument("--verb", choices=("train", "sft"), default="train")
    parser.add_argument("--output_dir", type=Path, default=Path("runs/soak"), help="where the samples go")
    parser.add_argument("flags", nargs="*", help="more flags of the run, after --")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        code, samples = run(Path(folder), options)
    if code not in (0, STOPPED):
        print(f"the run ended with exit code {code}", file=sys.stderr)
        return 1
    table = make_table(samples, options.rows)
    slope = memory_slope(samples)
    verdict = (
        f"memory after the first {WARM:.0%} of the steps: {slope:+.1f} bytes per step, "
        f"{'flat' if slope < FLAT else 'NOT flat'} (below {FLAT:.0f})"
    )
    print("\n".join((*table, "", verdict)))
    options.output_dir.mkdir(parents=True, exist_ok=True)
    (options.output_dir / "soak.json").write_text(json.dumps(samples) + "\n", encoding="utf-8")
    (options.output_dir / "soak.md").write_text("\n".join((*table, "", verdict)) + "\n", encoding="utf-8")
    return int(slope >= FLAT)


def run(work: Path, options: argparse.Namespace) -> tuple[int, list[dict[str, Any]]]:
    """Exit code of the run, and what was seen of it about every hundredth part of its steps."""
    save_model(work / "model", "soak")
    lengths = [(3 + index % 5, 2 + index % 3, 2 + index % 4) for index in range(PAIRS)]
    write_pairs(work / "pairs.jsonl", lengths)
    folder = work / "run"
    command = [
        sys.executable, SCRIPT, options.verb, "--model_name_or_path", work / "model", "--output_dir", folder,
        "--dataset_name", work / "pairs.jsonl", "--max_steps", options.steps, "--per_device_train_batch_size", 2,
        "--logging_steps", 10, "--save_steps", 500, "--save_total_limit", 2, "--eval_steps", 1000, *options.flags,
    ]  # fmt: skip
    with open(work / "console", "w+", encoding="utf-8") as console:
        process = subprocess.Popen(list(map(str, command)), stdout=console, stderr=subprocess.STDOUT)
        samples = watch(process, folder, options.steps, options.minutes)
        if process.returncode not in (0, STOPPED):
            console.seek(0)
            sys.stderr.write(console.read()[-3000:])
    return process.returncode, samples


def watch(process: subprocess.Popen, folder: Path, steps: int, minutes: float | None) -> list[dict[str, Any]]:
    """Samples of a running process, until it ends, or is asked to after so many minutes."""
    until = time.time() + minutes * 60 if minutes is not None else None
    seen, samples, due, before = psutil.Process(process.pid), [], 0, (0, time.time())
    while process.poll() is None:
        time.sleep(0.2)
        if until is not None and time.time() > until:
            process.terminate()
            until = None
        step = read_step(folder)
        if step is None or step < due:
            continue
        try:
            sample = look(seen, folder, step)
        except (psutil.Error, OSError):
            continue  # it ends, or puts a file in the place of another, just now
        at = time.time()
        sample["ms_per_step"] = round((at - before[1]) / max(step - before[0], 1) * 1000, 1)
        samples.append(sample)
        due, before = step + max(steps // 100, 1), (step, at)
    return samples


def read_step(folder: Path) -> int | None:
    """How far the run says it is."""
    try:
        return json.loads((folder / "run.json").read_text(encoding="utf-8")).get("step")
    except (OSError, ValueError):
        return None


def look(process: psutil.Process, folder: Path, step: int) -> dict[str, Any]:
    """What the process and its folder take."""

    def kib(path: Path) -> float:
        return round(path.stat().st_size / 1024, 1) if path.is_file() else 0.0

    checkpoints = sorted(folder.glob("checkpoint-*"), key=lambda path: path.stat().st_mtime)
    return {
        "step": step,
        "memory_mib": round(process.memory_info().rss / 2**20, 2),
        "open_files": process.num_fds() if hasattr(process, "num_fds") else process.num_handles(),
        "threads": process.num_threads(),
        "checkpoints": len(checkpoints),
        "metrics_kib": kib(folder / "metrics.jsonl"),
        "record_kib": kib(folder / "run.json"),
        "report_kib": kib(folder / "report.html"),
        "state_kib": kib(checkpoints[-1] / "trainer_state.json") if checkpoints else 0.0,
        "folder_mib": round(sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) / 2**20, 2),
    }


def memory_slope(samples: list[dict[str, Any]]) -> float:
    """Bytes per step that the memory grew by, by least squares, after the warm-up."""
    warm = [sample for sample in samples if sample["step"] >= WARM * samples[-1]["step"]]
    steps, memory = [sample["step"] for sample in warm], [sample["memory_mib"] * 2**20 for sample in warm]
    middle, mean = sum(steps) / len(warm), sum(memory) / len(warm)
    spread = sum((step - middle) ** 2 for step in steps)
    return sum((s - middle) * (m - mean) for s, m in zip(steps, memory, strict=True)) / spread if spread else 0.0


def make_table(samples: list[dict[str, Any]], rows: int) -> list[str]:
    """Lines of the table, evenly drawn from the samples, the last among them."""
    every = -(-len(samples) // rows)
    shown = samples[::-1][::every][::-1]
    lines = [f"| {' | '.join(COLUMNS.values())} |", f"| {' | '.join('---' for _ in COLUMNS)} |"]
    return lines + [f"| {' | '.join(f'{sample[name]:,}' for name in COLUMNS)} |" for sample in shown]


if __name__ == "__main__":
    sys.exit(main())
