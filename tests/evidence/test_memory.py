"""The memory of a training step, measured."""

import pytest
import torch
from torch import nn

from lowbit.errors import UsageError
from lowbit.evidence.memory import step_memory
from lowbit.optim import LowBitOptimizer


@pytest.mark.parametrize(("states", "share"), [("fp32", 1.0), ("int8", 65 / 256)])
def test_a_step_is_counted_part_by_part(states: str, share: float) -> None:
    """A linear layer of 64 by 128 without bias, AdamW: each part is what its tensors take."""
    layer = nn.Linear(64, 128, bias=False)
    inner = torch.optim.AdamW(layer.parameters())
    optimizer = LowBitOptimizer(inner, states={"exp_avg": states, "exp_avg_sq": states})  # type: ignore[dict-item]
    x = torch.randn(32, 64)

    def step() -> None:
        optimizer.zero_grad()
        layer(x).sum().backward()
        optimizer.step()

    memory = step_memory(layer, optimizer, step)

    weights = 64 * 128 * 4
    assert memory.parameters == memory.gradients == weights
    assert memory.states == 2 * weights * share + 4  # the step counter
    assert memory.activations == x.nbytes
    assert weights <= memory.update <= 8 * weights
    assert "optimizer states" in str(memory)


def test_a_step_without_the_optimizer_is_an_error() -> None:
    """The message says that the step has to call it."""
    layer = nn.Linear(2, 2)
    optimizer = torch.optim.SGD(layer.parameters())

    with pytest.raises(UsageError, match="did not call step"):
        step_memory(layer, optimizer, lambda: layer(torch.ones(1, 2)).sum().backward())
