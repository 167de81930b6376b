"""Model-agnostic meta-learning (Finn, Abbeel, Levine 2017): every experiment, one engine."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from maml.api import load as load

__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    if name == "load":  # on demand: it brings all of the framework with it
        from maml.api import load

        return load
    raise AttributeError(f"module 'maml' has no attribute {name!r}")
