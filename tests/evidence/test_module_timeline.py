"""Where the time of a step goes: every part counts once, for the module that it belongs to."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lowbit.evidence.timeline import timeline

NOW = [0.0]


@pytest.fixture(autouse=True)
def _counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock that only `Slow` moves."""
    monkeypatch.setattr("lowbit.evidence.timeline.time.perf_counter", lambda: NOW[0])


class Slow(torch.autograd.Function):
    """The identity, which takes its time in both directions."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, seconds: float) -> Tensor:
        """Let time pass and return the input."""
        ctx.seconds = seconds
        NOW[0] += seconds
        return x.clone()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        """Let twice as much time pass."""
        NOW[0] += 2 * ctx.seconds
        return g, None


class Wait(nn.Module):
    """A layer that takes its time."""

    def __init__(self, seconds: float) -> None:
        super().__init__()
        self.seconds = seconds

    def forward(self, x: Tensor) -> Tensor:
        """Let time pass."""
        return Slow.apply(x, self.seconds)


class Block(nn.Module):
    """A layer, and a function that the block calls itself."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = Wait(20.0)

    def forward(self, x: Tensor) -> Tensor:
        """The layer, and then the function."""
        return Slow.apply(self.inner(x), 10.0)


def model() -> nn.Module:
    """A layer first, whose input needs no gradient, then a block."""
    return nn.Sequential(nn.Linear(4, 4), Wait(5.0), Block())


def test_time_belongs_to_the_innermost_module() -> None:
    """Each wait is found where it was, in both directions, and once."""
    net = model()

    with timeline(net) as found:
        net(torch.randn(2, 4)).sum().backward()

    assert dict(found.forward) == {"": 0.0, "0": 0.0, "1": 5.0, "2": 10.0, "2.inner": 20.0}
    assert (found.backward["1"], found.backward["2"], found.backward["2.inner"]) == (10.0, 20.0, 40.0)
    assert found.seconds("2.inner") == 60.0
    assert sum(found.backward.values()) == 70.0


def test_the_hooks_are_gone_afterwards() -> None:
    """Also after an exception, no module keeps a hook."""
    net = model()

    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"), timeline(net):
        net(torch.randn(2, 5))

    assert all(not m._forward_hooks and not m._forward_pre_hooks for m in net.modules())


def test_a_change_in_place_is_no_obstacle() -> None:
    """A layer's output may be changed by the next one."""
    net = nn.Sequential(nn.Linear(4, 4), nn.ReLU(inplace=True), nn.Linear(4, 4))

    with timeline(net) as found:
        net(torch.randn(2, 4)).sum().backward()

    assert set(found.backward) >= {"0", "1", "2"}
