"""Names of classes in configs: a class may move, but the name under which its runs are known stays."""

from __future__ import annotations

from typing import Any

from hydra.utils import get_class

# Where a class is now, and the name that hashes of its runs and older configs contain. Whoever moves a class that any
# run has used adds a line; no run's id changes, and old run folders can still be read.
MOVED = {
    "maml.hardware.base.Hardware": "maml.hardware.Hardware",
}


def stable_name(address: str) -> str:
    """Returns the name of a class in hashes: the address at which its first runs found it."""
    return MOVED.get(address, address)


def current_address(name: str) -> str:
    """Returns where the class of a name, stable or not, can be imported from."""
    return next((address for address, stable in MOVED.items() if stable == name), name)


def locate(name: str) -> Any:
    """Returns the class of a ``_target_``.

    Raises:
        Exception: whatever its import raises.
    """
    return get_class(current_address(name))
