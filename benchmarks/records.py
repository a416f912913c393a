"""Run records of strangers: values mangled by chance in the files of a run, read by every verb that reads them.

    python benchmarks/records.py [--cases 2000] [--seed 0]

In each case some values of run.json, metrics.jsonl, the held-out rows and the checkpoints' trainer_state.json are
replaced: by other types, by numbers that are huge or not finite, by deep nesting, control characters, paths, commands.
`status` must end with 0, `chat`, `merge` and `evaluate` with 2 and a message (their commands name something that is
absent, so that no weights are loaded), and the run's page must be made: never a traceback, a control character, or a
text that a browser would run. Prints what failed, and the counts.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import random
import re
import shutil
import sys
import tempfile
import time
import traceback
from collections import Counter
from pathlib import Path
from typing import Any

from mangling import changed_bytes, changed_value

ROOT = Path(__file__).resolve().parent.parent
FILES = (
    *("run.json", "metrics.jsonl", "held_out_pairs.jsonl", "held_out_examples.jsonl"),
    *("checkpoint-1/trainer_state.json", "checkpoint-2/trainer_state.json"),
)
WEIGHTS = (6, 2, 1, 1, 1, 1)


def mangle_records(folder: Path, draw: random.Random) -> list[str]:
    """Changes some values in one to three files of the run in `folder`. Returns what was changed."""
    said = []
    for name in draw.choices(FILES, WEIGHTS, k=draw.choice([1, 1, 2, 3])):
        path = folder / name
        for _ in range(draw.choice([1, 1, 2, 4])):
            _mangle(path, draw)
        said.append(name)
    return said


def _mangle(path: Path, draw: random.Random) -> None:
    if draw.random() < 0.05:
        path.write_bytes(changed_bytes(path.read_bytes(), draw))
        return
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines() if path.suffix == ".jsonl" else []
    place = draw.randrange(len(lines)) if lines else 0
    try:
        value = json.loads(lines[place] if lines else path.read_text(encoding="utf-8", errors="replace"))
    except (ValueError, RecursionError):
        return
    changed = json.dumps(_change(value, draw))
    path.write_text("\n".join([*lines[:place], changed, *lines[place + 1 :]]) if lines else changed, encoding="utf-8")


def _change(value: Any, draw: random.Random) -> Any:
    odd = [float("nan"), float("inf"), 1e308, -1e300, 10**400, "\u202e<script>", "\x1b[2J", 5e-324]
    if isinstance(value, dict) and value and draw.random() < 0.7:
        key = draw.choice(list(value))
        inner = _change(value[key], draw) if isinstance(value[key], dict | list) else draw.choice(odd)
        return value | {key: inner if draw.random() < 0.9 else _nested(draw.choice([40, 80, 800]))}
    return changed_value(value, draw)


def _nested(depth: int) -> Any:
    value: Any = 1
    for _ in range(depth):
        value = [value]
    return value


def use_records(folder: Path, ends: dict[str, set[int]]) -> list[str]:
    """Reads the run in every way; `ends` takes the exit codes of each verb. Returns what was wrong."""
    import advanced_dpo_script
    from utils.report.run_page import make_run_page

    faults = []
    page = folder.parent / "status.html"
    run = str(folder)
    for argv in (
        ["status", str(folder.parent)],
        ["status", "--json", str(folder.parent)],
        ["merge", "--model_name_or_path", run, "--output_dir", run],
        ["chat", "--model_name_or_path", run, "--compare_with", str(folder / "absent"), "--prompt", "x"],
        ["evaluate", "--model_name_or_path", run, "--dataset_name", str(folder / "absent.jsonl")],
    ):
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                code = advanced_dpo_script.main(argv)
            except SystemExit as stop:
                code = stop.code
            except BaseException:
                traceback.print_exc()
                code = 99
        ends.setdefault(argv[0], set()).add(code)
        allowed = (0,) if argv[0] == "status" else (0, 2)
        printed = out.getvalue() + err.getvalue()
        if code not in allowed or "Traceback" in printed:
            faults.append(f"{' '.join(argv[:2])} ended with {code}: {printed[-1500:]}")
        if match := re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]", printed):
            faults.append(f"{argv[0]} printed {match[0]!r}")
    try:
        page.write_text(make_run_page(folder), encoding="utf-8", errors="backslashreplace")
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()) as err:
            code = advanced_dpo_script.main(["status", str(folder.parent), "--report", str(folder.parent / "all.html")])
        if code not in (0, 2) or "Traceback" in err.getvalue():
            faults.append(f"status --report ended with {code}: {err.getvalue()[-1500:]}")
        texts = [path.read_text(encoding="utf-8") for path in folder.parent.glob("*.html")]
        faults += [f"a page has {match[0]!r}" for text in texts if (match := re.search("<script|\x1b|\u202e", text))]
    except Exception:
        faults.append(f"the page of the run: {traceback.format_exc()[-1500:]}")
    return faults


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--cases", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
    from mangling import make_seeds

    failed, began, ends = 0, time.monotonic(), {}
    kinds: Counter[str] = Counter()
    with tempfile.TemporaryDirectory(prefix="records-") as name:
        seeds = Path(name) / "seeds"
        with contextlib.redirect_stdout(io.StringIO()):
            if make_seeds(seeds) != 0:
                return 1
        for number in range(options.cases):
            draw, folder = random.Random(f"{options.seed}:{number}"), Path(name) / "case" / "run"
            shutil.copytree(seeds / draw.choice(["run", "full"]), folder)
            changed = mangle_records(folder, draw)
            kinds.update(changed)
            faults = use_records(folder, ends)
            if faults:
                failed += 1
                print(f"case {number} ({', '.join(changed)}): {'; '.join(faults)}", flush=True)
            shutil.rmtree(folder.parent)
    print(f"{options.cases:,} cases in {time.monotonic() - began:,.0f} s: {failed} failed; exit codes {ends}")
    print("changed: " + ", ".join(f"{kind} {count}" for kind, count in sorted(kinds.items())))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
