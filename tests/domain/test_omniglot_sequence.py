"""Sequences of Omniglot drawings against plain loops over the original images, and labels that do not leak."""

from __future__ import annotations

import math
import os
import signal
from collections import Counter
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from zipfile import ZipFile

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from maml.config.compose import compose
from maml.config.schema import build, build_without_data
from maml.data.omniglot import load_omniglot, vinyals_split
from maml.domain.omniglot_sequence import OmniglotSequence, by_showing, moved, num_earlier
from maml.errors import Diverged, Interrupted, MamlError
from maml.experiment import build_algorithm
from maml.hardware.base import Hardware
from maml.model.lstm import LSTM
from maml.model.mann import MANN
from maml.model.mlp import MLP
from maml.model.recurrent import Recurrent
from maml.network import Network
from maml.record.contents import Report, Source
from maml.record.run_files import read_json
from maml.seeding import Stream
from maml.types import Params, Tasks
from tests.hardware.test_distributed import assert_alike
from tests.runs import TinyRuns, assert_same_run, before_iteration

DATA = os.environ["MAML_DATA"]
Make = Callable[..., OmniglotSequence]


@pytest.fixture(scope="module")
def make(cache_dir: Path) -> Make:
    if not (Path(DATA) / "omniglot").is_dir():
        pytest.skip("the Omniglot files are not at MAML_DATA")
    return lambda **options: OmniglotSequence(
        **{"num_ways": 5, "sequence_length": 50} | options, data_dir=DATA, cache_dir=str(cache_dir)
    )


class LabelCopier(Recurrent):
    """Says the label that it sees in the input of the same step; it needs no drawing."""

    def __init__(self, num_ways: int) -> None:
        self.num_features = self.num_ways = num_ways

    def init(self, stream: Stream) -> Params:
        return {"head.weight": torch.eye(self.num_ways), "head.bias": torch.zeros(self.num_ways)}

    def states(self, params: Params, x: Tensor) -> Tensor:
        return x[..., -self.num_ways :]


def label_copier(num_ways: int) -> tuple[LabelCopier, Params]:
    model = LabelCopier(num_ways)
    return model, {name: value.unsqueeze(0) for name, value in model.init(Stream(0)).items()}


def test_labels_that_come_in_time_would_give_all_away(make: Make) -> None:
    domain, (model, params) = make(), label_copier(5)
    data = domain.data(domain.sample_tasks(30, Stream(0), "test"), "support")
    one_hot = torch.nn.functional.one_hot(data.y, 5).float()
    in_time = data._replace(x=torch.cat([data.x[..., :-5], one_hot], 3))
    (leaking,) = domain.measure(model, params, in_time, in_time, 0).values()
    assert torch.equal(leaking, torch.ones(30, 10))
    (honest,) = domain.measure(model, params, data, data, 0).values()
    # The label before never is that of a new character; at first there is none, and the copier says 0.
    expected = (data.y[:, 0, 0] == 0).float() / 5
    torch.testing.assert_close(honest[:, 0], expected)
    assert 0.1 < honest[:, 1:].mean() < 0.3


def test_inputs_up_to_a_step_do_not_depend_on_its_label(make: Make) -> None:
    domain = make(augment="none")
    tasks = domain.sample_tasks(3, Stream(0), "test")
    for step in (0, 7, 49):
        other = dict(tasks)
        other["labels"] = tasks["labels"].clone()
        other["labels"][:, step] = (tasks["labels"][:, step] + 1) % 5
        # The same drawing under another label: the two characters change places.
        other["classes"] = tasks["classes"].clone()
        rows = torch.arange(3)
        places = tasks["labels"][:, step], other["labels"][:, step]
        for place, source in (places, places[::-1]):
            other["classes"][rows, place] = tasks["classes"][rows, source]
        one, changed = domain.data(tasks, "support").x[:, 0], domain.data(other, "support").x[:, 0]
        assert torch.equal(one[:, step], changed[:, step])
        if step < 49:
            assert not torch.equal(one[:, step + 1, -5:], changed[:, step + 1, -5:])


@pytest.mark.parametrize(("order", "split"), [("random", "train"), ("balanced", "test")])
def test_elements_are_the_drawing_and_the_label_before(make: Make, order: str, split: str, cache_dir: Path) -> None:
    domain = make(order=order, augment="none")
    originals = load_omniglot(Path(DATA), cache_dir, size=20, is_grey=True).images.numpy()
    tasks = domain.sample_tasks(2, Stream(3), split)  # type: ignore[arg-type]
    data = domain.data(tasks, "query")
    assert (data.x.shape, data.y.shape, data.num_shots) == ((2, 1, *domain.in_shape), (2, 1, 50), 10)
    assert domain.in_shape == (50, 405)
    for task in range(2):
        seen: Counter[int] = Counter()
        for step in range(50):
            label = int(data.y[task, 0, step])
            turns, character = divmod(int(tasks["classes"][task, label]), 1623)
            drawing = int(tasks["drawings"][task, step])
            expected = np.rot90(originals[character, drawing], turns) / 255
            pixels, late = data.x[task, 0, step, :400].reshape(20, 20), data.x[task, 0, step, 400:]
            np.testing.assert_allclose(pixels.numpy(), expected, rtol=1e-6)
            before = int(data.y[task, 0, step - 1])
            assert late.tolist() == [float(step > 0 and place == before) for place in range(5)]
            seen[label] += 1
        assert order == "random" or list(seen.values()) == [10] * 5


def test_images_are_grey_with_full_ink(make: Make) -> None:
    domain = make(augment="none")
    images = domain.images(domain.sample_tasks(4, Stream(0)))
    assert images.shape == (4, 50, 20, 20)
    assert torch.equal(images.amax((2, 3)), torch.ones(4, 50))
    assert images.min() == 0
    assert ((images > 0.1) & (images < 0.9)).any()


def test_order_is_random_or_balanced(make: Make) -> None:
    counts = {}
    for order in ("random", "balanced"):
        labels = make(order=order).sample_tasks(100, Stream(1))["labels"]
        counts[order] = torch.nn.functional.one_hot(labels, 5).sum(1).flatten().double()
        assert labels[:, 0].unique().tolist() == [0, 1, 2, 3, 4]
    assert torch.equal(counts["balanced"], torch.full((500,), 10.0, dtype=torch.float64))
    assert math.isclose(counts["random"].std().item(), math.sqrt(50 * 0.2 * 0.8), rel_tol=0.1)


def test_drawings_come_again_only_after_all_others(make: Make) -> None:
    tasks = make(num_ways=2, sequence_length=120).sample_tasks(3, Stream(0))
    for labels, drawings in zip(tasks["labels"], tasks["drawings"], strict=True):
        for label in range(2):
            own = drawings[labels == label].tolist()
            assert len(set(own[:20])) == len(own[:20]) == 20
            assert own[20:40] == own[:20][: len(own[20:40])]


def test_labels_are_drawn_anew_in_every_sequence(make: Make) -> None:
    classes = make(num_ways=2, sequence_length=2).sample_tasks(400, Stream(0))["classes"]
    assert 0.43 < (classes[:, 0] < classes[:, 1]).double().mean() < 0.57


def test_test_characters_are_new_and_turned_ones_are_classes(make: Make, cache_dir: Path) -> None:
    domain = make(split="vinyals_trainval")
    characters = vinyals_split(load_omniglot(Path(DATA), cache_dir, size=20, is_grey=True).classes)["test"]
    drawn = {split: domain.sample_tasks(60, Stream(0), split)["classes"] for split in ("train", "test")}
    assert torch.isin(drawn["test"] % 1623, characters).all()
    assert not torch.isin(drawn["train"] % 1623, characters).any()
    assert all(set((classes // 1623).flatten().tolist()) == {0, 1, 2, 3} for classes in drawn.values())
    assert (domain.has_validation, make().has_validation) == (False, True)


@pytest.mark.parametrize(("augment", "splits"), [("train", ["train"]), ("all", ["train", "val", "test"]), ("none", [])])
def test_switch_says_which_drawings_are_augmented(make: Make, augment: str, splits: list[str]) -> None:
    domain = make(augment=augment)
    for split in ("train", "val", "test"):
        tasks = domain.sample_tasks(40, Stream(0), split)
        plain = {name: value for name, value in tasks.items() if name not in ("angles", "shifts")}
        assert torch.equal(domain.images(tasks), domain.images(plain)) == (split not in splits)
        if split in splits:
            assert 0.98 * math.pi / 16 < tasks["angles"].abs().max() <= math.pi / 16
            assert 0.98 * 10 / 105 < tasks["shifts"].abs().max() <= 10 / 105


def blob() -> Tensor:
    """Returns an image without symmetry that is smooth and far from the borders, ``(20, 20)``."""
    rows, columns = torch.meshgrid(torch.arange(20.0), torch.arange(20.0), indexing="ij")
    return torch.exp(-(rows - 7).square() / 6 - (columns - 11).square() / 12)


@pytest.mark.parametrize("degrees", [-11.25, 4.0, 11.25])
def test_drawings_turn_as_with_pillow(degrees: float) -> None:
    expected = np.asarray(Image.fromarray(blob().numpy()).rotate(degrees, Image.Resampling.BILINEAR))
    turned = moved(blob().reshape(1, 1, 20, 20), torch.tensor([[math.radians(degrees)]]), torch.zeros(1, 1, 2))
    np.testing.assert_allclose(turned[0, 0].numpy()[2:-2, 2:-2], expected[2:-2, 2:-2], atol=1e-4)


def test_drawings_move_after_they_turn() -> None:
    images, angle = blob().reshape(1, 1, 20, 20), torch.tensor([[0.15]])
    turned = moved(images, angle, torch.zeros(1, 1, 2))
    both = moved(images, angle, torch.tensor([[[2 / 20, -1 / 20]]]))  # two pixels right, one up
    torch.testing.assert_close(both[..., :-1, 2:], turned[..., 1:, :-2], atol=1e-5, rtol=0)
    assert both[..., :2].max() < 1e-3, "paper comes in from the left"


def test_showings_are_counted_class_by_class() -> None:
    labels, right = Stream(0).integers((20, 13), 4), Stream(1).integers((20, 13), 2).double()
    found = by_showing(right, labels, num_ways=4, num_showings=6)
    earlier, num_missing = num_earlier(labels, 4), 0
    for task in range(20):
        showings: dict[int, list[float]] = {number: [] for number in range(6)}
        seen: Counter[int] = Counter()
        for step, label in enumerate(labels[task].tolist()):
            assert earlier[task, step] == seen[label]
            showings.setdefault(seen[label], []).append(right[task, step].item())
            seen[label] += 1
        for number in range(6):
            expected = showings[number]
            if expected:
                assert math.isclose(found[task, number].item(), sum(expected) / len(expected))
            else:
                assert found[task, number].isnan()
            num_missing += not expected
    assert 0 < num_missing < 60


def test_loss_and_accuracy_are_means_over_steps(make: Make) -> None:
    domain, outputs = make(), Stream(0).normal((3, 1, 50, 5))
    data = domain.data(domain.sample_tasks(3, Stream(0)), "support")
    losses, metrics = domain.loss(outputs, data)
    for task in range(3):
        chances = outputs[task, 0].softmax(1)[torch.arange(50), data.y[task, 0]]
        torch.testing.assert_close(losses[task], -chances.log().mean())
        torch.testing.assert_close(
            metrics["accuracy"][task], (outputs[task, 0].argmax(1) == data.y[task, 0]).float().mean()
        )


def test_outputs_that_are_not_numbers_are_refused_in_meta_test(make: Make) -> None:
    domain = make()
    model = LSTM(domain.in_shape, domain.out_dim, hidden_size=4)
    params = {name: value[None] * torch.nan for name, value in model.init(Stream(0)).items()}
    data = domain.data(domain.sample_tasks(1, Stream(0), "test"), "support")
    with pytest.raises(Diverged, match="not finite"):
        domain.measure(model, params, data, data, 0)


def test_fewer_ways_in_the_test_keep_the_outputs_of_the_network(make: Make) -> None:
    domain = make()
    tasks: Tasks = domain.with_ways(3).sample_tasks(6, Stream(0), "test")
    assert (tasks["classes"].shape, tasks["labels"].shape, int(tasks["labels"].max())) == ((6, 3), (6, 30), 2)
    data, model = domain.data(tasks, "support"), LSTM(domain.in_shape, 5, 4)
    params = {name: value.unsqueeze(0) for name, value in model.init(Stream(0)).items()}
    params["head.bias"] = torch.tensor([[0.0, 0.0, 0.0, 9.0, 9.0]])  # of labels that these tasks do not have
    (accuracy,) = domain.measure(model, params, data, data, 0).values()
    assert accuracy.shape == (6, 10)
    assert accuracy.mean() > 0.2


def test_what_does_not_fit_is_refused(make: Make) -> None:
    with pytest.raises(MamlError, match=r"sequence_length=52 is no multiple of domain\.num_ways=5.*choose 55"):
        make(sequence_length=52)
    with pytest.raises(MamlError, match="MLP has none; choose model=mann or model=lstm"):
        make().check_model(MLP((2,), 5, [3]))
    with pytest.raises(MamlError, match="this data set has no val classes"):
        make(split="vinyals_trainval").sample_tasks(1, Stream(0), "val")


def test_domain_without_data_has_the_shapes(tiny: TinyRuns) -> None:
    options = {"num_ways": 4, "sequence_length": 12, "data_dir": "nowhere", "cache_dir": "nowhere"}
    domain = build_without_data({"_target_": "maml.domain.omniglot_sequence.OmniglotSequence", **options})
    assert (domain.in_shape, domain.out_dim, domain.num_shots) == ((12, 404), 4, 3)
    assert domain.data_digest is None
    domain.check_model(MANN(domain.in_shape, 4))


RUN = (
    "domain=omniglot_sequence",
    "domain.num_ways=2",
    "domain.sequence_length=8",
    "model=mann",
    "model.hidden_size=6",
    "model.num_slots=5",
    "model.slot_size=3",
    "model.num_heads=2",
    "algorithm=pretrain",
    "inner.num_steps=0",
    "evaluation=accuracy_by_showing",
    "evaluation.num_steps=0",
    "evaluation.num_shots=null",
    "num_iterations=9",
    "meta_batch_size=3",
    "hardware.task_chunk=2",
)


@pytest.mark.usefixtures("tiny_images")
def test_stopped_run_resumes_bit_exactly(tiny: TinyRuns, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = tiny.in_folder("whole").run(*RUN)
    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        before_iteration(patch, 5, lambda _: os.kill(os.getpid(), signal.SIGTERM))
        tiny.run(*RUN)
    assert_same_run(tiny.run(*RUN), whole)


@pytest.mark.slow
@pytest.mark.usefixtures("tiny_images")
def test_seeds_side_by_side_equal_separate_runs(tiny: TinyRuns) -> None:
    together, exact = tiny.in_folder("together"), (*RUN, "precision=float64")
    together.run(*exact, "seeds=2")
    for seed in (0, 1):
        own = (*exact, f"seed={seed}")
        assert_alike(tiny.run(*own), together.folder(*own))


@pytest.mark.usefixtures("tiny_images")
@pytest.mark.parametrize("algorithm", ["maml", "reptile"])
def test_algorithms_that_adapt_by_gradient_steps_are_refused(algorithm: str, tiny: TinyRuns) -> None:
    overrides = [override for override in RUN if not override.startswith(("algorithm", "inner"))]
    with pytest.raises(
        MamlError, match=r"adapts by gradient steps, but in OmniglotSequence .* choose algorithm=pretrain"
    ):
        tiny.run(*overrides, f"algorithm={algorithm}")
    assert not tiny.runs_dir.exists()


@pytest.mark.usefixtures("tiny_images")
def test_report_console_and_later_evaluations_name_showings(tiny: TinyRuns, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tiny.run(*RUN)
    report, lines = read_json(folder / "report.json"), capsys.readouterr().out.splitlines()
    assert report is not None
    assert report["measured_by"] == "showing"
    assert [line.split(":")[0].strip() for line in lines[2:6]] == [f"showing  {number}" for number in range(1, 5)]
    read = Report.model_validate(report | {"folder": folder})
    source = Source("custom", "accuracy", 4)
    for step in range(4):
        assert math.isclose(read.per_task(source, step).mean(), read.reading(source, step)[0], rel_tol=1e-5)
    tiny.run(*RUN, "mode=eval", "domain.augment=train", "evaluation.num_tasks=3")
    assert "showing  4" in capsys.readouterr().out
    with pytest.raises(MamlError, match=r"evaluation\.num_steps=1, but OmniglotSequence measures by showing"):
        tiny.run(*RUN, "evaluation.num_steps=1")


def test_loaded_network_reads_labelled_drawings_and_answers_from_the_state_after_them(make: Make) -> None:
    domain = make(num_ways=3, sequence_length=9, augment="none")
    config, _ = compose([*RUN, "domain.num_ways=3", "domain.sequence_length=9"])
    algorithm = build_algorithm(config, Hardware("cpu"), domain)
    network = Network("it", 0, 0, algorithm, build(config.evaluation), {})
    tasks = domain.sample_tasks(1, Stream(2), "test")
    images, labels = domain.images(tasks)[0], ["abc"[label] for label in tasks["labels"][0].tolist()]
    assert network.in_shape == (20, 20, 1)
    predictor = network.adapt(images[:7], labels[:7])
    assert predictor.classes is not None
    found = predictor.probabilities(images[7:])
    order = [predictor.classes.index(label) for label in labels]
    for query in (7, 8):
        shown = torch.cat([images[:7], images[query : query + 1]]).unsqueeze(0)
        x = domain.join(shown, torch.tensor([order[:7]])).unsqueeze(0)
        params = {name: value.unsqueeze(0) for name, value in algorithm.theta.items()}
        expected = algorithm.model(params, x)[0, 0, : len(predictor.classes)].softmax(-1)
        torch.testing.assert_close(found[query - 7], expected)
    assert set(predictor(images[7:])) <= set("abc")
    for problem, y, steps in (
        ("takes no gradient steps", labels[:7], 2),
        ("nothing to tell apart", ["a"] * 7, None),
        ("there are 7 inputs, but 6 labels", labels[:6], None),
        ("tells 3 classes apart, the labels have 4", [*"abcdabc"], None),
    ):
        with pytest.raises(MamlError, match=problem):
            network.adapt(images[:7], y, num_steps=steps)


def test_pictures_become_the_drawings_of_the_training(make: Make, cache_dir: Path) -> None:
    config, _ = compose(RUN)
    algorithm = build_algorithm(config, Hardware("cpu"), make(num_ways=2, sequence_length=8))
    network = Network("it", 0, 0, algorithm, build(config.evaluation), {})
    with ZipFile(Path(DATA) / "omniglot" / "images_background.zip") as archive:
        name = sorted(name for name in archive.namelist() if "/Greek/character02/" in name and name.endswith(".png"))[2]
        picture = Image.open(BytesIO(archive.read(name)))
        known = load_omniglot(Path(DATA), cache_dir, size=20, is_grey=True)
        own = known.images[known.classes.index("Greek/character02"), 2]
        torch.testing.assert_close(network.read([picture])[0, ..., 0], own / 255)
