"""Rules that give each layer its own bits, from what the layer's own products measured.

Notation: b the width of all operands of a layer that can be set; G its weight gradient from operands before they were
rounded, G^ as it ran.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

from lowbit.errors import RunError, UsageError, shown
from lowbit.inputs.checks import check_keys, check_whole, is_whole
from lowbit.schedules.checks import MOST_STEPS, check_bits
from lowbit.schedules.source import Source


@dataclass(frozen=True, kw_only=True)
class Measure:
    """What the products of one layer measured in one step, over all ranks.

    Args:
        bits: b when it ran.
        gradient: ``|G|^2``.
        gradient_error: ``|G^ - G|^2``.
        loss_error: the change of the loss, to first order, if the error of the output points anywhere:
            ``|g| |y^ - y| / sqrt(n)`` with g the gradient of the output y of n numbers.
        macs: multiply-accumulates by the widths of the two operands; None is an operand that has b bits.
    """

    bits: int
    gradient: float
    gradient_error: float
    loss_error: float
    macs: Mapping[tuple[int | None, int | None], int]

    def operations(self, bits: int) -> int:
        """Bit operations of the layer's products at a width."""
        return sum(n * (bits if a is None else a) * (bits if b is None else b) for (a, b), n in self.macs.items())

    @property
    def noise(self) -> float:
        """``|G^ - G| / |G|``; 0 if nothing changed, inf if G is zero and G^ is not."""
        if self.gradient_error == 0:
            return 0.0
        return math.sqrt(self.gradient_error / self.gradient) if self.gradient > 0 else math.inf


@dataclass(frozen=True, kw_only=True)
class Layerwise(ABC):
    """What gives each layer its own bits; `update` is its only transition, and `state_dict` is all that it remembers.

    Args:
        bits: the widths that a layer may have, rising.
        measure_every: steps from one measurement to the next, the first of them at step 0.

    Raises:
        UsageError: a value outside the above.
    """

    bits: Sequence[int]
    measure_every: int = 100
    now: dict[str, int] = field(default_factory=dict, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if not isinstance(self.bits, list | tuple) or len(self.bits) < 2:
            raise UsageError(f"bits={shown(self.bits)}: give two widths or more, e.g. [4, 8]")
        for bits in self.bits:
            check_bits("bits", bits)
        if any(later <= earlier for earlier, later in pairwise(self.bits)):
            raise UsageError(f"bits={list(self.bits)}: give each width once, the smallest first")
        check_whole("measure_every", self.measure_every, 1, MOST_STEPS)

    @property
    def follows(self) -> None:
        """None: it does not see the loss."""
        return

    def begin(self, layers: Sequence[str]) -> None:
        """Start a run of these layers, all at the fewest bits."""
        self.now.clear()
        self.now.update(dict.fromkeys(layers, self.bits[0]))

    def measures(self, step: int) -> bool:
        """Whether a step is measured."""
        return step % self.measure_every == 0

    def take(self, measured: Mapping[str, Measure]) -> bool:
        """`update`, if all that was measured is finite, and whether anything changed.

        Raises:
            RunError: a figure is not finite.
        """
        for layer, found in measured.items():
            if not all(map(math.isfinite, (found.gradient, found.gradient_error, found.loss_error))):
                raise RunError(
                    f"{layer or 'the model'}: the gradient that decides its bits is not finite. lowbit.tripwire(model) "
                    "stops at the first operand with a nan or inf"
                )
        before = dict(self.now)
        self.update(measured)
        return self.now != before

    @abstractmethod
    def update(self, measured: Mapping[str, Measure]) -> None:
        """Take what a step measured of the layers that ran, and change the bits in `now`."""

    def of(self, layer: str) -> "LayerBits":
        """What one layer follows."""
        return LayerBits(rule=self, layer=layer)

    def state_dict(self) -> dict[str, Any]:
        """The bits of each layer."""
        return {"bits": dict(self.now)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from what `state_dict` gave; if it is not such a state, a UsageError, and nothing changes."""
        what = f"state of {type(self).__name__}"
        check_keys(what, state, ("bits",))
        check_keys(f"{what}: bits", state["bits"], self.now)
        for layer, bits in state["bits"].items():
            if not is_whole(bits) or bits not in self.bits:
                raise UsageError(f"{what}: {shown(bits)} bits of {shown(layer)}: expected one of {list(self.bits)}")
        self.now.update(state["bits"])


@dataclass(frozen=True, kw_only=True)
class LayerBits(Source):
    """The bits that a rule gives one layer, for inputs, weights and gradients.

    Args:
        rule: the rule.
        layer: the layer's name.
    """

    rule: Layerwise
    layer: str

    @property
    def total_steps(self) -> int | None:
        """None: it never ends."""
        return None

    @property
    def max_bits(self) -> int:
        """The highest width."""
        return self.rule.bits[-1]

    @property
    def follows(self) -> None:
        """None: the rule is shown what was measured, and not this."""
        return

    @property
    def title(self) -> str:
        """The name of the rule's class."""
        return type(self.rule).__name__

    def at(self, step: int) -> int:  # noqa: ARG002 - only what the run measured decides
        """The present bits, whatever the step."""
        return self.rule.now[self.layer]

    def grad_at(self, step: int) -> int:
        """The same."""
        return self.at(step)

    def widths(self) -> list[int]:
        """All widths that the layer may have."""
        return [*self.rule.bits]

    def grad_widths(self) -> list[int]:
        """The same."""
        return [*self.rule.bits]

    def update(self, loss: Any, /) -> bool:  # noqa: ARG002 - it sees nothing
        """False: nothing changes."""
        return False

    def state_dict(self) -> dict[str, Any]:
        """An empty dict: the rule remembers."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Check that the state is empty."""
        check_keys(f"state of {self.title}", state, ())
