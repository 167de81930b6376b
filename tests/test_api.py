"""Loading a trained network and adapting it to one's own data: the same bits as the framework's own adaptation."""

from __future__ import annotations

import io
import json
import pickle
import pydoc
import shutil
import subprocess
import sys
import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from torch import Tensor

import maml
from maml import api
from maml.config.compose import compose_experiment
from maml.config.paths import CHECKPOINTS
from maml.config.schema import Settings, build, build_without_data
from maml.data.omniglot import load_omniglot
from maml.domain.classification import FewShotClassification
from maml.domain.sinusoid import Sinusoid
from maml.errors import MamlError
from maml.evaluation import Evaluation
from maml.experiment import build_algorithm
from maml.hardware.base import Hardware
from maml.record import checkpoint
from maml.record.exported import read_index
from maml.types import Params, num_tasks, take
from tests.config.test_schema import changed
from tests.runs import ROOT, TinyRuns
from tests.scripts.test_render import trained

OMNIGLOT = "omniglot_5way_1shot"
SINUSOID = "sinusoid_10shot"

# Some committed networks are not trained to the end, which `maml.load` warns of; here warnings are errors.
may_be_unfinished = pytest.mark.filterwarnings("ignore:.* was trained for .* iterations:UserWarning")


@torch.no_grad()
def by_the_framework(network: api.Network, config: Settings, task: int, num_shots: int) -> tuple[Any, dict[str, Any]]:
    """Evaluates one task of the bank, by the algorithm built with its real domain; returns its data and results."""
    algorithm = build_algorithm(config, Hardware("cpu"))
    algorithm.load_state_dict(network.algorithm.state_dict())
    evaluation: Evaluation = build(config.evaluation)
    domain = algorithm.domain
    tasks = take(evaluation.bank(domain, num_shots), task, task + 1)
    *_, params = algorithm.adapt(
        algorithm.params_per_task(num_tasks(tasks)), tasks, evaluation.num_steps, evaluation.step_sizes(num_shots)
    )
    support, query = domain.data(tasks, "support"), domain.data(tasks, "query")
    measured = domain.measure(algorithm.model, params, support, query, evaluation.num_steps)
    return domain, {"params": params, "support": support, "query": query, "measured": measured, "tasks": tasks}


def same(params: Params, other: Params) -> bool:
    return params.keys() == other.keys() and all(torch.equal(value, other[name]) for name, value in params.items())


def test_sinusoid_adapts_and_predicts_as_the_framework() -> None:
    network = maml.load(SINUSOID)
    assert (network.iteration, network.complete) == (70_000, True)
    _, found = by_the_framework(network, compose_experiment(SINUSOID), task=3, num_shots=5)
    predictor = network.adapt(found["support"].x[0].numpy(), found["support"].y[0].tolist())
    assert same(predictor.params, found["params"])
    values = predictor(found["query"].x[0])
    assert isinstance(values, Tensor)
    assert (values - found["query"].y[0]).square().mean().item() == found["measured"]["mse"].item()
    assert same(network.adapt(found["support"].x[0, :, 0], found["support"].y[0]).params, found["params"])
    assert network.adapt(found["support"].x[0], found["support"].y[0], num_steps=0)([[0.5]]).shape == (1, 1)


@may_be_unfinished
@pytest.mark.parametrize("experiment", [OMNIGLOT, "omniglot_5way_1shot_context_vector"])
def test_omniglot_adapts_and_predicts_as_the_framework(tiny_images: TinyRuns, experiment: str) -> None:
    network = maml.load(experiment)
    config = compose_experiment(experiment)
    config = replace(config, domain={**config.domain, "cache_dir": str(tiny_images.cache_dir)})
    domain, found = by_the_framework(network, config, task=1, num_shots=1)
    raw = (found["support"].x[0, ..., 0] * domain.scale).to(torch.uint8)
    predictor = network.adapt(raw.numpy(), list("abcde"))
    assert same(predictor.params, found["params"])
    assert predictor.classes == list("abcde")
    query, truth = found["query"].x[0], ["abcde"[number] for number in found["query"].y[0]]
    for transductive, metric in [(True, "accuracy_transductive"), (False, "accuracy_inductive")]:
        labels = predictor(query, transductive)
        assert np.mean([a == b for a, b in zip(labels, truth, strict=True)]) == pytest.approx(found["measured"][metric])
        chances = predictor.probabilities(query, transductive)
        assert torch.allclose(chances.sum(1), torch.ones(5))
        assert ["abcde"[best] for best in chances.argmax(1)] == labels
    together = predictor.probabilities(query)
    assert torch.allclose(predictor.probabilities(query[2:3]), together[2:3], atol=1e-6)  # no matter what is beside it


@may_be_unfinished
def test_examples_may_come_in_any_order() -> None:
    network = maml.load("omniglot_5way_5shot")
    images = torch.rand(25, 28, 28, 1, generator=torch.Generator().manual_seed(0))
    labels = [("class", number % 5) for number in range(25)]  # hashable is enough
    order = [number for first in range(5) for number in range(first, 25, 5)]
    predictor = network.adapt(images, labels)
    other = network.adapt(images[order], [labels[number] for number in order])
    assert predictor.classes == other.classes == labels[:5]
    assert same(predictor.params, other.params)


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


@pytest.mark.parametrize("experiment", ["sinusoid_pretrain", SINUSOID])
def test_step_sizes_are_those_of_meta_test_and_of_the_nearest_k(experiment: str) -> None:
    network = maml.load(experiment)
    evaluation: Evaluation = build(compose_experiment(experiment).evaluation)
    for given, known in {5: 5, 1: 5, 9: 10, 100: 20}.items():
        sizes = evaluation.step_sizes(known)
        assert network._step_sizes(given, 10) == sizes
        assert network._step_sizes(given, 12) == (sizes and [*sizes, sizes[-1], sizes[-1]])


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


@pytest.mark.parametrize("baseline", ["finetune", "nearest_neighbor"])
def test_baselines_adapt_without_the_images_they_were_trained_on(baseline: str, tmp_path: Path) -> None:
    config = compose_experiment(f"mini_imagenet_5way_1shot_{baseline}")
    config = replace(config, domain={**config.domain, "data_dir": str(tmp_path), "cache_dir": str(tmp_path)})
    algorithm = build_algorithm(config, Hardware("cpu"), build_without_data(config.domain))
    network = api.Network("it", 0, 0, algorithm, build(config.evaluation), {})
    images = torch.rand(5, 84, 84, 3, generator=torch.Generator().manual_seed(0))
    predictor = network.adapt(images, list("abcde"), num_steps=2)
    labels = predictor(images)
    assert pickle.loads(pickle.dumps(predictor))(images) == labels
    assert set(labels) <= set("abcde") if baseline == "finetune" else labels == list("abcde")


@may_be_unfinished
def test_pictures_become_what_the_domain_has(tiny_images: TinyRuns, tmp_path: Path) -> None:
    data = load_omniglot(Path(tiny_images.config().domain["data_dir"]), tiny_images.cache_dir)
    drawing = data.images[7, 3]
    large = Image.fromarray((1 - drawing.numpy()) * np.uint8(255)).resize((105, 105), Image.Resampling.NEAREST)
    large.convert("RGBA").save(tmp_path / "drawing.png")
    network = maml.load(OMNIGLOT)
    assert torch.equal(network.read([tmp_path / "drawing.png"])[0, ..., 0], drawing.float())
    photo = Image.fromarray(np.full((50, 60, 3), [0, 51, 255], np.uint8))
    (pixels,) = maml.load("cifar_fs_5way_1shot").read([photo])
    assert torch.allclose(pixels, torch.tensor([0, 0.2, 1]).expand(32, 32, 3))


@may_be_unfinished
def test_drawings_on_transparent_paper_and_of_16_bits_are_read_as_drawn(tmp_path: Path) -> None:
    row, column = np.mgrid[-1:1:105j, -1:1:105j]
    ink = abs(row**2 + column**2 - 0.4) < 0.1
    plain = Image.fromarray(np.where(ink, 0, 255).astype(np.uint8))
    clear = Image.new("L", plain.size)
    clear.putalpha(Image.fromarray(np.where(ink, 255, 0).astype(np.uint8)))
    deep = Image.fromarray(np.where(ink, 45_000, 60_000).astype(np.uint16))
    files = [tmp_path / name for name in ("plain.png", "la.png", "rgba.png", "deep.png")]
    for picture, file in zip((plain, clear, clear.convert("RGBA"), deep), files, strict=True):
        picture.save(file)
    expected, *others = maml.load(OMNIGLOT).read(files)
    assert 0.05 < expected.mean() < 0.3
    assert all(torch.equal(other, expected) for other in others)


@may_be_unfinished
def test_picture_that_is_blank_or_broken_is_named(tmp_path: Path) -> None:
    network = maml.load(OMNIGLOT)
    Image.new("L", (50, 50), 255).save(tmp_path / "empty.png")
    (tmp_path / "page.png").write_text("<html>404</html>")
    (tmp_path / "half.png").write_bytes((tmp_path / "empty.png").read_bytes()[:60])
    with pytest.warns(UserWarning, match=r"empty\.png is all paper"):
        assert network.read([tmp_path / "empty.png"]).sum() == 0
    with pytest.warns(UserWarning, match="picture 1 is all ink"):
        network.read([Image.open(tmp_path / "empty.png").rotate(45), Image.new("L", (50, 50))])
    for name in ("page.png", "half.png", "gone.png"):
        with pytest.raises(MamlError, match=rf"{name} cannot be read as a picture \("):
            network.read([tmp_path / name])
    with pytest.raises(MamlError, match="no pictures to read"):
        network.read([])


@may_be_unfinished
def test_own_images_in_ten_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The example of docs/python.md, on drawings of five shapes."""
    monkeypatch.chdir(tmp_path)
    row, column = np.mgrid[-1:1:105j, -1:1:105j]
    shapes = {
        "ring": abs(row**2 + column**2 - 0.4),
        "cross": 3 * np.minimum(abs(row), abs(column)),
        "stripe": 3 * abs(row - 0.5),
        "diagonal": 2 * abs(row - column),
        "square": 3 * abs(np.maximum(abs(row), abs(column)) - 0.7),
    }
    Path("unknown").mkdir()
    for name, distance in shapes.items():
        (Path("drawings") / name).mkdir(parents=True)
        ink = Image.fromarray(np.where(distance < 0.2, 0, 255).astype(np.uint8))
        ink.save(f"drawings/{name}/1.png")
        ink.rotate(2, translate=(3, -2), fillcolor=255).save(f"unknown/{name}.png")
    said: list[tuple[str, str]] = []

    network = maml.load("omniglot_5way_1shot")
    examples = sorted(Path("drawings").glob("*/*.png"))
    predictor = network.adapt(network.read(examples), [file.parent.name for file in examples])
    unknown = sorted(Path("unknown").glob("*.png"))
    labels = predictor(network.read(unknown))
    chances = predictor.probabilities(network.read(unknown))
    for file, label, chance in zip(unknown, labels, chances.amax(1), strict=True):
        said.append((file.stem, str(label)))
        assert 0.2 < chance <= 1
    assert sum(stem == label for stem, label in said) >= 4


@may_be_unfinished
def test_fewer_classes_than_in_training_are_those_of_meta_test_with_fewer_ways(tiny_images: TinyRuns) -> None:
    network = maml.load(OMNIGLOT)
    config = compose_experiment(OMNIGLOT, ("evaluation.num_ways=3",))
    config = replace(config, domain={**config.domain, "cache_dir": str(tiny_images.cache_dir)})
    _, found = by_the_framework(network, config, task=4, num_shots=1)
    predictor = network.adapt(found["support"].x[0], list("abc"))
    assert same(predictor.params, found["params"])
    query, truth = found["query"].x[0], ["abc"[number] for number in found["query"].y[0]]
    for transductive, metric in [(True, "accuracy_transductive"), (False, "accuracy_inductive")]:
        labels = predictor(query, transductive)
        assert np.mean([a == b for a, b in zip(labels, truth, strict=True)]) == pytest.approx(found["measured"][metric])
        assert predictor.probabilities(query, transductive).shape == (3, 3)
    with pytest.raises(MamlError, match="nothing to tell apart: the labels have 1 class"):
        network.adapt(found["support"].x[0], list("aaa"))


@may_be_unfinished
def test_network_that_compares_images_takes_more_classes_than_in_training(tiny_images: TinyRuns) -> None:
    folder = tiny_images.run("algorithm=nearest_neighbor", "num_iterations=1", "meta_batch_size=10")
    network = maml.load(folder)
    images = torch.rand(16, 28, 28, 1, generator=torch.Generator().manual_seed(0))
    labels = [*range(8)] * 2
    assert network.adapt(images, labels)(images) == labels, "every image is most similar to itself"


@may_be_unfinished
def test_wrong_data_is_refused_with_what_to_give() -> None:
    network = maml.load(OMNIGLOT)
    images = np.zeros((5, 28, 28), np.uint8)
    for x, y, message in [
        (np.zeros((7, 28, 28)), range(7), "this network tells 5 classes apart, the labels have 7"),
        (images, list("abcd"), "5 inputs, but 4 labels"),
        (np.zeros((6, 28, 28)), list("abcdea"), "there are 2 of 'a', 1 of 'b'"),
        (np.zeros((5, 27, 28)), list("abcde"), r"x has shape \(5, 27, 28\); omniglot.*\('S', 28, 28, 1\)"),
        (np.zeros((0, 28, 28)), [], "x has shape"),
        (images + np.uint8(255), list("abcde"), "as uint8 they have to lie in 0 to 1"),
        (images - 0.5, list("abcde"), "as float64 they have to lie in 0 to 1"),
        (images * np.nan, list("abcde"), "x has values that are not finite"),
    ]:
        with pytest.raises(MamlError, match=message):
            network.adapt(x, y)  # type: ignore[arg-type]
    points = maml.load(SINUSOID)
    with pytest.raises(MamlError, match=r"y has shape \(4, 1\); the targets of x have shape \(3, 1\)"):
        points.adapt(np.zeros((3, 1)), np.zeros((4, 1)))
    with pytest.raises(MamlError, match=r"takes inputs of shape \('S', 1\)"):
        points.adapt(np.zeros((3, 2)), np.zeros((3, 1)))
    with pytest.raises(MamlError, match="diverge"):
        points.adapt(np.zeros((3, 1)), np.full((3, 1), 1e30))
    with pytest.raises(MamlError, match="values, which have no probabilities"):
        points.adapt(np.zeros((3, 1)), np.zeros((3, 1))).probabilities([[0.0]])
    with pytest.raises(MamlError, match="which are no images"):
        points.read([])


def test_policy_is_shown_and_not_adapted_to_examples(tmp_path: Path) -> None:
    trained("point_navigation_maml", tmp_path, "evaluation.theta=best")
    (path,) = tmp_path.rglob("checkpoint.pt")
    network = maml.load(path.parent)
    assert same(network.theta, {name: network.algorithm.best[name] for name in network.theta})
    with pytest.raises(MamlError, match=r"scripts/render.py \+experiment=point_navigation_maml"):
        network.adapt([[0.0, 0.0]], [0])


@may_be_unfinished
def test_available_names_can_be_loaded() -> None:
    names = maml.available()
    assert names == sorted(set(names))
    assert "sinusoid_10shot" in names
    assert maml.load(names[-1]).experiment == names[-1]


def test_predictor_can_be_saved_and_predicts_the_same() -> None:
    predictor = maml.load("sinusoid_10shot").adapt([[0.1], [1.0], [2.0]], [[0.0], [0.5], [1.0]])
    file = io.BytesIO()
    torch.save(predictor, file)
    file.seek(0)
    for copied in (torch.load(file, weights_only=False), pickle.loads(pickle.dumps(predictor))):
        assert torch.equal(copied([[0.3], [4.0]]), predictor([[0.3], [4.0]]))


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


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
def test_network_on_a_gpu_predicts_as_on_the_cpu() -> None:
    cpu, gpu = (maml.load("sinusoid_10shot", device=device) for device in ("cpu", "cuda"))
    x, y = [[0.1], [1.0], [2.0]], [[0.0], [0.5], [1.0]]
    assert torch.allclose(cpu.adapt(x, y)(x), gpu.adapt(x, y)(x).cpu(), atol=1e-4)


def test_unknown_sources_say_what_there_is(tmp_path: Path) -> None:
    for source, message in {
        "omniglot_5way_1shto": "did you mean omniglot_5way_1shot",
        "ant_velocity_oracle": "has no committed checkpoint: train it",
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


def test_sinusoid_network_learns_a_sinusoid() -> None:
    x = torch.linspace(-5, 5, 20).unsqueeze(1)
    y = 3 * torch.sin(x - 1)
    network = maml.load(SINUSOID)
    errors = [(network.adapt(x, y, num_steps)(x) - y).square().mean() for num_steps in (0, 1, 10)]
    assert errors[0] > errors[1] > errors[2]
    assert isinstance(network.algorithm.domain, Sinusoid)


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
    "maml.api.np.load": {"file": "payload.npy", "allow_pickle": True},
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
        ("domain._target_", "maml.domain.sinusoid.Sinusoid.without_data", "no such class"),
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
