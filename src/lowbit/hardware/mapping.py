"""The products of training as layers that the array of Fusion Units runs: ours, since the authors have inference only.

Notation as in `lowbit.hardware.array`. A convolution with square kernel, stride and images keeps its shape; each of its
groups is a separate layer. Everything else runs as matrix products, which are linear layers of R samples, K
input and N output channels (`lowbit.hardware.matrix`): linear layers, attention, recurrent steps, and, unfolded,
convolutions that are 1- or 3-dimensional, transposed or not square.

It does not model dilation (a kernel of 3 that spans 5 pixels loads a tile of 3), or how operands are rearranged.
"""

from lowbit.errors import UsageError, unknown
from lowbit.evidence.records import PRODUCTS, Product
from lowbit.hardware.array import Layer, check_count
from lowbit.hardware.matrix import as_matrix


def square(
    name: str,
    *,
    kernel: int,
    output_size: int,
    input_size: int,
    stride: int,
    in_channels: int,
    out_channels: int,
    batch: int,
    bits: tuple[int, int],
    first_layer: bool = False,
) -> Layer:
    """A product of a convolution with square kernel, stride and images, or of a linear layer (all 1).

    - `output`: the layer as it is;
    - `grad_input`: a layer from F to I channels with the same kernel, stride 1 and an output of `input_size`;
      `input` is grad_output. With stride S its zeros between pixels are computed too, S*S times the work;
    - `grad_weight`: a linear layer from B*O*O to F features with batch K*K*I; `weight` is grad_output.

    Args:
        name: ``"output"``, ``"grad_input"`` or ``"grad_weight"``.
        kernel: K, in pixels.
        output_size: O, in pixels.
        input_size: side of the layer's input in pixels, padding left out.
        stride: S, in pixels.
        in_channels: I.
        out_channels: F.
        batch: B, in samples.
        bits: widths of its operands: (input, weight), (grad_output, weight) or (grad_output, input).
        first_layer: whether the layer reads the network's input; counts for its output.

    Raises:
        UsageError: an unknown product; and as for `Layer`.
    """
    check_count("input_size", input_size)
    first, second = bits
    if name == "output":
        return Layer(
            kernel=kernel,
            output_size=output_size,
            stride=stride,
            in_channels=in_channels,
            out_channels=out_channels,
            batch=batch,
            input_bits=first,
            weight_bits=second,
            first_layer=first_layer,
        )
    if name == "grad_input":
        return Layer(
            kernel=kernel,
            output_size=input_size,
            stride=1,
            in_channels=out_channels,
            out_channels=in_channels,
            batch=batch,
            input_bits=first,
            weight_bits=second,
        )
    if name == "grad_weight":
        return _linear(batch * output_size**2, out_channels, kernel**2 * in_channels, second, first)
    raise unknown("product", name, PRODUCTS)


def layers(product: Product, *, first_layer: bool = False) -> tuple[Layer, int]:
    """What a product of a ledger is on the array: a layer, and how many such layers run.

    Args:
        product: from a ledger. A float operand is charged as an integer of its width.
        first_layer: whether the layer reads the network's input, which comes unfolded; counts for the output of
            convolutions.

    Raises:
        UsageError: nothing is multiplied, or the shapes have too few axes; and as for `Layer`.
    """
    if product.macs == 0:
        raise UsageError("nothing is multiplied")
    if _is_square(product):
        layer = square(
            product.product,
            kernel=product.weight[2],
            output_size=product.output[2],
            input_size=product.input[2],
            stride=product.stride[0],
            in_channels=product.weight[1],
            out_channels=product.weight[0] // product.groups,
            batch=product.input[0],
            bits=product.bits,
            first_layer=first_layer,
        )
        return layer, product.groups
    matrix = as_matrix(product)
    return _linear(matrix.summed, matrix.columns, matrix.rows, matrix.left_bits, matrix.right_bits), matrix.times


def _linear(inputs: int, outputs: int, samples: int, input_bits: int, weight_bits: int) -> Layer:
    return Layer(
        kernel=1,
        output_size=1,
        stride=1,
        in_channels=inputs,
        out_channels=outputs,
        batch=samples,
        input_bits=input_bits,
        weight_bits=weight_bits,
    )


def _is_square(product: Product) -> bool:
    """Whether it is a convolution that the array runs as a layer."""
    if product.kind != "conv2d":
        return False
    pairs = product.weight[2:], product.input[2:], product.output[2:], product.stride
    return all(len(set(pair)) == 1 for pair in pairs)
