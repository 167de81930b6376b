"""The theta with the best training returns, which appendix A.2 evaluates instead of the last theta."""

from __future__ import annotations

import torch
from torch import Tensor

from maml.types import Params

# The record holds the best theta's parameters and, under these names, its score and the values of recent iterations.
_SCORE, _RECENT = "score", "recent"
_NUM_RECENT = 10


def init_best(theta: Params) -> Params:
    """Returns the record before training: a copy of theta, a score of -inf, and no values yet."""
    lowest = next(iter(theta.values())).new_full((_NUM_RECENT,), -torch.inf)
    copies = {name: value.clone() for name, value in theta.items()}
    return copies | {_SCORE: lowest[0].clone(), _RECENT: lowest}


def update_best(best: Params, theta: Params, value: Tensor) -> None:
    """Copies theta into the record, in place, if its score is the best so far.

    The score is the mean value of the last ten iterations. The value of a single iteration is too noisy: it depends
    more on the few goals that were drawn than on theta.

    Args:
        best: the record, as `init_best` returns it; changed in place.
        theta: the parameters that collected the rollouts of this iteration.
        value: the mean return of these rollouts, 0-dim; larger is better.
    """
    recent = best[_RECENT]
    recent.copy_(torch.where(recent.isneginf(), value, torch.cat([recent[1:], value.reshape(1)])))
    score = recent.mean()
    if score > best[_SCORE]:
        best[_SCORE].copy_(score)
        for name, parameter in theta.items():
            best[name].copy_(parameter)
