"""Algorithms that use only the documented interface run in chunks, with several seeds or processes, and compiled."""

from __future__ import annotations

from dataclasses import replace

import pytest

from maml.config.schema import Settings
from maml.experiment import run_experiment
from maml.record import checkpoint
from maml.record.run_folder import RunFolder
from tests.hardware.test_distributed import Processes, assert_alike
from tests.runs import TinyRuns, assert_same_run, before_iteration

SMALL = ("num_iterations=12", "log_every=4", "checkpoint_every=8", "evaluation.num_shots=null", "precision=float64")
IMAGES = (
    "domain=omniglot",
    "model=conv4",
    "model.num_filters=4",
    "evaluation=accuracy",
    "evaluation.num_tasks=4",
    "evaluation.num_steps=2",
)
OWN = {"ANIL": (), "InputNoise": (), "Prototypical": IMAGES}


def settings(tiny: TinyRuns, name: str, *overrides: str) -> Settings:
    config = tiny.config(*SMALL, *OWN[name], *overrides)
    return replace(config, algorithm={"_target_": f"tests.contract.own_algorithms.{name}"})


@pytest.fixture(params=list(OWN))
def own_algorithm(request: pytest.FixtureRequest, tiny: TinyRuns) -> tuple[str, TinyRuns]:
    if request.param == "Prototypical":
        request.getfixturevalue("tiny_images")  # skips the test if the images are missing
    return request.param, tiny


def test_chunks_of_one_task_give_the_same_numbers(own_algorithm: tuple[str, TinyRuns]) -> None:
    name, tiny = own_algorithm
    whole, cut = settings(tiny, name), settings(tiny.in_folder("cut"), name, "hardware.task_chunk=1")
    for config in (whole, cut):
        run_experiment(config, "custom")
    assert_alike(*(RunFolder(config, "custom").path for config in (whole, cut)))


def test_interrupted_run_with_random_draws_in_its_loss_resumes_with_the_same_bits(
    tiny: TinyRuns, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, parts = settings(tiny, "InputNoise"), settings(tiny.in_folder("parts"), "InputNoise")
    run_experiment(whole, "custom")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        before_iteration(patch, 11, lambda _: (_ for _ in ()).throw(KeyboardInterrupt))
        run_experiment(parts, "custom")
    run_experiment(parts, "custom")
    assert_same_run(*(RunFolder(config, "custom").path for config in (whole, parts)))


def test_two_seeds_at_once_give_the_numbers_of_each(own_algorithm: tuple[str, TinyRuns]) -> None:
    name, tiny = own_algorithm
    together = settings(tiny.in_folder("together"), name, "seeds=2")
    run_experiment(together, "custom")
    for seed in (0, 1):
        alone = settings(tiny, name, f"seed={seed}")
        run_experiment(alone, "custom")
        assert_alike(RunFolder(alone, "custom").path, RunFolder(together.for_seed(seed), "custom").path)


def test_two_processes_give_the_numbers_of_one(own_algorithm: tuple[str, TinyRuns]) -> None:
    name, tiny = own_algorithm
    alone, shared = settings(tiny, name), settings(tiny.in_folder("shared"), name)
    run_experiment(alone, "custom")
    assert Processes(shared, 2).join() == [0, 0]
    assert_alike(*(RunFolder(config, "custom").path for config in (alone, shared)))


# Compiling a convolutional network takes minutes.
@pytest.mark.parametrize(
    "own_algorithm",
    ["ANIL", *(pytest.param(name, marks=pytest.mark.slow) for name in ("InputNoise", "Prototypical"))],
    indirect=True,
)
@pytest.mark.slow  # it compiles
# The compiler causes this warning, and here warnings are errors.
@pytest.mark.filterwarnings("ignore:.*script_method:DeprecationWarning")
def test_compiled_gradient_gives_the_same_numbers(own_algorithm: tuple[str, TinyRuns]) -> None:
    name, tiny = own_algorithm
    plain, compiled = settings(tiny, name), settings(tiny.in_folder("compiled"), name, "hardware.compile=true")
    for config in (plain, compiled):
        run_experiment(config, "custom")
    folder = RunFolder(compiled, "custom").path
    assert checkpoint.load(folder / "checkpoint.pt")["execution"]["compile"], "it was not given up"
    assert_alike(RunFolder(plain, "custom").path, folder)
