"""Estimates: what a product, a layer or a run costs on an accelerator, by the stores that its data passes.

A store is a place where data lies, e.g. a buffer or DRAM. Cycles, bits and energies are those of the whole batch;
one multiply-accumulate is one operation.
"""

import functools
import operator
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, TypeVar, final

from lowbit.errors import UsageError, shown, unknown
from lowbit.inputs.checks import check_fields, check_type, check_whole, is_finite


@final
@dataclass(frozen=True, kw_only=True)
class Store:
    """What passes one store.

    Args:
        name: letters, digits and underscores, e.g. ``"weight_buffer"``; not ``"core"`` or ``"energy"``, which reports
            have besides the stores.
        read: bits read from it.
        written: bits written to it.
        energy_nj: energy of both, in nJ.

    Raises:
        UsageError: a name that is not allowed, a negative count, or an energy that is negative or not finite.
    """

    name: str
    read: int
    written: int
    energy_nj: float

    def __post_init__(self) -> None:
        check_fields(self)
        if not self.name.isidentifier() or self.name in ("core", "energy"):
            raise UsageError(
                f"name={shown(self.name)}: give a store letters, digits and underscores, e.g. 'dram'; 'core' and "
                "'energy' are taken"
            )
        check_whole(f"{self.name}: read", self.read, 0)
        check_whole(f"{self.name}: written", self.written, 0)
        _check_amount(f"{self.name}: energy_nj", self.energy_nj)

    def __add__(self, other: "Store") -> "Store":
        return Store(
            name=self.name,
            read=self.read + other.read,
            written=self.written + other.written,
            energy_nj=self.energy_nj + other.energy_nj,
        )

    def __mul__(self, times: int) -> "Store":
        return Store(
            name=self.name, read=self.read * times, written=self.written * times, energy_nj=self.energy_nj * times
        )


@final
@dataclass(frozen=True)
class Loop:
    """One level of the loop over tiles: ``count`` tiles of ``size``, e.g. 3 of 128 input channels."""

    name: str
    count: int
    size: int


@final
@dataclass(frozen=True, kw_only=True)
class Estimate:
    """What one product of a layer, or a sum of products, costs.

    ``a + b``, ``a * times`` and `total` give sums; products run one after the other.

    Args:
        macs: multiply-accumulates, at least 1.
        compute_cycles: cycles in which the units work, padding included, at least 1.
        stall_cycles: cycles in which they wait for data.
        memory_cycles: cycles that the outermost store needs for its bits alone.
        seconds: all cycles at the accelerator's frequency.
        core_nj: energy of the units that multiply, in nJ.
        stores: what passes each store, from the units outwards; the last one is the memory outside the chip.
        loops: the tiles and the order of the loops over them, from outer to inner; empty for a sum.
        notes: what the accelerator assumed for this product besides what its page says, one sentence each.

    Raises:
        UsageError: a negative count, a number that is not finite, no store, or two stores with one name.
    """

    macs: int
    compute_cycles: int
    stall_cycles: int
    memory_cycles: int
    seconds: float
    core_nj: float
    stores: tuple[Store, ...]
    loops: tuple[Loop, ...] = ()
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        check_fields(self)
        for name, least in (("macs", 1), ("compute_cycles", 1), ("stall_cycles", 0), ("memory_cycles", 0)):
            check_whole(name, getattr(self, name), least)
        _check_amount("seconds", self.seconds)
        _check_amount("core_nj", self.core_nj)
        if len(set(self._names())) < max(1, len(self.stores)):
            raise UsageError(f"stores={', '.join(self._names()) or '()'}: give one or more, each with its own name")

    @property
    def cycles(self) -> int:
        """Compute and stall cycles."""
        return self.compute_cycles + self.stall_cycles

    @property
    def energy_nj(self) -> float:
        """Energy of the units and of all stores, in nJ."""
        return functools.reduce(operator.add, (store.energy_nj for store in self.stores), self.core_nj)

    @property
    def outermost(self) -> Store:
        """The memory outside the chip."""
        return self.stores[-1]

    @property
    def operations_per_memory_bit(self) -> float:
        """Arithmetic intensity: multiply-accumulates for each bit to or from the outermost store."""
        bits = self.outermost.read + self.outermost.written
        return self.macs / bits if bits else float("inf")

    @property
    def operations_per_cycle(self) -> float:
        """Multiply-accumulates per cycle, stalls included; the accelerator's peak is the roof."""
        return self.macs / self.cycles

    @property
    def bound(self) -> Literal["compute", "memory"]:
        """What limits the speed: the outermost store if it needs more cycles than the units, else the units."""
        return "memory" if self.memory_cycles > self.compute_cycles else "compute"

    def store(self, name: str) -> Store:
        """What passes one store.

        Raises:
            UsageError: no store has that name.
        """
        found = {store.name: store for store in self.stores}
        if name not in found:
            raise unknown("store", name, found)
        return found[name]

    def __add__(self, other: "Estimate") -> "Estimate":
        if self._names() != other._names():
            raise UsageError(
                f"stores {', '.join(self._names())} and {', '.join(other._names())}: estimates add up only if their "
                "stores are the same; add those of one accelerator"
            )
        return Estimate(
            **{name: getattr(self, name) + getattr(other, name) for name in _SUMMED},
            stores=tuple(map(operator.add, self.stores, other.stores)),
            notes=tuple(dict.fromkeys(self.notes + other.notes)),
        )

    def __mul__(self, times: int) -> "Estimate":
        check_whole("times", times, 1)
        return Estimate(
            **{name: getattr(self, name) * times for name in _SUMMED},
            stores=tuple(store * times for store in self.stores),
            notes=self.notes,
        )

    def _names(self) -> list[str]:
        return [store.name for store in self.stores]


# Fields of an estimate that are plain numbers.
_SUMMED = ("macs", "compute_cycles", "stall_cycles", "memory_cycles", "seconds", "core_nj")


@final
@dataclass(frozen=True, kw_only=True)
class TrainingEstimate:
    """What the three products of a layer cost in one training step; sums like `Estimate`.

    Args:
        output: input times weight.
        grad_input: grad_output times weight; None for a first layer, whose input needs no gradient.
        grad_weight: grad_output times input.
    """

    output: Estimate
    grad_input: Estimate | None
    grad_weight: Estimate

    @property
    def total(self) -> Estimate:
        """The products together, one after the other."""
        return total(product for product in (self.output, self.grad_input, self.grad_weight) if product is not None)

    def __add__(self, other: "TrainingEstimate") -> "TrainingEstimate":
        both = [product for product in (self.grad_input, other.grad_input) if product is not None]
        return TrainingEstimate(
            output=self.output + other.output,
            grad_input=total(both) if both else None,
            grad_weight=self.grad_weight + other.grad_weight,
        )


Summable = TypeVar("Summable", Estimate, TrainingEstimate)


def total(estimates: Iterable[Summable]) -> Summable:
    """The sum of estimates: layers of a network, products of a layer, or steps of a run.

    Args:
        estimates: at least one, all of one type and of one accelerator.

    Raises:
        UsageError: no estimate is given, or their stores differ.
    """
    check_type("estimates", estimates, Iterable)
    estimates = list(estimates)
    for estimate in estimates:
        check_type("estimates", estimate, Estimate | TrainingEstimate)
    if not estimates:
        raise UsageError("no estimates were given: a sum needs at least one; estimate a layer first")
    return functools.reduce(operator.add, estimates)


def _check_amount(what: str, value: float) -> None:
    if not is_finite(value) or value < 0:
        raise UsageError(f"{what}={shown(value)}: allowed are finite numbers from 0")
