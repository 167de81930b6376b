"""Exported parameters: a file keeps what evaluation needs, damage is noticed, and an algorithm can load it."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
import torch

from maml.algorithm.maml import MAML
from maml.domain.sinusoid import Sinusoid
from maml.errors import MamlError
from maml.inner.sgd import SGD
from maml.model.mlp import MLP
from maml.record.exported import Entry, ExportedFile, Index, Reading, pack, read_index, restore, unpack, write_index
from tests.algorithms import build_from


def sinusoid(seed: int, hidden: int = 4) -> MAML:
    inner = SGD(step_size=0.01, num_steps=1, order=2, adapt=["*"])
    return build_from(MAML, Sinusoid(), MLP((1,), 1, [hidden]), inner, seed=seed)


def test_pack_and_unpack_keep_every_group_but_the_outer_optimizers(tmp_path: Path) -> None:
    state = {group: {"a.b": torch.arange(3.0), "c": torch.ones(())} for group in ("theta", "outer", "buffers", "best")}
    content = pack(state, "a title")
    assert content == pack(dict(reversed(state.items())), "a title")
    (tmp_path / "file").write_bytes(content)
    with pytest.raises(MamlError, match="wrong hash"):
        unpack(tmp_path / "file", "0")
    found = unpack(tmp_path / "file", hashlib.sha256(content).hexdigest())
    assert sorted(found) == ["best", "buffers", "theta"]
    assert torch.equal(found["best"]["a.b"], torch.arange(3.0))
    (tmp_path / "file").write_bytes(b"no")
    with pytest.raises(MamlError, match="is no safetensors file"):
        unpack(tmp_path / "file", hashlib.sha256(b"no").hexdigest())


def test_content_depends_on_values_and_title_alone() -> None:
    values = torch.arange(12.0).reshape(3, 4)
    strided = values.t().contiguous().t()  # the same numbers in another order in memory
    assert pack({"theta": {"w": values}}, "run") == pack({"theta": {"w": strided}}, "run")
    assert pack({"theta": {"w": values}}, "run") != pack({"theta": {"w": values}}, "another run")
    assert b"another run" in pack({"theta": {"w": values}}, "another run")


def test_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(MamlError, match=r"gone\.safetensors cannot be read \(No such file or directory\); restore it"):
        unpack(tmp_path / "gone.safetensors", "0")


def test_algorithm_goes_on_from_what_was_exported_and_keeps_its_own_optimizer(tmp_path: Path) -> None:
    trained, fresh = sinusoid(seed=0), sinusoid(seed=1)
    content = pack(trained.state_dict(), "run")
    (tmp_path / "file").write_bytes(content)
    optimizer = {name: value.clone() for name, value in fresh.outer_state.items()}
    restore(fresh, unpack(tmp_path / "file", hashlib.sha256(content).hexdigest()))
    assert all(torch.equal(value, trained.theta[name]) for name, value in fresh.theta.items())
    assert all(torch.equal(value, optimizer[name]) for name, value in fresh.outer_state.items())


def test_parameters_of_another_network_are_refused() -> None:
    with pytest.raises(MamlError, match=r"theta\.linear1\.weight has shape \(5, 1\), but this model's has \(4, 1\)"):
        restore(sinusoid(seed=0), {"theta": sinusoid(seed=0, hidden=5).theta})
    with pytest.raises(MamlError, match=r"lacks \['theta\.head\.weight'\] and has \['theta\.linear3\.weight'\]"):
        theta = dict(sinusoid(seed=0).theta)
        theta["linear3.weight"] = theta.pop("head.weight")
        restore(sinusoid(seed=0), {"theta": theta})


def an_index() -> Index:
    about = ExportedFile(
        sha256="0", run_id="1f2e3d", seed=0, iteration=3, num_iterations=4, execution={}, versions={}, hardware={}
    )
    entry = Entry(
        file="b",
        experiment="sinusoid_10shot",
        overrides=["seed=1"],
        evaluation={"evaluation.num_steps": 1},
        metric="mse",
        num_shots=5,
        step_sizes=[0.01],
        bank="5a",
        readings={1: Reading(mean=0.1 + 0.2, ci95=1e-17), 0: Reading(mean=None, ci95=None)},
    )
    return Index(files={"b": about, "a": about}, cells={"table/row/column": entry})


def test_index_comes_back_to_the_last_digit_and_equal_content_is_equal_bytes(tmp_path: Path) -> None:
    index = an_index()
    write_index(tmp_path, index)
    content = (tmp_path / "index.json").read_bytes()
    found = read_index(tmp_path)
    assert found == index
    turned = Index(files=dict(reversed(found.files.items())), cells=found.cells)
    write_index(tmp_path, turned)
    assert (tmp_path / "index.json").read_bytes() == content
    assert content.endswith(b"}\n")


def test_folder_without_an_index_has_nothing_and_a_damaged_one_is_named(tmp_path: Path) -> None:
    assert read_index(tmp_path) == Index()
    write_index(tmp_path, an_index())
    content = json.loads((tmp_path / "index.json").read_text())
    del content["cells"]["table/row/column"]["bank"]
    (tmp_path / "index.json").write_text(json.dumps(content))
    with pytest.raises(MamlError, match=r"index\.json is damaged \(cells\.table/row/column\.bank: Field required\)"):
        read_index(tmp_path)
