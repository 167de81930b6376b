"""Model-agnostic meta-learning (Finn, Abbeel, Levine 2017): every experiment, one engine."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from maml.api import available as available
    from maml.api import load as load
    from maml.paper.results import results as results

__version__ = "0.1.0"

# What `import maml` offers, and its module. Each is imported on demand: it brings all of the framework with it.
_OFFERED = {"available": "maml.api", "load": "maml.api", "results": "maml.paper.results"}


def __getattr__(name: str) -> Any:
    if name in _OFFERED:
        return getattr(import_module(_OFFERED[name]), name)
    raise AttributeError(f"module 'maml' has no attribute {name!r}")
