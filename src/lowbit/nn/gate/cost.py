"""What a choice of bits costs, and in which direction the cost is trained.

Notation: as in `lowbit.nn.gate`.
"""

from collections.abc import Mapping

from torch import Tensor, nn

from lowbit.nn.site import Site

# A full-precision multiplication counts as one of 32 by 32 bits.
_FULL = 32 * 32
SKIP = (0, 0)


def direction(cost: float, *, target: float, band: float, inside: float) -> float:
    """The factor of the cost term: +1 above the target, -1 below it, `inside` times that within the band.

    Args:
        cost: the cost of the present batch, in percent of full precision.
        target: what the cost should be, in percent.
        band: half the width of the band, in percent; 0: no band.
        inside: factor within the band.
    """
    if cost >= target + band:
        return 1.0
    if cost < target - band:
        return -1.0
    return inside if cost >= target else -inside


def products_cost(bits: Tensor) -> float:
    """Full-precision multiplications per MAC of the three products: ``(w a + w g + a g) / 32**2``.

    Args:
        bits: widths of the operands, int64 ``(6,)`` in the order of `lowbit.methods.operands.SLOTS`.
    """
    b = bits.tolist()
    return float(b[0] * b[1] + b[2] * b[3] + b[4] * b[5]) / _FULL


def bits_at(site: Site, pair: tuple[int, int]) -> Tensor:
    """The site's bits with those of a choice; the choice must not skip."""
    bits = site.widths().clone()
    bits[list(site.slots("input"))] = pair[0]
    bits[list(site.slots("grad_output"))] = pair[1]
    return bits


def shortcut_of(block: nn.Module) -> nn.Module | None:
    """The child `shortcut` or `downsample` of a block, if it does anything."""
    for name in ("shortcut", "downsample"):
        path = getattr(block, name, None)
        if isinstance(path, nn.Module) and not isinstance(path, nn.Identity):
            return path
    return None


def cost_of(block: nn.Module, macs: Mapping[Site, float], pair: tuple[int, int]) -> float:
    """MACs of full precision that one sample costs at a choice; if it skips, those of its way past the block.

    Args:
        block: the gated block.
        macs: MACs of one sample at each site of the block.
        pair: the choice.
    """
    if pair == SKIP:
        path = shortcut_of(block)
        on_path = set() if path is None else set(path.modules())
        return sum(m * products_cost(site.widths()) for site, m in macs.items() if site in on_path)
    return sum(m * products_cost(bits_at(site, pair) if site.gated else site.widths()) for site, m in macs.items())
