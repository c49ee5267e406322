"""Bits of all layers under a budget of bit operations, solved again every so many steps.

Source: Pan et al. 2026, SNIP, arXiv:2602.01410.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

from lowbit.errors import RunError, UsageError, shown
from lowbit.inputs.checks import is_finite
from lowbit.schedules.allocation import Option, allocate
from lowbit.schedules.layerwise import Layerwise, Measure


@dataclass(frozen=True, kw_only=True)
class Budget(Layerwise):
    """Each layer gets the width that does the least damage to all layers together within a budget.

    The damage of a layer at b bits is its share of the loss divergence plus its share of the weight divergence:
    ``e_l(b) / sum e(low) + r_l(b) / sum r(low)``, where e is the change of the loss to first order by the error of the
    layer's output, r = ``|G^ - G| / |G|``, low the fewest bits, and the sums go over layers. Both are measured at the
    present width; at another they are proportional to the step of the grid, ``1 / (2**b - 1)``.

    Args:
        bits: the widths that a layer may have, rising, e.g. ``[4, 6, 8]``; before the first measurement is used, every
            layer has the first.
        measure_every: steps from one measurement to the next, the first of them at step 0.
        budget: bit operations as a share of those at the last of `bits`, above 0, at most 1.

    Raises:
        UsageError: a value outside the above, or a budget below what the fewest bits need.

    Source: Pan et al. 2026, arXiv:2602.01410: two divergences, an integer program for the widths of layers, solved
        again during training.
    """

    budget: float

    def __post_init__(self) -> None:
        super().__post_init__()
        if not is_finite(self.budget) or not 0 < self.budget <= 1:
            raise UsageError(f"budget={shown(self.budget)}: give a share, above 0 and at most 1")
        least = (self.bits[0] / self.bits[-1]) ** 2
        if self.budget < least:
            raise UsageError(
                f"budget={self.budget}: {self.bits[0]} bits everywhere already take {least:.4g} of the bit operations "
                f"of {self.bits[-1]} bits; allow as much, or give fewer bits"
            )

    def update(self, measured: Mapping[str, Measure]) -> None:
        """Solve for the layers that were measured; others keep their bits.

        Raises:
            RunError: the fewest bits already take more than the budget, as some operands have fixed widths.
        """
        low, high = self.bits[0], self.bits[-1]
        loss = {layer: found.loss_error / _step(found.bits) for layer, found in measured.items()}
        noise = {layer: min(found.noise, 1.0) / _step(found.bits) for layer, found in measured.items()}
        of_loss, of_noise = (math.fsum(each.values()) * _step(low) or 1.0 for each in (loss, noise))
        options = {
            layer: [
                Option(
                    bits=bits,
                    cost=found.operations(bits),
                    damage=_step(bits) * (loss[layer] / of_loss + noise[layer] / of_noise),
                )
                for bits in self.bits
            ]
            for layer, found in measured.items()
        }
        limit = self.budget * sum(found.operations(high) for found in measured.values())
        least = sum(found.operations(low) for found in measured.values())
        if least > limit:
            raise RunError(
                f"budget={self.budget}: {low} bits in every layer take {least * self.budget / limit:.4g} of the bit "
                f"operations of {high} bits, as operands that keep their own width do not shrink; allow as much"
            )
        self.now.update({layer: option.bits for layer, option in allocate(options, limit).items()})


def _step(bits: int) -> float:
    """The step of a grid of so many bits as a share of its range."""
    return 1 / (2.0**bits - 1)


MAKES = {"budget": Budget}
