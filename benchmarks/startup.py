"""Time from a command to its first training step, and of the verbs that need no model, beside an earlier revision.

    python benchmarks/startup.py [--against REVISION] [--repeats 7]

The earlier revision is checked out into a temporary folder. Both run the same commands in turn, with the same Python,
and each command once before, so that caches are filled. Prints the medians and their ratio; --against none measures
this one alone. The clock stops as the line of the first step is printed, or at the end of a verb without steps.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
BUNDLED = ROOT / "examples" / "demo" / "bundled"
SCRIPT = "advanced_dpo_script.py"
STEP = "step 1/1"

MODEL = ["--model_name_or_path", str(BUNDLED / "model"), "--dataset_name", str(BUNDLED / "pairs.jsonl")]
TRAIN = [*MODEL, "--max_samples", "64", "--max_steps", "1", "--logging_steps", "1", "--overwrite_output_dir"]


def commands(folder: Path) -> dict[str, list[str]]:
    """Name -> words; all write into a folder of their own."""
    run = str(folder / "run")
    return {
        "train": ["train", *TRAIN, "--output_dir", run],
        "train --use_lora": ["train", *TRAIN, "--use_lora", "--output_dir", str(folder / "lora")],
        "an occupied folder": ["train", *MODEL, "--output_dir", run],
        "a missing model": ["train", "--model_name_or_path", "./gone", *MODEL[2:], "--output_dir", str(folder / "new")],
        "data": ["data", "--dataset_name", MODEL[3], "--max_samples", "64"],
        "report": ["report", "--run", run],
        "status": ["status", "--folder", str(folder)],
        "init": ["init", "--situation", "cpu_trial", "--output_file", str(folder / "config.yaml")],
        "help": ["--help"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--against", default="5582270", metavar="REVISION", help="a git revision, or none")
    parser.add_argument("--repeats", type=int, default=7)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        places = {"now": ROOT}
        if options.against != "none":
            before = Path(scratch) / "before"
            before.mkdir()
            archive = subprocess.run(["git", "archive", options.against], cwd=ROOT, capture_output=True, check=True)
            subprocess.run(["tar", "-x", "-C", before], input=archive.stdout, check=True)
            places = {options.against: before} | places
        measure(places, Path(scratch), options.repeats)


def measure(places: dict[str, Path], scratch: Path, repeats: int) -> None:
    """Prints a row for each command as soon as it is measured."""
    print(f"seconds, medians of {repeats} runs in turn; {os.cpu_count()} cores, Python {sys.version.split()[0]}")
    print(f"{'':20}" + "".join(f"{name:>12}" for name in places) + (f"{'ratio':>12}" if len(places) > 1 else ""))
    for name in commands(scratch):
        times: dict[str, list[float]] = {revision: [] for revision in places}
        for number in range(repeats + 1):
            for revision, place in places.items():
                folder = scratch / f"of-{revision}"
                folder.mkdir(exist_ok=True)
                (folder / "config.yaml").unlink(missing_ok=True)
                seconds = time_of(place, commands(folder)[name])
                if number:  # the first run fills caches
                    times[revision].append(seconds)
        medians = [statistics.median(values) for values in times.values()]
        ratio = f"{medians[-1] / medians[0]:12.2f}" if len(medians) > 1 else ""
        print(f"{name:20}" + "".join(f"{median:12.2f}" for median in medians) + ratio, flush=True)


def time_of(place: Path, words: list[str]) -> float:
    """Seconds from the start of the command to its first step, or to its end where it takes none."""
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1"}
    environment.pop("PYTHONDONTWRITEBYTECODE", None)  # compiled once, as on any machine
    begun, reached = time.perf_counter(), None
    process = subprocess.Popen(
        [sys.executable, str(place / SCRIPT), *words],
        cwd=place,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    with process:
        lines = []
        for line in process.stdout or ():
            lines.append(line)
            if reached is None and STEP in line:
                reached = time.perf_counter() - begun
    ended = time.perf_counter() - begun
    expected = (0,) if STEP in "".join(lines) or words[0] != "train" else (2,)
    if process.returncode not in (*expected, 3):
        sys.exit(f"{' '.join(words)} ended with {process.returncode}:\n{''.join(lines)}")
    return ended if reached is None else reached


if __name__ == "__main__":
    main()
