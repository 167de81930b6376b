"""Half-cheetah and ant against MuJoCo's own fields, Gymnasium's environments, and the formulas of the rewards."""

from __future__ import annotations

import inspect
import os
import pickle
import subprocess
import sys
import warnings
from importlib.resources import files
from typing import Any

import gymnasium
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env

import maml.environment
from maml.environment.locomotion import AntDirection, AntVelocity, CheetahDirection, CheetahVelocity, Locomotion
from maml.errors import MamlError

mujoco = pytest.importorskip("mujoco")
pytestmark = pytest.mark.usefixtures("no_files_are_written")

KINDS = [CheetahVelocity, CheetahDirection, AntVelocity, AntDirection]
GOALS: dict[type[Locomotion], tuple[str, Any]] = {
    CheetahVelocity: ("goal_velocity", 1.3),
    CheetahDirection: ("goal_direction", -1),
    AntVelocity: ("goal_velocity", 0.4),
    AntDirection: ("goal_direction", -1),
}
PHYSICS = ["paper", "gymnasium"]
each_kind = pytest.mark.parametrize("kind", KINDS)
each_physics = pytest.mark.parametrize("physics", PHYSICS)


def build(kind: type[Locomotion], **arguments: Any) -> Locomotion:
    name, goal = GOALS[kind]
    return kind(**{name: goal, **arguments})


def make_registered(kind: type[Locomotion], **arguments: Any) -> gymnasium.Env:
    name, goal = GOALS[kind]
    return gymnasium.make(f"maml/{kind.__name__}-v0", **{name: goal, **arguments})


def actions(environment: Locomotion, count: int, seed: int = 0) -> np.ndarray:
    size = environment.action_space.shape[0]  # type: ignore[index]
    return np.random.default_rng(seed).standard_normal((count, size)).astype(np.float32)


def reference_simulation(kind: type[Locomotion]) -> tuple[Any, Any]:
    """Returns the paper's physics, made by editing Gymnasium's xml, at rest in its starting pose."""
    name = "half_cheetah" if "Cheetah" in kind.__name__ else "ant"
    text = (files("gymnasium") / f"envs/mujoco/assets/{name}.xml").read_text()
    if name == "ant":
        text = text.replace('timestep="0.01"', 'timestep="0.02"')
        text = text.replace("<geom conaffinity", '<geom solimp=".8 .8 .01" solref=".02 1" conaffinity', 1)
    model = mujoco.MjModel.from_xml_string(text)
    model.opt.disableflags |= mujoco.mjtDisableBit.mjDSBL_WARMSTART
    data = mujoco.MjData(model)
    if name == "ant":
        data.qpos[:] = [0, 0, 0.55, 1, 0, 0, 0, 0, 1, 0, -1, 0, -1, 0, 1]
    return model, data


def refresh(model: Any, data: Any) -> None:
    mujoco.mj_forward(model, data)
    mujoco.mj_subtreeVel(model, data)
    mujoco.mj_rnePostConstraint(model, data)


@each_kind
@each_physics
def test_gymnasiums_checker_has_nothing_to_say(kind: type[Locomotion], physics: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_env(make_registered(kind, physics=physics).unwrapped, skip_render_check=True)


def test_pictures_pass_the_checker_and_show_something(tmp_path_factory: pytest.TempPathFactory) -> None:
    # A process chooses its OpenGL library only once, so rendering needs its own process.
    script = """
import gymnasium, maml.environment, warnings
from gymnasium.utils.env_checker import check_env
environment = gymnasium.make("maml/AntVelocity-v0", goal_velocity=1.0, render_mode="rgb_array")
environment.reset(seed=0)
try:
    picture = environment.render()
except Exception:
    print("no OpenGL")
else:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_env(environment.unwrapped)
    print(picture.shape, picture.dtype, picture.std() > 10)
environment.close()
"""
    run = subprocess.run(
        [sys.executable, "-c", script], env={**os.environ, "MUJOCO_GL": "egl"}, capture_output=True, text=True
    )
    if "no OpenGL" in run.stdout:
        pytest.skip("no EGL on this machine")
    assert run.stdout.strip() == "(480, 640, 3) uint8 True", run.stderr


@each_kind
def test_ids_end_after_200_steps(kind: type[Locomotion]) -> None:
    environment = make_registered(kind)
    environment.reset(seed=0)
    assert isinstance(environment.unwrapped, kind)
    truncated = [environment.step(np.zeros(environment.action_space.shape, np.float32))[3] for _ in range(200)]
    assert truncated == [False] * 199 + [True]


@each_kind
def test_docstrings_have_gymnasiums_sections(kind: type[Locomotion]) -> None:
    sections = [line[3:] for line in (inspect.getdoc(kind) or "").splitlines() if line.startswith("## ")]
    assert sections == [
        "Description",
        "Action Space",
        "Observation Space",
        "Rewards",
        "Starting State",
        "Episode End",
        "Arguments",
        "Version History",
    ]


@each_kind
@each_physics
def test_pickling_keeps_the_state(kind: type[Locomotion], physics: str) -> None:
    environment = build(kind, physics=physics)
    environment.reset(seed=3)
    taken = actions(environment, 10)
    for action in taken[:5]:
        environment.step(action)
    copy = pickle.loads(pickle.dumps(environment))
    for action in taken[5:]:
        ours, theirs = environment.step(action), copy.step(action)
        assert np.array_equal(ours[0], theirs[0])
        assert ours[1:] == theirs[1:]
    assert np.array_equal(environment.reset()[0], copy.reset()[0])


@each_kind
@each_physics
def test_seed_decides_the_start(kind: type[Locomotion], physics: str) -> None:
    environment, other = build(kind, physics=physics), build(kind, physics=physics)
    first, second = environment.reset(seed=1)[0], environment.reset()[0]
    assert np.array_equal(first, other.reset(seed=1)[0])
    assert np.array_equal(second, other.reset()[0])
    assert not np.array_equal(first, second)
    assert not np.array_equal(first, other.reset(seed=2)[0])


@pytest.mark.parametrize(("physics", "deviation"), [("paper", 0.01), ("gymnasium", 0.1 / 3**0.5)])
@pytest.mark.parametrize("kind", [CheetahVelocity, AntVelocity])
def test_start_is_the_pose_and_noise(kind: type[Locomotion], physics: str, deviation: float) -> None:
    environment = build(kind, physics=physics)
    pose = reference_simulation(kind)[1].qpos.copy()
    if physics == "gymnasium" and kind is AntVelocity:
        pose = environment.model.qpos0
        assert pose[2] == 0.75
    numbers = environment.model.nq + environment.model.nv
    environment.reset(options={"noise": np.zeros(numbers)})
    assert np.array_equal(environment.data.qpos, pose)
    assert not environment.data.qvel.any()
    starts = []
    for seed in range(300):
        environment.reset(seed=seed)
        starts.append(np.concatenate([environment.data.qpos - pose, environment.data.qvel]))
    positions, velocities = np.split(np.array(starts), [environment.model.nq], axis=1)
    assert positions.std() == pytest.approx(deviation, rel=0.05)
    assert velocities.std() == pytest.approx(0.1, rel=0.05)
    assert np.abs(positions).max() > 3 * deviation if physics == "paper" else np.abs(positions).max() <= 0.1


def test_ant_stands_at_055_and_has_gymnasiums_masses() -> None:
    environment = AntVelocity(1.0)
    environment.reset(options={"noise": np.zeros(29)})
    assert environment.data.qpos[2] == 0.55
    gymnasium_model = mujoco.MjModel.from_xml_path(str(files("gymnasium") / "envs/mujoco/assets/ant.xml"))
    for fact in ("body_mass", "body_inertia", "actuator_gear", "jnt_range", "dof_armature"):
        assert np.array_equal(getattr(environment.model, fact), getattr(gymnasium_model, fact)), fact
    assert environment.model.opt.timestep == 0.02
    assert environment.model.opt.integrator == mujoco.mjtIntegrator.mjINT_RK4


def test_cheetah_has_gymnasiums_masses() -> None:
    model = CheetahVelocity(1.0).model
    reference_model = reference_simulation(CheetahVelocity)[0]
    assert model.body_mass.sum() == pytest.approx(14)
    assert model.stat.meaninertia == reference_model.stat.meaninertia  # meaninertia scales the solver's tolerance
    for fact in ("body_mass", "body_inertia", "actuator_gear", "jnt_range", "dof_damping"):
        assert np.array_equal(getattr(model, fact), getattr(reference_model, fact)), fact


@each_kind
def test_papers_physics_is_that_of_a_model_made_by_hand(kind: type[Locomotion]) -> None:
    environment = build(kind)
    model, data = reference_simulation(kind)
    noise = np.random.default_rng(1).standard_normal(model.nq + model.nv)
    data.qpos += 0.01 * noise[: model.nq]
    data.qvel += 0.1 * noise[model.nq :]
    mujoco.mj_forward(model, data)
    environment.reset(options={"noise": noise})
    goal = GOALS[kind][1]
    touched = 0.0
    for action in actions(environment, 60):
        control = np.clip(action.astype(float), -1, 1)
        data.ctrl[:] = control
        mujoco.mj_step(model, data)
        refresh(model, data)
        velocity = data.subtree_linvel[1, 0]
        progress = -abs(velocity - goal) if "Velocity" in kind.__name__ else goal * velocity
        if "Cheetah" in kind.__name__:
            seen = [data.qpos[1:9], data.qvel[:9], data.subtree_com[1]]
            expected = progress - 0.05 * np.sum(control**2)
        else:
            forces = np.clip(data.cfrc_ext, -1, 1)
            assert forces.shape == (14, 6)
            assert not forces[0].any()
            touched = max(touched, np.abs(forces).max())
            torso = [data.body("torso").xmat, data.subtree_com[1]]
            seen = [data.qpos, data.qvel, forces.ravel(), *torso]
            survival = 1.05 if "Velocity" in kind.__name__ else 0.05
            expected = progress + survival - 0.005 * np.sum(control**2) - 0.0005 * np.sum(forces**2)
        observation, reward, terminated, truncated, info = environment.step(action)
        assert observation.shape == ((20,) if "Cheetah" in kind.__name__ else (125,))
        assert np.array_equal(observation, np.concatenate(seen))
        assert reward == pytest.approx(expected, abs=1e-12)
        assert info == {"x_velocity": velocity, "unstable": False}
        assert not truncated
        assert terminated == ("Ant" in kind.__name__ and not 0.2 <= data.qpos[2] <= 1.0)
    assert touched == (1.0 if "Ant" in kind.__name__ else 0.0)


@each_kind
def test_velocity_is_the_momentum_of_all_bodies_over_their_mass(kind: type[Locomotion]) -> None:
    environment = build(kind)
    environment.reset(seed=0)
    model, data = environment.model, environment.data
    for action in actions(environment, 20):
        info = environment.step(action)[4]
        motion, momentum = np.zeros(6), 0.0
        for body in range(1, model.nbody):
            # In the inertial frame, the linear velocity is that of the body's centre of mass.
            mujoco.mj_objectVelocity(model, data, mujoco.mjtObj.mjOBJ_BODY, body, motion, 0)
            momentum += model.body_mass[body] * motion[3]
        assert info["x_velocity"] == pytest.approx(momentum / model.body_mass.sum(), abs=1e-12)


def test_gymnasiums_physics_is_half_cheetah_v5() -> None:
    gymnasium_env: Any = gymnasium.make("HalfCheetah-v5").unwrapped
    gymnasium_env.model.opt.disableflags |= mujoco.mjtDisableBit.mjDSBL_WARMSTART
    ours = {goal: CheetahDirection(goal, physics="gymnasium") for goal in (1, -1)}
    at_speed = CheetahVelocity(1.5, physics="gymnasium")
    gymnasium_env.reset(seed=0)
    noise = np.random.default_rng(0).uniform(-1, 1, 18)
    gymnasium_env.set_state(gymnasium_env.init_qpos + 0.1 * noise[:9], 0.1 * noise[9:])
    for environment in (*ours.values(), at_speed):
        environment.reset(options={"noise": noise})
    for action in np.clip(actions(at_speed, 100), -1, 1):
        seen, forward, _, _, info = gymnasium_env.step(action.astype(float))
        results = {goal: environment.step(action) for goal, environment in ours.items()}
        assert np.array_equal(results[1][0], seen)
        assert results[1][1] == pytest.approx(forward, abs=1e-12)
        assert results[-1][1] == pytest.approx(forward - 2 * info["x_velocity"], abs=1e-12)
        expected = -abs(info["x_velocity"] - 1.5) + info["reward_ctrl"]
        assert at_speed.step(action)[1] == pytest.approx(expected, abs=1e-12)


def test_gymnasiums_physics_is_ant_v5() -> None:
    gymnasium_env: Any = gymnasium.make("Ant-v5").unwrapped
    gymnasium_env.model.opt.disableflags |= mujoco.mjtDisableBit.mjDSBL_WARMSTART
    ours = AntVelocity(1.5, physics="gymnasium")
    gymnasium_env.reset(seed=0)
    noise = np.random.default_rng(0).uniform(-1, 1, 29)
    gymnasium_env.set_state(gymnasium_env.init_qpos + 0.1 * noise[:15], 0.1 * noise[15:])
    ours.reset(options={"noise": noise})
    ended = False
    for action in np.clip(actions(ours, 1000), -1, 1):
        start = gymnasium_env.data.qpos[0]
        seen, _, terminated, _, info = gymnasium_env.step(action.astype(float))
        refresh(gymnasium_env.model, gymnasium_env.data)  # Gymnasium's fields are from before the last substep
        forces = np.clip(gymnasium_env.data.cfrc_ext[1:], -1, 1).ravel()
        observation, reward, ended, _, _ = ours.step(action)
        assert observation.shape == seen.shape
        assert np.array_equal(observation, np.concatenate([seen[:27], forces]))
        assert ended == terminated
        velocity = (gymnasium_env.data.qpos[0] - start) / gymnasium_env.dt
        costs = 0.5 * np.sum(action.astype(float) ** 2) + 5e-4 * np.sum(forces**2)
        assert reward == pytest.approx(1 - abs(velocity - 1.5) + info["reward_survive"] - costs, abs=1e-12)
        if ended:
            assert info["reward_survive"] == 0
            break
    assert ended


@each_physics
@pytest.mark.parametrize(("height", "over"), [(0.15, True), (0.3, False), (0.9, False), (1.1, True)])
def test_ant_ends_when_it_is_too_low_or_too_high(physics: str, height: float, over: bool) -> None:
    environment = AntVelocity(1.0, physics=physics)  # type: ignore[arg-type]
    environment.reset(seed=0)
    environment.data.qpos[2] = height
    environment.data.qvel[:] = 0
    # Without contacts the floor does not push it up.
    environment.model.opt.disableflags |= mujoco.mjtDisableBit.mjDSBL_CONTACT
    _, reward, terminated, _, info = environment.step(np.zeros(8, np.float32))
    assert terminated == over
    assert not info["unstable"]
    assert reward != 0


@each_kind
@each_physics
@pytest.mark.parametrize("bad", [np.nan, 1e12, 1e300])
@pytest.mark.parametrize("part", ["qpos", "qvel"])
def test_blown_up_simulation_ends_the_episode(kind: type[Locomotion], physics: str, bad: float, part: str) -> None:
    environment = build(kind, physics=physics)
    environment.reset(seed=0)
    getattr(environment.data, part)[2] = bad
    observation, reward, terminated, truncated, info = environment.step(actions(environment, 1)[0])
    assert terminated
    assert not truncated
    assert info["unstable"]
    assert reward == 0
    assert not observation.any()
    observation, _ = environment.reset(seed=0)
    assert observation in environment.observation_space
    _, reward, terminated, _, info = environment.step(actions(environment, 1)[0])
    assert reward != 0
    assert not terminated
    assert not info["unstable"]


def test_accelerations_beyond_mujocos_limit_count_as_unstable() -> None:
    environment = CheetahVelocity(1.0)
    environment.reset(seed=0)
    environment.data.xfrc_applied[1, 0] = 1e12  # after one step the velocity is still within its limit
    _, _, terminated, _, info = environment.step(np.zeros(6, np.float32))
    assert np.abs(environment.data.qvel).max() < 1e10
    assert terminated
    assert info["unstable"]


@each_kind
def test_actions_beyond_the_motors_are_clipped(kind: type[Locomotion]) -> None:
    small, large = build(kind), build(kind)
    small.reset(seed=0)
    large.reset(seed=0)
    signs = np.sign(actions(small, 1)[0])
    ours, theirs = small.step(signs), large.step(7 * signs)
    assert np.array_equal(ours[0], theirs[0])
    assert ours[1] == theirs[1]


def test_nan_action_says_so() -> None:
    environment = CheetahVelocity(1.0)
    environment.reset(seed=0)
    with pytest.raises(MamlError, match="an action is NaN"):
        environment.step(np.full(6, np.nan, np.float32))


@pytest.mark.parametrize("action", [np.zeros(5, np.float32), np.zeros((1, 6), np.float32), np.float32(0)])
def test_action_of_another_shape_says_so(action: np.ndarray) -> None:
    with pytest.raises(MamlError, match="give 6 numbers"):
        CheetahVelocity(1.0).step(action)


@pytest.mark.parametrize(
    ("kind", "arguments", "message"),
    [
        (CheetahVelocity, {"goal_velocity": np.inf}, "a goal of inf cannot be reached"),
        (CheetahDirection, {"goal_direction": 0}, "goal_direction=0 is neither"),
        (AntDirection, {"goal_direction": 0.5}, "goal_direction=0.5 is neither"),
        (AntVelocity, {"goal_velocity": 1.0, "physics": "rllab"}, "physics='rllab' is unknown"),
        (AntVelocity, {"goal_velocity": 1.0, "render_mode": "human"}, "render_mode='human' is unknown"),
    ],
)
def test_unusable_argument_says_so(kind: type[Locomotion], arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(MamlError, match=message):
        kind(**arguments)


def test_missing_mujoco_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "mujoco", None)
    with pytest.raises(MamlError, match=r"pip install 'maml\[mujoco\]'"):
        CheetahVelocity(1.0)


def test_importing_the_environments_leaves_mujoco_alone() -> None:
    script = "import sys, maml.environment, maml.environment.mujoco_batch; print('mujoco' in sys.modules)"
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "False"
    assert maml.environment.__doc__
