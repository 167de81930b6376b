"""Stands in for torchvision, which downloads data sets: a class that writes one, or fails."""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import ModuleType
from urllib.error import URLError

import pytest


def install_torchvision(monkeypatch: pytest.MonkeyPatch, name: str, dataset: Callable[..., object]) -> None:
    """Makes ``torchvision.datasets`` a module with one data set."""
    package, datasets = ModuleType("torchvision"), ModuleType("torchvision.datasets")
    setattr(datasets, name, dataset)
    monkeypatch.setitem(sys.modules, "torchvision", package)
    monkeypatch.setitem(sys.modules, "torchvision.datasets", datasets)


def no_network(*args: object, **kwargs: object) -> None:
    """Fails as a download without network."""
    raise URLError("Temporary failure in name resolution")


def broken_operators(*args: object, **kwargs: object) -> None:
    """Fails as a torchvision that does not fit torch."""
    raise RuntimeError("operator torchvision::nms does not exist")
