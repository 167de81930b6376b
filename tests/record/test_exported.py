"""Exported parameters: a file keeps what evaluation needs, damage is noticed, and an algorithm can load it."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from maml.algorithm.maml import MAML
from maml.domain.sinusoid import Sinusoid
from maml.errors import MamlError
from maml.inner.sgd import SGD
from maml.model.mlp import MLP
from maml.record import checkpoint
from maml.record.exported import (
    CommittedNumber,
    Entry,
    ExportedFile,
    Index,
    check_overrides,
    compose_entry,
    pack,
    read_index,
    read_parameters,
    restore,
    title,
    unpack,
    write_index,
)
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


def test_parameters_too_large_to_export_come_from_their_run_folder(tmp_path: Path) -> None:
    folder, run = tmp_path / "checkpoints", tmp_path / "runs" / "sinusoid_10shot" / "0a"
    run.mkdir(parents=True)
    state = {group: {"w": torch.arange(3.0)} for group in ("theta", "outer", "buffers", "best")}
    saved = {"run_id": "0a", "experiment": "", "training": {}, "execution": {}, "iteration": 5, "state": state}
    content = pack(state, title(run, 5))
    (file,) = an_index().files.keys() - {"a"}
    origin = (
        an_index()
        .files[file]
        .model_copy(update={"run": "sinusoid_10shot/0a", "sha256": hashlib.sha256(content).hexdigest(), "iteration": 5})
    )
    with pytest.raises(MamlError, match=r"checkpoint\.pt is missing; .*restore the run folder"):
        read_parameters(folder, file, origin)
    checkpoint.save(run / "checkpoint.pt", saved)
    found = read_parameters(folder, file, origin)
    assert sorted(found) == ["best", "buffers", "theta"]
    assert torch.equal(found["theta"]["w"], torch.arange(3.0))
    checkpoint.save(run / "checkpoint.pt", saved | {"iteration": 6})
    with pytest.raises(MamlError, match=r"has other parameters \(of iteration 6\) than .* \(of iteration 5"):
        read_parameters(folder, file, origin)


@pytest.mark.parametrize("run", ["../runs/a", "/etc/passwd", "a/b/c", "a/..", ""])
def test_index_cannot_name_a_run_folder_elsewhere(tmp_path: Path, run: str) -> None:
    index = an_index()
    write_index(tmp_path, Index(files={k: v.model_copy(update={"run": run}) for k, v in index.files.items()}))
    with pytest.raises(MamlError, match=r"files\.\w\.run"):
        read_index(tmp_path)


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
    for value in fresh.outer_state.values():
        value.add_(3)  # no longer the zeros of a new optimizer
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
        numbers={1: CommittedNumber(mean=0.1 + 0.2, ci95=1e-17), 0: CommittedNumber(mean=None, ci95=None)},
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
    with pytest.raises(MamlError, match=r"index\.json is damaged \(cells\.table/row/column\.bank is missing\)"):
        read_index(tmp_path)
    write_index(tmp_path, Index(cells=an_index().cells))
    with pytest.raises(MamlError, match=r"index\.json is damaged \(files has no entry b\)"):
        read_index(tmp_path)


@pytest.mark.parametrize(
    "override",
    [
        "+inner.step_size=1",
        "++inner.step_size=1",
        "~inner",
        "~inner.step_size=1",
        "+evaluation.x._target_=os.system",
        "evaluation._target_=os.system",
        "evaluation={_target_: os.system, command: ls}",
        "evaluation.search={_target_: os.system}",
        "evaluation.search=[{a: {'_target_': os.system}}]",
        "evaluation.search={'_target_': os.system}",
        "evaluation.step_size=${oc.env:HOME}",
        "evaluation.step_size='${oc.env:HOME}'",
        "evaluation.step_size=${oc.create:{a: 1}}",
        "inner.step_size=0.1,0.2",
        "inner.step_size=choice(0.1,0.2)",
        "seed=range(1,3)",
        "model=glob(*)",
        "model=mlp,conv4",
        "model=[mlp,conv4]",
        "model=../../elsewhere",
        "model=no_option",
        "model@domain=mlp",
        "/model=mlp",
        "model/other=mlp",
        "hydra.searchpath=[file://elsewhere]",
        "hydra.run.dir=elsewhere",
        "hydra/launcher=joblib",
        "--config-dir=elsewhere",
        "-m",
        "--cfg=job",
        "runs_dir=elsewhere",
        "data_dir=elsewhere",
        "cache_dir=elsewhere",
        "hardware=gpu",
        "logger=wandb",
        "experiment=sinusoid_10shot",
        "+experiment=sinusoid_10shot",
        "seed",
        "",
    ],
)
def test_override_that_does_more_than_set_a_setting_is_refused(override: str) -> None:
    with pytest.raises(MamlError, match=r"index\.json has the override"):
        check_overrides(["inner.step_size=0.01", override])


def test_settings_of_training_and_evaluation_are_overridden() -> None:
    overrides = [
        "inner.step_size=0.02",
        "evaluation.num_shots=[5]",
        "algorithm=fomaml",
        "num_iterations=7",
        "precision=tf32",
    ]
    entry = an_index().cells["table/row/column"]
    settings = compose_entry(entry.model_copy(update={"overrides": overrides}), seed=3)
    assert (settings.inner["step_size"], settings.inner["order"], settings.seed) == (0.02, 1, 3)
    assert (settings.evaluation["num_shots"], settings.num_iterations, settings.precision) == ([5], 7, "tf32")


@pytest.mark.parametrize(
    ("field", "value", "reason"),
    [
        ("experiment", "../debug/smoke", "names the experiment '../debug/smoke', which is no file in conf/experiment/"),
        ("experiment", "sinusoid_10shot,sinusoid_oracle", "which is no file in conf/experiment/"),
        ("overrides", ["inner.nothing=1"], "in index.json do not fit sinusoid_10shot"),
        ("overrides", ["inner.step_size=-1"], "inner.step_size=-1: input should be greater than 0"),
        ("overrides", ["model=module"], "model.module._target_ has no value, and the run needs one"),
    ],
)
def test_entry_that_fits_no_experiment_is_refused(field: str, value: Any, reason: str) -> None:
    entry = an_index().cells["table/row/column"].model_copy(update={field: value})
    with pytest.raises(MamlError, match=re.escape(reason)):
        compose_entry(entry, seed=0)


@pytest.mark.parametrize("file", ["../b", "/b", "a/b", "", ".", ".."])
def test_file_of_an_entry_is_beside_the_index(file: str, tmp_path: Path) -> None:
    index = json.loads(an_index().model_dump_json())
    index["cells"]["table/row/column"]["file"] = file
    (tmp_path / "index.json").write_text(json.dumps(index))
    with pytest.raises(MamlError, match=r"index\.json is damaged \(cells\.table/row/column\.file"):
        read_index(tmp_path)
