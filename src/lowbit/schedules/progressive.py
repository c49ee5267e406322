"""PFQ, progressive fractional quantization: a list of bits, of which the next begins when the loss has settled.

Source: Fu et al. 2020, FracTrain, arXiv:2012.13113, section 3.1.
"""

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

from torch import Tensor

from lowbit.errors import UsageError, shown
from lowbit.schedules.checks import check_bits
from lowbit.schedules.plateau import PlateauRule
from lowbit.schedules.source import Follows, Rule


class Progressive(Rule):
    """A list of bits, of which the next begins when the loss of the epochs has settled (see `PlateauRule`).

    Args:
        bits: bits of `input` and `weight` in each stage, never falling, e.g. ``[3, 4, 6, 8]``.
        grad_bits: bits of `grad_output` in each stage, never falling, as many as `bits`.
        threshold: how flat the loss is at a plateau, epsilon of the paper, 0 or more.
        decay: factor of the threshold at the first two switches, alpha of the paper, 0 to 1.

    Raises:
        UsageError: a value outside the above.

    Source: that of `PlateauRule`.
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
                check_bits(name, width)
            if any(later < earlier for earlier, later in pairwise(stages)):
                raise UsageError(f"{name}={list(stages)}: precision never goes down from one stage to the next")
        self._plateau = PlateauRule(stages=len(bits), threshold=threshold, decay=decay)
        self._bits, self._grad_bits = tuple(bits), tuple(grad_bits)

    def __repr__(self) -> str:
        return (
            f"Progressive(bits={list(self.bits)}, grad_bits={list(self.grad_bits)}, threshold={self.threshold}, "
            f"decay={self._plateau.decay}, stage={self.stage})"
        )

    @property
    def bits(self) -> tuple[int, ...]:
        """Bits of `input` and `weight` in each stage."""
        return self._bits

    @property
    def grad_bits(self) -> tuple[int, ...]:
        """Bits of `grad_output` in each stage."""
        return self._grad_bits

    @property
    def stage(self) -> int:
        """The present stage, from 0."""
        return self._plateau.stage

    @property
    def threshold(self) -> float:
        """Epsilon of the present stage."""
        return self._plateau.threshold

    @property
    def scale(self) -> float:
        """Sigma: the mean of the first losses, at most 10 of them; 1 before the first."""
        return self._plateau.scale

    @property
    def follows(self) -> Follows:
        """The mean loss of each epoch."""
        return self._plateau.follows

    @property
    def current_bits(self) -> int:
        """Bits of `input` and `weight` until the next `update`."""
        return self.bits[self.stage]

    @property
    def current_grad_bits(self) -> int:
        """Bits of `grad_output` until the next `update`."""
        return self.grad_bits[self.stage]

    @property
    def max_bits(self) -> int:
        """Bits of `input` and `weight` in the last stage."""
        return self.bits[-1]

    def widths(self) -> list[int]:
        """The bits of each stage, and the highest."""
        return [*self.bits, self.max_bits]

    def grad_widths(self) -> list[int]:
        """The bits of gradients in each stage."""
        return [*self.grad_bits]

    def update(self, epoch_loss: float | Tensor) -> bool:
        """Take the mean loss of the epoch that just ended, as `PlateauRule.update`."""
        return self._plateau.update(epoch_loss)

    def state_dict(self) -> dict[str, Any]:
        """The state of the plateau rule."""
        return self._plateau.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from what `state_dict` gave; a UsageError if it is not the state of such a rule."""
        self._plateau.load_state_dict(state)


MAKES = {"progressive": Progressive}
