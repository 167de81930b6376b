"""Runs that cannot fit into memory: each is refused by the setting that makes it too large."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from maml.domain.sinusoid import Sinusoid
from maml.errors import MamlError
from tests.runs import TinyRuns


@pytest.mark.parametrize(
    ("overrides", "reason"),
    [
        (("seeds=1000000000000",), "seeds=1000000000000 is too large: a meta-batch takes at least"),
        (("meta_batch_size=1000000000000000",), "meta_batch_size=1000000000000000 is too large: a meta-batch takes"),
        (("domain.num_shots=1000000000000000",), "domain.num_shots=1000000000000000 is too large: a meta-batch takes"),
        (("evaluation.num_tasks=1000000000000000",), "evaluation.num_tasks=1000000000000000 is too large: the frozen"),
        (("evaluation.num_steps=1000000000000000",), "evaluation.num_steps=1000000000000000 is too large: the frozen"),
        (("model.hidden_sizes=[40,1000000000000000]",), "model.hidden_sizes=1000000000000000 is too large: a draw of"),
        (("inner.num_steps=1000000000000000",), "inner.num_steps=1000000000000000 is too large: a graph of"),
    ],
)
def test_what_cannot_fit_is_refused_before_anything_is_written(
    tiny: TinyRuns, overrides: tuple[str, ...], reason: str, tmp_path: Path
) -> None:
    with pytest.raises(MamlError, match=reason):
        tiny.run(*overrides)
    assert list(tmp_path.iterdir()) == []


def test_a_full_gpu_is_named(tiny: TinyRuns, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def fail(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. 12.00 MiB is free. Process 42 has 79.1 GiB.\nadvice")

    monkeypatch.setattr(Sinusoid, "to", fail)
    with pytest.raises(MamlError, match=r"Process 42 has 79.1 GiB.; choose another GPU \(CUDA_VISIBLE_DEVICES\)"):
        tiny.run()
    assert list(tmp_path.iterdir()) == []
