"""What each verb imports, and packages whose import waits for their first use."""

from __future__ import annotations

import contextlib
import functools
import gc
import importlib.util
import inspect
import json
import subprocess
import sys
import threading

import pytest
from shared.runs import ROOT

from utils import libraries
from utils.libraries import WaitingModule, compiled_at_first_call, imported_fast


@pytest.fixture(scope="module")
def imported(tiny_model, pairs_file, tmp_path_factory):
    """Command -> its exit code, what is imported after it, what it complained of; in one process, in this order."""
    words = [ROOT / "tests" / "programs" / "imports.py", tiny_model, pairs_file, tmp_path_factory.mktemp("imports")]
    done = subprocess.run([sys.executable, *map(str, words)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


LIGHT = {
    "help": 0,
    "a wrong flag": 2,
    "an occupied folder": 2,
    "a folder that is gone": 2,
    "no model in the folder": 2,
    "data that is gone": 2,
    "evaluate what is gone": 2,
    "chat with what is gone": 2,
    "init": 0,
    "status": 0,
}


def test_light_verbs_and_early_refusals_import_no_library(imported):
    for name, code in LIGHT.items():
        assert imported[name][:2] == [code, []], imported[name]


def test_data_imports_no_model_library(imported):
    code, heavy, complaints = imported["data"]
    assert code in (0, 3), complaints
    assert "datasets" in heavy
    assert not {"torch", "transformers", "trl", "peft", "accelerate", "bitsandbytes", "wandb"} & set(heavy)


def test_a_run_imports_no_tracker_no_4_bit_and_no_compiler_unless_it_uses_them(imported):
    unused = {"wandb", "bitsandbytes", "torch._inductor.compile_fx"}
    for name in ("train", "report"):
        code, heavy, complaints = imported[name]
        assert code == 0, complaints
        assert {"torch", "transformers", "trl", "peft"} <= set(heavy)
        assert not unused & set(heavy)
    code, heavy, complaints = imported["train --use_lora"]  # PEFT looks for layers in 4 bits
    assert code == 0, complaints
    assert unused & set(heavy) == {"bitsandbytes"}
    assert 0 < imported["4 bits"][0] < 0.2  # once it is asked to, it computes


@pytest.fixture
def home(tmp_path, monkeypatch):
    """Where a package lies that waits for its use, and that writes down each time its code runs."""
    home = tmp_path / "late_package"
    home.mkdir()
    (home / "__init__.py").write_text(
        "import builtins\nbuiltins.runs.append(__name__)\nfrom . import part\nvalue, run = 7, 'theirs'\n"
        "__version__ = '3.1'\n"
    )
    for name in ("part", "other"):
        (home / f"{name}.py").write_text("import builtins\nbuiltins.runs.append(__name__)\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr("builtins.runs", [], raising=False)
    monkeypatch.setattr(libraries, "WAITING", {"late_package": {"run": None}})
    yield home
    for name in [name for name in sys.modules if name.partition(".")[0] == "late_package"]:
        del sys.modules[name]


@pytest.fixture
def package(home):
    """What a library has of it that imported it and did not use it."""
    with imported_fast():
        import late_package
    return late_package


BOTH = ["late_package", "late_package.part"]


def runs() -> list[str]:
    import builtins

    return builtins.runs


def test_what_looks_through_all_modules_imports_none(home):
    with imported_fast():
        assert importlib.util.find_spec("late_package").origin == str(home / "__init__.py")
        import late_package

        assert isinstance(sys.modules["late_package"], WaitingModule)
        assert importlib.util.find_spec("late_package").origin == late_package.__file__ == str(home / "__init__.py")
        assert not hasattr(late_package, "__wrapped__")
        assert inspect.getmodule(runs) is sys.modules[__name__]
        assert late_package.run is None
    assert late_package.run is None
    assert "late_package" not in sys.modules
    assert runs() == []


@pytest.mark.parametrize("within", [True, False], ids=["as libraries are imported", "later"])
@pytest.mark.parametrize(
    ("use", "more"),
    [
        ("assert package.value == 7", []),
        ("assert package.__version__ == '3.1'", []),
        ("from late_package import value; assert value == 7", []),
        ("from late_package import part; assert part.__name__ == 'late_package.part'", []),
        ("import late_package.part as part; assert part is package.part", []),
        ("import late_package.other as other; assert other is package.other", ["late_package.other"]),
    ],
)
def test_the_first_use_imports_all_of_it_once(package, use, more, within):
    with imported_fast() if within else contextlib.nullcontext():
        import late_package  # noqa: F401

        exec(use, {"package": package})
        exec(use, {"package": package})
    assert runs() == BOTH + more
    assert package.run == sys.modules["late_package"].run == "theirs"
    for name in runs():
        assert type(sys.modules[name]).__name__ == "module"
        assert type(sys.modules[name].__spec__.loader).__name__ == "SourceFileLoader"
    sys.modules["late_package"].run = "changed since"
    assert package.run == "changed since"


def test_threads_that_use_it_first_import_it_once(package):
    values = []
    threads = [threading.Thread(target=lambda: values.append(package.value)) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert values == [7] * 8
    assert runs() == BOTH


def test_code_that_fails_fails_at_each_use(home, package):
    with open(home / "__init__.py", "a", encoding="utf-8") as file:
        file.write("\nraise ImportError('no driver')\n")
    for _ in range(2):
        with pytest.raises(ImportError, match="no driver"):
            package.nothing  # noqa: B018


def test_an_empty_folder_is_no_package_that_waits(tmp_path, monkeypatch):
    """Left behind by pip; transformers tells it from the package by what it lacks."""
    (tmp_path / "left_behind").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(libraries, "WAITING", {"left_behind": {"run": None}})
    with imported_fast():
        import left_behind
    assert not hasattr(left_behind, "run")
    del sys.modules["left_behind"]


def test_nothing_stays_changed_for_others():
    before = functools.lru_cache, list(sys.meta_path), gc.isenabled()
    with contextlib.suppress(ZeroDivisionError), imported_fast():
        assert not gc.isenabled()
        assert functools.lru_cache(lambda: 1).cache_info().maxsize == 128
        assert functools.lru_cache(maxsize=3)(lambda: 1).cache_info().maxsize == 3
        _ = 1 / 0
    assert before == (functools.lru_cache, list(sys.meta_path), gc.isenabled())


def test_a_function_is_compiled_when_it_is_called_and_once(monkeypatch):
    import torch

    compiled = []

    def compile_now(function, **options):
        compiled.append(options)
        return lambda x: function(x) + 100

    monkeypatch.setattr(torch, "compile", compile_now)
    with compiled_at_first_call():

        @torch.compile(dynamic=False)
        def double(x):
            return 2 * x

        @torch.compile
        def triple(x):
            return 3 * x

    assert torch.compile is compile_now
    assert (double.__name__, compiled) == ("double", [])
    assert [double(1), double(2), triple(1)] == [102, 104, 103]
    assert compiled == [{"dynamic": False}, {}]
