"""Pictures of policies: single environments compared with the batch, and GIFs of tiny runs."""

from __future__ import annotations

import re
import runpy
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from PIL import Image

from maml.config.compose import compose
from maml.config.schema import build
from maml.domain.reinforcement import Reinforcement
from maml.environment.base import TellGoal
from maml.environment.distribution import Gaussian
from maml.environment.mujoco_batch import MujocoEnvironments
from maml.errors import EnvironmentFailed, MamlError
from maml.experiment import build_algorithm, run_experiment
from maml.hardware.base import Hardware
from maml.logger.wandb import WandB
from maml.model.gaussian_policy import GaussianPolicy
from maml.seeding import Stream
from maml.types import num_tasks, take
from tests.runs import ROOT

SCRIPT = runpy.run_path(str(ROOT / "scripts" / "render.py"))
TINY = (
    "domain.horizon=12",
    "domain.num_shots=2",
    "evaluation.num_shots=[2]",
    "model.hidden_sizes=[8]",
    "hardware=cpu",
    "hardware.num_threads=1",
)


@pytest.fixture(autouse=True)
def as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MUJOCO_GL", "")  # so that the script's change of it is undone
    monkeypatch.delenv("MUJOCO_GL")


def trained(experiment: str, runs_dir: Path, *overrides: str) -> list[str]:
    """Trains for some iterations and returns the overrides of the run."""
    run = [f"+experiment={experiment}", "+debug=smoke", *TINY, f"runs_dir={runs_dir}", *overrides]
    run_experiment(*compose(run))
    return run


def show(*arguments: str) -> None:
    SCRIPT["main"](list(arguments))


@pytest.mark.parametrize("oracle", [False, True])
@pytest.mark.parametrize(
    "name",
    [
        "point_navigation",
        "cheetah_velocity",
        "cheetah_direction",
        "ant_velocity",
        "ant_direction",
        "cheetah_velocity_v5",
        "ant_direction_v5",
    ],
)
def test_single_environment_is_one_of_the_batch(name: str, oracle: bool) -> None:
    config, _ = compose([f"domain={name}", "domain.horizon=7", f"domain.oracle={str(oracle).lower()}"])
    domain: Reinforcement = build(config.domain)
    goal = domain.test_goals(3)[-1]
    environments = domain.environments
    stream = Stream(torch.tensor([5]))
    batched = environments.reset(goal[None], stream)
    if isinstance(environments, TellGoal):
        environments = environments.environments
    noise = environments.draw_noise(stream)[0].numpy() if isinstance(environments, MujocoEnvironments) else None
    single = domain.make_single(goal)
    observation, _ = single.reset(options={"noise": noise})
    told = goal if oracle else goal[:0]
    for time, action in enumerate(Stream(1).normal((7, domain.environments.action_dim)), start=1):
        seen = torch.cat([torch.as_tensor(observation, dtype=torch.float32), told])
        assert torch.equal(seen, batched[0])
        observation, reward, terminated, truncated, _ = single.step(action.numpy())
        step = domain.environments.step(action[None], torch.tensor([0]))
        batched = step.observations
        assert np.float32(reward) == step.rewards.item()
        assert (terminated, truncated) == (False, time == 7)


def test_gif_shows_each_policy_and_what_it_earned(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = trained("point_navigation_maml", tmp_path)
    show(*run, "--goal", "2", "--steps", "3", "0", "1")
    said = capsys.readouterr().out
    (path,) = tmp_path.rglob("policy_goal_2.gif")
    assert f"written to {path}" in said
    returns = [float(text) for text in re.findall(r"return (\S+) in 12 steps", said)]
    assert len(returns) == 3
    assert re.search("before adaptation.*\n.*after 1 gradient step:.*\n.*after 3 gradient steps:", said)
    with Image.open(path) as picture:
        assert picture.n_frames == 13  # type: ignore[attr-defined]
        assert picture.width == 3 * 256 + 4 * 8
        shown = []
        for number in range(13):
            picture.seek(number)
            shown.append(picture.convert("RGB"))
        assert picture.info["loop"] == 0
    panels = [shown[-1].crop((8 + 264 * i, 28, 264 + 264 * i, 284)).tobytes() for i in range(3)]
    assert len(set(panels)) == 3  # the policies differ; the starting state and the noise do not
    assert len({page.tobytes() for page in shown}) == 13

    content = path.read_bytes()
    show(*run, "--goal", "2", "--steps", "0", "1", "3", "--output", str(tmp_path / "again.gif"))
    assert (tmp_path / "again.gif").read_bytes() == content


def test_episode_is_the_batchs_where_start_and_noise_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    config, _ = compose(["+experiment=point_navigation_maml", *TINY])
    algorithm = build_algorithm(config, Hardware("cpu"))
    assert isinstance(algorithm.domain, Reinforcement)
    bank = build(config.evaluation).bank(algorithm.domain, num_shots=1)
    tasks = take(bank, 1, 2)
    with torch.no_grad():
        *_, params = algorithm.adapt(algorithm.params_per_task(num_tasks(tasks)), tasks, 1)
        noise = Stream(tasks["keys"]).child("step").child(1).child(0).child("actions").normal((12, 2))[0]
        monkeypatch.setattr(Stream, "normal", lambda self, shape: noise)
        environment = algorithm.domain.make_single(tasks["goals"][0], "rgb_array")
        distribution = algorithm.domain.distribution
        frames = SCRIPT["run_episode"](environment, distribution, algorithm.model, params, torch.zeros(0), 12)
    assert frames[-1].time == 12
    assert frames[-1].total_reward == pytest.approx(tasks["step_1.returns"].item(), rel=1e-5)


def test_oracle_is_told_the_goal_and_has_one_panel(tmp_path: Path) -> None:
    run = trained("point_navigation_oracle", tmp_path)
    show(*run, "--output", str(tmp_path / "deeper" / "oracle.gif"))
    with Image.open(tmp_path / "deeper" / "oracle.gif") as picture:
        assert picture.width < 2 * 256


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # the viewer is not created
def test_cheetah_is_drawn_in_real_time_where_opengl_starts(tmp_path: Path) -> None:
    pytest.importorskip("mujoco")
    run = trained("cheetah_velocity_maml", tmp_path)
    try:
        show(*run, "--output", str(tmp_path / "cheetah.gif"))
    except MamlError as error:
        if "OpenGL does not start" not in str(error):
            raise
        pytest.skip(str(error))
    with Image.open(tmp_path / "cheetah.gif") as picture:
        assert picture.n_frames == 1 + 12 // 4  # type: ignore[attr-defined]
        assert picture.info["duration"] == 40  # four steps of 0.01 s
        assert picture.width == 2 * 341 + 3 * 8


def test_opengl_that_does_not_start_names_variable_and_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    package = {"__name__": "mujoco.egl"}
    exec("def start(): raise AttributeError(\"'NoneType' object has no attribute 'eglQueryString'\")", package)

    class Broken(gymnasium.Env[Any, Any]):
        def render(self) -> None:
            package["start"]()  # type: ignore[operator]

    monkeypatch.setenv("MUJOCO_GL", "egl")
    with pytest.raises(MamlError, match=r"MUJOCO_GL=egl .*eglQueryString.* libegl1 .* libosmesa6"):
        SCRIPT["first_picture"](Broken())


class Drawn(gymnasium.Env[np.ndarray, np.ndarray]):
    """Draws what it is given, without OpenGL, and ends after three steps."""

    def __init__(self, *pictures: Any) -> None:
        self.pictures, self.time, self.metadata = pictures, 0, {"render_fps": 1}

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[np.ndarray, dict]:
        return np.zeros(2), {}

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        self.time += 1
        if self.time > len(self.pictures):
            raise KeyError("late")
        return np.zeros(2), 0.0, False, False, {}

    def render(self) -> Any:
        picture = self.pictures[min(self.time, len(self.pictures) - 1)]
        return picture() if callable(picture) else picture


PICTURE = np.zeros((4, 5, 3), np.uint8)


@pytest.mark.parametrize(
    ("pictures", "said"),
    [
        (
            [lambda: [][1]],
            r"fails in render: IndexError: list index out of range \(test_render\.py, line \d+\); mend it",
        ),
        (
            [PICTURE, lambda: 1 / 0],
            r"fails in render, after step 1 of an episode: ZeroDivisionError: .*render",
        ),
        ([PICTURE], r"fails in step 2 of an episode: KeyError: 'late' \(test_render\.py, line \d+\); mend it"),
    ],
)
def test_environment_that_fails_while_it_is_shown_is_named_with_the_place(pictures: list[Any], said: str) -> None:
    policy = GaussianPolicy(in_shape=(2,), out_dim=4, hidden_sizes=[3])
    params = {name: value.unsqueeze(0) for name, value in policy.init(Stream(0)).items()}
    with pytest.raises(EnvironmentFailed, match=rf"^Drawn {said}"):
        SCRIPT["run_episode"](Drawn(*pictures), Gaussian(2), policy, params, torch.zeros(0), 3)


@pytest.mark.parametrize("channels", [(), (3,), (4,)])
def test_grey_and_transparent_pictures_become_coloured(channels: tuple[int, ...]) -> None:
    picture = SCRIPT["first_picture"](Drawn(np.full((4, 5, *channels), 7, np.uint8)))
    assert (picture.mode, picture.size, picture.getpixel((1, 1))) == ("RGB", (5, 4), (7, 7, 7))


@pytest.mark.parametrize(
    ("pixels", "said"),
    [(PICTURE / 1, r"float64 \(4, 5, 3\)"), (None, "NoneType"), (PICTURE[..., :2], r"uint8 \(4, 5, 2\)")],
)
def test_what_is_no_picture_is_named(pixels: Any, said: str) -> None:
    with pytest.raises(MamlError, match=rf"^Drawn\.render returns {said} instead of a picture, uint8 "):
        SCRIPT["first_picture"](Drawn(pixels))


def test_missing_package_of_a_picture_is_named() -> None:
    class Broken(gymnasium.Env[Any, Any]):
        def render(self) -> None:
            raise gymnasium.error.DependencyNotInstalled("pygame is not installed, run `pip install pygame`")

    with pytest.raises(MamlError, match=r"cannot be drawn: pygame is not installed, run `pip install pygame`$"):
        SCRIPT["first_picture"](Broken())


def test_environment_that_says_no_speed_has_a_picture_for_each_step() -> None:
    class Silent:
        metadata: dict[str, int] = {}

    assert SCRIPT["_steps_per_frame"](Silent()) == 1


def test_misspelt_key_is_named_with_its_likely_spelling(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(MamlError, match=r"Could not override 'domain\.horison'"):
        show("+experiment=point_navigation_maml", "domain.horison=9", "--goal", "1")
    assert "did you mean domain.horizon?" in capsys.readouterr().err


def test_what_cannot_be_shown_is_said(tmp_path: Path) -> None:
    point = ["+experiment=point_navigation_maml", f"runs_dir={tmp_path}"]
    for arguments, message in {
        ("+experiment=sinusoid_10shot",): "Sinusoid has no policy; name",
        (*point, "--goal", "40"): "the goals are 0 to 39",
        (*point, "--goal", "-1"): "the goals are 0 to 39",
        (*point, "--steps", "0", "5"): "after 0 to 4 gradient steps",
        tuple(point): "train first",
    }.items():
        with pytest.raises(MamlError, match=message):
            show(*arguments)
    assert list(tmp_path.iterdir()) == []

    run = trained("point_navigation_maml", tmp_path)
    with pytest.raises(MamlError, match="cannot be written"):
        show(*run, "--output", f"{tmp_path}/point_navigation_maml")


@pytest.mark.filterwarnings("ignore::ResourceWarning")  # Pillow keeps a GIF open, and W&B does not close it
def test_logger_of_the_config_gets_the_picture_of_a_finished_run(
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    wandb = pytest.importorskip("wandb")
    run = trained("point_navigation_maml", tmp_path)
    configs: list[Any] = []
    start = WandB.start

    def remember(logger: WandB, run_dir: Path, experiment: str, run_id: str, config: Any, resumed: bool) -> None:
        configs.append(config)
        start(logger, run_dir, experiment, run_id, config, resumed)

    monkeypatch.setattr(WandB, "start", remember)
    show(*run, "logger=wandb", "logger.mode=offline")
    wandb.teardown()
    (config,) = configs
    assert config["algorithm_name"] == "MAML" and config["settings_hash"]
    (original,) = tmp_path.rglob("policy_goal_0.gif")
    (sent,) = tmp_path.rglob("wandb/offline-run-*/files/media/images/pictures/*.gif")
    assert sent.read_bytes() == original.read_bytes()
    assert not [record for record in caplog.records if record.name.startswith("maml.")]

    (original.parent / "report.json").unlink()
    show(*run, "logger=wandb")
    assert "has no report yet" in caplog.text


def test_gif_of_another_runs_checkpoint_is_written_beside_it(tmp_path: Path) -> None:
    run = trained("point_navigation_maml", tmp_path / "committed")
    (checkpoint,) = (tmp_path / "committed").rglob("checkpoint.pt")
    show(*run, f"runs_dir={tmp_path / 'runs'}", f"checkpoint={checkpoint}")
    assert (checkpoint.parent / "policy_goal_0.gif").exists()
    assert not (tmp_path / "runs").exists(), "a folder without a run there would keep the run from being imported"
