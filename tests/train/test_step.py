"""One step: its seed, and why a loss is not finite."""

import math

import torch
from torch import nn

from lowbit.train.step import explain_non_finite, step_seed


def test_step_seeds_do_not_repeat_for_the_next_seed() -> None:
    """No two of 50 seeds times 50 steps share the 32 bits that torch's CPU generator uses."""
    seeds = {step_seed(seed, step) % 2**32 for seed in range(50) for step in range(50)}

    assert len(seeds) == 2500  # a collision among random 32-bit values has probability 0.0007


def test_explanation_names_the_first_bad_layer() -> None:
    """The first layer whose output is not finite is named, not the later ones that it spoils."""

    class Log(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.log()

    model = nn.Sequential(nn.Flatten(), Log(), nn.Linear(2, 2))

    reason = explain_non_finite(model, torch.tensor([[-1.0, 1.0]]))

    assert reason == "the first layer whose output is not finite is 1"


def test_explanation_tells_what_enters_a_layer() -> None:
    """A value that is bad before the first layer is not blamed on the layer."""
    reason = explain_non_finite(nn.Sequential(nn.Identity()), torch.tensor([math.inf]))

    assert reason == "the first value that is not finite enters the layer 0"


def test_explanation_names_a_bad_parameter() -> None:
    """A parameter that an update blew up is named before any layer."""
    model = nn.Linear(1, 1)
    nn.init.constant_(model.weight, math.inf)

    assert explain_non_finite(model, torch.zeros(1)).startswith("the parameter weight is not finite")
