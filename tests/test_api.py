"""Loading a trained network from its name, a run folder or a file; one from somebody else runs no code."""

from __future__ import annotations

import json
import pickle
import pydoc
import shutil
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

import maml
from maml.config.paths import CHECKPOINTS
from maml.config.schema import build, build_without_data
from maml.domain.classification import FewShotClassification
from maml.errors import MamlError
from maml.record import checkpoint
from maml.record.exported import read_index
from tests.config.test_schema import changed
from tests.runs import ROOT, TinyRuns
from tests.test_network import SINUSOID, may_be_unfinished, same


def test_tiny_run_is_loaded_from_folder_and_file(tiny: TinyRuns) -> None:
    folder = tiny.run()
    network = maml.load(folder)
    assert (network.experiment, network.iteration, network.complete) == ("custom", 200, True)
    assert repr(network) == "<custom, iteration 200 of 200>"
    x, y = torch.linspace(-5, 5, 10).unsqueeze(1), torch.zeros(10, 1)
    assert same(network.adapt(x, y).params, maml.load(folder / "checkpoint.pt").adapt(x, y).params)
    before = {name: value.clone() for name, value in network.theta.items()}
    network.adapt(x, y, num_steps=40)
    assert same(network.theta, before)


@pytest.mark.parametrize("name", ["omniglot", "mini_imagenet", "cifar_fs", "fc100"])
def test_domain_without_its_images_is_like_the_one_with_them(name: str, tiny_images: TinyRuns) -> None:
    config = tiny_images.config(f"domain={name}").domain
    bare: Any = build_without_data(config)
    try:
        domain: FewShotClassification = build(config)
    except MamlError as error:
        pytest.skip(str(error))
    for attribute in ("in_shape", "out_dim", "scale", "rotate", "num_shots", "num_query", "workload"):
        assert getattr(bare, attribute) == getattr(domain, attribute)
    assert len(bare.splits["train"]) == len(domain.splits["train"]) == domain.num_train_classes
    assert domain.images.shape[2:] == (domain.in_shape[0] * domain.in_shape[1], domain.in_shape[2])
    assert 0.5 < domain.images[:3].max() / domain.scale <= 1


@may_be_unfinished
def test_available_names_can_be_loaded() -> None:
    names = maml.available()
    assert names == sorted(set(names))
    assert "sinusoid_10shot" in names
    assert maml.load(names[-1]).experiment == names[-1]


@pytest.mark.parametrize(
    ("device", "reason"),
    [
        ("cuda:99", "device=cuda:99 cannot be used"),
        ("tpu", "device=tpu cannot be used"),
        ("meta", "allowed: cpu, cuda"),
    ],
)
def test_device_that_cannot_be_used_is_refused(device: str, reason: str) -> None:
    with pytest.raises(MamlError, match=reason):
        maml.load("sinusoid_10shot", device=device)


def test_unknown_sources_say_what_there_is(tmp_path: Path) -> None:
    for source, message in {
        "omniglot_5way_1shto": "did you mean omniglot_5way_1shot",
        "mini_imagenet_5way_1shot": "has no committed checkpoint: train it",
        str(tmp_path): "is no run folder",
        str(tmp_path / "a.safetensors"): "has no entry for a.safetensors",
    }.items():
        with pytest.raises(MamlError, match=message):
            maml.load(source)


def test_import_of_the_package_stays_light() -> None:
    code = (
        "import sys, maml; assert 'torch' not in sys.modules; assert callable(maml.load); assert 'torch' in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
    with pytest.raises(AttributeError, match="no attribute 'lod'"):
        maml.lod  # noqa: B018


@pytest.mark.parametrize("experiment", sorted({entry.experiment for entry in read_index(CHECKPOINTS).cells.values()}))
def test_every_committed_network_can_be_loaded(experiment: str) -> None:
    with warnings.catch_warnings(record=True, action="always") as caught:
        network = maml.load(experiment)
    assert bool(caught) == (not network.complete)
    assert all(value.isfinite().all() for value in network.theta.values())
    assert all(value.any() for value in network.algorithm.buffers.values()), "they are the trained ones"


COMMITTED = sorted(path.parent for path in (ROOT / "results" / "runs").glob("*/*/config.yaml"))
# Their checkpoints, with the optimizer's state, are too large; results/checkpoints has their parameters.
WITHOUT_CHECKPOINT = {"omniglot_5way_1shot_non_conv/37f8b2b40b51", "omniglot_5way_5shot_non_conv/1aed3f1a8263"}


def name(folder: Path) -> str:
    return f"{folder.parent.name}/{folder.name}"


def test_committed_runs_without_a_checkpoint_are_known() -> None:
    assert {name(folder) for folder in COMMITTED if not (folder / "checkpoint.pt").exists()} == WITHOUT_CHECKPOINT


@may_be_unfinished
@pytest.mark.parametrize("folder", [folder for folder in COMMITTED if name(folder) not in WITHOUT_CHECKPOINT], ids=name)
def test_every_committed_run_folder_can_be_loaded(folder: Path) -> None:
    network = maml.load(folder)
    assert network.experiment == folder.parent.name
    assert all(value.isfinite().all() for value in network.theta.values())


# --- files from somebody else ---

# Calls that leave the file ``left`` in the current folder, as the arguments of their ``_target_``.
CALLS: dict[str, dict[str, Any]] = {
    "pandas.read_pickle": {"filepath_or_buffer": "payload.pkl"},
    "numpy.load": {"file": "payload.npy", "allow_pickle": True},
    "maml.network.np.load": {"file": "payload.npy", "allow_pickle": True},
    "torch.load": {"f": "payload.pt", "weights_only": False},
    "joblib.load": {"filename": "payload.pkl"},
    "pathlib.Path.write_text": {"self": {"_target_": "pathlib.Path", "_args_": ["left"]}, "data": "text"},
    "maml.record.checkpoint.Path.write_text": {"self": {"_target_": "maml.api.Path", "_args_": ["left"]}, "data": ""},
    "shutil.copyfile": {"src": "payload.pkl", "dst": "left"},
    "os.system": {"command": "touch left"},
    "maml.config.schema.inspect.os.system": {"command": "touch left"},
    "subprocess.Popen": {"args": ["touch", "left"]},
    "maml.record.provenance.subprocess.Popen": {"args": ["touch", "left"]},
    "brought.Net": {},
}
PARTS_OF_A_CONFIG = (
    "evaluation",
    "domain",
    "logger",
    "hardware",
    "evaluation.search",
    "evaluation.step_size",
    "inner.step_size",
    "hardware.device",
    "data_dir",
    "seed",
)


class Payload:
    """Leaves a file when it is unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (Path("left"),)


@pytest.fixture
def sent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A run folder that can be loaded, with payloads; it is the current folder, and modules are found in it."""
    for file in ("config.yaml", "checkpoint.pt"):
        shutil.copy(ROOT / "results" / "runs" / SINUSOID / "8374a9db09bf" / file, tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    Path("payload.pkl").write_bytes(pickle.dumps(Payload()))
    np.save("payload.npy", np.array([Payload()], dtype=object), allow_pickle=True)
    torch.save(Payload(), "payload.pt")
    Path("brought.py").write_text("open('left', 'w').close()\nclass Net: pass\n")
    yield tmp_path
    sys.modules.pop("brought", None)


def test_unfinished_training_is_said(sent: Path) -> None:
    checkpoint.save(sent / "checkpoint.pt", checkpoint.load(sent / "checkpoint.pt") | {"iteration": 1234})
    with pytest.warns(UserWarning, match="sinusoid_10shot was trained for 1,234 of 70,000 iterations") as caught:
        assert not maml.load(sent).complete
    assert caught[0].filename == __file__


def change_config(folder: Path, key: str, value: Any) -> None:
    config = yaml.safe_load((folder / "config.yaml").read_text())
    (folder / "config.yaml").write_text(yaml.safe_dump(changed(config, key, value)))


def refusal(source: Path, **options: Any) -> str:
    """Returns the message with which `maml.load` refuses; no payload has left its file."""
    with pytest.raises(MamlError) as caught:
        maml.load(source, **options)
    assert not Path("left").exists()
    assert "brought" not in sys.modules
    return str(caught.value)


def test_folder_of_these_tests_can_be_loaded(sent: Path) -> None:
    assert maml.load(sent).complete
    assert not Path("left").exists()


@pytest.mark.parametrize("address", CALLS)
def test_payloads_of_these_tests_leave_a_file_if_they_are_called(address: str, sent: Path) -> None:
    if address.startswith("joblib"):
        pytest.importorskip("joblib")
    arguments = {key: Path("left") if key == "self" else value for key, value in CALLS[address].items()}
    result: Any = pydoc.locate(address)(**arguments)  # type: ignore[operator]
    if isinstance(result, subprocess.Popen):
        result.wait()
    assert Path("left").exists()


@pytest.mark.parametrize("part", PARTS_OF_A_CONFIG)
@pytest.mark.parametrize("address", CALLS)
def test_run_folder_cannot_call_anything(address: str, part: str, sent: Path) -> None:
    change_config(sent, part, {"_target_": address, **CALLS[address]})
    message = refusal(sent)
    if address.startswith("maml"):
        assert "no such class" in message
    else:
        assert f"{part}._target_={address} needs the module {address.rpartition('.')[0]}" in message
        assert f'maml.load(..., allow=["{address.partition(".")[0]}"])' in message


@pytest.mark.parametrize("address", [address for address in CALLS if not address.startswith(("maml.", "brought."))])
def test_what_is_no_part_cannot_be_called_though_its_module_is_allowed(address: str, sent: Path) -> None:
    change_config(sent, "evaluation", {"_target_": address, **CALLS[address]})
    message = refusal(sent, allow=[address.partition(".")[0]])
    assert "evaluation._target_=" in message
    assert "no such class" in message or "has to inherit from maml.evaluation.Evaluation" in message


@pytest.mark.parametrize(
    ("key", "value", "reason"),
    [
        ("evaluation._target_", "maml.api.Path", "maml.api.Path needs the module pathlib"),  # defined elsewhere
        ("evaluation._target_", "maml.record.checkpoint.save", "it is a function, not a class"),
        ("evaluation._target_", "maml.domain.sinusoid.Sinusoid", "has to inherit from maml.evaluation.Evaluation"),
        ("domain._target_", "maml.domain.sinusoid.Sinusoid.sample_tasks", "no such class"),
        ("domain._target_", "maml.domain.base.Domain", "lacks data, draw_tasks"),
        ("domain._target_", "maml.load", "it is a function, not a class"),
        ("domain._target_", "maml.api.__class__", "needs the module builtins"),
        ("domain._target_", "maml..api.load", "is not the address of a class"),
        ("domain._target_", ".brought.Net", "is not the address of a class"),
        ("domain._target_", "brought", "is not the address of a class"),
        ("domain._target_", ["brought.Net"], "is not the address of a class"),
        ("domain._target_", "${oc.env:HOME}", "is not the address of a class"),
        ("domain._target_", "mamlx.brought.Net", 'allow=["mamlx"]'),
        ("evaluation._args_", [5, 10], "evaluation._args_ is not a key"),
        ("evaluation._convert_", "none", "evaluation._convert_ is not a key"),
        ("evaluation._recursive_", False, "evaluation._recursive_ is not a key"),
        ("evaluation._partial_", True, "evaluation._partial_=True has to be left out"),
        ("evaluation.step_size", {5: {"_target_": "brought.Net"}}, "step_size.5._target_=brought.Net needs the module"),
        ("model.hidden_sizes", [40, {"_target_": "brought.Net"}], "hidden_sizes.1._target_=brought.Net needs the"),
        ("model.hidden_sizes", [{"_target_": "maml.inner.sgd.SGD"}], "hidden_sizes.0 is a plain value, not a part"),
        ("evaluation.search", {"_target_": "maml.inner.sgd.SGD"}, "inherit from maml.evaluation.StepSizeSearch"),
        ("hydra", {"run": {"dir": "elsewhere"}}, "hydra is not a key"),
        (
            "model",
            {"_target_": "maml.model.module.ModuleModel", "module": {"_target_": "torch.nn.Flatten"}},
            '["torch"]',
        ),
        (
            "domain",
            {"_target_": "maml.domain.gymnasium_env.GymnasiumEnv", "env_id": "brought:Net-v0", "goals": {"g": [0, 1]}},
            "domain.env_id=brought:Net-v0 needs the module brought",
        ),
    ],
)
def test_ways_around_are_refused(key: str, value: Any, reason: str, sent: Path) -> None:
    change_config(sent, key, value)
    assert reason in refusal(sent)


def test_class_of_torch_is_a_network_if_it_is_allowed_and_nothing_else_is(sent: Path) -> None:
    module = {"_target_": "torch.nn.Flatten", "_partial_": True}
    change_config(sent, "model", {"_target_": "maml.model.module.ModuleModel", "module": module})
    assert "the parameters belong to run" in refusal(sent, allow=["torch"])
    change_config(sent, "model.module._partial_", False)
    assert "model.module._partial_=False has to be true" in refusal(sent, allow=["torch.nn"])
    change_config(sent, "model.module", {"_target_": "torch.utils.data.DataLoader", "_partial_": True})
    assert "has to inherit from torch.nn.modules.module.Module" in refusal(sent, allow=["torch"])


@pytest.mark.parametrize(
    "text",
    [
        "${oc.env:HOME}",
        "${oc.decode:'{_target_: os.system}'}",
        "${oc.create:{_target_: brought.Net}}",
        "${direction:brought.Net}",
    ],
)
def test_interpolations_stay_texts(text: str, sent: Path) -> None:
    change_config(sent, "data_dir", text)
    change_config(sent, "cache_dir", "${data_dir}")
    assert maml.load(sent).complete
    assert not Path("left").exists()
    change_config(sent, "evaluation.step_size", text)
    assert f"evaluation.step_size={text!r}" in refusal(sent)


@pytest.mark.parametrize(
    "text",
    [
        "!!python/object/apply:os.system ['touch left']",
        "!!python/object/new:brought.Net {}",
        "!!python/name:os.system",
        "!!python/object/apply:pathlib.Path [left]",
        "2020-01-01",
        "!!binary aGVsbG8=",
        "&a [*a]",
    ],
)
def test_config_that_is_no_plain_data_is_refused(text: str, sent: Path) -> None:
    with open("config.yaml", "a") as file:
        file.write(f"more: {text}\n")
    assert "config.yaml is damaged, or no config of a run" in refusal(sent)
    Path("config.yaml").write_text("[1, 2]")
    assert "it is no mapping of settings" in refusal(sent)


def test_checkpoint_runs_no_code(sent: Path) -> None:
    for source in ("payload.pt", "payload.pkl"):
        shutil.copy(source, "checkpoint.pt")
        assert "damaged or not a checkpoint" in refusal(sent / "checkpoint.pt")


@pytest.mark.parametrize("change", [{"experiment": None}, {"iteration": "many"}, {"state": 3}, {"state": {"theta": 3}}])
def test_checkpoint_of_another_form_is_named(change: dict[str, Any], sent: Path) -> None:
    saved = checkpoint.load(sent / "checkpoint.pt") | change
    checkpoint.save(sent / "checkpoint.pt", {key: value for key, value in saved.items() if value is not None})
    assert "checkpoint.pt is damaged (" in refusal(sent)


@pytest.mark.parametrize("sizes", ["[1]", '{"a": [0.1]}', '{"5": "b"}'])
def test_step_sizes_of_another_form_are_named(sizes: str, sent: Path) -> None:
    report = json.loads((ROOT / "results" / "runs" / SINUSOID / "8374a9db09bf" / "report.json").read_text())
    (sent / "report.json").write_text(json.dumps(report | {"step_sizes": json.loads(sizes)}))
    assert "report.json is damaged (step_sizes" in refusal(sent)


def test_own_module_is_used_only_if_it_is_allowed_by_name(tiny: TinyRuns, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "my_nets.py").write_text(
        "from torch import nn\n"
        "class Net(nn.Linear):\n"
        "    def __init__(self, width: int):\n"
        "        super().__init__(width, width)\n"
    )
    folder = tiny.run("model=module", "model.module._target_=my_nets.Net", "+model.module.width=1", "inner.adapt=['*']")
    monkeypatch.delitem(sys.modules, "my_nets")
    for allow in ([], ["my_net"], ["my_nets.Net"], ["torch"]):
        message = refusal(folder, allow=allow)
        assert "model.module._target_=my_nets.Net needs the module my_nets" in message
        assert 'maml.load(..., allow=["my_nets"])' in message
        assert "my_nets" not in sys.modules
    assert maml.load(folder, allow=["my_nets"]).complete
    change_config(folder, "model.module._target_", "my_nets.nn.Flatten")
    assert "no such class" in refusal(folder, allow=["my_nets"])
    monkeypatch.setattr("my_nets.Flatten", torch.nn.Flatten, raising=False)
    change_config(folder, "model.module._target_", "my_nets.Flatten")
    assert "my_nets.Flatten needs the module torch.nn.modules.flatten" in refusal(folder, allow=["my_nets"])


def test_index_with_an_override_that_does_more_than_set_a_number_is_refused(sent: Path) -> None:
    (file,) = {entry.file for entry in read_index(CHECKPOINTS).cells.values() if entry.experiment == SINUSOID}
    shutil.copy(CHECKPOINTS / file, sent)
    content = (CHECKPOINTS / "index.json").read_text()
    (sent / "index.json").write_text(content)
    assert maml.load(sent / file).complete
    call = "{_target_: pandas.read_pickle, filepath_or_buffer: payload.pkl}"
    for overrides, reason in [
        ([f"evaluation={call}"], "index.json has the override"),
        ([f"evaluation.search={call}"], "index.json has the override"),
        (["hydra.searchpath=[.]"], "index.json has the override"),
        (["inner.step_size=0.5"], "the parameters belong to run"),
    ]:
        index = json.loads(content)
        for entry in index["cells"].values():
            if entry["file"] == file:
                entry["overrides"] = overrides
        (sent / "index.json").write_text(json.dumps(index))
        assert reason in refusal(sent / file)


def test_committed_network_may_be_named_by_a_path() -> None:
    assert maml.load(Path("sinusoid_10shot")).experiment == "sinusoid_10shot"


def test_no_device_is_refused_in_a_line() -> None:
    with pytest.raises(MamlError, match="device=None cannot be used"):
        maml.load("sinusoid_10shot", device=None)  # type: ignore[arg-type]
