"""The array of Fusion Units: its settings, the widths it multiplies, and one product as it runs there.

Notation: a product has batch B, output O x O, kernel K x K, stride S, input channels I, output channels F; `input`
has a bits, `weight` has w bits. The array has N rows and M columns of Fusion Units, each of which makes P products of
these widths in one cycle.
"""

import dataclasses
from abc import ABC, abstractmethod
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from typing import TypeVar, final

from torch import Tensor

from lowbit.errors import UsageError, shown
from lowbit.evidence.records import Product
from lowbit.hardware.energies import Bank, Energies, resolved
from lowbit.hardware.estimate import Estimate
from lowbit.inputs.checks import is_finite, is_whole

OUTPUT_BITS = 32  # a partial sum in the output buffer and in DRAM, whatever the widths of the operands
UNIT_BITS = 16  # the widest operand that Fusion Units are published for
MAX_BITS = 64  # the widest operand that is estimated

Size = TypeVar("Size", int, Tensor)


def ceil_div(x: Size, y: int) -> Size:
    """``ceil(x / y)`` of whole numbers."""
    return -(-x // y)


def check_count(name: str, value: int) -> None:
    """Raise a UsageError unless a value is a positive whole number of 63 bits."""
    if not is_whole(value) or not 1 <= value < 2**63:
        raise UsageError(f"{name}={shown(value)}: allowed are whole numbers from 1; give a positive int")


def check_bits(name: str, value: int, most: int = MAX_BITS) -> None:
    """Raise a UsageError unless a value is a width from 1 to `most`."""
    if not is_whole(value) or not 1 <= value <= most:
        raise UsageError(
            f"{name}={shown(value)}: the array has widths from 1 to {most} bits; give a whole number in that range"
        )


@final
@dataclass(frozen=True, kw_only=True)
class Layer:
    """One product as the array runs it; a linear layer has K = O = S = 1.

    Args:
        kernel: K, in pixels.
        output_size: O, in pixels.
        stride: S, in pixels.
        in_channels: I.
        out_channels: F.
        batch: B, in samples.
        input_bits: a, 1 to 64 bits.
        weight_bits: w, 1 to 64 bits.
        first_layer: whether the layer reads the network's input, which comes unfolded: a row of the array then gets
            any of the K*K*I values of a patch; otherwise it gets any of the I channels of a pixel.

    Raises:
        UsageError: a size is not a positive whole number, or a width is not a whole number from 1 to 64.
    """

    kernel: int
    output_size: int
    stride: int
    in_channels: int
    out_channels: int
    batch: int
    input_bits: int
    weight_bits: int
    first_layer: bool = False

    def __post_init__(self) -> None:
        for name in ("kernel", "output_size", "stride", "in_channels", "out_channels", "batch"):
            check_count(name, getattr(self, name))
        check_bits("input_bits", self.input_bits)
        check_bits("weight_bits", self.weight_bits)
        if not isinstance(self.first_layer, bool):
            raise UsageError(f"first_layer={shown(self.first_layer)}: give True or False")

    @property
    def macs(self) -> int:
        """Multiply-accumulates, ``B O O K K I F``."""
        return self.batch * self.output_size**2 * self.kernel**2 * self.in_channels * self.out_channels


@dataclass(frozen=True, kw_only=True)
class Array(ABC):
    """The settings of an array of Fusion Units; `BitFusion` is the accelerator, and documents them."""

    rows: int = 16
    columns: int = 32
    pmax: int = 8
    pmin: int = 2
    weight_bytes: int = 65536
    input_bytes: int = 32768
    output_bytes: int = 16384
    dram_bits_per_cycle: int = 192
    frequency: float = 500e6
    energies: Energies = dataclasses.field(default_factory=Energies)
    snap_bits: bool = False

    def __post_init__(self) -> None:
        for name in ("rows", "columns", "weight_bytes", "input_bytes", "output_bytes", "dram_bits_per_cycle"):
            check_count(name, getattr(self, name))
        for name in ("pmax", "pmin"):
            check_bits(name, getattr(self, name), UNIT_BITS)
        if self.pmin > self.pmax or self.pmax.bit_count() != 1 or self.pmin.bit_count() != 1:
            raise UsageError(
                f"pmax={self.pmax}, pmin={self.pmin}: both are powers of two up to {UNIT_BITS} and pmin is at most "
                "pmax; choose such a pair, e.g. 8 and 2"
            )
        if not is_finite(self.frequency) or self.frequency <= 0:
            raise UsageError(
                f"frequency={shown(self.frequency)}: allowed are finite numbers above 0; give cycles per second, e.g. "
                "500e6"
            )
        if not isinstance(self.energies, Energies):
            raise UsageError(f"energies={shown(self.energies)}: allowed is an Energies; give e.g. Energies(dram=0.006)")
        if not isinstance(self.snap_bits, bool):
            raise UsageError(f"snap_bits={shown(self.snap_bits)}: give True or False")
        _ = self.costs  # refuses an array without energies

    @abstractmethod
    def product(self, product: Product, *, first_layer: bool = False) -> Estimate:
        """What one call of a product costs; see `lowbit.hardware.Accelerator`."""

    @cached_property
    def costs(self) -> dict[str, float]:
        """What each event costs in nJ, by the names of `Energies`: as given, or as published for these sizes."""
        line = self.pmax**2 // self.pmin
        banks = (
            Bank(buffer="weight", total=self.weight_bytes, banks=self.rows * self.columns, line_bits=line),
            Bank(buffer="input", total=self.input_bytes, banks=self.rows, line_bits=line),
            Bank(buffer="output", total=self.output_bytes, banks=self.columns, line_bits=OUTPUT_BITS),
        )
        return resolved(self.energies, banks, rows=self.rows, columns=self.columns, pmax=self.pmax, pmin=self.pmin)

    @property
    def core_nj(self) -> float:
        """Energy of one compute cycle of the whole array."""
        return self.costs["core"] * self.rows * self.columns

    def peak(self, *, input_bits: int, weight_bits: int) -> float:
        """The roof: multiply-accumulates per cycle with every Fusion Unit busy, ``N M P``.

        Divided by `dram_bits_per_cycle` it is the ridge: from so many operations per DRAM bit on, the array limits the
        speed, and no longer DRAM.

        Args:
            input_bits: width of `input`, 1 to 64.
            weight_bits: width of `weight`, 1 to 64.

        Raises:
            UsageError: a width outside the above.
        """
        widths = self.snapped("input_bits", input_bits), self.snapped("weight_bits", weight_bits)
        return float(self.rows * self.columns * self.products_per_unit(*widths))

    def products_per_unit(self, input_bits: int, weight_bits: int) -> Fraction:
        """Products of one Fusion Unit in one cycle, P; below 1 if several units make one product."""
        return self._share(input_bits) * self._share(weight_bits)

    def _share(self, bits: int) -> Fraction:
        """How many operands of this width one side of a Fusion Unit takes in."""
        if bits > self.pmax:
            return Fraction(1, ceil_div(bits, self.pmax))
        return Fraction(self.pmax // max(bits, self.pmin))

    def snapped(self, name: str, bits: int) -> int:
        """The width that the array works with."""
        check_bits(name, bits)
        return max(self.pmin, 1 << (bits - 1).bit_length()) if self.snap_bits else bits
