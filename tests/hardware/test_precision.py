"""The precision of a run: set for this run only, part of its id, refused if it makes no sense."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from maml.algorithm.maml import MAML
from maml.domain.sinusoid import Sinusoid
from maml.errors import MamlError, Unavailable
from maml.hardware.precision import Precision, check_precision, use_precision
from maml.inner.sgd import SGD
from maml.model.conv4 import Conv4
from maml.model.functional import conv3x3, linear
from maml.model.mlp import MLP
from maml.model.module import ModuleModel
from maml.seeding import Stream
from maml.types import Params
from tests import algorithms
from tests.algorithms import build_from
from tests.runs import TinyRuns, checkpoint_tensors
from tests.training.test_meta_gradient import NUM_WAYS, SMALL, FixedExamples, SmallNet


@pytest.fixture(autouse=True)
def _as_before() -> Iterator[None]:
    yield
    assert torch.get_default_dtype() == torch.float32
    assert torch.get_float32_matmul_precision() == "highest"


MODELS: dict[str, Callable[[], Any]] = {
    "vectors": lambda: MLP((1,), 1, [40, 40], weight_std=0.3),
    "images": lambda: Conv4(SMALL, NUM_WAYS, 8, "stride", activation="softplus"),
    "module": lambda: ModuleModel(SMALL, NUM_WAYS, SmallNet),
}


def meta_gradient(precision: Precision, kind: str) -> tuple[Params, torch.dtype]:
    """Returns the meta-gradient, always of the same theta and tasks, and the type of the parameters."""
    inner = SGD(step_size=0.02, num_steps=2, order=2, adapt=["*", "!*.shift"])
    domain: Any = Sinusoid() if kind == "vectors" else FixedExamples(SMALL, classes=True)
    exact = build_from(MAML, domain, MODELS[kind](), inner).theta
    with use_precision(precision):
        algorithm = build_from(MAML, domain, MODELS[kind](), inner)
        theta = {name: exact[name].to(value.dtype) for name, value in algorithm.theta.items()}
        tasks = {
            name: value.to(torch.get_default_dtype()) if value.is_floating_point() else value
            for name, value in algorithm.sample_tasks(4, Stream(1)).items()
        }
        gradient, _ = algorithms.gradient(algorithm, theta, tasks)
    return {name: value.double() for name, value in gradient.items()}, next(iter(algorithm.theta.values())).dtype


def relative_error(mine: Params, theirs: Params) -> float:
    one, other = (torch.cat([value.flatten() for value in params.values()]) for params in (mine, theirs))
    return ((one - other).norm() / other.norm()).item()


@pytest.mark.parametrize("kind", MODELS)
def test_gradients_are_as_exact_as_the_precision(kind: str) -> None:
    expected, dtype = meta_gradient("float64", kind)
    assert dtype == torch.float64
    float32, dtype = meta_gradient("float32", kind)
    assert dtype == torch.float32
    bf16, dtype = meta_gradient("bf16", kind)
    assert dtype == torch.float32, "parameters and what is summed up stay float32"
    assert relative_error(float32, expected) < 1e-3
    assert 1e-4 < relative_error(bf16, expected) < 0.2


def test_bf16_rounds_the_factors_and_not_the_sums() -> None:
    weights, x = torch.full((1, 1, 2), 1.0), torch.tensor([[[1.0, 2.0**-12]]])
    bias = torch.full((1, 1), 2.0**-14)
    assert linear(x, weights, bias).item() == 1 + 2.0**-12 + 2.0**-14
    with use_precision("bf16"):
        assert linear(x, weights, bias).dtype == torch.float32
        assert linear(torch.tensor([[[1 + 2.0**-12, 0.0]]]), weights, bias).item() == 1 + 2.0**-14
        for tasks in (1, 2):
            images, kernels = torch.ones(tasks, 1, 3, 3, 1) + 2.0**-12, torch.ones(tasks, 1, 1, 3, 3)
            y = conv3x3(images, kernels)
            assert y.dtype == torch.float32
            assert y[:, 0, 1, 1, 0].tolist() == [9.0] * tasks


def test_another_precision_is_another_run(tiny: TinyRuns) -> None:
    assert tiny.folder() == tiny.folder("precision=float32")
    assert len({tiny.folder(f"precision={name}") for name in ("float64", "float32", "tf32", "bf16")}) == 4


@pytest.mark.parametrize("precision", ["float64", "bf16"])
def test_run_computes_in_what_it_says(precision: str, tiny_images: TinyRuns) -> None:
    folder = tiny_images.run("num_iterations=3", f"precision={precision}", "model.num_filters=4")
    wanted = torch.float64 if precision == "float64" else torch.float32
    assert {value.dtype for name, value in checkpoint_tensors(folder).items() if name.startswith("theta")} == {wanted}


def test_what_makes_no_sense_is_refused_before_anything_is_written(tiny: TinyRuns) -> None:
    with pytest.raises(MamlError, match="precision=bf16 is for supervised domains"):
        check_precision("bf16", True, torch.device("cpu"))
    with pytest.raises(Unavailable, match="precision=tf32 needs a GPU"):
        tiny.run("precision=tf32")
    assert not tiny.runs_dir.exists()
    check_precision("tf32", True, torch.device("cuda"))
