"""Precision schedules: pure functions step -> bits, and the plateau rule that raises bits as a loss settles.

Notation: t step (the batch counted from 0), b bits of `input` and `weight`, g bits of `grad_output`, T period of
a cycle in steps, u = (t mod T)/T the part of a cycle that is done, span = high - low.
"""

import math
import re
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from fractions import Fraction
from functools import cached_property
from inspect import Parameter, signature
from itertools import pairwise
from types import MappingProxyType
from typing import Any, Literal, Protocol, TypedDict, runtime_checkable

from torch import Tensor

from lowbit.checks import check_fields, check_keys, check_type, checked, is_finite, is_whole
from lowbit.errors import RunError, UsageError, check_choice, shown, unknown

Profile = Literal["cosine", "linear", "rex", "exponential"]
Shape = Literal["repeated", "triangular-vertical", "triangular-horizontal"]
Final = Literal["high"]
Better = Literal["higher", "lower"]
_MOST_STEPS = 2**63 - 1

# A step, or "400" steps, "10ep" epochs, "0.9" of the run.
Time = int | str
RANGE_TEST: Literal["range-test"] = "range-test"
# A range test in the first cycle trains so many steps at each width, or more.
_LEAST_STEPS = 10


@runtime_checkable
class Schedule(Protocol):
    """What every schedule is: a callable step -> bits that knows how long it lasts and how high it goes."""

    @property
    def total_steps(self) -> int | None:
        """Number of steps it is defined for; None where it never ends."""

    @property
    def max_bits(self) -> int:
        """The highest bits it ever takes, e.g. for evaluation."""

    def __call__(self, step: int) -> int:
        """Bits of batch `step`, counted from 0; a UsageError outside ``0 .. total_steps - 1``."""


@runtime_checkable
class Rule(Protocol):
    """What every rule is that follows the run: bits now, changed by `update`, with a state to save."""

    @property
    def current_bits(self) -> int:
        """Bits of `input` and `weight` now."""

    @property
    def current_grad_bits(self) -> int | None:
        """Bits of `grad_output` now; None where it leaves them alone."""

    @property
    def max_bits(self) -> int:
        """The highest bits it ever takes, e.g. for evaluation."""

    def update(self, value: float, /) -> bool:
        """Take what the run measured; whether anything changes."""

    def state_dict(self) -> dict[str, Any]:
        """All that it remembers, as plain values."""

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from what `state_dict` gave."""


Source = Schedule | Rule


def parse_steps(given: Time, *, total_steps: int | None = None, steps_per_epoch: int | None = None) -> int:
    """A time as a number of whole steps, rounded down: the one place where units are read.

    Args:
        given: steps (``400`` or ``"400"``), epochs (``"10ep"``, ``"2.5ep"``) or, with a decimal point, a
            fraction of the run (``"0.9"``; ``"1.0"`` is all of it).
        total_steps: length of the run in steps; needed for fractions.
        steps_per_epoch: needed for epochs.

    Raises:
        UsageError: no such unit, a negative time, a fraction above 1, or what its unit needs is missing.
    """
    check_type("total_steps", total_steps, int | None)
    check_type("steps_per_epoch", steps_per_epoch, int | None)
    if isinstance(given, int) and not isinstance(given, bool):
        if not 0 <= given <= _MOST_STEPS:
            raise UsageError(f"time {shown(given)}: steps count from 0")
        return given
    match = re.fullmatch(r"(\d{1,18}|\d{0,18}\.\d{1,18})(ep)?", given, re.ASCII) if isinstance(given, str) else None
    if match is None:
        raise UsageError(f"time {shown(given)}: write steps as 400, epochs as '10ep', a fraction of the run as '0.9'")
    number, epochs = Fraction(match[1]), match[2]
    if epochs:
        if steps_per_epoch is None:
            raise UsageError(f"time {given!r} is in epochs: give steps_per_epoch, or steps such as 400")
        return math.floor(number * _count("steps_per_epoch", steps_per_epoch))
    if "." not in match[1]:
        return int(number)
    if number > 1:
        raise UsageError(f"time {given!r}: a fraction of the run is at most '1.0'; epochs are written '2.5ep'")
    if total_steps is None:
        raise UsageError(f"time {given!r} is a fraction of a run without end: give steps such as 400")
    return math.floor(number * total_steps)


@dataclass(frozen=True, kw_only=True)
class Constant:
    """The same bits at every step, without end.

    Args:
        bits: 1 to 32.
    """

    bits: int

    def __post_init__(self) -> None:
        _check_bits("bits", self.bits)

    @property
    def total_steps(self) -> None:
        """None: it never ends."""
        return

    @property
    def max_bits(self) -> int:
        """Its bits."""
        return self.bits

    def __call__(self, step: int) -> int:
        """The bits; `step` is 0 or more."""
        _check_step(step, self.total_steps)
        return self.bits


@dataclass(frozen=True, kw_only=True)
class Piecewise:
    """Constant bits on each of several pieces: b(t) is that of the last piece that starts at or before t.

    Args:
        pieces: pairs (start, bits) in order of time; the first starts at 0. A start is a step, ``"10ep"`` or
            ``"0.9"`` of `total_steps` (see `parse_steps`).
        total_steps: length of the run in steps; every piece starts before it.
        steps_per_epoch: needed where a start is in epochs.

    Raises:
        UsageError: a value outside the above.
    """

    pieces: Sequence[tuple[Time, int]]
    total_steps: int
    steps_per_epoch: int | None = None

    def __post_init__(self) -> None:
        _count("total_steps", self.total_steps)
        if not isinstance(self.pieces, list | tuple) or not self.pieces:
            raise UsageError(f"pieces={shown(self.pieces)}: give at least one, e.g. [(0, 8)]")
        for piece in self.pieces:
            if not isinstance(piece, list | tuple) or len(piece) != 2:
                raise UsageError(f"pieces={shown(self.pieces)}: each is a pair (start, bits), e.g. (0, 8)")
        for _, bits in self.pieces:
            _check_bits("bits of a piece", bits)
        check_type("steps_per_epoch", self.steps_per_epoch, int | None)
        starts = [start for start, _ in self._steps]
        if starts[0] != 0:
            raise UsageError(f"the first piece starts at step {starts[0]}: start it at 0, so that every step has bits")
        if any(later <= earlier for earlier, later in pairwise(starts)):
            raise UsageError(f"pieces start at steps {starts}: give them in order of time, each start once")
        if starts[-1] >= self.total_steps:
            raise UsageError(
                f"a piece starts at step {starts[-1]}, after the last of total_steps={self.total_steps}: "
                "leave it out, or give more total_steps"
            )

    @cached_property
    def _steps(self) -> tuple[tuple[int, int], ...]:
        """The pieces with their starts in steps."""
        return tuple(
            (parse_steps(start, total_steps=self.total_steps, steps_per_epoch=self.steps_per_epoch), bits)
            for start, bits in self.pieces
        )

    @property
    def max_bits(self) -> int:
        """The bits of the highest piece."""
        return max(bits for _, bits in self._steps)

    def __call__(self, step: int) -> int:
        """Bits of the piece that `step` lies in."""
        _check_step(step, self.total_steps)
        return next(bits for start, bits in reversed(self._steps) if start <= step)


@dataclass(frozen=True, kw_only=True)
class Cyclic:
    """Bits that swing between `low` and `high` in cycles of ``T = total_steps // cycles`` steps.

    ``b = round(low + span G(u))``, ties to even, with the growth profile G

    - ``"cosine"``: ``(1 - cos(pi u))/2``;
    - ``"linear"``: ``u``;
    - ``"rex"``: ``1 - (1-u)/(0.1 + 0.9 (1-u))``: stays low and rises late;
    - ``"exponential"``: ``1 - exp(-4 u)``: rises early and ends 1.8 % of the span below `high` before rounding.

    ``"repeated"`` cycles all grow and jump back to `low`. ``"triangular-..."`` cycles 0, 2, 4, ... fall and the
    others grow; falling is growth reflected in the vertical direction, ``1 - G(u)``, or in the horizontal one,
    ``G(1 - u)``. The defaults are CPT's schedule, bit for bit.

    Args:
        low: the lowest bits, 1 to `high`; ``"range-test"``: a `lowbit.PrecisionController` finds it in the first
            cycle (see `RangeTest`), and until then this schedule has no bits of its own.
        high: the highest bits, up to 32. Short cycles may stop short of it: cycles of 3 steps from 3 to 8 end at 7.
        cycles: how many; even for triangular shapes, so that the last one grows.
        total_steps: length of the run in steps, at least `cycles`.
        profile: G, as above.
        shape: as above.
        final: None: the ``total_steps % cycles`` steps that are left over begin another cycle, which in CPT's code
            ends the run at `low`. ``"high"``: they are at `high`, and so is the last step where none are left over.

    Raises:
        UsageError: a value outside the above.

    Source: Fu et al. 2021, CPT, arXiv:2101.09868; profiles and shapes: Wolfe and Kyrillidis 2024, arXiv:2403.02243.
    """

    low: int | Literal["range-test"]
    high: int
    cycles: int
    total_steps: int
    profile: Profile = "cosine"
    shape: Shape = "repeated"
    final: Final | None = None

    def __post_init__(self) -> None:
        if isinstance(self.low, str) and self.low != RANGE_TEST:
            raise UsageError(
                f"low={shown(self.low)}: bits are whole numbers from 1 to 32, or {RANGE_TEST!r} finds them"
            )
        _check_bits("high", self.high)
        if not isinstance(self.low, str):
            _check_bits("low", self.low)
            if self.low > self.high:
                raise UsageError(f"low={self.low}, high={self.high}: low is at most high")
        _count("cycles", self.cycles)
        _count("total_steps", self.total_steps)
        if self.total_steps < self.cycles:
            raise UsageError(
                f"total_steps={self.total_steps}, cycles={self.cycles}: a cycle has at least one step; "
                "give more steps or fewer cycles"
            )
        check_choice("profile", self.profile, Profile)
        check_choice("shape", self.shape, Shape)
        if self.final is not None:
            check_choice("final", self.final, Final)
        if self.shape != "repeated" and self.cycles % 2:
            raise UsageError(
                f"cycles={self.cycles} with shape={self.shape!r}: give an even number; cycles fall and grow by turns "
                "and the last one grows"
            )

    @property
    def period(self) -> int:
        """Steps of one cycle, T."""
        return self.total_steps // self.cycles

    @property
    def max_bits(self) -> int:
        """The highest bits it ever takes; fewer than `high` where all cycles are too short to reach it."""
        if self.low == RANGE_TEST:
            return self.high
        # A growing cycle is highest at its end, a falling one at its start.
        return max(self(0), self(self.period - 1), self(self.total_steps - 1))

    def __call__(self, step: int) -> int:
        """Bits of batch `step`."""
        _check_step(step, self.total_steps)
        if isinstance(self.low, str):
            raise UsageError(
                f"low={self.low!r} is not a number yet: give this schedule to a lowbit.PrecisionController, which "
                "finds it in the first cycle, or find it before with lowbit.range_test"
            )
        if self.final == "high" and step >= min(self.cycles * self.period, self.total_steps - 1):
            return self.high
        cycle, position = divmod(step, self.period)
        done, left = position / self.period, (self.period - position) / self.period
        if self.shape == "repeated" or cycle % 2:
            return round(self._between(self.low, self.high, done, left))
        # Cosine and linear are their own mirror image: computed in one way, ties cannot tell the two shapes apart.
        if self.shape == "triangular-vertical" or self.profile in ("cosine", "linear"):
            return round(self._between(self.high, self.low, done, left))
        return round(self._between(self.low, self.high, 1 - done, 1 - left))

    def _between(self, start: int, end: int, done: float, left: float) -> float:
        """The unrounded value after the part `done` of a cycle from `start` to `end`.

        Algebra is not free here: each line is in the order of operations of the authors' code, since the last bit
        decides ties such as 3.5. CPT's code and Wolfe's write the cosine in different ways.
        """
        span = end - start
        match self.profile:
            case "linear":
                return start + span * done
            case "rex":
                return end - span * (left / (1 - 0.9 + 0.9 * left))
            case "exponential":
                return end - span * math.exp(-4 * done)
            case "cosine" if self.shape == "repeated":
                return start + 0.5 * span * (1 + math.cos(math.pi * done + math.pi))
            case "cosine":
                return start + 0.5 * span * (1 - math.cos(math.pi * done))


class Curve(TypedDict):
    """The two arguments of `Cyclic` that tell the ten schedules of Wolfe and Kyrillidis apart."""

    profile: Profile
    shape: Shape


# By the authors' names: growth Cosine, Linear, Rex or Exponential; Repeated or Triangular; Vertical or Horizontal
# reflection. `Cyclic(low=3, high=8, cycles=8, total_steps=64_000, **SUITE["RTH"])`
SUITE: Mapping[str, Curve] = MappingProxyType(
    {
        "CR": {"profile": "cosine", "shape": "repeated"},
        "CT": {"profile": "cosine", "shape": "triangular-vertical"},
        "LR": {"profile": "linear", "shape": "repeated"},
        "LT": {"profile": "linear", "shape": "triangular-vertical"},
        "RR": {"profile": "rex", "shape": "repeated"},
        "RTV": {"profile": "rex", "shape": "triangular-vertical"},
        "RTH": {"profile": "rex", "shape": "triangular-horizontal"},
        "ER": {"profile": "exponential", "shape": "repeated"},
        "ETV": {"profile": "exponential", "shape": "triangular-vertical"},
        "ETH": {"profile": "exponential", "shape": "triangular-horizontal"},
    }
)


@dataclass(frozen=True, kw_only=True)
class Deficit:
    """A window of few bits inside another schedule: ``b = bits`` for ``start <= t < start + length``.

    Args:
        schedule: what runs outside the window; its own steps go on during the window.
        bits: bits inside the window, 1 to the highest of `schedule`.
        start: first step of the window; a step, ``"10ep"``, or ``"0.5"`` of the schedule's total steps.
        length: steps in the window, in the same units; 0 is an empty window. It ends within the schedule.
        steps_per_epoch: needed where `start` or `length` is in epochs.

    Raises:
        UsageError: a value outside the above.

    Source: Wolfe and Kyrillidis 2024, arXiv:2403.02243, critical learning periods.
    """

    schedule: Schedule
    bits: int
    start: Time
    length: Time
    steps_per_epoch: int | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.schedule, Schedule):
            raise UsageError(f"schedule={shown(self.schedule)}: give a schedule, e.g. Constant(bits=8)")
        _check_bits("bits", self.bits)
        check_fields(self)
        if self.bits > self.schedule.max_bits:
            raise UsageError(
                f"bits={self.bits} in the window of a schedule that goes up to {self.schedule.max_bits}: "
                "a deficit has at most as many"
            )
        end = self._window.stop
        if self.total_steps is not None and end > self.total_steps:
            raise UsageError(
                f"the window ends at step {end}, after the last of total_steps={self.total_steps}: "
                "start it earlier or make it shorter"
            )

    @cached_property
    def _window(self) -> range:
        """The steps in the window."""
        start, length = (
            parse_steps(time, total_steps=self.total_steps, steps_per_epoch=self.steps_per_epoch)
            for time in (self.start, self.length)
        )
        return range(start, start + length)

    @property
    def total_steps(self) -> int | None:
        """That of the schedule around the window."""
        return self.schedule.total_steps

    @property
    def max_bits(self) -> int:
        """The highest bits it ever takes, which the window may hide."""
        highest = self.schedule.max_bits
        if self.total_steps is None or any(self(step) == highest for step in range(self.total_steps)):
            return highest
        return max(map(self, range(self.total_steps)))

    def __call__(self, step: int) -> int:
        """Few bits inside the window, the schedule's outside."""
        return self.bits if step in self._window else self.schedule(step)


# The authors' code fixes both: how many epochs must agree, and how many the scale is the mean of.
_PLATEAU_EPOCHS = 5
_SCALE_EPOCHS = 10


@dataclass(frozen=True, kw_only=True)
class _Plateau:
    """What the plateau rule remembers, as plain numbers.

    Args:
        threshold: epsilon of the present stage.
        stage: how often it found a plateau.
        epochs: how many losses it saw.
        first_losses: sum of the first 10 of them.
        window: the losses since the last switch, the newest 5 at most.
    """

    threshold: float
    stage: int = 0
    epochs: int = 0
    first_losses: float = 0.0
    window: list[float] = field(default_factory=list)

    @property
    def scale(self) -> float:
        """Mean of the first losses, at most 10 of them; 1 before the first."""
        return self.first_losses / min(self.epochs, _SCALE_EPOCHS) if self.epochs else 1.0

    def after(self, loss: float, *, last_stage: int, decay: float) -> "_Plateau":
        """The state one epoch later: `Progressive` documents the rule."""
        now = replace(
            self,
            epochs=self.epochs + 1,
            first_losses=self.first_losses + loss if self.epochs < _SCALE_EPOCHS else self.first_losses,
        )
        if self.stage == last_stage:
            return now
        now = replace(now, window=[*self.window, loss][-_PLATEAU_EPOCHS:])
        if not now.flat:
            return now
        # The authors' code lowers the threshold after the first and the second switch only.
        threshold = self.threshold * decay if self.stage < 2 else self.threshold
        return replace(now, stage=self.stage + 1, threshold=threshold, window=[])

    @property
    def flat(self) -> bool:
        """Whether the window is full and no loss in it is farther than the threshold from the newest."""
        if len(self.window) < _PLATEAU_EPOCHS:
            return False
        *earlier, newest = self.window
        moves = [abs(loss - newest) for loss in earlier]
        if self.scale == 0:  # all first losses were 0: the smallest move is too far
            return not any(moves)
        return all(move / self.scale <= self.threshold for move in moves)


class PlateauRule:
    """PFQ's plateau rule: the next of several stages whenever the loss of the epochs has settled.

    After each epoch, with its mean loss L: sigma is the mean of the losses so far, from epoch 10 on that of the first
    ten. A stage ends when it saw five epochs or more and the last five agree: ``|L_j - L| / sigma <= threshold`` for
    each of the four before the newest. Then the next stage begins, the five are forgotten, and after the first and
    the second switch ``threshold <- threshold * decay``. It never goes back to an earlier stage.

    It is a small state machine: `update` is its only transition and `state_dict` all that it remembers.

    Args:
        stages: how many there are.
        threshold: epsilon of the paper, 0 or more.
        decay: alpha of the paper, 0 to 1.

    Raises:
        UsageError: a value outside the above.

    Source: Fu et al. 2020, FracTrain, arXiv:2012.13113, algorithm 1; window and scale as in the authors' code.
    """

    def __init__(self, *, stages: int, threshold: float, decay: float) -> None:
        _count("stages", stages)
        if not is_finite(threshold) or threshold < 0:
            raise UsageError(f"threshold={shown(threshold)}: give a finite number, 0 or more")
        if not is_finite(decay) or not 0 <= decay <= 1:
            raise UsageError(f"decay={shown(decay)}: give a number from 0 to 1")
        self._stages, self._decay = stages, float(decay)
        self._state = _Plateau(threshold=float(threshold))

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}({self._stages_shown()}, threshold={self.threshold}, decay={self._decay}, "
            f"stage={self.stage})"
        )

    def _stages_shown(self) -> str:
        return f"stages={self._stages}"

    @property
    def stage(self) -> int:
        """The present stage, from 0."""
        return self._state.stage

    @property
    def threshold(self) -> float:
        """Epsilon of the present stage."""
        return self._state.threshold

    @property
    def scale(self) -> float:
        """Sigma: the mean of the first losses, at most 10 of them; 1 before the first."""
        return self._state.scale

    def update(self, epoch_loss: float | Tensor) -> bool:
        """Take the mean loss of the epoch that just ended; what follows is of the present stage.

        Returns:
            Whether a new stage began.

        Raises:
            RunError: the loss is inf or nan; nothing changed.
            UsageError: the mean of the first losses is negative, so that changes cannot be measured by it.
        """
        loss = _measure("epoch_loss", epoch_loss)
        if not math.isfinite(loss):
            raise RunError(
                f"the loss of epoch {self._state.epochs + 1} is {loss}: training diverged; resume from an earlier "
                "checkpoint with more bits or a smaller learning rate"
            )
        state = self._state.after(loss, last_stage=self._stages - 1, decay=self._decay)
        if state.scale < 0:
            raise UsageError(
                f"the mean loss of the first epochs is {state.scale}: the plateau rule divides by it and needs losses "
                "that are not negative; add a constant to the loss"
            )
        switched = state.stage > self.stage
        self._state = state
        return switched

    def state_dict(self) -> dict[str, Any]:
        """All that `update` depends on besides the arguments, as plain numbers and one list of them."""
        return asdict(self._state)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from what `state_dict` gave; a UsageError where it is not the state of such a rule."""
        loaded: _Plateau = _loaded("a plateau rule", state, _Plateau)
        if not 0 <= loaded.stage < self._stages:
            raise UsageError(
                f"stage {loaded.stage} of a rule with {self._stages} stages: give the stages that it was saved with"
            )
        if not (
            loaded.threshold >= 0
            and _PLATEAU_EPOCHS * loaded.stage <= loaded.epochs <= _MOST_STEPS
            and loaded.first_losses >= 0
            and (loaded.epochs > 0 or loaded.first_losses == 0)
            and len(loaded.window) <= min(_PLATEAU_EPOCHS, loaded.epochs)
        ):
            raise UsageError(f"state of a plateau rule {shown(dict(state))}: no epochs lead to these numbers")
        self._state = replace(loaded, window=list(loaded.window))


class Progressive(PlateauRule):
    """PFQ: a list of bits, and the next one whenever the loss of the epochs has settled (see `PlateauRule`).

    Args:
        bits: bits of `input` and `weight` in each stage, never falling.
        grad_bits: bits of `grad_output` in each stage, never falling, as many as `bits`.
        threshold: epsilon of the paper, 0 or more.
        decay: alpha of the paper, 0 to 1.

    Raises:
        UsageError: a value outside the above.

    Source: as `PlateauRule`.
    """

    def __init__(self, *, bits: Sequence[int], grad_bits: Sequence[int], threshold: float, decay: float) -> None:
        for name, stages in (("bits", bits), ("grad_bits", grad_bits)):
            if not isinstance(stages, list | tuple):
                raise UsageError(f"{name}={shown(stages)}: give a list with the bits of each stage")
        if not bits or len(bits) != len(grad_bits):
            raise UsageError(
                f"bits={shown(bits)}, grad_bits={shown(grad_bits)}: give one of each for every stage, at least one "
                "stage"
            )
        for name, stages in (("bits", bits), ("grad_bits", grad_bits)):
            for width in stages:
                _check_bits(name, width)
            if any(later < earlier for earlier, later in pairwise(stages)):
                raise UsageError(f"{name}={list(stages)}: precision never goes down from one stage to the next")
        super().__init__(stages=len(bits), threshold=threshold, decay=decay)
        self._bits, self._grad_bits = tuple(bits), tuple(grad_bits)

    def _stages_shown(self) -> str:
        return f"bits={list(self._bits)}, grad_bits={list(self._grad_bits)}"

    @property
    def bits(self) -> tuple[int, ...]:
        """Bits of `input` and `weight` in each stage."""
        return self._bits

    @property
    def grad_bits(self) -> tuple[int, ...]:
        """Bits of `grad_output` in each stage."""
        return self._grad_bits

    @property
    def current_bits(self) -> int:
        """Bits of `input` and `weight` until the next `update`."""
        return self._bits[self.stage]

    @property
    def current_grad_bits(self) -> int:
        """Bits of `grad_output` until the next `update`."""
        return self._grad_bits[self.stage]

    @property
    def max_bits(self) -> int:
        """Bits of `input` and `weight` in the last stage."""
        return self._bits[-1]


@dataclass(frozen=True, kw_only=True)
class Tried:
    """What a range test saw at one width.

    Args:
        bits: the width.
        steps: training steps at it.
        first: mean of the measure over the first half of them.
        last: mean over the last half.
        gain: how much the measure got better, see `RangeTest`.
        error: standard error of the gain, from the variances of the two halves; None where a half is one step.
        progress: whether the gain counts as progress.
    """

    bits: int
    steps: int
    first: float
    last: float
    gain: float
    error: float | None
    progress: bool


@dataclass(frozen=True, kw_only=True)
class _Ladder:
    """What a range test remembers, as plain numbers: the measures at the present width and the widths done."""

    measures: list[float] = field(default_factory=list)
    tried: list[tuple[int, int, float, float, float, float | None]] = field(default_factory=list)
    chosen: int | None = None


class RangeTest:
    """CPT's precision range test: train at 2 bits, then 3, ... until a width makes training progress.

    Each width b trains for n steps. With m_1 and m_2 the means of the measure over the first and the last n // 2 of
    them, the gain is ``m_2 - m_1`` of a measure that should rise (an accuracy), and ``(m_1 - m_2) / |m_1|`` of one
    that should fall (a loss, whose unit is free). The first width with a gain above `threshold` and above
    `significance` standard errors of it is chosen; `high` where none has. With s_1 and s_2 the standard deviations in
    the halves, the standard error is ``sqrt((s_1^2 + s_2^2) / (n // 2))``, divided by |m_1| where the gain is.

    It is a small state machine: `update` is its only transition and `state_dict` all that it remembers.

    Args:
        low: the first width.
        high: the last one, at least `low`; it is not trained at unless `every`, since nothing is left to choose.
        steps_per_bit: n, 4 or more, without `significance` 2.
        threshold: the gain that is progress.
        better: whether the measure should get ``"higher"`` or ``"lower"``.
        significance: standard errors that a gain must exceed too, which takes `steps_per_bit` of 4 or more; None: the
            threshold decides alone, and noise that passes it is progress.
        every: True goes on to train at each width up to `high`, for the table; the choice is the same.

    Raises:
        UsageError: a value outside the above.

    Source: Fu et al. 2021, CPT, arXiv:2101.09868, section 3.3, which states neither window nor threshold; the
    authors' code has no range test.
    """

    def __init__(
        self,
        *,
        low: int = 2,
        high: int = 8,
        steps_per_bit: int = 100,
        threshold: float = 0.01,
        better: Better = "lower",
        significance: float | None = 3.0,
        every: bool = False,
    ) -> None:
        _check_bits("low", low)
        _check_bits("high", high)
        if low > high:
            raise UsageError(f"low={low}, high={high}: low is at most high")
        if _count("steps_per_bit", steps_per_bit) < 2:
            raise UsageError(f"steps_per_bit={steps_per_bit}: a gain needs two steps or more at each width")
        check_type("every", every, bool)
        if not is_finite(threshold):
            raise UsageError(f"threshold={shown(threshold)}: give a finite number, e.g. 0.01")
        check_choice("better", better, Better)
        if significance is not None:
            if not is_finite(significance) or significance <= 0:
                raise UsageError(f"significance={shown(significance)}: give a finite number above 0, e.g. 3.0, or None")
            if steps_per_bit < 4:
                raise UsageError(
                    f"steps_per_bit={steps_per_bit} with significance={significance:g}: a half of one step has no "
                    "variance; give 4 steps or more, or significance=None"
                )
        self.low, self.high, self.steps_per_bit = low, high, steps_per_bit
        self.threshold, self.better, self.every = float(threshold), better, every
        self.significance = None if significance is None else float(significance)
        self._state = _Ladder()
        self._close()

    @classmethod
    def of_first_cycle(cls, schedule: "Cyclic", **changes: Any) -> "RangeTest":
        """The test in the first cycle of a schedule: from 2 bits on, widths share the cycle, 10 steps or more each.

        Args:
            schedule: whose `high` is the last width.
            changes: arguments of the class in place of those.
        """
        low = min(2, schedule.high)
        steps = max(schedule.period // max(schedule.high - low, 1), _LEAST_STEPS)
        return cls(**{"low": low, "high": schedule.high, "steps_per_bit": steps, **changes})

    def __repr__(self) -> str:
        now = f"at {self.current_bits} bits" if self.chosen is None else f"chose {self.chosen} bits"
        return f"RangeTest(low={self.low}, high={self.high}, steps_per_bit={self.steps_per_bit}, {now})"

    @property
    def tried(self) -> tuple[Tried, ...]:
        """A row for each width that is done."""
        return tuple(
            Tried(
                bits=bits,
                steps=steps,
                first=first,
                last=last,
                gain=gain,
                error=error,
                progress=self._is_progress(gain, error),
            )
            for bits, steps, first, last, gain, error in self._state.tried
        )

    @property
    def chosen(self) -> int | None:
        """The lowest width that makes progress; None while no width has shown it."""
        return self._state.chosen

    @property
    def done(self) -> bool:
        """Whether no width is left to train at."""
        return len(self._state.tried) == self.most_steps // self.steps_per_bit or (
            self.chosen is not None and not self.every
        )

    @property
    def most_steps(self) -> int:
        """Training steps that the whole test may take."""
        return (self.high - self.low + self.every) * self.steps_per_bit

    @property
    def current_bits(self) -> int:
        """The width to train the next step at: the chosen one once the test is over."""
        return self.chosen if self.done and self.chosen else self.low + len(self._state.tried)

    @property
    def current_grad_bits(self) -> None:
        """None: gradients stay as they are."""
        return

    @property
    def max_bits(self) -> int:
        """The highest width of the test."""
        return self.high

    def update(self, measure: float | Tensor) -> bool:
        """Take the measure of the step that just ended.

        Returns:
            Whether the width changes, or the test is over.

        Raises:
            RunError: the measure is inf or nan; nothing changed.
            UsageError: the test is over.
        """
        value = _measure("measure", measure)
        if self.done:
            raise UsageError(f"this range test is over: it chose {self.chosen} bits")
        if not math.isfinite(value):
            raise RunError(
                f"the measure of the range test is {value} at {self.current_bits} bits: training diverged; begin the "
                "test at more bits, or with a smaller learning rate"
            )
        measures = [*self._state.measures, value]
        if len(measures) < self.steps_per_bit:
            self._state = replace(self._state, measures=measures)
            return False
        half = self.steps_per_bit // 2
        first, last = math.fsum(measures[:half]) / half, math.fsum(measures[-half:]) / half
        unit = abs(first) if self.better == "lower" and first else 1.0
        gain = (first - last if self.better == "lower" else last - first) / unit
        error = None
        if half > 1:
            variances = statistics.variance(measures[:half]) + statistics.variance(measures[-half:])
            error = math.sqrt(variances / half) / unit
        bits = self.current_bits
        chosen = bits if self.chosen is None and self._is_progress(gain, error) else self.chosen
        row = (bits, self.steps_per_bit, first, last, gain, error)
        self._state = _Ladder(tried=[*self._state.tried, row], chosen=chosen)
        self._close()
        return True

    def _is_progress(self, gain: float, error: float | None) -> bool:
        """Whether a gain with this standard error counts as progress."""
        return gain > max(self.threshold, (self.significance or 0.0) * (error or 0.0))

    def _close(self) -> None:
        """Choose `high` where no lower width is left."""
        if self.done and self.chosen is None:
            self._state = replace(self._state, chosen=self.high)

    def state_dict(self) -> dict[str, Any]:
        """All that `update` depends on besides the arguments, as plain numbers and lists of them."""
        return {**asdict(self._state), "tried": [list(row) for row in self._state.tried]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from what `state_dict` gave; a UsageError where it is not the state of such a test."""
        check_keys("state of a range test", state, (f.name for f in fields(_Ladder)))
        rows = state["tried"]
        rows = [tuple(row) if isinstance(row, list) else row for row in rows] if isinstance(rows, list) else rows
        loaded: _Ladder = _loaded("a range test", {**state, "tried": rows}, _Ladder)
        tried = loaded.tried
        widths = [row[0] for row in tried]
        fits = len(tried) * self.steps_per_bit <= self.most_steps and len(state["measures"]) < self.steps_per_bit
        if not fits or widths != [*range(self.low, self.low + len(widths))]:
            raise UsageError(
                f"state of a range test that tried {widths} bits: this one goes from {self.low} to {self.high} with "
                f"{self.steps_per_bit} steps at each; give the arguments that it was saved with"
            )
        if any(row[1] != self.steps_per_bit or (row[5] is None) != (self.steps_per_bit < 4) for row in tried):
            raise UsageError(
                f"state of a range test with {shown(tried)}: each width has {self.steps_per_bit} steps, and a standard "
                "error from 4 on"
            )
        over = len(tried) == self.most_steps // self.steps_per_bit
        progress = (row[0] for row in tried if self._is_progress(*row[4:]))
        if loaded.chosen != next(progress, self.high if over else None):
            raise UsageError(f"state of a range test that chose {loaded.chosen} bits: its gains do not lead to that")
        self._state = replace(loaded, measures=list(loaded.measures))


@dataclass(frozen=True, kw_only=True)
class Template:
    """A schedule before the length of the run is known, as recipes hold it.

    Args:
        kind: ``"constant"``, ``"piecewise"``, ``"cyclic"`` or ``"progressive"``.
        settings: the arguments of that class, without `total_steps` and `steps_per_epoch`.

    Raises:
        UsageError: no such kind or argument, or a value that no run could have.
    """

    kind: str
    settings: tuple[tuple[str, Any], ...]

    def __post_init__(self) -> None:
        if not isinstance(self.kind, str) or self.kind not in _KINDS:
            raise unknown("kind of schedule", self.kind, _KINDS)
        check_type("settings", self.settings, tuple[tuple[str, Any], ...])
        for name in dict(self.settings):
            if name not in self.allowed:
                raise unknown(f"setting of a {self.kind} schedule", name, self.allowed)
        if absent := [name for name in self.allowed if self._is_needed(name) and name not in dict(self.settings)]:
            raise UsageError(f"a {self.kind} schedule lacks {', '.join(absent)}")
        # A run long enough for any setting: what fails here fails in every run.
        self.build(total_steps=10**9, steps_per_epoch=10**6)

    @property
    def allowed(self) -> tuple[str, ...]:
        """The names of the settings that this kind has."""
        return tuple(name for name in signature(_KINDS[self.kind]).parameters if name not in _OF_THE_RUN)

    @property
    def values(self) -> dict[str, Any]:
        """Every setting of this kind with its value, the defaults included."""
        parameters = signature(_KINDS[self.kind]).parameters
        return {name: dict(self.settings).get(name, parameters[name].default) for name in self.allowed}

    def _is_needed(self, name: str) -> bool:
        return signature(_KINDS[self.kind]).parameters[name].default is Parameter.empty

    def replace(self, **settings: Any) -> "Template":
        """The same with some settings changed, e.g. ``template.replace(cycles=8)``."""
        return replace(self, settings=tuple({**dict(self.settings), **settings}.items()))

    @checked
    def build(self, *, total_steps: int, steps_per_epoch: int | None = None) -> Source:
        """The schedule of a run of that length.

        Raises:
            UsageError: the settings do not fit the run, e.g. more cycles than steps.
        """
        run = {"total_steps": total_steps, "steps_per_epoch": steps_per_epoch}
        parameters = signature(_KINDS[self.kind]).parameters
        schedule: Source = _KINDS[self.kind](
            **dict(self.settings), **{name: value for name, value in run.items() if name in parameters}
        )
        return schedule

    def __str__(self) -> str:
        return f"{self.kind}({', '.join(f'{name}={value}' for name, value in self.settings)})"


_KINDS: Mapping[str, Callable[..., Any]] = MappingProxyType(
    {"constant": Constant, "piecewise": Piecewise, "cyclic": Cyclic, "progressive": Progressive}
)
_OF_THE_RUN = ("total_steps", "steps_per_epoch")


def bit_operations(schedule: Schedule, grad_bits: int | Schedule) -> float:
    """Bit operations per MAC of `output`, summed over the three products and averaged over the steps: b² + 2 b g.

    One multiplication of an m-bit by an n-bit number counts as m n bit operations: b b in `output`, b g in each of
    `grad_input` and `grad_weight`. The whole run is counted, with the bits of each step. Additions, quantization,
    normalisation, optimizer, evaluation and memory traffic are not.

    Args:
        schedule: bits of `input` and `weight`.
        grad_bits: bits of `grad_output`, in both of its products.

    Raises:
        UsageError: the two schedules have different lengths.

    Source: the authors' code of FracTrain and CPT, which divide it by 3 * 32**2.
    """
    if not isinstance(schedule, Schedule):
        raise UsageError(f"schedule={shown(schedule)}: give a schedule, e.g. Constant(bits=8)")
    check_type("grad_bits", grad_bits, int | Schedule)
    backward = Constant(bits=grad_bits) if isinstance(grad_bits, int) else grad_bits
    lengths = {total for total in (schedule.total_steps, backward.total_steps) if total is not None}
    if len(lengths) > 1:
        raise UsageError(f"schedules of {sorted(lengths)} steps: give them the same total_steps")
    steps = range(max(lengths, default=1))
    return sum(b * b + 2 * b * g for b, g in zip(map(schedule, steps), map(backward, steps), strict=True)) / len(steps)


def saving(schedule: Schedule, *, grad_bits: int = 8, high: int = 8) -> float:
    """Percent of bit operations that a schedule saves against `high` bits all the time, gradients alike in both.

    Args:
        schedule: bits of `input` and `weight`.
        grad_bits: bits of `grad_output`.
        high: bits of `input` and `weight` in the static run.

    Returns:
        ``100 (1 - mean(b² + 2 b g) / (high² + 2 high g))``, see `bit_operations`; negative where it costs more.
    """
    check_type("grad_bits", grad_bits, int)
    _check_bits("high", high)
    return 100 * (1 - bit_operations(schedule, grad_bits) / bit_operations(Constant(bits=high), grad_bits))


def _check_bits(what: str, bits: int) -> None:
    """Raise a UsageError unless `bits` is a whole number from 1 to 32."""
    if not is_whole(bits) or not 1 <= bits <= 32:
        raise UsageError(f"{what}={shown(bits)}: bits are whole numbers from 1 to 32")


def _loaded(what: str, state: object, expected: type[Any]) -> Any:
    """A saved state as the class that remembers it; a UsageError unless each field is of its type and finite."""
    check_keys(f"state of {what}", state, (f.name for f in fields(expected)))
    assert isinstance(state, Mapping)
    loaded = expected(**state)
    try:
        check_fields(loaded)
    except UsageError as error:
        raise UsageError(f"state of {what}: {error}") from error
    if bad := [name for name, value in state.items() if not _all_finite(value)]:
        raise UsageError(f"state of {what}: {bad[0]}={shown(state[bad[0]])} is not finite")
    return loaded


def _all_finite(value: object) -> bool:
    """Whether a number, or every number in a list, is neither inf nor nan."""
    if isinstance(value, list | tuple):
        return all(map(_all_finite, value))
    return not isinstance(value, float) or math.isfinite(value)


def _measure(what: str, given: Any) -> float:
    """One number that the run measured, also as a tensor; a UsageError where it is not one."""
    if not (isinstance(given, Tensor) and given.numel() == 1 and not given.is_meta and not given.is_complex()):
        check_type(what, given, float)
    return float(given)


def _check_step(step: int, total_steps: int | None) -> None:
    """Raise a UsageError unless the schedule covers `step`."""
    if not is_whole(step) or not 0 <= step < (_MOST_STEPS if total_steps is None else total_steps):
        last = "on" if total_steps is None else f"to {total_steps - 1}"
        raise UsageError(
            f"step {shown(step)} of a schedule with total_steps={total_steps}: it has bits from step 0 {last}; "
            "give it as many total_steps as the run has"
        )


def _count(what: str, given: int) -> int:
    """`given` itself; a UsageError unless it is a whole number, 1 or more."""
    if not is_whole(given) or not 1 <= given <= _MOST_STEPS:
        raise UsageError(f"{what}={shown(given)}: give a whole number, 1 or more")
    return given
