"""Locomotion (section 5.3): MuJoCo's half-cheetah and ant, told by the reward alone how fast or which way to run."""

from __future__ import annotations

from importlib.resources import files
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple
from warnings import catch_warnings, simplefilter

import gymnasium
import numpy as np
from gymnasium.spaces import Box
from numpy.typing import ArrayLike, NDArray

from maml.errors import MamlError, Unavailable

if TYPE_CHECKING:  # an extra, which `import maml.environment` does without
    import mujoco

Physics = Literal["paper", "gymnasium"]

_LARGEST = 1e10  # largest absolute number in a stable state: MuJoCo's own limit (mjMAXVAL)
_TORSO = 1  # the first body under the world, so that its subtree is the whole robot
_BLOWN_UP = slice(3, 6)  # MuJoCo's warnings of bad positions, velocities and accelerations
_HEALTHY_HEIGHT = (0.2, 1.0)  # range of the height of the ant's torso, in metres


class Outcome(NamedTuple):
    """The result of a step, for one simulation or, with a leading axis, for several."""

    observation: NDArray[np.float64]
    reward: NDArray[np.float64]
    terminated: NDArray[np.bool_]
    unstable: NDArray[np.bool_]
    velocity: NDArray[np.float64]


class Locomotion(gymnasium.Env[NDArray[np.float64], NDArray[np.float32]]):
    """A robot that moves along x; see the four environments below.

    The result of a step depends on positions, velocities and action only (the solver starts cold). Rewards and
    observations are functions of an ``MjData``, or of an object that has its fields with leading axes. So one
    simulation and many (`maml.environment.mujoco_batch`) share them.

    Args:
        goal: velocity or direction.
        physics: decides the time step, observations, rewards and starting states.
        render_mode: None or ``"rgb_array"``.

    Attributes:
        goal: the goal; `progress` computes the reward for it.
        model: the simulated robot.
        data: the robot's present state.
        duration: duration of a step, in seconds.

    Raises:
        MamlError: if MuJoCo is missing, or an argument is unusable.
    """

    metadata = {"render_modes": ["rgb_array"]}

    # Facts of a robot, for either physics:
    model_file: ClassVar[str]  # among Gymnasium's
    fields: ClassVar[tuple[str, ...]]  # fields of MjData that observations and rewards use
    control_weight: ClassVar[dict[Physics, float]]

    def __init__(self, goal: float, physics: Physics = "paper", render_mode: str | None = None) -> None:
        if physics not in ("paper", "gymnasium"):
            raise MamlError(f"physics={physics!r} is unknown; give 'paper' or 'gymnasium'")
        if render_mode not in (None, "rgb_array"):
            raise MamlError(f"render_mode={render_mode!r} is unknown; give 'rgb_array', or None for no pictures")
        if not np.isfinite(goal):
            raise MamlError(f"a goal of {goal} cannot be reached; give a finite number")
        try:
            import mujoco
        except ImportError as error:
            raise Unavailable(
                "half-cheetah and ant are simulated by MuJoCo, which is not installed; "
                "install the extra, `pip install 'maml[mujoco]'`"
            ) from error
        self.goal = goal
        self.physics: Physics = physics
        self.render_mode = render_mode
        self.model = self._build_model()
        self.data = mujoco.MjData(self.model)
        mujoco.mj_forward(self.model, self.data)
        self.frame_skip = 1 if physics == "paper" else 5
        self.duration = self.model.opt.timestep * self.frame_skip
        self.metadata = {**self.metadata, "render_fps": round(1 / self.duration)}
        self.action_space = Box(-1.0, 1.0, (self.model.nu,), np.float32)
        self.observation_space = Box(-_LARGEST, _LARGEST, self.observe(self.data).shape, np.float64)
        self._renderer: Any = None

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[NDArray[np.float64], dict[str, Any]]:
        """Starts an episode.

        Args:
            seed: seed of the generator from which this and later resets draw.
            options: ``{"noise": numbers}`` uses these numbers instead of a draw; see `place`.
        """
        import mujoco

        super().reset(seed=seed)
        noise = (options or {}).get("noise")
        if noise is None:
            num_positions, num_velocities = self.model.nq, self.model.nv
            positions = (
                self.np_random.standard_normal(num_positions)
                if self.physics == "paper"
                else self.np_random.uniform(-1.0, 1.0, num_positions)
            )
            noise = np.concatenate([positions, self.np_random.standard_normal(num_velocities)])
        mujoco.mj_resetData(self.model, self.data)
        self.place(self.data, noise)
        mujoco.mj_forward(self.model, self.data)
        return self.observe(self.data), {}

    def step(self, action: NDArray[np.float32]) -> tuple[NDArray[np.float64], float, bool, bool, dict[str, Any]]:
        import mujoco

        if np.shape(action) != self.action_space.shape:
            raise MamlError(f"action {action} does not move this robot; give {self.model.nu} numbers")
        control = self.control(action)
        start = self.data.qpos[0]
        self.data.ctrl[:] = control
        mujoco.mj_step(self.model, self.data, self.frame_skip)
        # After a step, the state is new, but forces and centres of mass are old; the authors' code updates them too.
        mujoco.mj_forward(self.model, self.data)
        outcome = self.outcome(self.data, self.data.warning.number, control, start, self.goal)
        info = {"x_velocity": float(outcome.velocity), "unstable": bool(outcome.unstable)}
        return outcome.observation, float(outcome.reward), bool(outcome.terminated), False, info

    def render(self) -> NDArray[np.uint8] | None:
        """Returns a picture, ``(height, width, 3)``; None without a render mode."""
        if self.render_mode is None:
            return None
        if self._renderer is None:
            from gymnasium.envs.mujoco.mujoco_rendering import MujocoRenderer  # needs OpenGL

            screen = self.model.vis.global_
            camera = {"type": 1, "trackbodyid": _TORSO, "distance": 4.0}  # 1: follows a body
            self._renderer = MujocoRenderer(self.model, self.data, camera, screen.offwidth, screen.offheight)
        return self._renderer.render(self.render_mode)

    def close(self) -> None:
        if self._renderer is not None:
            self._renderer.close()
            self._renderer = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_renderer": None}  # a window into OpenGL; the copy opens its own

    # The methods below serve one simulation and many; "..." is one leading axis, or none.

    def control(self, action: ArrayLike) -> NDArray[np.float64]:
        """Clips actions, ``(..., A)``, to the range of the motors.

        Raises:
            MamlError: if the policy has diverged.
        """
        control = np.clip(np.asarray(action, np.float64), -1.0, 1.0)
        if np.isnan(control).any():
            raise MamlError("an action is NaN: the policy that gave it has diverged; a smaller step size may help")
        return control

    def place(self, data: Any, noise: ArrayLike) -> None:
        """Sets the start of an episode.

        Args:
            data: an ``MjData``, or a batch of simulations.
            noise: unscaled noise of the positions, then of the velocities, ``(..., nq + nv)``. It is normal; for
                positions in Gymnasium's physics, it is uniform in [-1, 1].
        """
        positions, velocities = np.split(np.asarray(noise, np.float64), [self.model.nq], axis=-1)
        data.qpos[:] = self._pose() + (0.01 if self.physics == "paper" else 0.1) * positions
        data.qvel[:] = 0.1 * velocities

    def observe(self, data: Any) -> NDArray[np.float64]:
        """Returns the observations ``(..., O)`` of simulations, as a copy."""
        raise NotImplementedError

    @np.errstate(invalid="ignore", over="ignore")
    def outcome(
        self, data: Any, warnings: NDArray[np.int32], control: NDArray[np.float64], start: Any, goal: Any
    ) -> Outcome:
        """Computes the result of a step.

        Args:
            data: simulations after the step; see `observe`.
            warnings: number of MuJoCo's warnings of each kind since the reset, ``(..., 7)``.
            control: the actions as `control` returned them, ``(..., A)``.
            start: x of the root before the step, ``(...,)``.
            goal: each simulation's goal, ``(...,)``.
        """
        observation = self.observe(data)
        velocity = (
            data.subtree_linvel[..., _TORSO, 0]
            if self.physics == "paper"
            else (data.qpos[..., 0] - start) / self.duration
        )
        # Departure: the paper names neither this cost nor, in `_bonus`, those of contact and the reward of survival.
        cost = self.control_weight[self.physics] * np.square(control).sum(-1)
        reward = self.progress(velocity, goal) - cost + self._bonus(data)
        # A NaN fails the comparison.
        stable = (np.abs(observation) <= _LARGEST).all(-1) & (np.abs(reward) <= _LARGEST)
        unstable = ~stable | (warnings[..., _BLOWN_UP] > 0).any(-1)
        return Outcome(
            observation=np.where(unstable[..., None], 0.0, observation),
            reward=np.where(unstable, 0.0, reward),
            terminated=unstable | ~self._is_healthy(data),
            unstable=unstable,
            velocity=velocity,
        )

    def progress(self, velocity: Any, goal: Any) -> Any:
        """Returns the part of the reward that depends on the goal, ``(...,)``."""
        raise NotImplementedError

    def _pose(self) -> NDArray[np.float64]:
        return self.model.qpos0

    def _bonus(self, data: Any) -> Any:
        return 0.0

    def _is_healthy(self, data: Any) -> Any:
        return np.ones(data.qpos.shape[:-1], bool)

    def _edit(self, spec: mujoco.MjSpec) -> None:
        """Changes Gymnasium's model to that of ``physics``."""

    def _build_model(self) -> mujoco.MjModel:
        import mujoco

        # Blow-ups are reported by `outcome`; MuJoCo would also note them in a file in the working directory.
        log = mujoco.MjLogConfig.get()
        log.logto_file = False
        log.set()

        spec = mujoco.MjSpec.from_file(str(files("gymnasium") / "envs/mujoco/assets" / self.model_file))
        self._edit(spec)
        # Without warm starts, a step depends on the state only. Without automatic resets, an unstable simulation stays
        # as it is instead of continuing from the default pose.
        flags = mujoco.mjtDisableBit
        spec.option.disableflags |= flags.mjDSBL_WARMSTART | flags.mjDSBL_AUTORESET
        # MuJoCo leaves out velocities of subtrees and external forces unless a sensor needs them.
        sensors = [mujoco.mjtSensor.mjSENS_SUBTREELINVEL]
        if "cfrc_ext" in self.fields:
            sensors.append(mujoco.mjtSensor.mjSENS_FRAMELINACC)
        for sensor in sensors:
            spec.add_sensor(type=sensor, objtype=mujoco.mjtObj.mjOBJ_BODY, objname="torso")
        with catch_warnings():
            simplefilter("ignore")  # the cheetah's settotalmass is deprecated
            return spec.compile()


class Cheetah(Locomotion):
    """The half-cheetah, without a reward; see `CheetahVelocity`."""

    model_file = "half_cheetah.xml"
    fields = ("qpos", "qvel", "subtree_com", "subtree_linvel")
    control_weight = {"paper": 0.05, "gymnasium": 0.1}

    def observe(self, data: Any) -> NDArray[np.float64]:
        seen = [data.qpos[..., 1:], data.qvel]
        if self.physics == "paper":
            seen.append(data.subtree_com[..., _TORSO, :])
        return np.concatenate(seen, -1)


class Ant(Locomotion):
    """The ant, without a reward; see `AntVelocity`."""

    model_file = "ant.xml"
    fields = ("qpos", "qvel", "subtree_com", "subtree_linvel", "xmat", "cfrc_ext")
    control_weight = {"paper": 0.005, "gymnasium": 0.5}

    def observe(self, data: Any) -> NDArray[np.float64]:
        forces = _contact_forces(data)
        if self.physics == "gymnasium":
            return np.concatenate([data.qpos[..., 2:], data.qvel, forces[..., 6:]], -1)
        pose = [data.xmat[..., _TORSO, :], data.subtree_com[..., _TORSO, :]]
        return np.concatenate([data.qpos, data.qvel, forces, *pose], -1)

    def _pose(self) -> NDArray[np.float64]:
        return self.model.numeric("init_qpos").data if self.physics == "paper" else self.model.qpos0

    def _bonus(self, data: Any) -> Any:
        survival = 0.05 if self.physics == "paper" else 1.0 * self._is_healthy(data)
        return survival - 5e-4 * np.square(_contact_forces(data)).sum(-1)

    def _is_healthy(self, data: Any) -> Any:
        lowest, highest = _HEALTHY_HEIGHT
        return (data.qpos[..., 2] >= lowest) & (data.qpos[..., 2] <= highest)

    def _edit(self, spec: mujoco.MjSpec) -> None:
        if self.physics == "paper":
            spec.option.timestep = 0.02
            for geom in spec.geoms:
                geom.solimp[:3] = [0.8, 0.8, 0.01]
                geom.solref = [0.02, 1.0]


def _contact_forces(data: Any) -> NDArray[np.float64]:
    """Returns the clipped external forces on each body, ``(..., 6 * bodies)``; the world is first and always zero."""
    return np.clip(data.cfrc_ext, -1.0, 1.0).reshape(*data.qpos.shape[:-1], -1)


def _check_direction(direction: float) -> float:
    if direction not in (1, -1):
        raise MamlError(f"goal_direction={direction} is neither forward nor backward; give 1 or -1")
    return direction


class CheetahVelocity(Cheetah):
    """A half-cheetah that runs at one goal velocity (section 5.3 of Finn, Abbeel, Levine 2017).

    ## Description

    A planar robot of a torso with a head, and two legs of three joints. It does not observe the velocity that it should
    run at: it has to learn it from the rewards. The paper draws it uniformly from [0, 2] m/s.

    There are two kinds of physics, on the same model of Gymnasium's. `"paper"` is that of the paper's code: steps of
    0.01 s, and velocities of the centre of mass. `"gymnasium"` is that of `HalfCheetah-v5`, steps of 0.05 s, but for
    the reward.

    ## Action Space

    `Box(-1, 1, (6,), float32)`: torques, as fractions of what each motor can do; larger actions are clipped.

    | Num | Action                       | Min | Max | Torque at 1 |
    | --- | ---------------------------- | --- | --- | ----------- |
    | 0   | torque on the back thigh     | -1  | 1   | 120 N m     |
    | 1   | torque on the back shin      | -1  | 1   | 90 N m      |
    | 2   | torque on the back foot      | -1  | 1   | 60 N m      |
    | 3   | torque on the front thigh    | -1  | 1   | 120 N m     |
    | 4   | torque on the front shin     | -1  | 1   | 60 N m      |
    | 5   | torque on the front foot     | -1  | 1   | 30 N m      |

    ## Observation Space

    `Box(-1e10, 1e10, (20,), float64)`, and of `(17,)` for Gymnasium's physics; beyond these bounds a simulation counts
    as unstable.

    | Num   | Observation                                             | Unit       |
    | ----- | ------------------------------------------------------- | ---------- |
    | 0     | height of the root, from where it started               | m          |
    | 1     | pitch of the root                                       | rad        |
    | 2-7   | joint angles, in the order of the actions               | rad        |
    | 8-9   | velocity of the root in x and z                         | m/s        |
    | 10    | pitch velocity of the root                              | rad/s      |
    | 11-16 | joint velocities, in the order of the actions           | rad/s      |
    | 17-19 | centre of mass of the robot, x, y, z (paper only)       | m          |

    ## Rewards

    `-abs(velocity - goal_velocity) - weight * sum(action**2)`, of the clipped action. The paper's physics takes the
    velocity in x of the robot's centre of mass after the step, and a weight of 0.05; Gymnasium's the distance that the
    root came in x, over the duration of the step, and 0.1.

    ## Starting State

    The model's default pose, at rest, with noise: positions 0.01 times normal numbers (Gymnasium's physics: 0.1 times
    uniform numbers in [-1, 1]), velocities 0.1 times normal numbers. `reset(options={"noise": numbers})` starts from
    the 18 numbers given, positions first.

    ## Episode End

    Made by its id, the episode is truncated after 200 steps. It terminates only if the simulation blows up; the
    observation and the reward of that step are zero, and `info["unstable"]` is true.

    ## Arguments

    * `goal_velocity`: in m/s; `gymnasium.make("maml/CheetahVelocity-v0", goal_velocity=1.5)`.
    * `physics`: `"paper"` or `"gymnasium"`.
    * `render_mode`: `"rgb_array"`, or None. Where there is no display, set the environment variable `MUJOCO_GL=egl`.

    An action that is NaN or of another shape, and an argument that is unusable, raise a `MamlError`.

    ## Version History

    * v0: first version.
    """

    def __init__(self, goal_velocity: float, physics: Physics = "paper", render_mode: str | None = None) -> None:
        super().__init__(goal_velocity, physics, render_mode)

    def progress(self, velocity: Any, goal: Any) -> Any:
        return -np.abs(velocity - goal)


class CheetahDirection(Cheetah):
    """A half-cheetah that runs forward, or backward, as fast as it can (section 5.3 of Finn et al. 2017).

    ## Description

    The robot of `CheetahVelocity`. It does not observe which way it should run; the paper draws either way.

    ## Action Space

    That of `CheetahVelocity`: `Box(-1, 1, (6,), float32)`.

    ## Observation Space

    That of `CheetahVelocity`: `Box(-1e10, 1e10, (20,), float64)`, and of `(17,)` for Gymnasium's physics.

    ## Rewards

    `goal_direction * velocity - weight * sum(action**2)`, with the velocity and weights of `CheetahVelocity`.

    ## Starting State

    That of `CheetahVelocity`.

    ## Episode End

    That of `CheetahVelocity`.

    ## Arguments

    * `goal_direction`: 1 or -1; `gymnasium.make("maml/CheetahDirection-v0", goal_direction=-1)`.
    * `physics` and `render_mode`: those of `CheetahVelocity`.

    ## Version History

    * v0: first version.
    """

    def __init__(self, goal_direction: float, physics: Physics = "paper", render_mode: str | None = None) -> None:
        super().__init__(_check_direction(goal_direction), physics, render_mode)

    def progress(self, velocity: Any, goal: Any) -> Any:
        return goal * velocity


class AntVelocity(Ant):
    """A four-legged robot that runs at one goal velocity (section 5.3 of Finn, Abbeel, Levine 2017).

    ## Description

    A torso with four legs of two joints. It does not observe the velocity that it should run at: it has to learn it
    from the rewards. The paper draws it uniformly from [0, 3] m/s.

    There are two kinds of physics. `"paper"` is that of the paper's code: steps of 0.02 s, softer contacts, and
    velocities of the centre of mass. `"gymnasium"` is that of `Ant-v5`, steps of 0.05 s, but for the reward, and for
    contact forces, which are those at the end of a step instead of a little before.

    ## Action Space

    `Box(-1, 1, (8,), float32)`: torques, as fractions of 150 N m; larger actions are clipped.

    | Num | Action                                | Min | Max |
    | --- | ------------------------------------- | --- | --- |
    | 0   | torque on the back right hip          | -1  | 1   |
    | 1   | torque on the back right ankle        | -1  | 1   |
    | 2   | torque on the front left hip          | -1  | 1   |
    | 3   | torque on the front left ankle        | -1  | 1   |
    | 4   | torque on the front right hip         | -1  | 1   |
    | 5   | torque on the front right ankle       | -1  | 1   |
    | 6   | torque on the back left hip           | -1  | 1   |
    | 7   | torque on the back left ankle         | -1  | 1   |

    ## Observation Space

    `Box(-1e10, 1e10, (125,), float64)`; beyond these bounds a simulation counts as unstable.

    | Num     | Observation                                                      | Unit       |
    | ------- | ---------------------------------------------------------------- | ---------- |
    | 0-2     | place of the torso, x, y, z                                      | m          |
    | 3-6     | orientation of the torso, a quaternion                           |            |
    | 7-14    | angles of hip and ankle, front left, front right, back left and right | rad   |
    | 15-17   | velocity of the torso in x, y, z                                 | m/s        |
    | 18-20   | angular velocity of the torso                                    | rad/s      |
    | 21-28   | joint velocities, in the order of the angles                     | rad/s      |
    | 29-112  | torque and force from outside on each of 14 bodies, the world's (zero) first, clipped to [-1, 1] | |
    | 113-121 | orientation of the torso, a rotation matrix, row by row          |            |
    | 122-124 | centre of mass of the robot, x, y, z                             | m          |

    Gymnasium's physics leaves out 0, 1, 29-34 and everything from 113 on: 105 numbers.

    ## Rewards

    `1 - abs(velocity - goal_velocity) - weight * sum(action**2) - 0.0005 * sum(forces**2) + survival`, of the clipped
    action and the clipped forces. The paper's physics takes the velocity in x of the robot's centre of mass after the
    step, a weight of 0.005, and 0.05 for survival; Gymnasium's the distance that the torso came in x, over the duration
    of the step, 0.5, and 1 as long as the episode does not terminate.

    ## Starting State

    The torso 0.55 m high, legs half bent (Gymnasium's physics: 0.75 m, straight), at rest, with noise: positions 0.01
    times normal numbers (Gymnasium's physics: 0.1 times uniform numbers in [-1, 1]), velocities 0.1 times normal
    numbers. `reset(options={"noise": numbers})` starts from the 29 numbers given, positions first.

    ## Episode End

    The episode terminates when the torso is lower than 0.2 m or higher than 1 m. Made by its id, it is truncated after
    200 steps. It terminates, too, if the simulation blows up; the observation and the reward of that step are zero, and
    `info["unstable"]` is true.

    ## Arguments

    * `goal_velocity`: in m/s; `gymnasium.make("maml/AntVelocity-v0", goal_velocity=1.5)`.
    * `physics`: `"paper"` or `"gymnasium"`.
    * `render_mode`: `"rgb_array"`, or None. Where there is no display, set the environment variable `MUJOCO_GL=egl`.

    An action that is NaN or of another shape, and an argument that is unusable, raise a `MamlError`.

    ## Version History

    * v0: first version.
    """

    def __init__(self, goal_velocity: float, physics: Physics = "paper", render_mode: str | None = None) -> None:
        super().__init__(goal_velocity, physics, render_mode)

    def progress(self, velocity: Any, goal: Any) -> Any:
        return 1.0 - np.abs(velocity - goal)


class AntDirection(Ant):
    """A four-legged robot that runs forward, or backward, as fast as it can (section 5.3 of Finn et al. 2017).

    ## Description

    The robot of `AntVelocity`. It does not observe which way it should run; the paper draws either way.

    ## Action Space

    That of `AntVelocity`: `Box(-1, 1, (8,), float32)`.

    ## Observation Space

    That of `AntVelocity`: `Box(-1e10, 1e10, (125,), float64)`, and of `(105,)` for Gymnasium's physics.

    ## Rewards

    `goal_direction * velocity - weight * sum(action**2) - 0.0005 * sum(forces**2) + survival`, with the velocity,
    weights and survival of `AntVelocity`.

    ## Starting State

    That of `AntVelocity`.

    ## Episode End

    That of `AntVelocity`.

    ## Arguments

    * `goal_direction`: 1 or -1; `gymnasium.make("maml/AntDirection-v0", goal_direction=-1)`.
    * `physics` and `render_mode`: those of `AntVelocity`.

    ## Version History

    * v0: first version.
    """

    def __init__(self, goal_direction: float, physics: Physics = "paper", render_mode: str | None = None) -> None:
        super().__init__(_check_direction(goal_direction), physics, render_mode)

    def progress(self, velocity: Any, goal: Any) -> Any:
        return goal * velocity
