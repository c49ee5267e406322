"""What a controller follows: one interface for schedules, which know the step, and rules, which see the run.

Notation: t step (the batch counted from 0), b bits of `input` and `weight`, g bits of `grad_output`.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Protocol, runtime_checkable

from torch import Tensor

from lowbit.inputs.checks import check_keys

Follows = Literal["step", "epoch"]
# The most steps of a schedule that are looked at.
_MOST_LOOKS = 10**6


@runtime_checkable
class Schedule(Protocol):
    """What every schedule is, a user's included: a callable t -> b that knows its length and its highest bits."""

    @property
    def total_steps(self) -> int | None:
        """Number of steps it is defined for; None if it never ends."""

    @property
    def max_bits(self) -> int:
        """The highest bits it ever takes, e.g. for evaluation."""

    def __call__(self, step: int) -> int:
        """Bits of batch `step`, counted from 0; a UsageError outside ``0 .. total_steps - 1``."""


class Follower(ABC):
    """What may follow the run: `update` is its only transition, and `state_dict` is all that it remembers."""

    @property
    @abstractmethod
    def follows(self) -> Follows | None:
        """Which loss the next `update` takes: that of a ``"step"``, the mean of an ``"epoch"``, or None."""

    @abstractmethod
    def update(self, loss: float | Tensor, /) -> bool:
        """Take what the run measured, and return whether anything changes."""

    @abstractmethod
    def state_dict(self) -> dict[str, Any]:
        """Everything that it remembers, as plain values."""

    @abstractmethod
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from what `state_dict` gave; if it is not such a state, a UsageError, and nothing changes."""


class Source(Follower):
    """Where bits come from: `at(step)` gives them, `update(loss)` may change them."""

    if TYPE_CHECKING:  # at run time a property here would become the default of a dataclass's field of this name

        @property
        def total_steps(self) -> int | None:
            """Number of steps it is defined for; None if it never ends."""

    @property
    @abstractmethod
    def max_bits(self) -> int:
        """The highest bits it ever takes, e.g. for evaluation."""

    @abstractmethod
    def at(self, step: int) -> int:
        """Bits of `input` and `weight` of batch `step`, counted from 0; a UsageError outside the run."""

    def grad_at(self, step: int) -> int | None:  # noqa: ARG002 - most leave the gradients alone
        """Bits of `grad_output` of batch `step`; None if it leaves them alone."""
        return None

    @abstractmethod
    def widths(self) -> list[int]:
        """The bits that it may take: they are checked before the run, and identify it in a saved state."""

    def grad_widths(self) -> list[int]:
        """The bits that it may give gradients; empty if it leaves them alone."""
        return []

    @property
    def title(self) -> str:
        """Its name in a table of layers and in a saved state."""
        return type(self).__name__


class PureSchedule(Source):
    """A source whose bits are a function of the step alone: its `update` does nothing, and it lacks a state."""

    def __call__(self, step: int) -> int:
        """The same as `at`."""
        return self.at(step)

    @property
    def follows(self) -> None:
        """None: it does not see a loss."""
        return

    def update(self, loss: float | Tensor, /) -> bool:  # noqa: ARG002 - it sees nothing
        """False: nothing changes."""
        return False

    def state_dict(self) -> dict[str, Any]:
        """An empty dict: it does not remember anything."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Check that the state is empty."""
        check_keys(f"state of {self.title}", state, ())

    def widths(self) -> list[int]:
        """The bits of its steps, or of about a million of them if there are more, and the highest."""
        total = self.total_steps or 1
        return [self.at(step) for step in range(0, total, -(-total // _MOST_LOOKS))] + [self.max_bits]


@dataclass(frozen=True, kw_only=True)
class Called(PureSchedule):
    """A user's callable as a source.

    Args:
        schedule: what is called.
    """

    schedule: Schedule

    @property
    def total_steps(self) -> int | None:
        """The callable's."""
        return self.schedule.total_steps

    @property
    def max_bits(self) -> int:
        """The callable's."""
        return self.schedule.max_bits

    def at(self, step: int) -> int:
        """What the callable says."""
        return self.schedule(step)

    @property
    def title(self) -> str:
        """The name of the callable's class."""
        return type(self.schedule).__name__


class Rule(Source):
    """A source whose bits follow what the run measures. It has present bits, whatever the step, and a state."""

    @property
    def total_steps(self) -> int | None:
        """None: it never ends."""
        return None

    @property
    @abstractmethod
    def current_bits(self) -> int:
        """Bits of `input` and `weight` now."""

    @property
    def current_grad_bits(self) -> int | None:
        """Bits of `grad_output` now; None if it leaves them alone."""
        return None

    def at(self, step: int) -> int:  # noqa: ARG002 - only what the run measured decides
        """The present bits, whatever the step."""
        return self.current_bits

    def grad_at(self, step: int) -> int | None:  # noqa: ARG002
        """The present bits of gradients, whatever the step."""
        return self.current_grad_bits

    def grad_widths(self) -> list[int]:
        """The present bits of gradients; a rule that changes them returns all that it may take."""
        return [] if self.current_grad_bits is None else [self.current_grad_bits]
