"""The products of one training step as workloads of other people's simulators: ZigZag and SCALE-Sim.

Both take one pass over a network, so a workload is the last step of a ledger, forward and backward; ``ledger.until(n)``
ends a ledger with an earlier one, and ``ledger.at("w4a4g8")`` gives it other widths. A product that ran several times
in the step is there as many times. Products without a multiplication are left out.

Sources: the formats are those that ZigZag 3.9.1 (``WorkloadValidator``) and SCALE-Sim 3.0.0 (``topologies``) read.
"""

import json
from collections.abc import Iterator
from typing import Any

from lowbit.errors import UsageError
from lowbit.evidence.ledger import Ledger
from lowbit.evidence.records import Product
from lowbit.hardware.matrix import as_matrix
from lowbit.inputs.checks import check_whole, checked


@checked
def zigzag(ledger: Ledger, *, sum_bits: int = 16) -> str:
    """A workload of ZigZag, in YAML.

    The `output` of a convolution with two spatial axes keeps its loops; every other product is a matrix product, as
    `lowbit.hardware.as_matrix` unfolds it, with a loop G over groups, heads or samples where there are several. Both
    operands come from memory. The padding is what the shapes imply; dilation is not in a ledger and taken as 1.

    Args:
        ledger: of a run or a plan, with at least one step.
        sum_bits: width of sums and of results in bits, which a ledger does not say: 16 is what the accumulators of
            most of ZigZag's own accelerators have; lowbit's engines sum integers in 32 bits.

    Raises:
        UsageError: the ledger has no step.
    """
    check_whole("sum_bits", sum_bits, 1)
    layers = [
        {"id": i, "name": _name(product), **_loops(product, sum_bits), "operand_source": {"I": i, "W": i}}
        for i, product in enumerate(_products(ledger))
    ]
    # A list of mappings whose values are JSON, which is YAML too.
    lines = (f"{'-' if first else ' '} {name}: {json.dumps(value)}" for first, name, value in _entries(layers))
    return "\n".join(lines) + "\n"


@checked
def scale_sim(ledger: Ledger) -> str:
    """A topology of SCALE-Sim, as CSV of matrix products (``-i gemm``): M rows, N columns, K in each sum.

    SCALE-Sim has neither widths nor batches of products: a name that ends in ``_xT`` stands for T products of this
    shape (groups of a convolution, heads of an attention), so its cycles count T times.

    Args:
        ledger: of a run or a plan, with at least one step.

    Raises:
        UsageError: the ledger has no step.
    """
    lines = ["Layer, M, N, K,"]
    for product in _products(ledger):
        matrix = as_matrix(product)
        times = f"_x{matrix.times}" if matrix.times > 1 else ""
        lines.append(f"{_name(product)}{times}, {matrix.rows}, {matrix.columns}, {matrix.summed},")
    return "\n".join(lines) + "\n"


def _products(ledger: Ledger) -> Iterator[Product]:
    if not ledger.steps:
        raise UsageError("the ledger has no step, and a workload is the last step of one")
    for product, calls in ledger.last_step():
        if product.macs:
            yield from [product] * calls


def _name(product: Product) -> str:
    """Layer and product; a comma would end a field of SCALE-Sim's."""
    return f"{product.layer or 'model'}.{product.product}".replace(",", "_")


def _entries(layers: list[dict[str, Any]]) -> Iterator[tuple[bool, str, Any]]:
    for layer in layers:
        for i, (name, value) in enumerate(layer.items()):
            yield not i, name, value


def _loops(product: Product, sum_bits: int) -> dict[str, Any]:
    if product.product == "output" and product.kind == "conv2d" and not product.transposed:
        return _convolution(product, sum_bits)
    matrix = as_matrix(product)
    group, sizes = ("[g]", {"G": matrix.times}) if matrix.times > 1 else ("", {})
    sizes = {**sizes, "B": matrix.rows, "C": matrix.summed, "K": matrix.columns}
    return {
        "operator_type": "Gemm",
        "equation": f"O{group}[b][k]+=I{group}[b][c]*W{group}[c][k]",
        "dimension_relations": [],
        **_sized(sizes),
        "operand_precision": _precision(matrix.left_bits, matrix.right_bits, sum_bits),
    }


def _convolution(product: Product, sum_bits: int) -> dict[str, Any]:
    outputs, channels, *taps = product.weight
    group, sizes = ("[g]", {"G": product.groups}) if product.groups > 1 else ("", {})
    sizes = {**sizes, "B": product.input[0], "K": outputs // product.groups, "C": channels}
    positions, given = product.output[2:], product.input[2:]
    sizes |= {"OY": positions[0], "OX": positions[1], "FY": taps[0], "FX": taps[1]}
    spans = [(p - 1) * s + t for p, s, t in zip(positions, product.stride, taps, strict=True)]
    missing = [max(0, span - size) for span, size in zip(spans, given, strict=True)]
    return {
        "operator_type": "Conv",
        "equation": f"O[b]{group}[k][oy][ox]+=W{group}[k][c][fy][fx]*I[b]{group}[c][iy][ix]",
        "dimension_relations": [f"i{a}={s}*o{a}+1*f{a}" for a, s in zip("yx", product.stride, strict=True)],
        **_sized(sizes),
        "pr_loop_dims": ["IY", "IX"],
        "pr_loop_sizes": list(given),
        "padding": [[pad // 2, pad - pad // 2] for pad in missing],
        "operand_precision": _precision(*product.bits, sum_bits),
    }


def _sized(sizes: dict[str, int]) -> dict[str, Any]:
    return {"loop_dims": list(sizes), "loop_sizes": list(sizes.values())}


def _precision(left: int, right: int, sums: int) -> dict[str, int]:
    return {"I": left, "W": right, "O": sums, "O_final": sums}
