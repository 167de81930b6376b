"""Meta-test: the frozen bank, the interval, the two accuracies."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch

from maml.algorithm.maml import MAML
from maml.config.identity import evaluation_config
from maml.config.schema import build
from maml.curve import per_task_rows
from maml.digest import digest
from maml.domain.base import Domain, Metrics
from maml.domain.point_navigation import PointNavigation
from maml.domain.sinusoid import Sinusoid
from maml.domain.sinusoid_sequence import SinusoidSequence
from maml.errors import MamlError
from maml.evaluation import Evaluation, StepSizeSearch, bank_hash
from maml.experiment import build_algorithm
from maml.hardware.base import Hardware
from maml.inner.sgd import SGD
from maml.model.base import Model
from maml.model.conv4 import Conv4
from maml.model.mlp import MLP
from maml.record.run_files import read_json
from maml.seeding import Stream
from maml.training.progress import EvaluationProgress
from maml.types import Examples, Params, Split, Tasks, num_tasks
from tests.algorithms import build_from
from tests.runs import TinyRuns


def sinusoid(seed: int = 0) -> MAML:
    inner = SGD(step_size=0.01, num_steps=1, order=2, adapt=["*"])
    return build_from(MAML, Sinusoid(), MLP((1,), 1, [40, 40]), inner, seed=seed)


def test_bank_is_frozen() -> None:
    _, banks, _ = Evaluation(num_tasks=600, num_steps=0, num_shots=[5, 10])(sinusoid())
    assert banks == {"5": "7c2ad5c08e7bf2d0", "10": "d7f95fefde4f5634"}


def test_bank_depends_on_neither_seed_nor_chunk_and_results_not_on_the_chunk() -> None:
    evaluation = Evaluation(num_tasks=7, num_steps=2)
    curves, banks, _ = evaluation(sinusoid())
    for task_chunk in (3, 1):
        again, same, _ = evaluation(sinusoid(), task_chunk)
        assert same == banks
        torch.testing.assert_close(again[0].values, curves[0].values, rtol=1e-5, atol=1e-6)
    assert evaluation(sinusoid(seed=1))[1] == banks


@pytest.mark.parametrize("change", [{"bank_seed": 1}, {"split": "val"}, {"num_query": 3}, {"num_shots": [4]}])
def test_bank_follows_its_settings(change: dict[str, object]) -> None:
    domain = Sinusoid()
    first, other = (Evaluation(**{"num_tasks": 5, "num_steps": 0} | extra) for extra in ({}, change))  # type: ignore[arg-type]
    shots = (other.num_shots or [10])[0]
    assert bank_hash(first.bank(domain, 10)) != bank_hash(other.bank(domain, shots))


def test_bank_has_k_query_points_whatever_training_has() -> None:
    bank = Evaluation(num_tasks=2, num_steps=0).bank(Sinusoid(num_query=3), 5)
    assert bank["query_x"].shape == (2, 5, 1)


def test_authors_bank_is_the_domains_and_frozen() -> None:
    evaluation = Evaluation(num_tasks=600, num_steps=0, num_shots=[5], bank="authors")
    domain = Sinusoid()
    evaluation.check(domain)
    assert bank_hash(evaluation.bank(domain, 5)) == bank_hash(domain.authors_test_tasks(600, 5)) == "0f1b9460b7c06aea"


def test_validation_tasks_beside_the_authors_bank_are_the_seeded_ones() -> None:
    domain = Sinusoid()
    authors, seeded = (Evaluation(num_tasks=5, num_steps=0, bank=bank) for bank in ("authors", "seeded"))
    assert bank_hash(authors.bank(domain, 5, 3, split="val")) == bank_hash(seeded.bank(domain, 5, 3, split="val"))
    assert bank_hash(authors.bank(domain, 5)) != bank_hash(seeded.bank(domain, 5))
    tuning = Evaluation(num_tasks=5, num_steps=0, bank="authors", split="val")
    tuning.check(domain)
    assert bank_hash(tuning.bank(domain, 5)) == bank_hash(seeded.bank(domain, 5, split="val"))


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"bank_seed": 1}, r"evaluation\.bank_seed=1 asks for others; set evaluation\.bank=seeded"),
        ({"num_query": 3}, r"set evaluation\.num_query=null"),
        ({"num_tasks": 601}, r"evaluation\.num_tasks=601; lower it"),
    ],
)
def test_other_tasks_than_the_authors_bank_has_are_refused(options: dict[str, Any], problem: str) -> None:
    settings: dict[str, Any] = {"num_tasks": 5, "num_steps": 0, "bank": "authors"} | options
    with pytest.raises(MamlError, match=problem):
        Evaluation(**settings).check(Sinusoid())


@pytest.mark.parametrize("domain", [SinusoidSequence(), PointNavigation()])
def test_domain_without_a_bank_of_the_authors_is_refused(domain: Domain[Any]) -> None:
    with pytest.raises(MamlError, match=r"has no bank that is rebuilt .* set evaluation\.bank=seeded"):
        Evaluation(num_tasks=5, num_steps=0, bank="authors").check(domain)


def test_curve_equals_adaptation_by_hand() -> None:
    algorithm = sinusoid()
    evaluation = Evaluation(num_tasks=3, num_steps=2, step_size=[0.1, 0.05])
    (curve,), *_ = evaluation(algorithm)
    bank = evaluation.bank(algorithm.domain, 10)
    for task in range(3):
        params = {name: value.clone().requires_grad_() for name, value in algorithm.theta.items()}
        only = {name: value[task : task + 1] for name, value in bank.items()}
        for step, step_size in enumerate([0.1, 0.05, 0.0]):
            role = "query" if step else "support"
            data = algorithm.domain.data(only, role)  # type: ignore[arg-type]
            batched = {name: value.unsqueeze(0) for name, value in params.items()}
            error = ((algorithm.model(batched, data.x) - data.y) ** 2).mean().item()
            assert curve.values[step, task].item() == pytest.approx(error, rel=1e-4)
            support = algorithm.domain.data(only, "support")
            loss = ((algorithm.model(batched, support.x) - support.y) ** 2).mean()
            gradients = torch.autograd.grad(loss, list(params.values()))
            params = {
                name: (value - step_size * gradient).detach().requires_grad_()
                for (name, value), gradient in zip(params.items(), gradients, strict=True)
            }


class ByShowing(Sinusoid):
    """Measures three showings: the task's amplitude, its phase in every other task, and its phase in none."""

    headline = "seen"
    measured_by = "showing"

    def measure(self, model: Model, params: Params, support: Examples, query: Examples, step: int) -> Metrics:
        self.num_calls = getattr(self, "num_calls", 0) + 1
        value = support.y[:, 0, 0]
        missing = torch.full_like(value, math.nan)
        return {"seen": torch.stack([value, value.where(value > 0, missing), missing], 1)}


@pytest.mark.parametrize("chunk", [None, 3])
def test_curve_by_showing_comes_from_one_pass_and_leaves_out_tasks_without_it(chunk: int | None) -> None:
    domain = ByShowing()
    algorithm = build_from(MAML, domain, MLP((1,), 1, [4]), SGD(step_size=0.1, num_steps=1, order=1, adapt=["*"]))
    evaluation = Evaluation(num_tasks=8, num_steps=0)
    evaluation.check(domain)
    (curve,), _, _ = evaluation(algorithm, chunk)
    assert domain.num_calls == (1 if chunk is None else 3)
    assert (curve.measured_by, curve.values.shape) == ("showing", (3, 8))
    everything = domain.data(evaluation.bank(domain, 10), "support").y[:, 0, 0].double()
    some = everything[everything > 0]
    assert 1 < len(some) < 8
    for step, values in zip(curve.summary()["steps"], (everything, some), strict=False):
        assert step["mean"] == pytest.approx(values.mean().item())
        assert step["ci95"] == pytest.approx(1.96 * values.std(correction=0).item() / math.sqrt(len(values)))
        assert step["num_tasks"] == len(values)
    assert curve.summary()["steps"][2] == {"step": 2, "mean": None, "ci95": None, "num_tasks": 0}
    rows = per_task_rows([curve])
    assert [row["step_1"] is None for row in rows] == (everything <= 0).tolist()
    assert all(row["step_2"] is None for row in rows)


@pytest.mark.parametrize(("key", "value"), [("step_size", 0.1), ("search", StepSizeSearch([0.1], 2))])
def test_size_of_steps_that_are_not_taken_is_refused(key: str, value: Any) -> None:
    with pytest.raises(MamlError, match=rf"evaluation\.{key} sets the size of steps, .* set evaluation\.{key}=null"):
        Evaluation(num_tasks=2, num_steps=0, **{key: value})


def test_gradient_steps_are_refused_by_showing() -> None:
    with pytest.raises(MamlError, match=r"evaluation\.num_steps=2, but ByShowing measures by showing.*num_steps=0"):
        Evaluation(num_tasks=2, num_steps=2).check(ByShowing())


def test_evaluation_leaves_theta_as_it_was() -> None:
    algorithm = sinusoid()
    before = {name: value.clone() for name, value in algorithm.theta.items()}
    Evaluation(num_tasks=3, num_steps=3)(algorithm)
    assert all(torch.equal(algorithm.theta[name], value) for name, value in before.items())
    assert not any(value.requires_grad for value in algorithm.theta.values())


def test_inductive_predictions_depend_on_no_other_query_image() -> None:
    """Transductive predictions depend on them, because normalisation uses the statistics of the query batch."""
    model = Conv4((28, 28, 1), 5, num_filters=8)
    params = {name: value.unsqueeze(0) for name, value in model.init(Stream(0)).items()}
    support, query, others = (Stream(seed).uniform((1, 10, 28, 28, 1)) for seed in (1, 2, 3))
    changed = torch.cat([query[:, :1], others[:, 1:]], dim=1)
    outputs = {
        inductive: [
            model(params, torch.cat([support, x], dim=1), num_reference=10)[0, 10]
            if inductive
            else model(params, x)[0, 0]
            for x in (query, changed)
        ]
        for inductive in (True, False)
    }
    torch.testing.assert_close(*outputs[True], rtol=1e-5, atol=1e-5)
    assert (outputs[False][0] - outputs[False][1]).abs().max() > 1e-3


@pytest.mark.parametrize("step", [0, 1])
def test_both_accuracies_are_counted_from_those_predictions(step: int, tiny_images: TinyRuns) -> None:
    config = tiny_images.config()
    algorithm = build_algorithm(config, build(config.hardware))
    domain, model = algorithm.domain, algorithm.model
    tasks = domain.sample_tasks(6, Stream(4), "test")
    *_, params = algorithm.adapt(algorithm.params_per_task(num_tasks(tasks)), tasks, step)
    support, query = (domain.data(tasks, role) for role in ("support", "query"))
    measured = domain.measure(model, params, support, query, step)
    for task in range(6):
        own = {name: value[task : task + 1] for name, value in params.items()}
        labels = query.y[task]
        transductive = model(own, query.x[task : task + 1])[0].argmax(-1)
        # One query image at a time, after the support images, whose statistics are used.
        inductive = torch.stack(
            [
                model(own, torch.cat([support.x[task], image.unsqueeze(0)]).unsqueeze(0), num_reference=5)[
                    0, 5
                ].argmax()
                for image in query.x[task]
            ]
        )
        assert measured["accuracy_transductive"][task] == (transductive == labels).float().mean()
        assert measured["accuracy_inductive"][task] == (inductive == labels).float().mean()


def test_bank_of_images_is_frozen(tiny_images: TinyRuns) -> None:
    domain = build(tiny_images.config().domain)
    assert bank_hash(Evaluation(num_tasks=600, num_steps=0).bank(domain, 1)) == "a45e59428ad2566f"


def test_bank_of_other_ways_is_that_of_a_domain_with_these_ways(tiny_images: TinyRuns) -> None:
    few, many = (build(tiny_images.config(f"domain.num_ways={ways}").domain) for ways in (5, 20))
    plain, fewer = (Evaluation(num_tasks=6, num_steps=0, num_ways=ways) for ways in (None, 5))
    assert bank_hash(plain.bank(few, 1)) == bank_hash(fewer.bank(many, 1)) == bank_hash(fewer.bank(few, 1))
    assert fewer.bank(many, 1, 2, split="val")["classes"].shape == (2, 5)


def test_ways_that_do_not_fit_are_refused(tiny_images: TinyRuns) -> None:
    domain = build(tiny_images.config().domain)
    more = Evaluation(num_tasks=6, num_steps=0, num_ways=6)
    network, prototypes = (
        build_algorithm(tiny_images.config(f"algorithm={name}"), Hardware("cpu"), domain)
        for name in ("maml", "prototypical")
    )
    with pytest.raises(MamlError, match=r"evaluation\.num_ways=6, but the network has an output for each of the 5 cl"):
        more.check_algorithm(network)
    more.check_algorithm(prototypes)
    more.check(domain)
    with pytest.raises(MamlError, match="num_ways=500, but the test split has 423 classes"):
        Evaluation(num_tasks=6, num_steps=0, num_ways=500).check(domain)
    with pytest.raises(MamlError, match="num_ways=101, but the val split has 100 classes"):
        Evaluation(num_tasks=6, num_steps=1, num_ways=101, search=StepSizeSearch([0.1], num_tasks=2)).check(domain)
    with pytest.raises(MamlError, match=r"evaluation\.num_ways=6 is for tasks that draw their own classes"):
        more.check(Sinusoid())


def test_finished_run_is_tested_with_other_ways(tiny_images: TinyRuns, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tiny_images.run("num_iterations=1")
    bank = Evaluation(num_tasks=5, num_steps=2, num_ways=3).bank(build(tiny_images.config().domain), 1)
    capsys.readouterr()
    tiny_images.run("num_iterations=1", "mode=eval", "evaluation.num_ways=3")
    assert "accuracy_transductive, 3 ways, K=1, 5 tasks" in capsys.readouterr().out
    (again,) = folder.glob("evaluations/*/report.json")
    report, first = read_json(again), read_json(folder / "report.json")
    assert report is not None and first is not None
    assert report["banks"] == {"1": bank_hash(bank)} != first["banks"]
    assert report["evaluation"] == first["evaluation"] | {"evaluation.num_ways": 3}
    tiny_images.run("algorithm=nearest_neighbor", "num_iterations=1", "meta_batch_size=10", "evaluation.num_ways=30")
    assert "accuracy_inductive, 30 ways, K=1, 5 tasks" in capsys.readouterr().out


def test_diverged_adaptation_is_reported_as_such(tiny: TinyRuns, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tiny.run("num_iterations=1", "evaluation.step_size=1e30", "evaluation.num_steps=4")
    assert ": diverged" in capsys.readouterr().out
    report = read_json(folder / "report.json")  # strict readers refuse NaN
    assert report is not None and report["headline"] is None
    assert "NaN" not in (folder / "report.json").read_text()


def test_settings_that_contradict_each_other_are_refused() -> None:
    with pytest.raises(MamlError, match=r"lists 2 sizes for evaluation\.num_steps=3"):
        Evaluation(num_tasks=1, num_steps=3, step_size=[0.1, 0.1])
    with pytest.raises(MamlError, match="names a K twice"):
        Evaluation(num_tasks=1, num_steps=3, num_shots=[5, 5])
    with pytest.raises(MamlError, match=r"evaluation\.step_size and evaluation\.search both set"):
        Evaluation(num_tasks=2, num_steps=3, step_size=0.1, search=StepSizeSearch([0.1], num_tasks=2))


def test_each_k_has_its_own_step_size() -> None:
    algorithm = sinusoid()
    together = Evaluation(num_tasks=4, num_steps=2, num_shots=[5, 10], step_size={10: 0.02, 5: 0.1})
    curves, _, sizes = together(algorithm)
    assert sizes == {"5": [0.1, 0.1], "10": [0.02, 0.02]}
    for curve, step_size in zip(curves, (0.1, 0.02), strict=True):
        (alone,), *_ = Evaluation(num_tasks=4, num_steps=2, num_shots=[curve.num_shots], step_size=step_size)(algorithm)
        assert torch.equal(curve.values, alone.values)


def test_k_without_a_step_size_is_named_before_any_training(tiny: TinyRuns) -> None:
    overrides = ("evaluation.step_size={5: 0.1, 20: 0.02}", "num_iterations=1")
    with pytest.raises(
        MamlError, match=r"no entry for K=10, only for 5, 20; add one, as in \+evaluation\.step_size\.10="
    ):
        tiny.run(*overrides)
    assert not tiny.runs_dir.exists()
    folder = tiny.run(*overrides, "+evaluation.step_size.10=0.03")
    report = read_json(folder / "report.json")
    assert report is not None
    assert report["step_sizes"] == {"5": [0.1, 0.1], "10": [0.03, 0.03]}
    assert report["evaluation"]["evaluation.step_size"] == {"5": 0.1, "20": 0.02, "10": 0.03}


def test_step_sizes_per_k_are_the_same_however_they_are_written(tiny: TinyRuns) -> None:
    of_file = tiny.config("+experiment=sinusoid_pretrain")
    assert of_file.evaluation["step_size"] == {5: 0.01, 10: 0.02, 20: 0.02}
    assert build(of_file.evaluation).step_sizes(20) == [0.02] * 2
    written = [
        ("evaluation.step_size={5: 1.0, 10: 2.5}",),
        ("evaluation.step_size={10: 2.5, 5: 1}",),
        ("evaluation.step_size={5: 1.0}", "+evaluation.step_size.10=2.5"),
    ]
    hashes = [digest(evaluation_config(tiny.config(*overrides))) for overrides in written]
    assert len(set(hashes)) == 1
    assert digest(evaluation_config(tiny.config("evaluation.step_size={5: 1.0, 10: 2.0}"))) != hashes[0]
    assert tiny.folder(*written[0]) == tiny.folder(), "training is the same"


class Upside(Sinusoid):
    """A domain in which a larger error is better; it notes the split of each bank."""

    larger_is_better = True

    def __init__(self) -> None:
        super().__init__()
        self.splits: list[Split] = []

    def draw_tasks(self, num_tasks: int, stream: Stream, split: Split, num_shots: int, num_query: int) -> Tasks:
        self.splits.append(split)
        return super().draw_tasks(num_tasks, stream, split, num_shots, num_query)


@pytest.mark.parametrize("domain", [Sinusoid(), Upside()])
def test_search_takes_what_does_best_on_validation_tasks_after_the_last_step(domain: Sinusoid) -> None:
    algorithm = build_from(MAML, domain, MLP((1,), 1, [40, 40]), SGD(step_size=0.01, num_steps=1, order=2, adapt=["*"]))
    algorithm.theta = {name: 20 * value for name, value in algorithm.theta.items()}  # so that steps change something
    grid, decays = [0.002, 0.02, 0.1], [0.0, 1.0]
    search = StepSizeSearch(grid, num_tasks=6, decays=decays)
    _, _, chosen = Evaluation(num_tasks=5, num_steps=3, num_shots=[5, 10], search=search)(algorithm)
    for num_shots in (5, 10):
        scores = {}
        for step_size, decay in itertools.product(grid, decays):
            sizes = [step_size, step_size / (1 + decay), step_size / (1 + 2 * decay)]
            alone = Evaluation(num_tasks=6, num_steps=3, num_shots=[num_shots], split="val", step_size=sizes)
            scores[tuple(sizes)] = alone(algorithm)[0][0].summary()["steps"][-1]["mean"]
        pick = max if domain.larger_is_better else min
        assert tuple(chosen[str(num_shots)] or ()) == pick(scores, key=scores.__getitem__)
    if isinstance(domain, Upside):
        assert domain.splits[:4] == ["test", "val", "test", "val"]


def test_search_shortens_the_steps_after_the_first() -> None:
    algorithm = sinusoid()
    search = StepSizeSearch([0.02], num_tasks=2, decays=[1.0], later_factor=0.5)
    _, _, chosen = Evaluation(num_tasks=2, num_steps=3, search=search)(algorithm)
    assert chosen == {"10": pytest.approx([0.02, 0.02 / 2 / 2, 0.02 / 3 / 2])}


def test_search_never_takes_a_step_size_that_diverged() -> None:
    algorithm = sinusoid()
    algorithm.theta = {name: 20 * value for name, value in algorithm.theta.items()}
    _, _, chosen = Evaluation(num_tasks=3, num_steps=3, search=StepSizeSearch([1e30, 1e-9, 1e20], num_tasks=3))(
        algorithm
    )
    assert chosen == {"10": [1e-9] * 3}
    every = Evaluation(num_tasks=3, num_steps=3, search=StepSizeSearch([1e30, 1e20], num_tasks=3))
    with pytest.raises(MamlError, match=r"K=10 diverged with every step size .*=\[1e\+30, 1e\+20\]; add smaller ones"):
        every(algorithm)


def test_search_takes_the_first_of_equal_step_sizes() -> None:
    search = StepSizeSearch([1e-30, 1e-29], num_tasks=2)  # too small to change theta
    _, _, chosen = Evaluation(num_tasks=2, num_steps=1, search=search)(sinusoid())
    assert chosen == {"10": [1e-30]}


def test_display_reaches_its_total_with_the_search_and_steps_that_diverge(monkeypatch: pytest.MonkeyPatch) -> None:
    shares, whats = list[float](), list[str]()

    def reach(self: EvaluationProgress, done: float) -> None:
        self.done = done
        shares.append(done / self.total)
        whats.append(self.what)

    monkeypatch.setattr(EvaluationProgress, "reach", reach)
    search = StepSizeSearch([1e30, 1e-3], num_tasks=4, decays=[0.0, 0.5])
    Evaluation(num_tasks=6, num_steps=2, num_shots=[5, 10], search=search)(sinusoid(), task_chunk=3)
    assert shares == sorted(shares)
    assert shares[-1] == pytest.approx(1.0)
    assert len(shares) > 30, "every step counts"
    assert list(dict.fromkeys(whats))[1:5] == [
        "K=5, trying step size 1e+30, decay 0.5",
        "K=5, trying step size 0.001",
        "K=5, trying step size 0.001, decay 0.5",
        "K=5, 6 tasks",
    ]


def test_search_of_a_config_is_recorded(tiny: TinyRuns) -> None:
    search = "{_target_: maml.evaluation.StepSizeSearch, step_sizes: [0.001, 0.01], num_tasks: 3}"
    folder = tiny.run("num_iterations=1", f"evaluation.search={search}")
    report = read_json(folder / "report.json")
    assert report is not None
    assert set(report["step_sizes"]) == {"5", "10"}
    assert all(sizes in ([0.001] * 2, [0.01] * 2) for sizes in report["step_sizes"].values())
    assert report["evaluation"]["evaluation.search.step_sizes"] == [0.001, 0.01]


def test_training_tasks_are_no_meta_test(tiny: TinyRuns) -> None:
    with pytest.raises(MamlError, match=r"evaluation\.split.*'test'.*'val'"):
        tiny.run("evaluation.split=train")
    assert not tiny.runs_dir.exists()
