"""Names of classes in configs: a class may move to another module without a change of its runs' ids."""

from __future__ import annotations

from typing import Any

from hydra.utils import get_class

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


def locate(name: str) -> Any:
    """Imports the class of a ``_target_``.

    Raises:
        Exception: any error of the import.
    """
    return get_class(current_address(name))
