"""The rows of a cost: what one product of one layer costs, and its plain values."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from lowbit.evidence import metrics
from lowbit.evidence.records import Product, Total, per_layer
from lowbit.hardware import Estimate


@dataclass(frozen=True)
class Row:
    """One product of one layer at one pair of widths, over the whole run.

    Args:
        total: the product and its calls.
        once: what one call costs on the hardware; None without hardware, or if it cannot run the product.
        reason: why an estimate is missing.
        first_layer: whether its layer reads the network's input.
    """

    total: Total
    once: Estimate | None = None
    reason: str = ""
    first_layer: bool = False

    @property
    def estimate(self) -> Estimate | None:
        """What all calls cost on the hardware."""
        return None if self.once is None else self.once * self.total.calls


def first_layers(totals: Sequence[Total]) -> set[str]:
    """The layers that read the network's input: those that trained their weight without a `grad_input`."""
    return {
        layer
        for layer, each in per_layer(totals)
        if any(t.product.grad_input_bits for t in each) and not any(t.product.product == "grad_input" for t in each)
    }


def layer_of(product: Product) -> str:
    """The layer of a product, for a message."""
    return product.layer or "(model)"


def row_values(row: Row) -> dict[str, Any]:
    """A row as plain values, by the names of CSV columns."""
    product, calls = row.total
    data: dict[str, Any] = {
        "layer": product.layer,
        "kind": product.kind,
        "product": product.product,
        "engine": product.engine,
        "bits": f"{product.bits[0]}x{product.bits[1]}",
        "input": "x".join(map(str, product.input)),
        "weight": "x".join(map(str, product.weight)),
        "output": "x".join(map(str, product.output)),
        "calls": calls,
        "macs": row.total.macs,
        "effective_macs": metrics.effective_macs([row.total]).total,
        "gbitops": metrics.gbitops([row.total]).total,
        "operand_bytes": metrics.operand_bytes([row.total]).total,
    }
    if row.once is not None and row.estimate is not None:
        data |= estimate_values(row.estimate)
        data["loops"] = " ".join(f"{loop.name}:{loop.count}x{loop.size}" for loop in row.once.loops)
    return data | ({"not_estimated": row.reason} if row.reason else {})


def estimate_values(e: Estimate) -> dict[str, Any]:
    """An estimate as plain values; a ratio that is not finite is None."""
    return {
        "cycles": e.cycles,
        "stall_cycles": e.stall_cycles,
        "seconds": e.seconds,
        "energy_nj": e.energy_nj,
        "core_nj": e.core_nj,
        **{f"{store.name}_nj": store.energy_nj for store in e.stores},
        "macs_per_cycle": e.operations_per_cycle,
        f"macs_per_{e.outermost.name}_bit": e.operations_per_memory_bit
        if math.isfinite(e.operations_per_memory_bit)
        else None,
        "bound": e.bound,
    }
