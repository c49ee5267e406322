"""How the products of a ledger run on BitFusion: our mapping, since the authors' model has layers of inference only.

Notation as in `lowbit.hardware.bitfusion`. A convolution of square kernel, stride and images is a layer as the model
knows it, each group one of its own. Everything else runs as matrix products of R rows, K products in each sum and N
columns: linear layers, attention, recurrent steps, and, unfolded, convolutions that are 1- or 3-dimensional,
transposed or not square. Of such a layer

- `output` has R samples, K input and N output channels;
- `grad_input` has R samples, N input and K output channels;
- `grad_weight` has K samples, R input and N output channels.

Not modelled: dilation (a kernel of 3 that spans 5 pixels loads a tile of 3), and how operands are rearranged.
"""

import dataclasses
import math
from dataclasses import dataclass

from lowbit.errors import UsageError
from lowbit.hardware.bitfusion import MAX_BITS, BitFusion, Estimate
from lowbit.ledger import Product


@dataclass(frozen=True, kw_only=True)
class _Matrix:
    """A product of R rows, K products in each sum and N columns, so many `times`."""

    rows: int
    summed: int
    columns: int
    times: int = 1


def estimate(array: BitFusion, product: Product, *, first_layer: bool = False) -> Estimate:
    """What one call of a product costs on an array.

    Args:
        array: the accelerator.
        product: from a ledger. A 16-bit float operand is charged as one of 16 bits.
        first_layer: whether the layer reads the network's input, which comes unfolded; counts for convolutions.

    Raises:
        UsageError: the array lacks the widths, nothing is multiplied, or as `BitFusion.estimate`.
    """
    if max(product.bits) > MAX_BITS:
        raise UsageError(
            f"{product.bits[0]}x{product.bits[1]} bits: the array has widths from 1 to {MAX_BITS}; convert this layer "
            "to few bits, or count it elsewhere"
        )
    if product.macs == 0:
        raise UsageError("nothing is multiplied")
    if _is_square(product):
        return _convolution(array, product, first_layer=first_layer and product.product == "output")
    try:
        matrix = _matrix(product)
    except IndexError as error:
        raise UsageError(
            f"a {product.kind} of input {product.input}, weight {product.weight} and output {product.output}: these "
            "shapes have too few axes"
        ) from error
    first, second = product.bits
    batch, inputs, outputs, input_bits, weight_bits = {
        "output": (matrix.rows, matrix.summed, matrix.columns, first, second),
        "grad_input": (matrix.rows, matrix.columns, matrix.summed, first, second),
        "grad_weight": (matrix.summed, matrix.rows, matrix.columns, second, first),
    }[product.product]
    one = array.estimate(
        kernel=1,
        output_size=1,
        stride=1,
        in_channels=inputs,
        out_channels=outputs,
        batch=batch,
        input_bits=input_bits,
        weight_bits=weight_bits,
    )
    return _times(one, matrix.times)


def _times(one: Estimate, times: int) -> Estimate:
    """So many of the same, with the tiles that each has."""
    return dataclasses.replace(one * times, loops=one.loops)


def _is_square(product: Product) -> bool:
    """Whether it is a convolution that the model has a layer for."""
    if product.kind != "conv2d":
        return False
    pairs = product.weight[2:], product.input[2:], product.output[2:], product.stride
    return all(len(set(pair)) == 1 for pair in pairs)


def _convolution(array: BitFusion, product: Product, *, first_layer: bool) -> Estimate:
    """A square convolution, one layer for each group; see `BitFusion.training`."""
    groups, kernel, stride = product.groups, product.weight[2], product.stride[0]
    channels, features = product.weight[1], product.weight[0] // groups
    one = array.product(
        product.product,
        kernel=kernel,
        output_size=product.output[2],
        input_size=product.input[2],
        stride=stride,
        in_channels=channels,
        out_channels=features,
        batch=product.input[0],
        bits=product.bits,
        first_layer=first_layer,
    )
    return _times(one, groups)


def _matrix(product: Product) -> _Matrix:
    """The matrix product that a product is, or becomes when it is unfolded."""
    taps = math.prod(product.weight[2:])
    if product.transposed:
        rows = product.input[0] * math.prod(product.input[2:])
        inputs, outputs = product.weight[0] // product.groups, product.weight[1] * taps
        return _Matrix(rows=rows, summed=inputs, columns=outputs, times=product.groups)
    if product.kind.startswith("conv"):
        rows = product.output[0] * math.prod(product.output[2:])
        inputs, outputs = product.weight[1] * taps, product.weight[0] // product.groups
        return _Matrix(rows=rows, summed=inputs, columns=outputs, times=product.groups)
    rows, summed = math.prod(product.input[:-1]), product.input[-1]
    if product.kind == "linear":
        return _Matrix(rows=rows, summed=summed, columns=product.weight[0])
    if len(product.weight) == 2:
        return _Matrix(rows=rows, summed=summed, columns=product.weight[1])
    times = math.prod(product.output[:-2])
    return _Matrix(rows=product.output[-2], summed=summed, columns=product.output[-1], times=times)
