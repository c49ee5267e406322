"""A ledger along its steps: the bits of each layer, and the cost so far.

Notation: a column is a stretch of steps; m MACs of a product, b the width of an operand.
"""

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate

from lowbit.evidence.ledger import Ledger
from lowbit.evidence.records import OPERANDS, PLAIN, PRODUCTS

Slot = tuple[str, str]
"""A product and one of its operands."""

SLOTS: tuple[Slot, ...] = tuple((product, operand) for product in PRODUCTS for operand in OPERANDS[product])


@dataclass(frozen=True)
class Bits:
    """The bits of one operand of one product in every layer over the steps of a run.

    Args:
        layers: names of the layers that had this product.
        steps: the first step of each column.
        width: steps in a column; the last one may have fewer.
        values: for each layer the mean bits of each column, weighted by MACs; None where the product did not run.
    """

    layers: Sequence[str]
    steps: Sequence[int]
    width: int
    values: Sequence[Sequence[float | None]]


def bits_over_time(ledger: Ledger, columns: int = 120) -> dict[Slot, Bits]:
    """The bits of each operand of each product: ``sum m b / sum m`` over the calls in each column.

    Args:
        ledger: of a run or a plan.
        columns: the most columns; with as many steps or fewer, each step has one.

    Returns:
        By product and operand, only those that ran in converted layers.
    """
    sums = [_bits_of_program(ledger, index) for index in range(len(ledger.programs))]
    width = max(1, -(-len(ledger.steps) // columns))
    starts = range(0, len(ledger.steps), width)
    ran = [Counter(step.program for step in ledger.steps[start : start + width]) for start in starts]
    keys = [tuple(sorted(programs.items())) for programs in ran]  # many columns ran the same
    found: dict[Slot, Bits] = {}
    places = {layer: i for i, layer in enumerate(_order(ledger))}
    for slot in SLOTS:
        layers = sorted({layer for each in sums for layer in each.get(slot, ())}, key=places.__getitem__)
        means = {key: _mean_bits(sums, slot, layers, key) for key in set(keys)}
        if layers:
            table = [[means[key][i] for key in keys] for i in range(len(layers))]
            found[slot] = Bits(layers, [ledger.steps[start].step for start in starts], width, table)
    return found


def _mean_bits(
    sums: Sequence[Mapping[Slot, Mapping[str, tuple[float, float]]]],
    slot: Slot,
    layers: Sequence[str],
    programs: Sequence[tuple[int, int]],
) -> list[float | None]:
    """The mean bits of an operand in each layer over steps, given as pairs (program, how often)."""
    means: list[float | None] = []
    for layer in layers:
        each = [(times, sums[program].get(slot, {}).get(layer, (0.0, 0.0))) for program, times in programs]
        macs = sum(times * whole for times, (_, whole) in each)
        means.append(round(sum(times * weighted for times, (weighted, _) in each) / macs, 2) if macs else None)
    return means


def _order(ledger: Ledger) -> list[str]:
    """All layers in the order in which the forward pass meets them, the names of `layers` first."""
    forward = [product.layer for product in ledger.products if product.product == "output"]
    return list(dict.fromkeys([*ledger.layers, *forward, *(product.layer for product in ledger.products)]))


def _bits_of_program(ledger: Ledger, index: int) -> Mapping[Slot, Mapping[str, tuple[float, float]]]:
    """``sum m b`` and ``sum m`` of one step by operand and layer, of converted layers."""
    sums: dict[Slot, dict[str, tuple[float, float]]] = defaultdict(dict)
    for number, calls in ledger.programs[index].calls:
        product = ledger.products[number]
        macs = calls * product.macs
        if product.engine == PLAIN or not macs:
            continue
        for operand, bits in zip(OPERANDS[product.product], product.bits, strict=True):
            slot = sums[product.product, operand]
            weighted, whole = slot.get(product.layer, (0.0, 0.0))
            slot[product.layer] = (weighted + macs * bits, whole + macs)
    return sums


def bit_operations_so_far(ledger: Ledger) -> list[int]:
    """Bit operations of the steps of the ledger up to each step, that step included."""
    of_program = [
        sum(calls * ledger.products[number].bit_operations for number, calls in program.calls)
        for program in ledger.programs
    ]
    return list(accumulate(of_program[step.program] for step in ledger.steps))
