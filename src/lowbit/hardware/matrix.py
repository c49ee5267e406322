"""Products of a ledger as matrix products, which is what most accelerators run.

Notation: a matrix product of R rows, K products in each sum and N columns has R K N multiply-accumulates. A layer
whose `output` is R x K times K x N has

- `grad_input` = grad_output (R x N) times weight (N x K);
- `grad_weight` = input (K x R) times grad_output (R x N).

Convolutions are unfolded: R counts positions of all samples, and K the taps of all input channels of a group. Each
group, and each matrix of a batch of them, is a separate product.
"""

import math
from dataclasses import dataclass
from typing import final

from lowbit.errors import UsageError
from lowbit.evidence.records import Product
from lowbit.inputs.checks import checked


@final
@dataclass(frozen=True, kw_only=True)
class Matrix:
    """``times`` products of a left ``rows x summed`` and a right ``summed x columns`` matrix.

    Args:
        rows: R.
        summed: K.
        columns: N.
        left_bits: width of the left operand in bits.
        right_bits: width of the right operand in bits.
        times: how many such products there are.
    """

    rows: int
    summed: int
    columns: int
    left_bits: int
    right_bits: int
    times: int = 1

    @property
    def macs(self) -> int:
        """Multiply-accumulates of all products together."""
        return self.rows * self.summed * self.columns * self.times


@checked
def as_matrix(product: Product) -> Matrix:
    """The matrix product that a product is, or becomes when it is unfolded.

    Args:
        product: from a ledger.

    Returns:
        A matrix product with exactly the product's multiply-accumulates.

    Raises:
        UsageError: nothing is multiplied, or the shapes have too few axes for their kind.
    """
    if product.macs == 0:
        raise UsageError("nothing is multiplied")
    try:
        rows, summed, columns, times = _forward(product)
    except IndexError as error:
        raise UsageError(
            f"a {product.kind} of input {product.input}, weight {product.weight} and output {product.output}: these "
            "shapes have too few axes"
        ) from error
    first, second = product.bits
    rows, summed, columns, left_bits, right_bits = {
        "output": (rows, summed, columns, first, second),
        "grad_input": (rows, columns, summed, first, second),
        "grad_weight": (summed, rows, columns, second, first),
    }[product.product]
    return Matrix(rows=rows, summed=summed, columns=columns, left_bits=left_bits, right_bits=right_bits, times=times)


def _forward(product: Product) -> tuple[int, int, int, int]:
    """R, K and N of the layer's `output`, and how many such products it has."""
    taps = math.prod(product.weight[2:])
    if product.transposed:
        rows = product.input[0] * math.prod(product.input[2:])
        return rows, product.weight[0] // product.groups, product.weight[1] * taps, product.groups
    if product.kind.startswith("conv"):
        rows = product.output[0] * math.prod(product.output[2:])
        return rows, product.weight[1] * taps, product.weight[0] // product.groups, product.groups
    rows, summed = math.prod(product.input[:-1]), product.input[-1]
    if product.kind == "linear":
        return rows, summed, product.weight[0], 1
    if len(product.weight) == 2:
        return rows, summed, product.weight[1], 1
    return product.output[-2], summed, product.output[-1], math.prod(product.output[:-2])
