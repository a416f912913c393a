"""The package that `pip install .` makes: all its files, under its own name, from any folder."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest
from shared.pairs import make_pairs, write_lines
from shared.runs import ROOT, pretend_interrupted, read_record

from utils import __version__

if sys.version_info >= (3, 11):
    import tomllib

SOURCES = ("utils", "examples", "setup.py", "pyproject.toml", "README.md", "LICENSE")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """Made from a copy: setuptools leaves its working files beside the sources."""
    pytest.importorskip("setuptools")
    copy, made = tmp_path_factory.mktemp("sources"), tmp_path_factory.mktemp("wheel")
    for name in SOURCES:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / name, copy)
    words = ["wheel", "--quiet", "--no-build-isolation", "--no-deps", "--no-index", "--wheel-dir", str(made), str(copy)]
    subprocess.run([sys.executable, "-m", "pip", *words], check=True, capture_output=True, text=True)
    (path,) = made.glob("*.whl")
    return path


def files_of(*patterns: str) -> set[str]:
    files = [path for pattern in patterns for path in ROOT.glob(pattern) if path.is_file()]
    return {path.relative_to(ROOT).as_posix() for path in files if path.suffix != ".pyc"}


def test_a_wheel_holds_every_file_of_the_rooms_and_what_they_look_up(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    packed = {name for name in names if not name.split("/")[0].endswith(".dist-info")}
    expected = {re.sub("^utils/", "advanced_dpo/", name) for name in files_of("utils/**/*")}
    assert packed == expected | {f"advanced_dpo/{name}" for name in files_of("examples/*/**/*")}
    assert wheel.name.startswith(f"advanced_dpo-{__version__}-")


@pytest.mark.skipif(sys.version_info < (3, 11), reason="Python reads TOML from 3.11 on")
def test_what_is_pinned_lies_in_the_ranges_of_the_package():
    packaging = pytest.importorskip("packaging.requirements")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    lines = [*project["dependencies"], *(line for extra in project["optional-dependencies"].values() for line in extra)]
    ranges = {need.name.lower(): need.specifier for need in map(packaging.Requirement, lines)}
    pinned = [line for line in (ROOT / "requirements.txt").read_text().splitlines() if line and line[0] != "#"]
    for need in map(packaging.Requirement, pinned):
        (pin,) = need.specifier
        if need.name != "setuptools":  # which builds the package
            assert pin.version in ranges.pop(need.name.lower(), ()) or need.marker, need
    assert set(ranges) <= {"advanced-dpo", "coverage"} | {packaging.Requirement(line).name.lower() for line in pinned}


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory) -> Path:
    """The commands of a new environment that holds the wheel, and sees the libraries of this one."""
    place = tmp_path_factory.mktemp("environment")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(place)], check=True)
    scripts = place / ("Scripts" if os.name == "nt" else "bin")
    python = scripts / "python"
    where = [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"]
    own = Path(subprocess.run(where, check=True, capture_output=True, text=True).stdout.strip())
    (own / "libraries.pth").write_text(sysconfig.get_path("purelib"), encoding="utf-8")
    words = ["install", "--quiet", "--no-deps", "--no-index", str(wheel)]
    subprocess.run([sys.executable, "-m", "pip", "--python", str(python), *words], check=True)
    return scripts


DOCKERFILE = (ROOT / "Dockerfile").read_text(encoding="utf-8").replace("\\\n", "")
STEPS = [line.split(maxsplit=1) for line in DOCKERFILE.splitlines() if line and line[0] not in "# "]


def test_the_dockerfile_copies_what_the_package_is_made_of():
    copied = {name for kind, words in STEPS if kind == "COPY" for name in words.split()[:-1]}
    assert copied == {*SOURCES, "requirements.txt"}
    ignored = (ROOT / ".dockerignore").read_text(encoding="utf-8").split()
    assert not copied & set(ignored)
    assert [words for kind, words in STEPS if kind == "ENTRYPOINT"] == ['["dpo-train"]']


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="its steps are a Linux shell's")
def test_the_steps_of_the_dockerfile_run_in_a_clean_folder(tmp_path):
    """All but the packages of the system; the libraries are those of this environment, which pip finds in place."""
    environment = os.environ | {"PATH": f"{tmp_path}/opt/venv/bin{os.pathsep}{os.environ['PATH']}"}
    environment.pop("PYTHONPATH", None)

    def run(command: str) -> str:
        done = subprocess.run(command, shell=True, cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    ran = []
    for kind, words in STEPS:
        placed = re.sub(r"/(?=opt/venv|src)", f"{tmp_path}/", words)
        if kind == "COPY":
            *names, target = placed.split()
            for name in names:
                if (ROOT / name).is_dir():
                    shutil.copytree(ROOT / name, target, ignore=shutil.ignore_patterns("__pycache__"))
                else:
                    Path(target).mkdir(exist_ok=True)
                    shutil.copy(ROOT / name, target)
        elif kind == "RUN" and "apt-get" not in words:
            run(placed.replace("python3 ", f"{shlex.quote(sys.executable)} ", 1))
            ran.append(words.split()[0])
            if "venv" in words.split():
                (site,) = tmp_path.glob("opt/venv/lib/*/site-packages")
                (site / "libraries.pth").write_text(sysconfig.get_path("purelib"), encoding="utf-8")
    assert ran == ["python3", "pip", "pip"]
    assert f"dpo-train {__version__} " in run("dpo-train --version")
    run("dpo-train init --situation cpu_trial --output_file trial.yaml")
    assert (tmp_path / "trial.yaml").is_file()


@pytest.mark.slow
def test_an_installed_copy_works_from_an_empty_folder(installed, tiny_model, pairs_file, tmp_path):
    (tmp_path / "helping").mkdir()
    (tmp_path / "helping" / "utils.py").write_text("def shorter(texts): return [-len(text) for text in texts]\n")
    (tmp_path / "helping" / "scorer.py").write_text(
        "from utils import shorter\ndef score(prompts, responses): return shorter(responses)\n"
    )

    def run(*words, code: int = 0) -> str:
        environment = os.environ | {"PATH": f"{installed}{os.pathsep}{os.environ['PATH']}"}
        done = subprocess.run(
            list(map(str, words)), cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=250
        )
        assert done.returncode == code, done.stdout + done.stderr
        return done.stdout

    assert "usage: dpo-train [VERB]" in run("dpo-train", "--help")
    assert "advanced_dpo_script.py" not in run("dpo-train", "--help")
    model = ["--model_name_or_path", tiny_model, "--dataset_name", pairs_file]
    run("dpo-train", "train", *model, "--output_dir", "run", "--max_steps", 4, "--save_steps", 2, "--use_lora")
    record = read_record(tmp_path / "run")
    assert record["command"].startswith("dpo-train train --model_name_or_path")
    trained = (tmp_path / "run" / "adapter_model.safetensors").read_bytes()

    pretend_interrupted(tmp_path / "run", 2)
    (to_go_on,) = re.findall(r"dpo-train train .* --resume_from_checkpoint auto", run("dpo-train", "status", "."))
    run(*shlex.split(to_go_on))
    assert (tmp_path / "run" / "adapter_model.safetensors").read_bytes() == trained
    run("dpo-train", "evaluate", "--model_name_or_path", "run")

    # A file of the person's own finds the person's own utils.
    write_lines(tmp_path / "few.jsonl", make_pairs(4))
    generate = ["data", "--generate", *model[:2], "--dataset_name", "few.jsonl", "--output_file", "made.jsonl"]
    scored = ["--scorer", "helping/scorer.py:score", "--max_new_tokens", 4]
    run("dpo-train", *generate, *scored)

    # What comes with it is found, as a module and by a launcher too.
    run(installed / "python", "-m", "advanced_dpo", "init", "--situation", "cpu_trial", "--output_file", "trial.yaml")
    run("dpo-train", "--config", "trial.yaml", "--dry_run", "--max_samples", 100)
    run("dpo-train", "init", "--situation", "eight_gpus_full", "--output_file", "sharded.yaml")
    several = ["-m", "torch.distributed.run", "--nproc_per_node", 2, "-m", "advanced_dpo"]
    run(installed / "python", *several, *model, "--output_dir", "two", "--max_steps", 2)
    launched = read_record(tmp_path / "two")["process"]
    assert launched["launcher"][-2:] == ["--nproc_per_node", "2"]
    assert launched["script"] == "dpo-train"

    run(installed / "python", *["-m", "accelerate.commands.launch", "--cpu", "-m", "advanced_dpo"], *model,
        "--output_dir", "alone", "--max_steps", 1)  # fmt: skip
    assert read_record(tmp_path / "alone")["process"]["launcher"][2:] == ["accelerate.commands.launch", "--cpu"]


def test_a_program_with_utils_of_its_own_imports_the_script(tmp_path):
    """Its own are found before and after; the script is the same."""
    (tmp_path / "utils").mkdir()
    (tmp_path / "utils" / "__init__.py").write_text("name = 'theirs'\n")
    (tmp_path / "program.py").write_text(
        "import sys\n"
        f"sys.path.append({str(ROOT)!r})\n"
        "import advanced_dpo_script\n"
        "from utils import name\n"
        "print(name, advanced_dpo_script.main(['init', '--situation', 'cpu_trial', '--output_file', 'trial.yaml']))\n"
    )
    done = subprocess.run([sys.executable, "program.py"], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.stdout.endswith("theirs 0\n"), done.stderr
    assert (tmp_path / "trial.yaml").is_file()
