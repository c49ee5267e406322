"""What steps spent in bit operations, beside what the same products would at static 8 bits and in fp32."""

from collections.abc import Iterable, Mapping
from types import MappingProxyType

from lowbit.evidence.records import PLAIN, Total

FULL_PRECISION = (32, 32)  # bits of the operands that savings are against
STATIC = (8, 8)


class Spent:
    """The bit operations of steps so far, beside those of the same products at other widths."""

    def __init__(self) -> None:
        self._ran, self._static, self._full = 0.0, 0, 0

    def add(self, totals: Iterable[Total], gated: Mapping[str, float] = MappingProxyType({})) -> None:
        """Add what ran; `gated` has the bit operations per MAC of the layers whose bits gates choose in a plan."""
        for each in totals:
            own, macs = each.bit_operations, each.macs
            self._full += FULL_PRECISION[0] * FULL_PRECISION[1] * macs
            if each.product.engine == PLAIN:
                self._ran += own
                self._static += own
            else:
                layer = each.product.layer
                self._ran += macs * gated[layer] if layer in gated else own
                self._static += STATIC[0] * STATIC[1] * macs

    def saved(self) -> dict[str, float]:
        """See `Cost.saved`."""
        others = {"static 8 bits": self._static, "fp32": self._full}
        return {name: 100 * (1 - self._ran / operations) for name, operations in others.items() if operations}
