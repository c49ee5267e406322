"""An element: what one code of an operand is, and where its codes lie.

Notation: x real value, S scale, z zero point, o float offset, q code, n the largest code, u noise in [0, 1). A code is
a number held in the float dtype of x: ``x ~ (q - z) S + o``.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Literal, Protocol

from torch import Tensor

Zero = Literal["symmetric", "integer", "offset"]
Scaled = Literal["always", "never", "either"]

# Makes the scale for a span and a number of steps, see `lowbit.numerics.scales.Scale.step`.
Step = Callable[[Tensor, Tensor | float], Tensor]


@dataclass(frozen=True, kw_only=True)
class Steps:
    """Where codes lie: ``x ~ (q - zero) * scale + offset`` with ``low <= q <= high``.

    Args:
        scale: broadcasts against x; not 0.
        zero: integer zero points held in float, or None for 0.
        offset: float offsets, or None for 0.
        low: the smallest code, a number or a scalar tensor.
        high: the largest code.
    """

    scale: Tensor
    zero: Tensor | float | None = None
    offset: Tensor | None = None
    low: Tensor | float
    high: Tensor | float


class Element(Protocol):
    """What one code is."""

    kind: ClassVar[str]
    # Whether a schedule or a gate can set its bits.
    has_width: ClassVar[bool]
    scaled: ClassVar[Scaled]

    @property
    def bits(self) -> int:
        """The width of a code, sign included."""

    @property
    def zero(self) -> Zero:
        """Where real zero lies; ``"symmetric"`` if it is the code 0."""

    @property
    def code_range(self) -> tuple[float, float]:
        """The smallest and the largest code."""

    @property
    def margin(self) -> float:
        """How far beyond the largest code a value may lie that still rounds to it: half of the last step."""

    def steps(self, lo: Tensor, hi: Tensor, levels: Tensor | float, step: Step) -> Steps:
        """Where codes lie for values from `lo` to `hi` if `levels` is the largest code."""

    def fixed_steps(self, x: Tensor) -> Steps | None:
        """Where codes lie without a scale; None if `codes` gives the values themselves."""

    def codes(self, x: Tensor, steps: Steps | None, noise: Tensor | None) -> Tensor:
        """The codes of `x`, a new tensor: rounded by `noise`, or without it to nearest with halves to even."""

    def __str__(self) -> str:
        """Its name in reports."""


def bound(t: Tensor, low: Tensor | float, high: Tensor | float) -> Tensor:
    """Clamp `t` in place; nan stays nan."""
    if isinstance(high, Tensor):
        return t.clamp_(low.to(t) if isinstance(low, Tensor) else t.new_tensor(low), high.to(t))
    return t.clamp_(float(low), high)
