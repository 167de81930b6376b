"""Many half-cheetahs or ants at once: one native call steps all of them, on all threads of the run."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from maml.environment.base import Environments, Transition
from maml.environment.locomotion import Locomotion, Physics
from maml.hardware.threads import num_threads
from maml.seeding import Stream


class MujocoEnvironments(Environments):
    """A `Locomotion` environment for many goals. It agrees with single environments to the bit.

    Args:
        environment: the class of the single environment.
        physics: the physics of the single environment.

    Raises:
        MamlError: if MuJoCo is missing.
    """

    goal_dim = 1

    def __init__(self, environment: type[Locomotion], physics: Physics = "paper") -> None:
        self._single = environment(1.0, physics)
        self.observation_dim = self._single.observation_space.shape[0]  # type: ignore[index]
        self.action_dim = self._single.model.nu

    def draw_noise(self, stream: Stream) -> Tensor:
        """Returns the noise that `reset` starts from, ``(M, nq + nv)``; see `Locomotion.place`."""
        model, positions = self._single.model, stream.child("positions")
        return torch.cat(
            [
                positions.normal((model.nq,))
                if self._single.physics == "paper"
                else positions.uniform((model.nq,), -1.0, 1.0),
                stream.child("velocities").normal((model.nv,)),
            ],
            dim=-1,
        )

    def reset(self, goals: Tensor, stream: Stream) -> Tensor:
        from mujoco import mjtStage
        from mujoco.batch import Batch

        self._goals = goals[:, 0].cpu().numpy().astype(np.float64)
        self._batch = Batch(self._single.model, len(goals), num_threads())  # cheap
        for field in self._single.fields:
            self._batch.bind(field)
        self._single.place(self._batch, self.draw_noise(stream).cpu().numpy())
        # After a step, observed values are computed again from the new state; only forces need all stages.
        self._stage = int(mjtStage.mjSTAGE_ACC if "cfrc_ext" in self._single.fields else mjtStage.mjSTAGE_VEL)
        self._batch.forward(stage=self._stage)
        return _tensor(self._single.observe(self._batch), goals)

    def step(self, actions: Tensor, living: Tensor) -> Transition:
        rows = living.cpu().numpy()
        control = self._single.control(actions.cpu().numpy())
        start = self._batch.qpos[rows, 0]
        self._batch.ctrl[rows] = control
        self._batch.step(rows, self._single.frame_skip, self._stage)
        data = SimpleNamespace(**{field: getattr(self._batch, field)[rows] for field in self._single.fields})
        warnings = self._batch.warning[rows, :, 1]  # index 1: number of warnings; 0: detail
        outcome = self._single.outcome(data, warnings, control, start, self._goals[rows])
        return Transition(
            observations=_tensor(outcome.observation, actions),
            rewards=_tensor(outcome.reward, actions),
            terminated=torch.from_numpy(outcome.terminated).to(actions.device),
            unstable=torch.from_numpy(outcome.unstable).to(actions.device),
        )


def _tensor(numbers: NDArray[np.float64], like: Tensor) -> Tensor:
    return torch.from_numpy(numbers).to(like.device, torch.get_default_dtype())
