"""What a controller follows: one interface of the schedules, which know the step, and the rules, which see the run.

Notation: t step (the batch counted from 0), b bits of `input` and `weight`, g bits of `grad_output`.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Protocol, runtime_checkable

from torch import Tensor

from lowbit.inputs.checks import check_keys

Follows = Literal["step", "epoch"]
# A schedule is looked at in so many of its steps, or in all where it has fewer.
_MOST_LOOKS = 10**6


@runtime_checkable
class Schedule(Protocol):
    """What every schedule is, also a user's own: a callable t -> b that knows its length and its highest bits."""

    @property
    def total_steps(self) -> int | None:
        """Number of steps it is defined for; None where it never ends."""

    @property
    def max_bits(self) -> int:
        """The highest bits it ever takes, e.g. for evaluation."""

    def __call__(self, step: int) -> int:
        """Bits of batch `step`, counted from 0; a UsageError outside ``0 .. total_steps - 1``."""


class Follower(ABC):
    """What may follow the run: `update` is its only transition, and `state_dict` all that it remembers."""

    @property
    @abstractmethod
    def follows(self) -> Follows | None:
        """Whose loss the next `update` takes: that of each step, the mean of each epoch, or None: it needs none."""

    @abstractmethod
    def update(self, loss: float | Tensor, /) -> bool:
        """Take what the run measured; whether anything changes."""

    @abstractmethod
    def state_dict(self) -> dict[str, Any]:
        """All that it remembers, as plain values."""

    @abstractmethod
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from what `state_dict` gave; a UsageError where it is not such a state, and then nothing changes."""


class Source(Follower):
    """Where bits come from: `at(step)` gives them, `update(loss)` may change them."""

    if TYPE_CHECKING:  # at run time a property here would become the default of a dataclass's field of this name

        @property
        def total_steps(self) -> int | None:
            """Number of steps it is defined for; None where it never ends."""

    @property
    @abstractmethod
    def max_bits(self) -> int:
        """The highest bits it ever takes, e.g. for evaluation."""

    @abstractmethod
    def at(self, step: int) -> int:
        """Bits of `input` and `weight` of batch `step`, counted from 0; a UsageError outside of the run."""

    def grad_at(self, step: int) -> int | None:  # noqa: ARG002 - most leave the gradients alone
        """Bits of `grad_output` of batch `step`; None where it leaves them alone."""
        return None

    @abstractmethod
    def widths(self) -> list[int]:
        """The bits that it may take, to be checked before the run, and to recognise it by."""

    def grad_widths(self) -> list[int]:
        """The bits that it may give gradients; none where it leaves them alone."""
        return []

    @property
    def title(self) -> str:
        """What a table of layers and a saved state call it."""
        return type(self).__name__


class PureSchedule(Source):
    """A source whose bits are a function of the step alone: its `update` does nothing, and it has no state."""

    def __call__(self, step: int) -> int:
        """The same as `at`."""
        return self.at(step)

    @property
    def follows(self) -> None:
        """None: it sees no loss."""
        return

    def update(self, loss: float | Tensor, /) -> bool:  # noqa: ARG002 - it sees nothing
        """Nothing: False."""
        return False

    def state_dict(self) -> dict[str, Any]:
        """Nothing: an empty dict."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Check that the state is empty."""
        check_keys(f"state of {self.title}", state, ())

    def widths(self) -> list[int]:
        """The bits of its steps, of about a million of them where there are more, and the highest."""
        total = self.total_steps or 1
        return [self.at(step) for step in range(0, total, -(-total // _MOST_LOOKS))] + [self.max_bits]


@dataclass(frozen=True, kw_only=True)
class Called(PureSchedule):
    """A callable of a user's own as a source.

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
    """A source whose bits follow what the run measures: it has bits now, whatever the step, and a state to save."""

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
        """Bits of `grad_output` now; None where it leaves them alone."""
        return None

    def at(self, step: int) -> int:  # noqa: ARG002 - only what the run measured decides
        """The present bits, whatever the step."""
        return self.current_bits

    def grad_at(self, step: int) -> int | None:  # noqa: ARG002
        """The present bits of gradients, whatever the step."""
        return self.current_grad_bits

    def grad_widths(self) -> list[int]:
        """The present bits of gradients: a rule that changes them gives all of theirs."""
        return [] if self.current_grad_bits is None else [self.current_grad_bits]
