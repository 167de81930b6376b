"""Shows a policy before and after adaptation to one goal, side by side, as an animated GIF.

    python scripts/render.py +experiment=cheetah_velocity_maml --goal 6 --steps 0 3

The policy is the newest checkpoint of the run of ``python train.py`` with the same overrides. The goal is one of the
evaluation's goals, and adaptation is the same as in the evaluation. Every panel is one episode of Gymnasium's
environment. All episodes begin in the same state and sample the same action noise, so they differ in the policy alone.
With ``logger=wandb``, the picture of a finished run is also sent to its W&B run.
"""

from __future__ import annotations

import argparse
import logging
import os
import re
import sys
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import ceil
from pathlib import Path
from typing import Any, NamedTuple

import gymnasium
import numpy as np
import torch
from hydra.errors import HydraException
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from maml.algorithm.base import Algorithm
from maml.cli.scripts import exit_with
from maml.config.compose import compose
from maml.config.hints import explain_override_error
from maml.config.schema import Settings, build
from maml.domain.reinforcement import Reinforcement
from maml.environment.distribution import Distribution
from maml.errors import EnvironmentFailed, MamlError, cause, place
from maml.evaluation import Evaluation
from maml.experiment import build_algorithm
from maml.hardware.base import Hardware
from maml.hardware.precision import use_precision
from maml.logger.base import Logger, Mirror
from maml.logger.mirror import described
from maml.model.base import Model
from maml.record.run_folder import RunFolder
from maml.seeding import Stream
from maml.types import Params, num_tasks, take

LOG = logging.getLogger(__name__)

_MAX_FPS = 25  # most pictures per second; more would only make the file larger
_PANEL_HEIGHT = 256  # pixels
_LINE_HEIGHT = 20
_MARGIN = 8


class Frame(NamedTuple):
    """One picture of an episode.

    Attributes:
        picture: the rendered image.
        time: number of steps so far.
        total_reward: sum of the rewards so far.
    """

    picture: Image.Image
    time: int
    total_reward: float


@dataclass(frozen=True)
class Episode:
    """One episode of a policy.

    Attributes:
        num_steps: number of gradient steps of the policy's adaptation.
        frames: the pictures, at least one.
        seconds: seconds between two pictures.
    """

    num_steps: int
    frames: Sequence[Frame]
    seconds: float


def main(arguments: Sequence[str] | None = None) -> None:
    """Draws one GIF."""
    usage = "%(prog)s +experiment=NAME [runs_dir=DIR ...] [--goal N] [--steps N ...] [--output FILE]"
    parser = argparse.ArgumentParser(
        usage=usage, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--goal", type=int, default=0, help="number of the goal in the evaluation's bank (default: 0)")
    parser.add_argument(
        "--steps", type=int, nargs="+", help="gradient steps, a panel for each (default: 0 and the evaluation's last)"
    )
    parser.add_argument("--output", type=Path, help="the file (default: policy_goal_<N>.gif in the run's folder)")
    words = sys.argv[1:] if arguments is None else list(arguments)
    overrides = [word for word in words if "=" in word and not word.startswith("-")]  # at any position
    options = parser.parse_args([word for word in words if word not in overrides])
    try:
        settings, experiment = compose(overrides)
    except HydraException as error:
        explain_override_error(overrides)
        raise MamlError(str(error)) from error
    with use_precision(settings.precision):
        animate(settings, experiment, options)


def animate(settings: Settings, experiment: str, options: argparse.Namespace) -> None:
    """Draws the GIF of one run, and sends it to the logger."""
    evaluation: Evaluation = build(settings.evaluation)
    backend = os.environ.pop("MUJOCO_GL", None)  # removed, because importing MuJoCo fails if the backend does not work
    algorithm = build_algorithm(settings, Hardware("cpu"))
    if sys.platform == "linux" and not os.environ.get("DISPLAY"):
        backend = backend or "egl"  # EGL needs no display
    os.environ |= {"MUJOCO_GL": backend} if backend else {}
    steps = sorted(set(options.steps or [0, evaluation.num_steps]))
    check(algorithm, evaluation, options.goal, steps)
    run = RunFolder(settings, experiment)
    iteration = restore(algorithm, run)
    goal, episodes = play(algorithm, evaluation, options.goal, steps)

    numbers = ", ".join(f"{number:.2f}" for number in goal.tolist())
    heading = f"{experiment}, goal {options.goal}: {numbers}"
    path = options.output or run.trained_in / f"policy_goal_{options.goal}.gif"
    save(path, heading, episodes)
    print(f"{heading}, iteration {iteration} of {settings.num_iterations}")
    for episode in episodes:
        last = episode.frames[-1]
        print(f"  {caption(episode)}: return {last.total_reward:.1f} in {last.time} steps")
    print(f"written to {path}")
    mirror(settings, algorithm.name, run, path)


def check(algorithm: Algorithm, evaluation: Evaluation, goal: int, steps: Sequence[int]) -> None:
    """Checks that the experiment has a policy, and that the goal and the gradient steps exist.

    Raises:
        MamlError: if one of them does not.
    """
    if not isinstance(algorithm.domain, Reinforcement):
        raise MamlError(
            f"{type(algorithm.domain).__name__} has no policy; name an experiment of reinforcement learning, such as "
            "+experiment=point_navigation_maml"
        )
    if not 0 <= goal < evaluation.num_tasks:
        raise MamlError(
            f"--goal {goal}: evaluation.num_tasks={evaluation.num_tasks}, so the goals are 0 to "
            f"{evaluation.num_tasks - 1}"
        )
    if steps[0] < 0 or steps[-1] > evaluation.num_steps:
        raise MamlError(
            f"--steps {' '.join(map(str, steps))}: this experiment is evaluated after 0 to {evaluation.num_steps} "
            "gradient steps; choose among them, or raise evaluation.num_steps"
        )


def restore(algorithm: Algorithm, run: RunFolder) -> int:
    """Loads the run's newest checkpoint, or the file in the config's ``checkpoint``; returns its iteration.

    Raises:
        MamlError: if there is no checkpoint.
    """
    saved = run.load_checkpoint()
    if saved is None:
        raise MamlError(
            f"there is no policy in {run.path} yet: train first (python train.py with the same overrides), say where "
            "the run is with runs_dir=, or name a file with checkpoint="
        )
    algorithm.load_state_dict(saved["state"])
    return saved["iteration"]


@torch.no_grad()
def play(
    algorithm: Algorithm, evaluation: Evaluation, index: int, steps: Sequence[int]
) -> tuple[Tensor, list[Episode]]:
    """Adapts to a goal of the bank, as the evaluation does, and runs an episode after each of the ``steps``.

    Returns:
        The goal, ``(G,)``, and the episodes.
    """
    domain = algorithm.domain
    assert isinstance(domain, Reinforcement)
    torch.set_num_threads(1)  # one task is too little work for several threads
    num_shots = (evaluation.num_shots or [domain.num_shots])[0]
    step_sizes = (
        evaluation.search(evaluation, algorithm, num_shots) if evaluation.search else evaluation.step_sizes(num_shots)
    )
    tasks = take(evaluation.bank(domain, num_shots), index, index + 1)
    goal = tasks["goals"][0]
    episodes = []
    start = algorithm.params_per_task(num_tasks(tasks), evaluation.choose_theta(algorithm))
    for step, params in enumerate(algorithm.adapt(start, tasks, steps[-1], step_sizes)):
        if step in steps:
            environment = domain.make_single(goal, render_mode="rgb_array")
            oracle_goal = goal if domain.oracle else goal[:0]
            frames = run_episode(environment, domain.distribution, algorithm.model, params, oracle_goal, domain.horizon)
            episodes.append(Episode(step, frames, _steps_per_frame(environment) / _fps(environment)))
            environment.close()
    return goal, episodes


def run_episode(
    environment: gymnasium.Env,
    distribution: Distribution,
    model: Model,
    params: Params,
    oracle_goal: Tensor,
    horizon: int,
) -> list[Frame]:
    """Runs one episode and takes pictures at its start, at its end and at regular intervals.

    Args:
        environment: an environment that renders pictures.
        distribution: the distribution of its actions.
        model: the policy network.
        params: parameters of one task, name -> ``(1, ...)``.
        oracle_goal: the goal that an oracle policy sees after each observation, ``(G,)``; ``(0,)`` for other policies.
        horizon: largest number of steps.

    Raises:
        MamlError: if OpenGL cannot start.
        EnvironmentFailed: if the environment raises an error.
    """
    with naming("reset", environment):
        observation, _ = environment.reset(seed=0)
    frames, total, every = [Frame(first_picture(environment), 0, 0.0)], 0.0, _steps_per_frame(environment)
    for time, noise in enumerate(distribution.noise(Stream(0).child("render"), horizon), start=1):
        policy_input = torch.cat([torch.as_tensor(observation, dtype=oracle_goal.dtype), oracle_goal])
        action = distribution.sample(model(params, policy_input.view(1, 1, -1)).flatten(), noise)
        with naming(f"step {time} of an episode", environment):
            observation, reward, terminated, truncated, _ = environment.step(action.numpy())
        total += float(reward)
        over = terminated or truncated
        if over or time % every == 0:
            with naming(f"render, after step {time} of an episode", environment):
                pixels = environment.render()
            frames.append(Frame(as_picture(pixels, environment), time, total))
        if over:
            break
    return frames


def first_picture(environment: gymnasium.Env) -> Image.Image:
    """Takes the first picture, which starts OpenGL if the environment needs it.

    Raises:
        MamlError: if OpenGL cannot start, a package is missing, or the environment returns no picture.
        EnvironmentFailed: if the environment itself raises an error.
    """
    try:
        pixels = environment.render()
    except gymnasium.error.DependencyNotInstalled as error:  # it says which package is missing
        raise MamlError(f"{_name(environment)} cannot be drawn: {error}") from error
    except Exception as error:  # each OpenGL backend raises other exceptions
        if not _is_of_opengl(error):
            raise _failed("render", environment, error) from error
        raise MamlError(
            f"{_name(environment)} cannot be drawn, because OpenGL does not start with "
            f"MUJOCO_GL={os.environ.get('MUJOCO_GL', '')} ({type(error).__name__}: {error}). Without a display, "
            "MUJOCO_GL=egl works with Debian's packages libegl1 and libgl1-mesa-dri, MUJOCO_GL=osmesa with libosmesa6"
        ) from error
    return as_picture(pixels, environment)


def _is_of_opengl(error: Exception) -> bool:
    """Returns whether an error comes from a package that draws with OpenGL."""
    modules = {str(frame.f_globals.get("__name__")) for frame, _ in traceback.walk_tb(error.__traceback__)}
    return any(re.match(r"(mujoco|OpenGL|glfw|gymnasium\.envs\.mujoco)\b", module) for module in modules)


def as_picture(pixels: Any, environment: gymnasium.Env) -> Image.Image:
    """Converts what `render` returns.

    Raises:
        MamlError: if it is no picture.
    """
    is_array = isinstance(pixels, np.ndarray)
    if not is_array or pixels.dtype != np.uint8 or pixels.shape[2:] not in ((), (3,), (4,)) or pixels.ndim < 2:
        what = f"{pixels.dtype} {pixels.shape}" if is_array else type(pixels).__name__
        raise MamlError(
            f"{_name(environment)}.render returns {what} instead of a picture, uint8 (height, width, 3); mend it"
        )
    return Image.fromarray(pixels).convert("RGB")


@contextmanager
def naming(where: str, environment: gymnasium.Env) -> Iterator[None]:
    """Names the environment and the place of an error that it raises.

    Raises:
        EnvironmentFailed: if it raises one.
    """
    try:
        yield
    except Exception as error:  # a user's environment may raise anything
        raise _failed(where, environment, error) from error


def _failed(where: str, environment: gymnasium.Env, error: Exception) -> EnvironmentFailed:
    return EnvironmentFailed(f"{_name(environment)} fails in {where}: {cause(error)} ({place(error)}); mend it")


def _name(environment: gymnasium.Env) -> str:
    return type(environment.unwrapped).__name__


def _steps_per_frame(environment: gymnasium.Env) -> int:
    """Returns the number of environment steps between two pictures."""
    return ceil(_fps(environment) / _MAX_FPS)


def _fps(environment: gymnasium.Env) -> int:
    """Returns the number of steps per second; an environment need not say it."""
    return environment.metadata.get("render_fps", _MAX_FPS)


def caption(episode: Episode) -> str:
    """Returns the caption of an episode's panel."""
    plural = "" if episode.num_steps == 1 else "s"
    return f"after {episode.num_steps} gradient step{plural}" if episode.num_steps else "before adaptation"


def save(path: Path, heading: str, episodes: Sequence[Episode]) -> None:
    """Writes the GIF, in real time and as an endless loop; a shorter episode shows its last picture until the end.

    Raises:
        MamlError: if the file cannot be written.
    """
    longest = max(len(episode.frames) for episode in episodes)
    pages = [
        draw(heading, [(caption(e), e.frames[min(number, len(e.frames) - 1)]) for e in episodes])
        for number in range(longest)
    ]
    durations = [round(1000 * episodes[0].seconds)] * (longest - 1) + [1500]  # milliseconds; the last picture is held
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        pages[0].save(path, "GIF", save_all=True, append_images=pages[1:], duration=durations, loop=0)
    except OSError as error:
        raise MamlError(f"{path} cannot be written ({error.strerror}); name another file with --output") from error


def draw(heading: str, panels: Sequence[tuple[str, Frame]]) -> Image.Image:
    """Draws pictures with captions side by side, below a heading."""
    font = ImageFont.load_default(14)
    pictures = [
        frame.picture.resize((frame.picture.width * _PANEL_HEIGHT // frame.picture.height, _PANEL_HEIGHT))
        for _, frame in panels
    ]
    width = sum(picture.width + _MARGIN for picture in pictures) + _MARGIN
    width = max(width, ceil(font.getlength(heading)) + 2 * _MARGIN)
    page = Image.new("RGB", (width, _PANEL_HEIGHT + 3 * _LINE_HEIGHT + 3 * _MARGIN), "gainsboro")
    pen = ImageDraw.Draw(page)
    pen.text((_MARGIN, _MARGIN), heading, "black", font)
    left, top = _MARGIN, _MARGIN + _LINE_HEIGHT
    for picture, (title, frame) in zip(pictures, panels, strict=True):
        page.paste(picture, (left, top))
        below = top + _PANEL_HEIGHT + _MARGIN // 2
        pen.text((left, below), title, "black", font)
        state = f"step {frame.time}, return {frame.total_reward:.1f}"
        pen.text((left, below + _LINE_HEIGHT), state, "black", font)
        left += picture.width + _MARGIN
    return page


def mirror(settings: Settings, algorithm: str, run: RunFolder, path: Path) -> None:
    """Sends the picture, together with the report, to the service of the config's logger."""
    logger: Logger = build(settings.logger)
    report = run.finished_report()
    if report is not None:
        config = described(settings.as_dict(), run.training_config, algorithm)
        logger.start(run.path, run.experiment, run.run_id, config, resumed=True)
        logger.report(report, {path.stem: path})
        logger.finish("finished")
    elif isinstance(logger, Mirror):
        LOG.warning(
            "%s has no report yet, so %s does not show its picture; run this again when training is complete",
            run.path,
            logger.name,
        )


if __name__ == "__main__":
    exit_with(main)
