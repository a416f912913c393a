"""The code behind a module, as a hash: kept rows are not used again once code that made them has changed."""

from __future__ import annotations

import ast
import functools
import hashlib
import importlib.util
from collections.abc import Iterator
from pathlib import Path

from ..run.manifests import hash_file


@functools.cache
def hash_code(module: str) -> str:
    """A hash of the source of one of our modules and of all that it imports of ours, directly or through others."""
    digest = hashlib.sha256()
    for name, path in sorted(modules_behind(module).items()):
        digest.update(f"{name} {hash_file(path)}\n".encode())
    return digest.hexdigest()


def modules_behind(module: str) -> dict[str, Path]:
    """The module and all of ours that it imports, directly or through others: name -> file."""
    own, found, waiting = module.partition(".")[0], {}, [module]
    while waiting:
        name = waiting.pop()
        spec = importlib.util.find_spec(name) if name not in found and name.partition(".")[0] == own else None
        if spec is None or spec.origin is None:
            continue
        found[name] = Path(spec.origin)
        package = name if spec.submodule_search_locations else name.rpartition(".")[0]
        waiting += _imported(Path(spec.origin), package)
    return found


def _imported(path: Path, package: str) -> Iterator[str]:
    """The modules that a file imports, anywhere in it; of `from a import b` both a and, if it is a module, a.b."""
    for node in _statements(ast.parse(path.read_bytes())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = importlib.util.resolve_name("." * node.level + (node.module or ""), package)
            yield base
            yield from (f"{base}.{alias.name}" for alias in node.names if _is_module(base, alias.name))


def _statements(node: ast.AST) -> Iterator[ast.AST]:
    """The statements of a tree, and of those within them; not what they compute, in which no import can stand."""
    for name in ("body", "orelse", "finalbody", "handlers", "cases"):
        within = getattr(node, name, None)
        for part in within if isinstance(within, list) else ():
            yield part
            yield from _statements(part)


def _is_module(package: str, name: str) -> bool:
    spec = importlib.util.find_spec(package)
    folders = (spec.submodule_search_locations or ()) if spec else ()
    return any((Path(folder) / f"{name}.py").is_file() or (Path(folder) / name).is_dir() for folder in folders)
