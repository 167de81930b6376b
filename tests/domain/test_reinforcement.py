"""The code that all RL domains share: data, losses and metrics, and keeping the best theta in training."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gymnasium
import pytest
import torch
from torch import Tensor

from maml.algorithm.best import update_best
from maml.algorithm.maml import MAML
from maml.algorithm.pretrain import Pretrain
from maml.config.compose import compose
from maml.config.schema import build
from maml.domain.locomotion import CheetahVelocity
from maml.domain.point_navigation import PointNavigation
from maml.domain.reinforcement import Reinforcement
from maml.environment.base import Environments, TellGoal, Transition
from maml.environment.point import PointEnvironments
from maml.errors import MamlError
from maml.evaluation import Evaluation
from maml.experiment import build_algorithm
from maml.hardware.base import Hardware
from maml.inner.sgd import SGD
from maml.model.gaussian_policy import GaussianPolicy
from maml.outer.trpo import TRPO
from maml.record import checkpoint
from maml.seeding import Stream
from maml.types import Params, Tasks, expand, num_tasks
from tests import algorithms
from tests.algorithms import build_from
from tests.environment.test_rollouts import RandomLengthWalks, roll_out_one_task
from tests.runs import TinyRuns


@dataclass(kw_only=True, eq=False)
class RandomLengthWalk(Reinforcement):
    """Walks that end after a random number of steps, often because the simulation blows up."""

    num_shots: int = 3
    horizon: int = 12
    discount: float = 0.9

    def make_environments(self) -> Environments:
        return RandomLengthWalks()

    def draw_goals(self, count: int, stream: Stream) -> Tensor:
        return stream.uniform((count, 1), -1.0, 1.0)

    def test_goals(self, count: int) -> Tensor:
        return torch.linspace(-1.0, 1.0, count).unsqueeze(-1)

    def make_single(self, goal: Tensor, render_mode: str | None = None) -> gymnasium.Env:
        raise NotImplementedError


def domains() -> dict[str, Reinforcement]:
    return {
        "point": PointNavigation(num_shots=2, horizon=12),
        "cheetah": CheetahVelocity(goal_range=(0.0, 2.0), num_shots=2, horizon=8),
        "strolls": RandomLengthWalk(),
    }


def algorithm_on(domain: Reinforcement, seed: int = 0) -> MAML:
    model = GaussianPolicy(domain.in_shape, domain.out_dim, hidden_sizes=[8], activation="tanh")
    return build_from(MAML, domain, model, SGD(0.1, 1, order=2, adapt=["*"]), TRPO(), seed)


def collect(domain: Reinforcement, count: int = 3, seed: int = 1) -> tuple[MAML, Tasks]:
    algorithm = algorithm_on(domain)
    tasks = algorithm.sample_tasks(count, Stream(seed))
    algorithm.collect(expand(algorithm.theta, count), tasks)
    return algorithm, tasks


def clone_params(params: Params) -> Params:
    return {name: value.clone() for name, value in params.items()}


@pytest.mark.parametrize("step", [0, 1])
def test_losses_are_means_over_the_timesteps_of_each_task(step: int) -> None:
    algorithm, tasks = collect(RandomLengthWalk())
    domain, data = algorithm.domain, algorithm.domain.data(tasks, "support", step)
    lengths = (data.weights > 0).sum(1)
    assert len(lengths.unique()) > 1
    other = algorithm.model.init(Stream(9)) | {"log_std": torch.tensor([0.2, -0.1])}
    params = expand(other, 3)
    inner, (outer, metrics) = (
        domain.inner_loss(algorithm.model, params, data),
        domain.outer_loss(algorithm.model, params, data),
    )
    outputs = algorithm.model(params, data.observations)
    for task, length in enumerate(lengths.tolist()):
        log_probs, ratios, divergences = [], [], []
        for time in range(length):
            old, new = (
                torch.distributions.Normal(row[task, time, :2], row[task, time, 2:].exp())
                for row in (data.outputs, outputs)
            )
            action, advantage = data.actions[task, time], data.advantages[task, time]
            log_probs.append(new.log_prob(action).sum() * advantage)
            ratios.append((new.log_prob(action).sum() - old.log_prob(action).sum()).exp() * advantage)
            divergences.append(torch.distributions.kl_divergence(old, new).sum())
        for ours, terms in ((-inner, log_probs), (-outer, ratios), (metrics["kl"], divergences)):
            torch.testing.assert_close(ours[task], torch.stack(terms).mean(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("step", [0, 1])
def test_at_the_policies_that_collected_the_objective_is_zero_and_so_is_the_divergence(step: int) -> None:
    algorithm, tasks = collect(RandomLengthWalk())
    params = list(algorithm.inner_steps(expand(algorithm.theta, 3), tasks, 1, None, create_graph=False))[step]
    data = algorithm.domain.data(tasks, "query", step)
    loss, metrics = algorithm.domain.outer_loss(algorithm.model, params, data)
    assert loss.abs().max() < 1e-5, "advantages have mean zero"
    assert metrics["kl"].abs().max() < 1e-5


def test_same_iteration_has_the_same_rollouts_whatever_ran_before() -> None:
    for domain in domains().values():
        algorithm, first = collect(domain)
        collect(domain, count=4, seed=2)
        Evaluation(num_tasks=2, num_steps=1)(algorithm)
        again = algorithm.sample_tasks(3, Stream(1))
        algorithm.collect(expand(algorithm.theta, 3), again)
        assert first.keys() == again.keys()
        assert [name for name, value in first.items() if not torch.equal(value, again[name])] == []
        other = algorithm.sample_tasks(3, Stream(2))
        algorithm.collect(expand(algorithm.theta, 3), other)
        assert not torch.equal(first["step_0.actions"][:, :5], other["step_0.actions"][:, :5])


def test_steps_have_noise_of_their_own() -> None:
    algorithm, tasks = collect(RandomLengthWalk())
    noise = []
    for step in range(2):
        data = algorithm.domain.data(tasks, "support", step)
        mean, log_std = data.outputs[:, :12].chunk(2, dim=-1)
        noise.append((data.actions[:, :12] - mean) * (-log_std).exp())
    assert (noise[0] - noise[1]).abs().min() > 1e-6


@pytest.mark.parametrize("kind", ["point", "cheetah", "strolls"])
def test_returns_do_not_depend_on_how_many_tasks_are_adapted_to(kind: str) -> None:
    domain = domains()[kind]
    algorithm = algorithm_on(domain)
    evaluation = Evaluation(num_tasks=2, num_steps=2, step_size=[0.1, 0.05])
    bank = evaluation.bank(domain, 2, num_tasks=6)
    (longer,) = evaluation.curves(algorithm, 2, bank, [0.1, 0.05])
    (shorter,) = evaluation.curves(algorithm, 2, {name: value[:3] for name, value in bank.items()}, [0.1, 0.05])
    assert (longer.metric, longer.values.shape) == ("return", (3, 6))
    torch.testing.assert_close(shorter.values, longer.values[:, :3], rtol=1e-4, atol=1e-4)
    assert (longer.values[0] - longer.values[2]).abs().min() > 1e-4


def test_oracle_sees_the_goal_behind_each_observation() -> None:
    domain, plain = RandomLengthWalk(oracle=True), RandomLengthWalk()
    assert (domain.in_shape, domain.out_dim, plain.in_shape) == ((4,), 4, (3,))
    _, tasks = collect(domain)
    data = domain.data(tasks, "support", 1)
    taken = data.weights > 0
    goals = tasks["goals"].unsqueeze(1).expand(-1, taken.shape[1], -1)
    assert torch.equal(data.observations[..., 3:][taken], goals[taken])
    assert not data.observations[~taken].any()


def test_pooling_is_for_training_only() -> None:
    domain = RandomLengthWalk(pooled=True)
    algorithm = algorithm_on(domain)
    for split, pooled in (("train", True), ("val", False), ("test", False)):
        tasks = domain.sample_tasks(4, Stream(0), split)  # type: ignore[arg-type]
        domain.collect(tasks, algorithm.model, expand(algorithm.theta, 4), 0)
        data = domain.data(tasks, "support", 0)
        taken = data.weights > 0
        assert abs(data.advantages[taken].mean()) < 1e-6
        means = torch.stack([row[own].mean() for row, own in zip(data.advantages, taken, strict=True)])
        assert bool((means.abs() > 1e-3).any()) == pooled


def pretrain_on(domain: Reinforcement) -> Pretrain:
    model = GaussianPolicy(domain.in_shape, domain.out_dim, hidden_sizes=[8], activation="tanh")
    return build_from(Pretrain, domain, model, SGD(0.1, 1, order=2, adapt=["*"]), TRPO())


def collect_for_pretraining(domain: Reinforcement, count: int = 6) -> tuple[Pretrain, Tasks]:
    algorithm = pretrain_on(domain)
    tasks = algorithm.sample_tasks(count, Stream(1))
    algorithm.collect(algorithm.params_per_task(count), tasks)
    return algorithm, tasks


@pytest.mark.parametrize("num_goals", [None, 2])
def test_each_episode_has_its_own_goal_and_all_timesteps_count_together(num_goals: int | None) -> None:
    """Against the sampler written out: reset with the next goal, until the batch has enough timesteps."""
    domain = RandomLengthWalk(oracle=True, pooled=True, goal_per="episode", num_goals=num_goals)
    algorithm, tasks = collect_for_pretraining(domain)
    theta = algorithm.params_per_task(1)
    # Episode i is the one that task i of a larger meta-batch would begin with.
    draws = RandomLengthWalk(oracle=True, num_goals=num_goals).sample_tasks(100, Stream(1))
    expected, steps = list[dict[str, Any]](), 0
    while steps < 6 * 3 * 12:
        one = slice(len(expected), len(expected) + 1)
        stream = Stream(draws["keys"][one]).child("step").child(0)
        environments = TellGoal(RandomLengthWalks())
        episode = roll_out_one_task(
            environments, lambda x: algorithm.model(theta, x), draws["goals"][one], stream, 1, 12, most_episodes=1
        )
        expected.append(episode)
        steps += episode["lengths"]
    data = domain.data(tasks, "support", 0)
    assert num_tasks(tasks) == len(expected) > 6 * 3
    for number, episode in enumerate(expected):
        length = episode["lengths"]
        assert data.lengths[number] == length
        for name in ("observations", "actions", "outputs"):
            torch.testing.assert_close(getattr(data, name)[number, :length], episode[name], rtol=1e-4, atol=1e-4)
            assert not getattr(data, name)[number, length:].any()
        assert data.returns[number].item() == pytest.approx(episode["total_reward"], rel=1e-4, abs=1e-4)
    goals = data.observations[:, 0, -1].unique()
    assert len(goals) == (num_goals or len(expected))

    # Losses, divergence and returns are means over the whole batch.
    taken = data.weights > 0
    assert int(taken.sum()) == steps
    assert abs(data.advantages[taken].mean()) < 1e-6
    params = expand(algorithm.model.init(Stream(9)), num_tasks(tasks))
    loss, metrics = domain.outer_loss(algorithm.model, params, data)
    outputs = algorithm.model(params, data.observations)
    log_prob = domain.distribution.log_prob
    ratios = (log_prob(outputs, data.actions) - log_prob(data.outputs, data.actions)).exp()
    torch.testing.assert_close(loss.mean(), -(ratios * data.advantages)[taken].mean(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(metrics["kl"].mean(), domain.distribution.kl(data.outputs, outputs)[taken].mean())
    means, _ = domain.rollout_metrics(tasks)
    total = sum(episode["total_reward"] for episode in expected)
    assert means["return"].mean().item() == pytest.approx(total / len(expected), rel=1e-4)
    assert means["episode_length"].mean().item() == pytest.approx(steps / len(expected))


@pytest.mark.parametrize("kind", ["point", "cheetah"])
def test_where_no_episode_ends_early_a_goal_per_episode_is_one_per_task_to_the_bit(kind: str) -> None:
    options = {"num_shots": 1, "horizon": 8, "pooled": True}
    after = []
    for goal_per in ("task", "episode"):
        domain = (
            PointNavigation(goal_range=(5.0, 6.0), goal_per=goal_per, **options)  # type: ignore[arg-type]
            if kind == "point"
            else CheetahVelocity(goal_range=(0.0, 2.0), goal_per=goal_per, **options)  # type: ignore[arg-type]
        )
        algorithm, tasks = collect_for_pretraining(domain)
        metrics = algorithms.step(algorithm, algorithm.sample_tasks(6, Stream(2)))
        after.append((domain.data(tasks, "support", 0)._asdict(), metrics, algorithm.theta))
    for per_task, per_episode in zip(*after, strict=True):
        assert per_task.keys() == per_episode.keys()
        assert [name for name, value in per_task.items() if not torch.equal(value, per_episode[name])] == []


def test_training_with_a_goal_per_episode_goes_on_with_any_number_of_episodes() -> None:
    domain = RandomLengthWalk(pooled=True, goal_per="episode", num_shots=1)
    algorithm = pretrain_on(domain)
    before = clone_params(algorithm.theta)
    counts = set()
    for iteration in range(4):
        tasks = algorithm.sample_tasks(4, Stream(2).child(iteration))
        metrics = algorithms.step(algorithm, tasks, task_chunk=3)
        counts.add(num_tasks(tasks))
        assert metrics["kl"].isfinite()
    assert len(counts) > 1
    assert not torch.equal(before["log_std"], algorithm.theta["log_std"])


def test_meta_test_keeps_one_goal_per_task() -> None:
    per_task, per_episode = (RandomLengthWalk(pooled=True, goal_per=goal_per) for goal_per in ("task", "episode"))
    for split in ("val", "test"):
        one, other = (domain.sample_tasks(4, Stream(0), split) for domain in (per_task, per_episode))
        assert one.keys() == other.keys()
        assert all(torch.equal(value, other[name]) for name, value in one.items())


def test_goal_per_episode_needs_a_pooled_baseline_and_no_adaptation() -> None:
    with pytest.raises(MamlError, match=r"too little for a baseline of its own; set domain\.pooled=true"):
        RandomLengthWalk(goal_per="episode")
    with pytest.raises(MamlError, match=r"MAML adapts to a task's goal.*choose algorithm=pretrain or oracle"):
        algorithm_on(RandomLengthWalk(pooled=True, goal_per="episode"))


def test_subsampled_episodes_keep_their_share_of_the_mean() -> None:
    domain = RandomLengthWalk(pooled=True, goal_per="episode")
    _, tasks = collect_for_pretraining(domain)
    whole, fewer = (domain.data(each, "support", 0) for each in (tasks, domain.subsample_timesteps(tasks, 3)))
    torch.testing.assert_close(fewer.weights.sum(1), whole.weights.sum(1))
    assert fewer.weights.sum(1).mean().item() == pytest.approx(1.0)


@pytest.mark.parametrize("every", [1, 3])
def test_subsampled_rollouts_are_every_nth_timestep(every: int) -> None:
    algorithm, tasks = collect(RandomLengthWalk())
    before = clone_params(tasks)
    subsampled = algorithm.domain.subsample_timesteps(tasks, every)
    for step in range(2):
        whole, data = (algorithm.domain.data(each, "query", step) for each in (tasks, subsampled))
        for name in ("observations", "actions", "outputs", "advantages"):
            assert torch.equal(getattr(data, name), getattr(whole, name)[:, ::every])
        torch.testing.assert_close(data.weights.sum(1), torch.ones(3))
        assert torch.equal(data.weights > 0, whole.weights[:, ::every] > 0)
        for row in data.weights:
            assert len(row[row > 0].unique()) == 1
        assert torch.equal(data.returns, whole.returns)
    assert all(torch.equal(value, tasks[name]) for name, value in before.items())


def test_summary_is_of_the_last_step_and_counts_all_blow_ups() -> None:
    algorithm = algorithm_on(RandomLengthWalk())
    tasks = algorithm.sample_tasks(4, Stream(1))
    for _ in algorithm.adapt(algorithm.params_per_task(num_tasks(tasks)), tasks, 2):
        pass
    means, counts = algorithm.domain.rollout_metrics(tasks)
    steps = [algorithm.domain.data(tasks, "query", step) for step in range(3)]
    assert list(means) == ["return_step_0", "return_step_1", "return", "episode_length"]
    for name, step in (("return_step_0", 0), ("return_step_1", 1), ("return", 2)):
        assert torch.equal(means[name], steps[step].returns)
    assert torch.equal(means["episode_length"], steps[2].lengths)
    assert counts.keys() == {"num_unstable"}
    assert counts["num_unstable"].sum() == sum(int(step.num_unstable.sum()) for step in steps) > 0


def test_return_is_the_undiscounted_mean_over_episodes() -> None:
    algorithm, tasks = collect(PointNavigation(num_shots=4, horizon=10))
    data = algorithm.domain.data(tasks, "query", 0)
    goals, horizon = tasks["goals"], 10
    for task in range(3):
        path = data.observations[task].reshape(4, horizon, 2)
        # Each step ends where the next one starts. The end of the last step is not stored, but follows from its action.
        end = path[:, -1] + 0.1 * data.actions[task].reshape(4, horizon, 2)[:, -1].clamp(-1, 1)
        reached = torch.cat([path[:, 1:], end.unsqueeze(1)], dim=1)
        expected = -(reached - goals[task]).norm(dim=-1).sum(1).mean()
        assert data.returns[task].item() == pytest.approx(expected.item(), rel=1e-5)
    measured = algorithm.domain.measure(algorithm.model, algorithm.theta, data, data, 0)
    assert list(measured) == ["return"]
    assert torch.equal(measured["return"], data.returns)


@pytest.mark.parametrize("num_shots", [None, 5])
def test_tasks_have_as_many_rollouts_as_asked_for(num_shots: int | None) -> None:
    domain = PointNavigation(num_shots=2, horizon=6)
    algorithm = algorithm_on(domain)
    tasks = domain.sample_tasks(3, Stream(0), "test", num_shots)
    list(algorithm.adapt(algorithm.params_per_task(num_tasks(tasks)), tasks, 1))
    for step in range(2):
        data = domain.data(tasks, "support", step)
        assert ((data.weights > 0).sum(1) == (num_shots or 2) * 6).all()


def test_best_theta_is_that_of_the_best_training_return_and_is_what_is_evaluated() -> None:
    algorithm = algorithm_on(PointNavigation(num_shots=2, horizon=12))
    assert algorithm.best["score"] == -torch.inf
    returns: list[float] = []
    seen: list[tuple[float, Params]] = []
    for iteration in range(14):
        theta = clone_params(algorithm.theta)
        metrics = algorithms.step(algorithm, algorithm.sample_tasks(3, Stream(2).child(iteration)))
        # The first return fills the window of ten iterations.
        returns += [metrics["return"].item()] * (1 if returns else 10)
        seen.append((sum(returns[-10:]) / 10, theta))
    score, best = max(seen, key=lambda pair: pair[0])
    assert score not in (seen[0][0], seen[-1][0]), "the best must not be the first or the last"
    state = algorithm.state_dict()["best"]
    assert state["score"] == pytest.approx(score, rel=1e-6)
    assert state.keys() == best.keys() | {"score", "recent"}
    assert all(torch.equal(state[name], value) for name, value in best.items())

    settings: dict[str, Any] = {"num_tasks": 3, "num_steps": 1}
    (curve_of_best,), *_ = Evaluation(**settings, theta="best")(algorithm)
    (curve_of_last,), *_ = Evaluation(**settings)(algorithm)
    algorithm.theta = best
    (expected,), *_ = Evaluation(**settings)(algorithm)
    assert torch.equal(curve_of_best.values, expected.values)
    assert not torch.equal(curve_of_last.values, expected.values)


def test_return_that_is_not_a_number_is_never_the_best() -> None:
    algorithm = algorithm_on(RandomLengthWalk())
    update_best(algorithm.best, algorithm.theta, torch.tensor(torch.nan))
    assert algorithm.best["score"] == -torch.inf
    for _ in range(10):
        update_best(algorithm.best, algorithm.theta, torch.tensor(-3.0))
    assert algorithm.best["score"] == -3


TINY = (
    "domain=point_navigation",
    "domain.num_shots=2",
    "domain.horizon=8",
    "model=gaussian_policy",
    "model.hidden_sizes=[6]",
    "outer=trpo",
    "evaluation=average_return",
    "evaluation.num_shots=[2]",
    "num_iterations=4",
    "log_every=1",
)


def test_log_counts_the_blow_ups(tiny: TinyRuns, monkeypatch: pytest.MonkeyPatch) -> None:
    step, blow_ups = PointEnvironments.step, [0]

    def step_with_blow_ups(self: PointEnvironments, actions: Tensor, living: Tensor) -> Transition:
        transition = step(self, actions, living)
        unstable = actions[:, 0] > 1.5
        blow_ups[0] += int(unstable.sum())
        return transition._replace(unstable=unstable, terminated=transition.terminated | unstable)

    monkeypatch.setattr(PointEnvironments, "step", step_with_blow_ups)
    monkeypatch.setattr("maml.experiment._evaluate", lambda *_: ({"headline": None}, Path("none")))
    folder = tiny.run(*TINY)
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["iteration"] for line in lines] == [1, 2, 3, 4]
    assert sum(line["num_unstable"] for line in lines) == blow_ups[0] > 0


def test_meta_test_says_that_episodes_blew_up(
    tiny: TinyRuns, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    step = PointEnvironments.step

    def step_with_blow_ups(self: PointEnvironments, actions: Tensor, living: Tensor) -> Transition:
        return step(self, actions, living)._replace(unstable=actions[:, 0] > 1.5)

    monkeypatch.setattr(PointEnvironments, "step", step_with_blow_ups)
    tiny.run(*TINY, "num_iterations=0", "evaluation.theta=last")
    assert re.search(r"\d+ episodes after 1 gradient steps blew up .* cannot be compared", capsys.readouterr().err)


def test_checkpoint_of_other_observations_is_refused(tiny: TinyRuns) -> None:
    folder = tiny.run(*TINY, "num_iterations=1")
    state = checkpoint.load(folder / "checkpoint.pt")["state"]
    oracle = (*TINY, "num_iterations=1", "domain.oracle=true")
    with pytest.raises(MamlError, match=r"belongs to another run .*\n +domain\.oracle: True here, its default there"):
        tiny.run(*oracle, "mode=eval", f"checkpoint={folder / 'checkpoint.pt'}")
    algorithm = build_algorithm(tiny.config(*oracle), Hardware("cpu"))
    with pytest.raises(
        MamlError,
        match=r"linear1\.weight has shape \(6, 2\), but this model's has \(6, 4\); use a domain with the inputs and",
    ):
        algorithm.load_state_dict(state)


@pytest.mark.parametrize(
    ("overrides", "reason"),
    [
        (["domain.horizon=0"], r"domain\.horizon=0: input should be greater than or equal to 1"),
        (["domain.num_shots=0"], r"domain\.num_shots=0: input should be greater than or equal to 1"),
        (["domain.num_goals=0"], r"domain\.num_goals=0: input should be greater than or equal to 1"),
        (["domain.discount=1.01"], r"domain\.discount=1\.01: input should be less than or equal to 1"),
        (["domain.discount=-0.1"], r"domain\.discount=-0\.1: input should be greater than or equal to 0"),
        (["domain.pooled=3"], r"domain\.pooled=3: input should be a valid boolean"),
        (["domain.goal_per=rollout"], r"domain\.goal_per='rollout': input should be 'task' or 'episode'"),
        (["domain.arrival=circle"], r"domain\.arrival='circle': input should be 'box' or 'disc'"),
        (["domain.reward=squared"], r"domain\.reward='squared': input should be 'distance' or 'squared_distance'"),
        (["domain.goal_range=[0.5,-0.5]"], r"domain\.goal_range=\[0\.5, -0\.5\]: .*0\.5 is not below -0\.5; swap them"),
        (["domain.goal_range=[0.5,0.5]"], r"0\.5 is not below 0\.5"),
        (["domain.goal_range=[0.5]"], r"domain\.goal_range=\[0\.5\]: field required"),
        (["domain=ant_velocity", "domain.goal_range=[3,0]"], r"3\.0 is not below 0\.0; swap them"),
        (["domain=ant_direction", "domain.physics=real"], r"domain\.physics='real': input should be 'paper' or 'gym"),
        (["domain=ant_direction", "+domain.goal_range=[0,3]"], r"domain\.goal_range is not a key"),
        (["outer=trpo", "outer.max_kl=0"], r"outer\.max_kl=0: input should be greater than 0"),
        (["outer=trpo", "outer.num_cg_steps=0"], r"outer\.num_cg_steps=0: input should be greater than or equal to 1"),
        (["outer=trpo", "outer.backtrack=1"], r"outer\.backtrack=1: input should be less than 1"),
        (
            ["outer=trpo", "outer.curvature=fd"],
            r"outer\.curvature='fd': input should be 'exact' or 'finite_difference'",
        ),
        (["outer=trpo", "outer.first_fraction=0"], r"outer\.first_fraction=0: input should be greater than 0"),
        (["outer=trpo", "outer.damping=-1"], r"outer\.damping=-1: input should be greater than or equal to 0"),
        (["outer=trpo", "outer.curvature_every=0"], r"outer\.curvature_every=0: input should be greater than or equal"),
        (["evaluation=average_return", "evaluation.theta=first"], r"input should be 'last' or 'best'"),
    ],
)
def test_setting_that_makes_no_sense_is_refused_by_name(overrides: list[str], reason: str) -> None:
    with pytest.raises(MamlError, match=reason):
        compose(["domain=point_navigation", "model=gaussian_policy", *overrides])


@pytest.mark.parametrize(
    ("overrides", "reason"),
    [
        (["outer=trpo"], "TRPO limits how far a policy moves, but Sinusoid has no policy; choose outer=adam, or an RL"),
        (["model=gaussian_policy"], "cannot have the 1 outputs of this domain; choose a domain of reinforcement learn"),
        *(
            (["domain=point_navigation", "model=gaussian_policy", f"algorithm={name}"], f"{kind} learns from labelled")
            for name, kind in (
                ("reptile", "Reptile"),
                ("finetune", "FineTune"),
                ("nearest_neighbor", "NearestNeighbor"),
                ("multitask_average", "MultitaskAverage"),
            )
        ),
        (["domain=point_navigation", "model=conv4"], r"takes images .* but the domain's inputs are \(2,\)"),
    ],
)
def test_parts_that_do_not_fit_each_other_are_refused(overrides: list[str], reason: str) -> None:
    config, _ = compose(overrides)
    with pytest.raises(MamlError, match=reason):
        build_algorithm(config, Hardware("cpu"))


def test_best_theta_of_labelled_examples_is_refused() -> None:
    config, _ = compose(["evaluation.theta=best"])
    with pytest.raises(
        MamlError, match=r"evaluation\.theta=best, but training on Sinusoid keeps the last .* choose last"
    ):
        build(config.evaluation).check_algorithm(build_algorithm(config, Hardware("cpu")))
