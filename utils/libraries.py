"""How the libraries are imported: what most runs do not use waits for its first use."""

from __future__ import annotations

import contextlib
import functools
import gc
import importlib
import importlib.machinery
import sys
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from typing import Any

# Packages that transformers, TRL and PEFT import when they find them, with what the libraries ask of them there.
WAITING: Mapping[str, Mapping[str, Any]] = {
    "bitsandbytes": {},
    "wandb": {"run": None},  # as before `wandb.init`
}
FORGETS = "transformers.utils.import_utils"  # lists the files of 549 models in a cache for 128, and then once more


@contextlib.contextmanager
def imported_fast() -> Iterator[None]:
    """Within the context libraries are imported without what a run may never use.

    - The packages of `WAITING` are imported by their first use, then or later.
    - Python's garbage collector rests: it finds nothing in what stays, and looks through it a dozen times.
    - transformers keeps the list of its models, which it makes twice.

    Each is left out by itself where a library changes: then it is imported as it always is.
    """
    collects, former, finder = gc.isenabled(), functools.lru_cache, _Finder()
    gc.disable()
    functools.lru_cache = _keeping(former)
    sys.meta_path.insert(0, finder)
    try:
        yield
    finally:
        sys.meta_path.remove(finder)
        for name in WAITING:  # who imports it from here on uses it
            if isinstance(sys.modules.get(name), WaitingModule):
                del sys.modules[name]
        functools.lru_cache = former
        if collects:
            gc.enable()


def _keeping(lru_cache: Callable[..., Any]) -> Callable[..., Any]:
    """`functools.lru_cache` that forgets nothing where it is put on a function of `FORGETS` without a size."""

    def decorate(maxsize: Any = 128, typed: bool = False) -> Any:
        keeps = getattr(maxsize, "__module__", None) == FORGETS
        return lru_cache(None)(maxsize) if keeps else lru_cache(maxsize, typed)

    return decorate


class WaitingModule(types.ModuleType):
    """What stands for a package in the modules that import it before it is used; the first use imports it.

    What Python itself looks for in all modules (`__file__`, `__spec__`) it knows.
    """

    def __getattr__(self, name: str) -> Any:
        if "made" not in vars(self):  # Python is about to write down what it knows of every module
            raise AttributeError(name)
        if sys.modules.get(self.__name__) in (None, self):  # not imported yet
            if name in WAITING[self.__name__]:
                return WAITING[self.__name__][name]
            if name.startswith("__") and name not in ("__path__", "__version__", "__all__"):
                raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")
        return getattr(_import_now(self.__name__), name)


def _import_now(name: str) -> types.ModuleType:
    if isinstance(sys.modules.get(name), WaitingModule):
        del sys.modules[name]
    finders = [finder for finder in sys.meta_path if isinstance(finder, _Finder)]
    for finder in finders:
        finder.waits = False
    try:
        with compiled_at_first_call():
            return importlib.import_module(name)
    finally:
        for finder in finders:
            finder.waits = True


class _Finder(MetaPathFinder):
    """Finds the packages of `WAITING` as Python does, and has a module made that stands for them."""

    waits = True

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: types.ModuleType | None = None
    ) -> ModuleSpec | None:
        top, _, part = name.partition(".")
        if top not in WAITING or not self.waits:
            return None
        if part:  # the package was imported as its part was asked for, and its part perhaps with it
            return ModuleSpec(name, _Same(sys.modules[name])) if name in sys.modules else None
        spec = importlib.machinery.PathFinder.find_spec(name, path, target)
        if spec is None or spec.origin is None or spec.loader is None:  # an empty folder of that name
            return None
        spec.loader, spec.submodule_search_locations = _Standing(), None
        return spec


class _Standing(Loader):
    """Makes the module that stands for a package, and runs no code."""

    def create_module(self, spec: ModuleSpec) -> types.ModuleType:
        return WaitingModule(spec.name)

    def exec_module(self, module: types.ModuleType) -> None:
        vars(module)["made"] = True


class _Same(Loader):
    """The module that is imported already, once more as it is."""

    def __init__(self, module: types.ModuleType) -> None:
        self.module, self.spec = module, module.__spec__

    def create_module(self, spec: ModuleSpec) -> types.ModuleType:
        return self.module

    def exec_module(self, module: types.ModuleType) -> None:
        module.__spec__ = self.spec


def import_bitsandbytes() -> None:
    """Imports bitsandbytes where it is installed and works, before PEFT looks for layers in 4 bits."""
    with contextlib.suppress(Exception), compiled_at_first_call():
        importlib.import_module("bitsandbytes")


@contextlib.contextmanager
def compiled_at_first_call() -> Iterator[None]:
    """Within the context `torch.compile` looks for its compiler when the function is called, not when it is defined.

    bitsandbytes defines four such functions as it is imported, and the compiler takes longer to import than all of it.
    """
    torch: Any = sys.modules.get("torch")
    former = getattr(torch, "compile", None)
    if former is None:
        yield
        return

    def compile_later(function: Callable[..., Any] | None = None, **options: Any) -> Any:
        if not isinstance(function, types.FunctionType):
            return functools.partial(compile_later, **options) if function is None else former(function, **options)

        @functools.cache
        def compiled() -> Callable[..., Any]:
            return former(function, **options)

        @functools.wraps(function)
        def call(*arguments: Any, **named: Any) -> Any:
            return compiled()(*arguments, **named)

        return call

    torch.compile = compile_later
    try:
        yield
    finally:
        torch.compile = former
