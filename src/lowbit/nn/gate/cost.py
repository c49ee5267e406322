"""What a choice of bits costs, and in which direction the cost is trained.

Notation: as in `lowbit.nn.gate`.
"""

from torch import Tensor

from lowbit.nn.site import Site

# A full-precision multiplication counts as one of 32 by 32 bits.
_FULL = 32 * 32
SKIP = (0, 0)


def direction(cost: float, *, target: float, band: float, inside: float) -> float:
    """The factor of the cost term: +1 above the target, -1 below it, `inside` times that within the band.

    Args:
        cost: of the present batch, in percent of full precision.
        target: what it should be, in percent.
        band: half the width of the band, in percent; 0: none.
        inside: factor within the band.
    """
    if cost >= target + band:
        return 1.0
    if cost < target - band:
        return -1.0
    return inside if cost >= target else -inside


def products_cost(bits: Tensor | None) -> float:
    """Full-precision multiplications per MAC of the three products: ``(w a + w g + a g) / 32**2``.

    Args:
        bits: widths of the operands, int64 ``(6,)`` in the order of `lowbit.recipe.SLOTS`.
    """
    assert bits is not None
    b = bits.tolist()
    return float(b[0] * b[1] + b[2] * b[3] + b[4] * b[5]) / _FULL


def _bits_at(site: Site, pair: tuple[int, int]) -> Tensor | None:
    """The site's bits with those of a choice; None for the choice that skips."""
    if pair == SKIP:
        return None
    bits = site.widths().clone()
    bits[list(site.slots("input"))] = pair[0]
    bits[list(site.slots("grad_output"))] = pair[1]
    return bits
