"""The best theta of a training run, by its own returns (appendix A.2 evaluates that one)."""

from __future__ import annotations

import torch
from torch import Tensor

from maml.types import Params

# Beside the parameters: the score of the best theta, and the values of the last iterations.
_SCORE, _RECENT = "score", "recent"
_NUM_RECENT = 10


def init_best(theta: Params) -> Params:
    """Returns the record before training: a copy of theta, and what is needed to compare later ones with it."""
    lowest = next(iter(theta.values())).new_full((_NUM_RECENT,), -torch.inf)
    copies = {name: value.clone() for name, value in theta.items()}
    return copies | {_SCORE: lowest[0].clone(), _RECENT: lowest}


def update_best(best: Params, theta: Params, value: Tensor) -> None:
    """Copies theta into the record, in place, if its value is the best so far.

    Values are averaged over ten iterations: in a single one, the luck of its few goals outweighs what theta has learnt.

    Args:
        best: as `init_best` returns it.
        theta: by which the rollouts of this iteration were collected.
        value: their mean return, 0-dim; larger is better.
    """
    recent = best[_RECENT]
    recent.copy_(torch.where(recent.isneginf(), value, torch.cat([recent[1:], value.reshape(1)])))
    score = recent.mean()
    if score > best[_SCORE]:
        best[_SCORE].copy_(score)
        for name, parameter in theta.items():
            best[name].copy_(parameter)
