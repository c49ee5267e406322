"""More bits for a layer whose gradient no longer stands out of its quantisation noise: the sqrt(3) rule.

Source: Chmiel, Fishman, Banner and Soudry 2025, FP4 All the Way, arXiv:2505.19115.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from lowbit.errors import UsageError, shown
from lowbit.inputs.checks import check_keys, check_whole, is_finite
from lowbit.schedules.checks import MOST_STEPS
from lowbit.schedules.layerwise import Layerwise, Measure


@dataclass(frozen=True, kw_only=True)
class GradientNoise(Layerwise):
    """A layer gets its next width once ``|G| < ratio |G^ - G|``, and never goes back.

    Args:
        bits: the widths that a layer may have, rising, e.g. ``[4, 8]``; all layers begin with the first.
        measure_every: steps from one measurement to the next, the first of them at step 0.
        ratio: how many times the noise the norm of the gradient must be; sqrt(3) in the paper.
        patience: how many measurements in a row must be below before the width changes.

    Raises:
        UsageError: a value outside the above.

    Source: Chmiel, Fishman, Banner and Soudry 2025, arXiv:2505.19115: training in few bits becomes less effective when
        the norm of the gradient falls below about sqrt(3) times the quantisation noise.
    """

    ratio: float = math.sqrt(3)
    patience: int = 1
    below: dict[str, int] = field(default_factory=dict, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not is_finite(self.ratio) or self.ratio <= 0:
            raise UsageError(f"ratio={shown(self.ratio)}: give a finite number above 0; the paper's is the root of 3")
        check_whole("patience", self.patience, 1, MOST_STEPS)

    def begin(self, layers: Any) -> None:
        """Start a run of these layers."""
        super().begin(layers)
        self.below.clear()
        self.below.update(dict.fromkeys(layers, 0))

    def update(self, measured: Mapping[str, Measure]) -> None:
        """Count the measurements in a row in which a layer's gradient is below its noise, and raise its bits."""
        for layer, found in measured.items():
            self.below[layer] = self.below[layer] + 1 if found.noise * self.ratio > 1 else 0
            if self.below[layer] >= self.patience and self.now[layer] < self.bits[-1]:
                self.now[layer] = self.bits[[*self.bits].index(self.now[layer]) + 1]
                self.below[layer] = 0

    def state_dict(self) -> dict[str, Any]:
        """The bits of each layer, and how many measurements in a row it was below."""
        return {**super().state_dict(), "below": dict(self.below)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from what `state_dict` gave; if it is not such a state, a UsageError, and nothing changes."""
        what = f"state of {type(self).__name__}"
        check_keys(what, state, ("bits", "below"))
        check_keys(f"{what}: below", state["below"], self.below)
        for layer, count in state["below"].items():
            check_whole(f"{what}: below of {layer}", count, 0, MOST_STEPS)
        super().load_state_dict({"bits": state["bits"]})
        self.below.update(state["below"])


MAKES = {"gradient-noise": GradientNoise}
