"""Hashes of the code of classes that are not part of this project, so that a run is not mixed with later code."""

from __future__ import annotations

import ast
import hashlib
import importlib.util
import inspect
import sys
import sysconfig
from collections.abc import Iterator, Mapping
from contextlib import suppress
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import gymnasium

from maml.config.names import locate_callable, named_modules
from maml.config.schema import TRAINING_PARTS, Settings

# Packages whose code is not hashed: this one (its commit is recorded), and those whose version is recorded.
_RECORDED = {"maml", "torch", "numpy", "gymnasium", "mujoco"}
_INSTALLED = [Path(sysconfig.get_path(name)).resolve() for name in ("stdlib", "purelib", "platlib")]


def code_hashes(settings: Settings) -> dict[str, str]:
    """Returns a hash of the code of every class and environment outside this project that a run uses.

    The hash covers the module that defines the class and the modules of the user that it imports, but not those that
    only a function imports. It is a hash of the parsed code, so comments, docstrings and layout do not change it. A
    different version of Python parses the same code to another hash.

    Args:
        settings: the settings of a run.

    Returns:
        Hashes of 12 hexadecimal digits, by ``_target_`` or ``env_id``; empty if all code is the project's. Code
        without a source file, such as a notebook's, has none.
    """
    config = {part: getattr(settings, part) for part in (*TRAINING_PARTS, "evaluation")}
    hashes = {}
    for key, name, _ in named_modules(config):
        is_class = key.endswith("_target_")
        modules = {name: inspect.getmodule(locate_callable(name))} if is_class else _modules_of_environment(name)
        for label, module in modules.items():
            if module is not None and module.__name__.partition(".")[0] not in _RECORDED:
                parts = sorted(set(_parsed(module)))
                if parts:
                    hashes[label] = hashlib.sha256("\n".join(parts).encode()).hexdigest()[:12]
    return hashes


def _modules_of_environment(env_id: str) -> dict[str, ModuleType | None]:
    """Returns the module of the class behind ``module:Name-v0`` and, if that is another one, the registering module.

    The registration has arguments and wrappers of the environment.
    """
    registering, _, name = env_id.partition(":")
    with suppress(ImportError):
        importlib.import_module(registering)
    registration = sys.modules.get(registering)
    spec = gymnasium.registry.get(name)
    entry: Any = spec.entry_point if spec else None
    module = inspect.getmodule(entry) if entry is not None and not isinstance(entry, str) else None
    if isinstance(entry, str):
        with suppress(ImportError):
            module = importlib.import_module(entry.partition(":")[0])
    module = module or registration
    return {env_id: module} | ({} if module is registration else {f"{env_id} (registration)": registration})


def _parsed(module: ModuleType, seen: set[str] | None = None) -> Iterator[str]:
    """Yields the parsed code of a module and of the user's modules that it imports, each once."""
    seen = set() if seen is None else seen
    file = getattr(module, "__file__", None)
    if file is None or not file.endswith(".py") or module.__name__ in seen:
        return
    seen.add(module.__name__)
    try:
        tree = _parse(file, Path(file).stat().st_mtime_ns)
    except (OSError, SyntaxError, ValueError):
        return
    yield tree[0]
    for level, name in tree[1]:
        absolute = name
        if level:
            with suppress(ImportError):
                absolute = importlib.util.resolve_name("." * level + name, module.__package__)
        imported = sys.modules.get(absolute)
        if imported is not None and _belongs_to_user(imported, module):
            yield from _parsed(imported, seen)


def _belongs_to_user(imported: ModuleType, importing: ModuleType) -> bool:
    """Returns whether a module is code of the user: of the same package, or not installed."""
    top = imported.__name__.partition(".")[0]
    if top in _RECORDED or top in sys.stdlib_module_names:
        return False
    file = Path(getattr(imported, "__file__", None) or "/").resolve()
    installed = any(file.is_relative_to(folder) for folder in _INSTALLED)
    return top == importing.__name__.partition(".")[0] or not installed


@cache
def _parse(file: str, changed: int) -> tuple[str, tuple[tuple[int, str], ...]]:
    """Returns a file's syntax tree as text, without docstrings, and the modules that it imports.

    Args:
        file: the path.
        changed: the time of the last change, so that a changed file is read again.
    """
    tree = ast.parse(Path(file).read_bytes())
    imports: list[tuple[int, str]] = []
    for node in _run_by_the_import(tree):
        if isinstance(node, ast.Import):
            imports += [(0, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            parent = node.module or ""
            imports.append((node.level, parent))
            # The imported name may be a module itself.
            imports += [(node.level, f"{parent}.{alias.name}".lstrip(".")) for alias in node.names]
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            _remove_docstring(node)
    return ast.dump(tree), tuple(imports)


def _run_by_the_import(node: ast.AST) -> Iterator[ast.AST]:
    """Yields the nodes below one that importing the module runs: what a function imports may be loaded or not."""
    for child in ast.iter_child_nodes(node):
        yield child
        if not isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            yield from _run_by_the_import(child)


def _remove_docstring(node: ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) -> None:
    match node.body:
        case [ast.Expr(ast.Constant(str())), *rest]:
            node.body = rest


def changed_code(earlier: Mapping[str, str], now: Mapping[str, str]) -> list[str]:
    """Returns the names whose code differs between two results of `code_hashes`; a name in one of them only is none."""
    return [name for name in now if name in earlier and earlier[name] != now[name]]
