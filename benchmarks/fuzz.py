"""A fuzz campaign: mangled flags, configs, data, model folders, adapters, templates, run folders, given to every verb.

    python benchmarks/fuzz.py [--cases 2000] [--seed 0] [--first N] [--only N] [--keep FOLDER]

Each case is a valid command of which something was changed, by chance from its seed. It must end with 0 (3 for problems
that `data` found), with 2 and a message, or with 130: never a traceback, a hang, a control character on the terminal, a
secret of the environment in any output, or a file made or changed outside the folder that was to be written. HOME, the
caches and the temporary folder lie in the folder that is watched. Prints what failed, with the command that repeats it.

The process imports everything once and forks a child per case. What is changed, and how, is in mangling.py; the tiny
models come from the tests. Linux and macOS.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import hashlib
import os
import re
import resource
import shlex
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

from mangling import Case, build_case, make_seeds

ROOT = Path(__file__).resolve().parent.parent
SECONDS = 45  # of processor time, after which a case hangs
WALL_SECONDS = 600  # the same by the clock: the machine may be busy
MEMORY_BYTES = 6 << 30
SECRETS = {
    name: f"planted-{name.lower().replace('_', '-')}-7f3a9"
    for name in ("HF_TOKEN", "WANDB_API_KEY", "OPENAI_API_KEY", "AWS_SECRET_ACCESS_KEY")
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--cases", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=int, help="run this case alone and show what it prints")
    parser.add_argument("--first", type=int, default=0, help="the number of the first case")
    parser.add_argument("--keep", type=Path, help="keep the folders of failed cases here")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="fuzz-") as name:
        sandbox = Path(name).resolve()
        prepare_environment(sandbox)
        import_everything()
        seeds = sandbox / "seeds"
        if run_child(lambda: make_seeds(seeds), sandbox / "making", SECONDS * 10) != 0:
            print((sandbox / "making.err").read_text()[-4000:])
            return 1
        numbers = [options.only] if options.only is not None else range(options.first, options.first + options.cases)
        return run_cases(numbers, options, sandbox, seeds)


def prepare_environment(sandbox: Path) -> None:
    """Before anything is imported: every place a library may write to lies in the sandbox."""
    for name in ("home", "caches", "tmp", "work"):
        (sandbox / name).mkdir()
    os.environ |= {
        "HOME": str(sandbox / "home"),
        "HF_HOME": str(sandbox / "caches"),
        "XDG_CACHE_HOME": str(sandbox / "caches" / "xdg"),
        "TMPDIR": str(sandbox / "tmp"),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "MKL_NUM_THREADS": "1",
        "WANDB_MODE": "offline",
        "WANDB_SILENT": "true",
        "TOKENIZERS_PARALLELISM": "false",
    }
    os.environ |= SECRETS
    tempfile.tempdir = str(sandbox / "tmp")


def import_everything() -> None:
    """What a case would spend most of its time on; nothing here computes, so that no thread pool is forked."""
    import importlib
    import logging
    import pkgutil

    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
    import utils

    for module in pkgutil.walk_packages(utils.__path__, "utils."):
        importlib.import_module(module.name)
    from transformers import LlamaForCausalLM, LlamaForSequenceClassification, PreTrainedTokenizerFast  # noqa: F401
    from trl import DPOTrainer, SFTTrainer  # noqa: F401

    import advanced_dpo_script  # noqa: F401

    with contextlib.suppress(ImportError):  # what loading a model computes once in a process
        from transformers.conversion_mapping import get_checkpoint_conversion_mapping

        get_checkpoint_conversion_mapping("llama")
    gc.collect()
    gc.freeze()  # else each child's collection would touch, and so copy, all of the parent's memory


def run_cases(numbers: range | list[int], options: argparse.Namespace, sandbox: Path, seeds: Path) -> int:
    """Runs them one after the other and prints what failed and how all ended."""
    codes: Counter[str] = Counter()
    kinds: Counter[str] = Counter()
    failed, began = 0, time.monotonic()
    for number in numbers:
        folder = sandbox / "cases" / f"{number}"
        case = build_case(number, options.seed, folder, seeds)
        faults, code, printed = judge(case, sandbox)
        codes[str(code)] += 1
        kinds[case.changes[0].removesuffix(" again")] += 1
        if faults:
            failed += 1
            print(f"\ncase {number}: {'; '.join(faults)}")
            print(f"  changed: {', '.join(case.changes)}")
            print(f"  command: {shlex.join(case.argv)}"[:2000].replace(str(folder), "."))
            lines = [line[:300] for line in printed.strip().splitlines() if line.strip(" ^~")]
            print("  " + "\n  ".join(lines[-8:]).replace(str(folder), "."))
            print(f"  again:   python benchmarks/fuzz.py --seed {options.seed} --only {number}", flush=True)
            if options.keep:
                shutil.copytree(folder, options.keep / f"{number}", symlinks=True, dirs_exist_ok=True)
        elif options.only is not None:
            print(f"case {number}: {', '.join(case.changes)}\n{shlex.join(case.argv)}\nexit code {code}\n{printed}")
        shutil.rmtree(folder, ignore_errors=True)
    ends = ", ".join(f"{count:,} with {code}" for code, count in sorted(codes.items()))
    print(f"\n{len(list(numbers)):,} cases in {time.monotonic() - began:,.0f} s: {ends}; {failed} failed")
    print("changed: " + ", ".join(f"{kind} {count}" for kind, count in sorted(kinds.items())))
    return 1 if failed else 0


def judge(case: Case, sandbox: Path) -> tuple[list[str], int | None, str]:
    """What was wrong with how the case ended (nothing: all was well), its exit code, and what it printed."""
    import advanced_dpo_script

    (case.folder / "stdin").write_bytes(case.stdin)
    watched = [case.folder, sandbox / "home", sandbox / "tmp", sandbox / "work", sandbox / "seeds"]
    before = listing(watched, case.written)
    stem = sandbox / "printed"
    code = run_child(
        lambda: advanced_dpo_script.main(case.argv), stem, SECONDS, sandbox / "work", case.folder / "stdin"
    )
    after = listing(watched, case.written)
    texts = [Path(f"{stem}.{end}").read_bytes().decode("utf-8", "replace") for end in ("out", "err")]
    faults = []
    if code is None:
        faults.append(f"no end within {SECONDS} s of processor time")
    elif code not in (0, 2, 130) and not (code == 3 and case.argv[0] == "data"):
        faults.append(f"exit code {code}")
    if "Traceback (most recent call last)" in texts[1] + texts[0]:
        faults.append("a traceback")
    if code == 2 and not any(line.startswith("error: ") and len(line) > 15 for line in texts[1].splitlines()):
        faults.append("no message")
    # What chat answers into a pipe is the answer as it is; only for a terminal are its control characters escaped.
    if match := re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f]", texts[1] + texts[0] * (case.argv[0] != "chat")):
        faults.append(f"the control character {match[0]!r} on the terminal")
    changed = sorted(str(path) for path in before.keys() | after.keys() if before.get(path) != after.get(path))
    if changed:
        faults.append(f"changed outside the output folder: {', '.join(changed[:4])}")
        for place in (sandbox / "home", sandbox / "tmp", sandbox / "work"):
            shutil.rmtree(place)
            place.mkdir()
    faults += [f"the secret {name} in {place}" for name, place in leaks(case, texts)]
    return faults, code, texts[0] + texts[1]


def listing(folders: list[Path], left_out: list[Path]) -> dict[Path, str]:
    """Every path below the folders with what it holds, but for those in folders that may be written."""
    found = {}
    for folder in folders:
        for path in folder.rglob("*"):
            if any(path == place or place in path.parents for place in left_out):
                continue
            if path.is_symlink():
                found[path] = f"a link to {os.readlink(path)}"
            elif path.is_file():
                found[path] = hashlib.sha256(path.read_bytes()).hexdigest()
            else:
                found[path] = "a folder"
    return found


def leaks(case: Case, texts: list[str]) -> Iterator[tuple[str, str]]:
    """Which secret of the environment stands in what was printed or written."""
    places = {"what was printed": "".join(texts).encode()}
    for folder in case.written:
        places |= {
            path.name: path.read_bytes() for path in folder.rglob("*") if path.is_file() and not path.is_symlink()
        }
    for name, secret in SECRETS.items():
        yield from ((name, place) for place, content in places.items() if secret.encode() in content)


def run_child(
    work: Callable[[], int], stem: Path, seconds: int, folder: Path | None = None, stdin: Path | None = None
) -> int | None:
    """The exit code of `work` in a child of its own, printing to stem.out and stem.err; None when it was killed."""
    child = os.fork()
    if child == 0:
        code = 99
        with contextlib.suppress(BaseException):
            os.setsid()
            for number, end in ((1, "out"), (2, "err")):
                os.dup2(os.open(f"{stem}.{end}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), number)
            os.dup2(os.open(stdin or os.devnull, os.O_RDONLY), 0)
            if folder is not None:
                os.chdir(folder)
                resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
                resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 30, 1 << 30))
            resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds + 5))
            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
            sys.stdout, sys.stderr = (os.fdopen(number, "w", encoding="utf-8") for number in (1, 2))
            sys.stdin = os.fdopen(0, encoding="utf-8")
            try:
                code = work() or 0
            except SystemExit as stop:
                code = stop.code if isinstance(stop.code, int) else 1
            except BaseException:
                traceback.print_exc()
                code = 99
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)
    status = wait_for(child)
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(child, signal.SIGKILL)  # what the case started and left
    if status is None or (os.WIFSIGNALED(status) and os.WTERMSIG(status) in (signal.SIGXCPU, signal.SIGKILL)):
        return None
    return os.waitstatus_to_exitcode(status)


def wait_for(child: int) -> int | None:
    began = time.monotonic()
    while time.monotonic() - began < WALL_SECONDS:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return status
        time.sleep(0.005)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return None


if __name__ == "__main__":
    sys.exit(main())
