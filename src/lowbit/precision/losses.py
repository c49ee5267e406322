"""What rules see of a run: the loss of each step, or the mean of an epoch, the same number on every rank."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lowbit import ranks
from lowbit.errors import UsageError
from lowbit.inputs.checks import check_type
from lowbit.schedules import Follower


def _zero() -> Tensor:
    return torch.zeros((), dtype=torch.float64, device="cpu")


@dataclass(kw_only=True)
class Losses:
    """Gives the losses of a run to what follows them, and remembers those of the unfinished epoch.

    Args:
        steps_per_epoch: number of steps whose mean loss a plateau rule takes; None without such a rule.
        sum: the sum of the losses since the last epoch.
        count: the number of these losses.
    """

    steps_per_epoch: int | None
    sum: Tensor = field(default_factory=_zero)
    count: int = 0

    def feed(self, loss: Tensor | float | None, followers: Sequence[Follower]) -> None:
        """Show the loss of a step to the rules that follow it.

        Raises:
            UsageError: a rule needs a loss and none is given, or it is not one number.
            RunError: a rule met a loss that is not finite.
        """
        per_step, per_epoch = ([f for f in followers if f.follows == what] for what in ("step", "epoch"))
        if not per_step and not per_epoch:
            return
        value = _one_number(loss)
        if per_step:
            measure = _mean_over_ranks(value)
            for follower in per_step:
                follower.update(measure)
        if per_epoch:
            self._add(value, per_epoch)

    def _add(self, value: Tensor, followers: Sequence[Follower]) -> None:
        """Count the loss of a step, and give the mean at the end of an epoch."""
        assert self.steps_per_epoch is not None
        total, count = self.sum.to(value.device) + value, self.count + 1
        if count == self.steps_per_epoch:
            mean = _mean_over_ranks(total / count)
            total, count = _zero(), 0
            for follower in followers:
                follower.update(mean)
        self.sum, self.count = total, count


def _one_number(loss: Tensor | float | None) -> Tensor:
    """A loss as a float64 scalar on its device; a UsageError unless it is one number."""
    if loss is None:
        raise UsageError("step() without a loss: a plateau rule or a range test needs step(loss)")
    if not isinstance(loss, Tensor):
        check_type("loss", loss, float)
    device = loss.device if isinstance(loss, Tensor) else "cpu"
    value = torch.as_tensor(loss, dtype=torch.float64, device=device).detach()
    if value.numel() != 1:
        raise UsageError(f"step() with a loss of shape {tuple(value.shape)}: give one number, e.g. its mean")
    return value.reshape(())


def _mean_over_ranks(value: Tensor) -> float:
    """The mean of one number over all processes of a distributed run, bit for bit the same on each of them."""
    return float(ranks.gathered(value).mean())
