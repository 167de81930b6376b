"""Gymnasium environments as domains: tasks are constructor arguments drawn from the configured ranges."""

from __future__ import annotations

import json
import os
import runpy
import signal
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium.spaces import Box, Dict, Discrete
from PIL import Image

import maml
from maml.config.compose import compose
from maml.config.identity import training_config
from maml.config.schema import build
from maml.digest import digest
from maml.domain.gymnasium_env import GymnasiumEnv
from maml.domain.reinforcement import Reinforcement
from maml.environment.distribution import Gaussian
from maml.errors import Interrupted, MamlError
from maml.experiment import build_algorithm
from maml.hardware.base import Hardware
from maml.seeding import Stream
from tests import algorithms
from tests.runs import ROOT, TinyRuns, assert_same_run, before_iteration, checkpoint_tensors


class Line(gymnasium.Env[Any, Any]):
    """A place on a line; the actions go left, stay or go right, and the reward is for a goal that is not seen."""

    metadata = {"render_modes": ["rgb_array"], "render_fps": 5}

    def __init__(
        self,
        goal: int = 2,
        noise: float = 0.0,
        reward: str = "distance",
        crashes: bool = False,
        render_mode: str | None = None,
    ) -> None:
        assert (type(goal), type(noise), reward in ("distance", "arrival"), type(crashes)) == (int, float, True, bool)
        assert noise < 1
        self.observation_space = Dict(place=Discrete(5), picture=Box(0, 1, (2, 2)))
        self.action_space = Discrete(3, start=-1)
        self.goal, self.noise, self.reward, self.crashes, self.render_mode = goal, noise, reward, crashes, render_mode

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        super().reset(seed=seed)
        self.place, self.time = int(self.np_random.integers(5)), 0
        return self._observation(), {}

    def step(self, action: int) -> tuple[dict[str, Any], float, bool, bool, dict[str, Any]]:
        self.time += 1
        if self.crashes and self.time == 3:
            raise RuntimeError("the motor is hot")
        self.place = int(np.clip(self.place + action, 0, 4))
        distance = abs(self.place - self.goal) + self.noise * self.np_random.normal()
        reward = -float(distance) if self.reward == "distance" else float(distance < 0.5)
        return self._observation(), reward, self.place == 4, False, {}

    def render(self) -> Any:
        picture = np.zeros((10, 50, 3), np.uint8)
        picture[:, 10 * self.place : 10 * self.place + 10] = 255
        return picture

    def _observation(self) -> dict[str, Any]:
        return {"place": self.place, "picture": np.full((2, 2), self.place / 4, np.float32)}


gymnasium.register("tests/Line-v0", f"{__name__}:Line")
CHOOSING = (
    "domain=gymnasium_env",
    "domain.num_shots=2",
    "domain.horizon=6",
    "model=categorical_policy",
    "model.hidden_sizes=[8]",
    "outer=trpo",
    "evaluation=average_return",
    "evaluation.num_shots=[2]",
    "num_iterations=2",
    "meta_batch_size=2",
    "evaluation.num_tasks=2",
    "evaluation.num_steps=1",
    "checkpoint_every=1",
)
LINE = (*CHOOSING, "domain.env_id=tests/Line-v0")
ON_LINE = (*LINE, "domain.goals={goal: {integers: [0, 4]}, noise: [0.0, 0.1], reward: {values: [distance, arrival]}}")


def pendulum(horizon: int = 10) -> GymnasiumEnv:
    return GymnasiumEnv(env_id="Pendulum-v1", goals={"g": (5.0, 15.0)}, num_shots=2, horizon=horizon)


def test_goals_are_uniform_in_their_ranges() -> None:
    goals = pendulum().draw_goals(4000, Stream(0))
    assert goals.shape == (4000, 1)
    assert 5.0 <= goals.min() < 5.05 and 14.95 < goals.max() <= 15.0
    counts = torch.histc(goals, 10, 5.0, 15.0)
    assert (counts - 400).abs().max() < 5 * 400**0.5


def test_test_goals_are_drawn_once_and_for_all() -> None:
    first, again = (pendulum().test_goals(5) for _ in range(2))
    assert torch.equal(first, again)
    assert torch.equal(pendulum().test_goals(3), first[:3])


def test_shapes_are_those_of_the_environment_and_of_the_policys_distribution() -> None:
    domain = pendulum()
    assert (domain.in_shape, domain.out_dim) == ((3,), 2), "mean and log standard deviation of one action"


def test_single_environment_has_its_goal_its_horizon_and_clipped_actions() -> None:
    environment = pendulum(horizon=7).make_single(torch.tensor([6.5]))
    assert environment.unwrapped.g == pytest.approx(6.5)  # type: ignore[attr-defined]
    environment.reset(seed=0)
    steps = [environment.step([1e6]) for _ in range(7)]
    assert [truncated for *_, truncated, _ in steps] == [False] * 6 + [True]


def test_keyword_that_the_environment_does_not_take_is_refused() -> None:
    with pytest.raises(MamlError, match=r"Pendulum-v1 cannot be made .*gravity"):
        GymnasiumEnv(env_id="Pendulum-v1", goals={"gravity": (5.0, 15.0)})


def test_horizon_replaces_the_registered_limit() -> None:
    domain = pendulum(horizon=205)  # Pendulum-v1 is registered with 200
    domain.environments.reset(torch.tensor([[9.5]]), Stream(torch.arange(1)))
    ended = [bool(domain.environments.step(torch.zeros(1, 1), torch.arange(1)).terminated) for _ in range(205)]
    assert ended.index(True) == 204, "the last step of the horizon"


def line(**goals: Any) -> GymnasiumEnv:
    return GymnasiumEnv(env_id="tests/Line-v0", goals=goals, num_shots=2, horizon=6)


def test_integers_are_uniform_with_both_ends_and_arrive_as_integers() -> None:
    domain = line(goal={"integers": [-2, 3]})
    goals = domain.draw_goals(6000, Stream(0))
    counts = torch.bincount(goals[:, 0].long() + 2, minlength=6)
    assert len(counts) == 6 and (counts - 1000).abs().max() < 5 * 1000**0.5
    assert domain.keywords([3.0]) == {"goal": 3} and type(domain.keywords([3.0])["goal"]) is int


@pytest.mark.parametrize(
    ("values", "numbers"),
    [
        ([3, 1, 10**9], [3.0, 1.0, 1e9]),
        ([0.1, 2, 7.5], [0.1, 2.0, 7.5]),
        ([False, True], [0.0, 1.0]),
        (["distance", "arrival"], [0.0, 1.0]),
        ([3, "three"], [0.0, 1.0]),
        ([2**24, 2**24 + 1], [0.0, 1.0]),
        ([1, True], [0.0, 1.0]),
        ([5], [5.0]),
    ],
)
def test_listed_values_arrive_exactly(values: list[Any], numbers: list[float], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("maml.domain.gymnasium_env.VectorizedEnvironments", _AnyEnvironments)
    domain = GymnasiumEnv(env_id="any", goals={"a": {"values": values}})
    goals = domain.draw_goals(300, Stream(0))
    assert sorted(set(goals[:, 0].tolist())) == sorted(torch.tensor(numbers).tolist())
    drawn = [domain.keywords(goal)["a"] for goal in goals.tolist()]
    assert {(type(value), value) for value in drawn} == {(type(value), value) for value in values}


class _AnyEnvironments:
    """Stands for environments that take any keyword."""

    observation_dim = action_dim = goal_dim = 1
    distribution = Gaussian(1)

    def __init__(self, *_: Any) -> None:
        pass

    def check(self, goal: list[float]) -> None:
        pass


def test_upper_end_of_a_range_is_not_tried_because_it_is_never_drawn() -> None:
    domain = line(noise=[0.0, 1.0])
    assert domain.keywords([0.25]) == {"noise": 0.25}
    with pytest.raises(MamlError, match=r"cannot be made with {'noise': 1.0}"):
        line(noise=[1.0, 2.0])


def test_first_goals_do_not_depend_on_how_many_are_drawn() -> None:
    domain = line(goal={"integers": [0, 4]}, noise=[0.0, 0.5], reward={"values": ["distance", "arrival"]})
    assert torch.equal(domain.draw_goals(9, Stream(1))[:4], domain.draw_goals(4, Stream(1)))


@pytest.mark.parametrize(
    ("goals", "reason"),
    [
        ("{g: [15.0, 5.0]}", r"of g 15\.0 is not below 5\.0; swap them, or give one value as {values: \[a\]}"),
        ("{g: [5.0]}", "g has to be two numbers, or else"),
        ("{g: [1, 2, 3]}", r"g has to be two numbers, or else \[low, high\], {integers: .*{values: \[a, b, \.\.\.\]}"),
        ("{g: [false, true]}", "g has to be two numbers, or else"),
        ("{g: [a, b]}", "g has to be two numbers, or else"),
        ("{g: 3.0}", "input should be a list"),
        ("{g: {}}", r"g has to be \[low, high\], {integers"),
        ("{g: {ints: [1, 2]}}", r"g has to be \[low, high\], {integers"),
        ("{g: {integers: [1, 2], values: [1]}}", r"g has to be \[low, high\], {integers"),
        ("{g: {integers: [1, 2.5]}}", r"g has to be two integers, {integers: \[low, high\]}"),
        ("{g: {integers: [1]}}", "g has to be two integers"),
        ("{g: {integers: [3, 3]}}", "of g 3 is not below 3"),
        ("{g: {integers: [0, 99999999]}}", "integers of g may go from -16,777,216 to 16,777,216"),
        ("{g: {values: []}}", "the list of values of g is empty"),
        ("{g: {values: 3}}", "input should be a list"),
        ("{g: {values: [[1]]}}", "input should be a valid"),
        ("{g: {values: [null]}}", "input should be a valid"),
        ("{}", "at least 1 item"),
        ("[1, 2]", "a mapping, such as"),
    ],
)
def test_wrong_goals_name_the_key_and_the_forms(goals: str, reason: str) -> None:
    with pytest.raises(MamlError, match=rf"domain\.goals=.*{reason}") as caught:
        compose(["domain=gymnasium_env", "domain.env_id=Pendulum-v1", f"domain.goals={goals}"])
    assert len(str(caught.value).splitlines()) <= 3


def test_ranges_of_integers_and_numbers_have_one_run_id() -> None:
    def settings(goals: str) -> str:
        return digest(training_config(compose(["domain=gymnasium_env", "domain.env_id=a", f"domain.goals={goals}"])[0]))

    assert settings("{g: [5, 15]}") == settings("{g: [5.0, 15.0]}")
    assert settings("{g: {values: [5, 15]}}") != settings("{g: {values: [5.0, 15.0]}}")


def test_value_that_the_environment_refuses_stops_the_run_before_it_starts(tiny: TinyRuns) -> None:
    with pytest.raises(MamlError, match=r"domain\.goals=.* cannot be made with {'reward': 'speed'}"):
        tiny.run(*LINE, "domain.goals={reward: {values: [distance, speed]}}")
    assert not tiny.runs_dir.exists()


def test_goal_of_meta_test_that_the_environment_refuses_stops_the_run_before_it_starts(
    tiny: TinyRuns, monkeypatch: pytest.MonkeyPatch
) -> None:
    goals = build(tiny.config(*LINE, "domain.goals={noise: [0.0, 0.9]}").domain).test_goals(2)
    made = Line.__init__

    def refuse_large_noise(self: Line, noise: float = 0.0, **more: Any) -> None:
        if noise >= goals.max().item():
            raise ValueError("too loud")
        made(self, noise=noise, **more)

    monkeypatch.setattr(Line, "__init__", refuse_large_noise)
    with pytest.raises(MamlError, match=r"^domain\.env_id=.* cannot be made with {'noise': 0\.\d+} \(too loud\)"):
        tiny.run(*LINE, "domain.goals={noise: [0.0, 0.9]}")
    assert not tiny.runs_dir.exists()


def test_discrete_environment_trains_resumes_exactly_and_is_loaded(
    tiny: TinyRuns, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = tiny.run(*ON_LINE)
    other = tiny.in_folder("other")
    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        before_iteration(patch, 1, lambda _: os.kill(os.getpid(), signal.SIGTERM))
        other.run(*ON_LINE)
    assert_same_run(whole, other.run(*ON_LINE))
    network = maml.load(whole)
    outputs = network.model({name: value[None] for name, value in network.theta.items()}, torch.zeros(1, 4, 9))
    assert outputs.shape == (1, 4, 3)


@pytest.mark.parametrize(
    "algorithm",
    ["algorithm=oracle", "algorithm=pretrain", "algorithm=random_init", "algorithm=context_vector", "algorithm=fomaml"],
)
def test_every_algorithm_of_policies_takes_discrete_actions(algorithm: str, tiny: TinyRuns) -> None:
    folder = tiny.run(*ON_LINE, algorithm, "num_iterations=1")
    width = {"algorithm=oracle": 12, "algorithm=context_vector": None}.get(algorithm, 9)
    shape = checkpoint_tensors(folder)["theta.linear1.weight"].shape
    assert width is None or shape[1] == width, "the oracle is told three numbers"


def test_policy_learns_where_the_reward_is() -> None:
    """A goal that is always on the left."""
    settings, _ = compose([*LINE, "domain.goals={goal: {values: [0]}}"])
    algorithm = build_algorithm(settings, Hardware("cpu"))
    returns = []
    for iteration in range(12):
        metrics = algorithms.step(algorithm, algorithm.sample_tasks(5, Stream(0).child(iteration)))
        returns.append(metrics["return_step_0"].item())
        assert metrics["kl"] <= 0.01
    assert sum(returns[-3:]) > sum(returns[:3]) + 3


def test_failing_step_ends_the_run_with_one_clear_error(tiny: TinyRuns) -> None:
    goals = "domain.goals={crashes: {values: [true]}}"
    message = r"tests/Line-v0 with {'crashes': True} fails in step 3 of an episode: RuntimeError: the motor is hot \("
    with pytest.raises(MamlError, match=message) as caught:
        tiny.run(*LINE, goals)
    assert len(str(caught.value).splitlines()) == 1


def test_failing_step_costs_no_earlier_iteration(tiny: TinyRuns, monkeypatch: pytest.MonkeyPatch) -> None:
    words = (*ON_LINE, "num_iterations=5", "checkpoint_every=100", "log_every=1")
    expected = tiny.run(*words, f"run_dir={tiny.runs_dir / 'whole'}")
    step, now = Line.step, [0]

    def hot_in_iteration_4(self: Line, action: int) -> Any:
        if now[0] == 3:
            raise RuntimeError("the motor is hot")
        return step(self, action)

    with monkeypatch.context() as patch:
        patch.setattr(Line, "step", hot_in_iteration_4)
        patch.setattr("maml.training.loop.report_iteration", lambda number: now.__setitem__(0, number))
        with pytest.raises(MamlError, match="the motor is hot"):
            tiny.run(*words)
    folder = tiny.run(*words)
    lines = [json.loads(line)["iteration"] for line in (folder / "metrics.jsonl").read_text().splitlines()]
    record = json.loads((folder / "run.json").read_text())
    assert lines == [1, 2, 3, 4, 5]
    assert [segment["last_iteration"] for segment in record["segments"]] == [3, 5]
    assert all(
        torch.equal(value, checkpoint_tensors(expected)[name]) for name, value in checkpoint_tensors(folder).items()
    )


@pytest.mark.parametrize(
    ("env_id", "goals", "model", "reason"),
    [
        ("tests/Line-v0", "goal: {values: [1]}", "model=gaussian_policy", "the 3 outputs .* model=categorical_policy"),
        (
            "CartPole-v1",
            "sutton_barto_reward: {values: [true]}",
            "model=gaussian_policy",
            "actions .* are numbered choices, .*GaussianPolicy gives means .*; choose model=categorical_policy",
        ),
        (
            "Pendulum-v1",
            "g: [5, 15]",
            "model=categorical_policy",
            "actions .* are real numbers, .*MLP gives a score for each choice; choose model=gaussian_policy",
        ),
        (
            "tests/Line-v0",
            "goal: {values: [1]}",
            "model.normalization=batch",
            r"depends on the others beside it.* \(model.normalization=none; with model=module",
        ),
    ],
)
def test_model_that_does_not_fit_the_actions_is_refused_with_the_remedy(
    env_id: str, goals: str, model: str, reason: str
) -> None:
    settings, _ = compose([*CHOOSING, f"domain.env_id={env_id}", f"domain.goals={{{goals}}}", model])
    with pytest.raises(MamlError, match=reason):
        build_algorithm(settings, Hardware("cpu"))


def test_observations_that_are_too_long_are_refused_with_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("maml.hardware.memory.machine_memory", lambda: 1000)
    with pytest.raises(MamlError, match=r"baseline of 9 observed numbers .* shorter, .*ResizeObservation"):
        line(goal={"values": [1]})


def test_picture_of_a_discrete_policy_shows_its_episodes(tiny: TinyRuns) -> None:
    tiny.run(*ON_LINE)
    places = (f"runs_dir={tiny.runs_dir}", f"cache_dir={tiny.cache_dir}")
    runpy.run_path(str(ROOT / "scripts" / "render.py"))["main"]([*tiny.base, *ON_LINE, *places])
    (path,) = tiny.runs_dir.rglob("*.gif")
    with Image.open(path) as picture:
        assert picture.n_frames > 1  # type: ignore[attr-defined]


class NoPictures(Line):
    def __init__(self, goal: int) -> None:
        super().__init__(goal)


gymnasium.register("tests/NoPictures-v0", f"{__name__}:NoPictures")


@pytest.mark.filterwarnings("ignore:.*render_mode.*")
def test_environment_without_pictures_is_named_when_it_should_be_drawn() -> None:
    domain = GymnasiumEnv(env_id="tests/NoPictures-v0", goals={"goal": {"values": [1, 2]}})
    domain.make_single(torch.tensor([1.0])).close()
    with pytest.raises(MamlError, match=r"NoPictures-v0 cannot be made with {'goal': 1, 'render_mode': 'rgb_array'}"):
        domain.make_single(torch.tensor([1.0]), "rgb_array")


@pytest.mark.parametrize("domain", ["cheetah_velocity", "ant_direction", "gymnasium_env"])
def test_double_precision_holds_for_rollouts(domain: str, tiny: TinyRuns, monkeypatch: pytest.MonkeyPatch) -> None:
    if domain != "gymnasium_env":
        pytest.importorskip("mujoco")
    seen: dict[str, torch.Tensor] = {}
    collect = Reinforcement.collect

    def spy(self: Reinforcement, tasks: Any, *rest: Any) -> None:
        collect(self, tasks, *rest)
        seen.update(tasks)

    monkeypatch.setattr(Reinforcement, "collect", spy)
    pendulum = ("domain.env_id=Pendulum-v1", "domain.goals={g: [5, 15]}") if domain == "gymnasium_env" else ()
    folder = tiny.run(
        f"domain={domain}",
        *pendulum,
        "domain.num_shots=1",
        "domain.horizon=5",
        "model=gaussian_policy",
        "model.hidden_sizes=[6]",
        "outer=trpo",
        "evaluation=average_return",
        "evaluation.num_shots=[1]",
        "num_iterations=2",
        "meta_batch_size=2",
        "evaluation.num_tasks=2",
        "precision=float64",
    )
    floats = {name: value for name, value in seen.items() if value.is_floating_point()}
    assert {value.dtype for value in floats.values()} == {torch.float64}
    names = ["step_0.returns"] if domain == "gymnasium_env" else ["step_0.returns", "step_0.observations"]
    for name in names:  # Pendulum itself observes float32
        assert not torch.equal(floats[name], floats[name].float().double()), "not rounded to float32 on the way"
    assert {value.dtype for value in checkpoint_tensors(folder).values() if value.is_floating_point()} == {
        torch.float64
    }
