"""The best theta so far: by its training returns, as in appendix A.2, or by validation tasks."""

from __future__ import annotations

import torch
from torch import Tensor

from maml.errors import MamlError
from maml.types import Params

# The record holds the best theta's parameters and buffers and, under these names, its score and recent values.
SCORE, _RECENT = "score", "recent"
# The return of a single iteration is too noisy: it depends more on the few goals that were drawn than on theta.
NUM_RECENT_RETURNS = 10


def init_best(theta: Params, num_recent: int) -> Params:
    """Returns the record before training: a copy of theta, a score of -inf, and no values yet.

    Args:
        theta: the initial parameters, and the buffers if training has some.
        num_recent: number of recent values whose mean is the score.

    Raises:
        MamlError: if theta has a name that the record needs.
    """
    if taken := {SCORE, _RECENT} & theta.keys():
        raise MamlError(
            f"the network has a parameter {min(taken)!r}, a name that the record of the best theta has for itself; "
            "give it another name"
        )
    lowest = next(iter(theta.values())).new_full((num_recent,), -torch.inf)
    copies = {name: value.clone() for name, value in theta.items()}
    return copies | {SCORE: lowest[0].clone(), _RECENT: lowest}


def update_best(best: Params, theta: Params, value: Tensor) -> None:
    """Copies theta into the record, in place, if its score is the best so far: the mean of the most recent values.

    Args:
        best: the record, as `init_best` returns it; changed in place.
        theta: the parameters and buffers that the value belongs to.
        value: the value, 0-dim, such as the mean return of the rollouts that theta has collected; larger is better.
    """
    recent = best[_RECENT]
    recent.copy_(torch.where(recent.isneginf(), value, torch.cat([recent[1:], value.reshape(1)])))
    score = recent.mean()
    if score > best[SCORE]:
        best[SCORE].copy_(score)
        for name, parameter in theta.items():
            best[name].copy_(parameter)
