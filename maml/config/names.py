"""Names of classes in configs: which of them a file from somebody else may name, and where a class is now."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from maml.errors import MamlError

# Current address of a class: the old address, which run ids and old configs contain. Add a line whenever a class that
# runs have used moves. Run ids then stay the same, and old run folders stay readable.
MOVED = {
    "maml.hardware.base.Hardware": "maml.hardware.Hardware",
}


def stable_name(address: str) -> str:
    """Returns the name of a class that is hashed into run ids: its address before it moved."""
    return MOVED.get(address, address)


def current_address(name: str) -> str:
    """Returns the address to import a class from, given its stable name or its current address."""
    return next((address for address, stable in MOVED.items() if stable == name), name)


def locate(name: str, allow: Sequence[str] | None = None) -> type:
    """Imports the class of a ``_target_``.

    Args:
        name: its stable name or its current address, ``module.Class``.
        allow: None if the name comes from the user's own config. For a file that may come from somebody else: the
            modules outside this package that may be imported (`check_allowed`).

    Raises:
        MamlError: if the class, or the place where it is defined, is not allowed.
        TypeError: if the address is that of something other than a class.
        Exception: any error of the import.
    """
    found: type = _imported(name, allow, type)
    return found


def locate_callable(name: str, allow: Sequence[str] | None = None) -> Callable[..., Any]:
    """Imports the class or function of a ``_target_``; the arguments and errors are those of `locate`."""
    found: Callable[..., Any] = _imported(name, allow, Callable)
    return found


def _imported(name: str, allow: Sequence[str] | None, kind: Any) -> Any:
    module, _, attribute = current_address(name).rpartition(".")
    if allow is not None:
        check_allowed(module, name, allow)
    found = getattr(importlib.import_module(module), attribute)
    if not isinstance(found, kind):
        raise TypeError(f"it is a {type(found).__name__}, not a class")
    if allow is not None:  # a module also has what it imports from others
        check_allowed(found.__module__, name, allow)
    return found


def check_allowed(module: str, name: str, allow: Sequence[str]) -> None:
    """Refuses a module, without importing it, that is neither of this package nor allowed by name.

    Args:
        module: the module's dotted name.
        name: the text in the file that asks for the module, for the message.
        allow: names of further modules; each includes the modules below it.

    Raises:
        MamlError: if the module is not allowed.
    """
    if all(part.isidentifier() for part in module.split(".")):
        if any(f"{module}.".startswith(f"{known}.") for known in ("maml", *allow)):
            return
        top = module.partition(".")[0]
        raise MamlError(
            f"{name} needs the module {module}, which is not part of this project and whose code would run. If you "
            f'trust it, allow it by name: maml.load(..., allow=["{top}"])'
        )
    raise MamlError(f"{name!r} is not the address of a class, module.Class")


def named_modules(config: Any, path: str = "") -> Iterator[tuple[str, str, str]]:
    """Yields each key of a config, at any depth, whose value makes Python import a module; imports nothing.

    These are ``_target_``, and ``env_id`` if it has the form ``module:Name-v0`` (Gymnasium imports that module).

    Yields:
        The dotted key, its value, and the module.
    """
    items: Any = ()
    if isinstance(config, Mapping):
        items = config.items()
    elif isinstance(config, list):
        items = enumerate(config)
    for key, value in items:
        inner = f"{path}.{key}" if path else str(key)
        if key == "_target_":
            yield inner, str(value), current_address(str(value)).rpartition(".")[0]
        elif key == "env_id" and ":" in str(value):
            yield inner, str(value), str(value).partition(":")[0]
        else:
            yield from named_modules(value, inner)
