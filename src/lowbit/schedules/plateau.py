"""PFQ's plateau rule: the next of several stages begins whenever the loss of the epochs has settled.

Source: Fu et al. 2020, FracTrain, arXiv:2012.13113, algorithm 1.
"""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from torch import Tensor

from lowbit.errors import RunError, UsageError, shown
from lowbit.inputs.checks import is_finite
from lowbit.schedules.checks import MOST_STEPS, as_measure, check_count, load_record
from lowbit.schedules.source import Follower, Follows

# The authors' code fixes both: how many epochs must agree, and the mean of how many is the scale.
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
        window: the losses since the last switch, at most the newest 5.
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
        """The state one epoch later: `PlateauRule` documents the rule."""
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


class PlateauRule(Follower):
    """PFQ's plateau rule: the next of several stages begins whenever the loss of the epochs has settled.

    It is applied after each epoch, whose mean loss is L. Sigma is the mean of the losses so far, and of the first ten
    from epoch 10 on. A stage ends when it saw five epochs or more and the last five agree:
    ``|L_j - L| / sigma <= threshold`` for each of the four before the newest. Then the next stage begins, the five are
    forgotten, and after the first and the second switch ``threshold <- threshold * decay``. It never goes back to an
    earlier stage.

    It is a small state machine: `update` is its only transition, and `state_dict` is all that it remembers.

    Args:
        stages: how many there are.
        threshold: epsilon of the paper, 0 or more.
        decay: alpha of the paper, 0 to 1.

    Raises:
        UsageError: a value outside the above.

    Source: Fu et al. 2020, FracTrain, arXiv:2012.13113, algorithm 1; window and scale as in the authors' code.
    """

    def __init__(self, *, stages: int, threshold: float, decay: float) -> None:
        check_count("stages", stages)
        if not is_finite(threshold) or threshold < 0:
            raise UsageError(f"threshold={shown(threshold)}: give a finite number, 0 or more")
        if not is_finite(decay) or not 0 <= decay <= 1:
            raise UsageError(f"decay={shown(decay)}: give a number from 0 to 1")
        self._stages, self._decay = stages, float(decay)
        self._state = _Plateau(threshold=float(threshold))

    def __repr__(self) -> str:
        return f"PlateauRule(stages={self._stages}, threshold={self.threshold}, decay={self.decay}, stage={self.stage})"

    @property
    def follows(self) -> Follows:
        """The mean loss of each epoch, in the last stage too."""
        return "epoch"

    @property
    def decay(self) -> float:
        """Alpha: the factor of the threshold at the first two switches."""
        return self._decay

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
        """Take the mean loss of the epoch that just ended; later steps are of the present stage.

        Returns:
            Whether a new stage began.

        Raises:
            RunError: the loss is inf or nan; nothing changes.
            UsageError: the mean of the first losses is negative, so changes cannot be measured by it.
        """
        loss = as_measure("epoch_loss", epoch_loss)
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
        """Everything that `update` depends on besides the arguments, as plain numbers and one list of them."""
        return asdict(self._state)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from what `state_dict` gave; a UsageError if it is not the state of such a rule."""
        loaded: _Plateau = load_record("a plateau rule", state, _Plateau)
        if not 0 <= loaded.stage < self._stages:
            raise UsageError(
                f"stage {loaded.stage} of a rule with {self._stages} stages: give the stages that it was saved with"
            )
        if not (
            loaded.threshold >= 0
            and _PLATEAU_EPOCHS * loaded.stage <= loaded.epochs <= MOST_STEPS
            and loaded.first_losses >= 0
            and (loaded.epochs > 0 or loaded.first_losses == 0)
            and len(loaded.window) <= min(_PLATEAU_EPOCHS, loaded.epochs)
        ):
            raise UsageError(f"state of a plateau rule {shown(dict(state))}: no epochs lead to these numbers")
        self._state = replace(loaded, window=list(loaded.window))
