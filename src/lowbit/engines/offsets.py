"""Products of codes whose real zero is not on the grid, ``x = (q - z) S + o``: an integer product plus sums.

``sum (a' + oa)(b' + ob) = sum a' b' + ob sum a' + oa sum b``, where b holds its offset. The first sum is one integer
product; the others are sums of one operand's codes over what the other one reaches. In a convolution a tap that falls
on the padding adds nothing to any of them.

Notation: a, b operands, oa, ob their offsets; a' values without their offset; G groups, P places of a sample.
"""

import math
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from lowbit.engines.base import Product
from lowbit.engines.codes import Codes, per_row
from lowbit.kernels import cpu

Multiply = Callable[[Product, Codes, Codes, Tensor | None], Tensor]


def with_offsets(multiply: Multiply, product: Product, a: Codes, b: Codes, bias: Tensor | None) -> Tensor:
    """The product of two operands, of which at least one has an offset.

    Args:
        multiply: gives the product of two operands without offsets.
        product: what it is.
        a: the first operand; its offsets, if it has any, are those of the whole tensor, or in `output` and `grad_input`
            of its samples.
        b: the second; in `output` and `grad_input` its offsets may be those of the channels that the product keeps.
        bias: added to the result.
    """
    product, a, b = replace(product, dtype=torch.float32), _centred(a), _centred(b)
    plain = replace(a, offset=None), replace(b, offset=None)
    if product.name == "grad_weight":
        y = multiply(product, *plain, bias)
        return y.add_(_of_a_weight(product, a, b)) if y.numel() else y
    if product.op.geometry is None:
        one = a.offset is not None and a.offset.numel() == 1
        if a.offset is not None and one:
            t = a.offset * _rows_of_a_weight(product, b)
            bias = t if bias is None else bias.float() + t
        y = multiply(product, *plain, bias)
        if not y.numel():
            return y
        if a.offset is not None and not one:
            each = per_row(a.offset, y.numel() // y.shape[-1]).view(-1, 1)
            cpu.add_offsets(y, each.contiguous(), _rows_of_a_weight(product, b).contiguous(), y.new_empty(0))
        if b.offset is not None:
            cpu.add_offsets(y, _row_sums(a, 1), b.offset.expand(y.shape[-1]).contiguous(), y.new_empty(0))
        return y
    y = multiply(product, *plain, bias)
    return _add_to_a_convolution(y, product, a, b) if y.numel() else y


def _centred(x: Codes) -> Codes:
    """The same values with the integer zero point that leaves the smallest offset, so that sums cancel little.

    The channels of a weight have one zero point, the mean of their own.
    """
    if x.offset is None:
        return x
    zero = (-x.offset.double() / x.scale.double()).mean()
    at = int(zero.round().clamp(0, 255)) if zero.isfinite() else 0
    return replace(x, zero=at, offset=(x.offset.double() + at * x.scale.double()).float())


def _signed(q: Tensor) -> bool:
    return q.dtype == torch.int8


def _row_sums(a: Codes, groups: int) -> Tensor:
    """The sum of a' over the numbers of each row, or over the channels of a group at each place, ``(rows, groups)``.

    Args:
        a: codes (..., width), or (B, *size, C).
        groups: of channels.
    """
    width = (a.shape[-1] if a.layout == "matrix" else a.shape[1]) // groups
    q = a.numbers.view(-1, width)
    sums = q.sum(1, dtype=torch.float32) if _signed(q) else cpu.row_sums(q, width)
    sums = sums.sub_(a.zero * width).view(-1, groups)
    scale = per_row(a.scale, len(sums))
    return sums.mul_(scale.view(-1, 1))


def _sums_over_samples(x: Codes) -> Tensor:
    """The sum of x' over rows, ``(1, width)``, or over the samples of a batch, ``(1, C, *size)``."""
    samples = x.shape[:-1].numel() if x.layout == "matrix" else x.shape[0]
    shape = (1, x.shape[-1]) if x.layout == "matrix" else (1, *x.shape[2:], x.shape[1])
    q = x.numbers.view(samples, math.prod(shape))
    sums = q.sum(0, dtype=torch.int64) if _signed(q) else cpu.code_sums(q, None, q.shape[1])[0]
    values = sums.sub_(samples * x.zero).view(shape).float().mul_(x.scale)
    return values if x.layout == "matrix" else values.movedim(-1, 1)


def _rows_of_a_weight(product: Product, w: Codes) -> Tensor:
    """The sum of a matrix's values over what the product sums over, float32 ``(columns,)``."""
    axis = 1 if product.name == "output" else 0
    sums = (w.numbers.view(w.shape).sum(axis, dtype=torch.float32) - w.zero * w.shape[axis]) * w.scale
    return sums if w.offset is None else sums + w.shape[axis] * w.offset


def _kernel_sums(w: Codes, groups: int, keeps_first: bool) -> Tensor:
    """The sum of a kernel's values over the channels that a product sums over.

    Returns:
        ``(first axis, 1, *kernel)`` where it keeps the first axis, else ``(G, second axis, *kernel)``.
    """
    first, second, *kernel = w.shape
    q = w.numbers.view(groups, first // groups, math.prod(kernel), second)
    if keeps_first:
        count = second
        sums = q.sum(3, dtype=torch.float32).view(first, 1, *kernel)
        shape = [first, 1, *[1] * len(kernel)]
    else:
        count = first // groups
        sums = q.sum(1, dtype=torch.float32).transpose(1, 2).reshape(groups, second, *kernel)
        shape = [groups, second, *[1] * len(kernel)]

    def in_shape(each: Tensor) -> Tensor:
        return each.view(shape) if each.numel() > 1 else each

    sums = (sums - w.zero * count) * in_shape(w.scale)
    return sums if w.offset is None else sums + count * in_shape(w.offset)


def _add_to_a_convolution(y: Tensor, product: Product, a: Codes, w: Codes) -> Tensor:
    """Add what offsets add to the output, or to the gradient of an input, of a convolution, in place."""
    geometry, shape = product.op.geometry, product.shape
    assert geometry is not None
    groups, kernel, forward = geometry.groups, w.shape[2:], product.name == "output"
    keeps_first = geometry.transposed != forward

    def convolve(x: Tensor, weight: Tensor, channels: int) -> Tensor:
        """Of numbers that stand for all channels of a group, (B, `channels`, *size)."""
        if forward:
            return product.op.output(x, weight)
        return product.op.grad_input(x, weight, torch.Size((x.shape[0], channels, *shape[2:])))

    u = y.new_zeros(shape[0] * shape[2:].numel(), groups)
    if w.offset is not None:
        sums = _row_sums(a, groups).view(a.shape[0], *a.shape[2:], groups).movedim(-1, 1)
        reached = convolve(sums, sums.new_ones(groups, 1, *kernel), groups)
        u = reached.movedim(1, -1).reshape(-1, groups)
    t = y.new_empty(0)
    if a.offset is not None:
        ones = y.new_ones(1, groups, *a.shape[2:])
        reached = convolve(ones, _kernel_sums(w, groups, keeps_first), shape[1])
        if a.offset.numel() == 1:
            t = reached.mul_(a.offset).movedim(1, -1).contiguous()
        else:
            y.addcmul_(reached, a.offset.view(-1, *[1] * (y.dim() - 1)))
    offset = y.new_zeros(1) if w.offset is None else w.offset
    rows = y.movedim(1, -1)  # a view, whose memory is rows by channels
    cpu.add_offsets(rows, u.contiguous(), offset.expand(shape[1]).contiguous(), t)
    return y


def _of_a_weight(product: Product, g: Codes, x: Codes) -> Tensor:
    """What offsets add to the gradient of a weight."""
    geometry, shape = product.op.geometry, product.shape
    rows = g.shape[:-1].numel() if geometry is None else g.shape[0]
    added = torch.zeros(1, dtype=torch.float32, device="cpu")
    if x.offset is not None:
        added = added + x.offset * _gradient(product, _sums_over_samples(g), None, g, x)
    if g.offset is not None:
        values = _sums_over_samples(x)
        values = values if x.offset is None else values + rows * x.offset
        added = added + g.offset * _gradient(product, None, values, g, x)
    return added.expand(shape)


def _gradient(product: Product, g: Tensor | None, x: Tensor | None, of_g: Codes, of_x: Codes) -> Tensor:
    """The gradient of a weight from one sample of one operand, the other (None) being 1 everywhere; it broadcasts."""
    op, geometry, shape = product.op, product.op.geometry, product.shape
    if geometry is None and g is not None:
        return g.view(-1, 1)
    if geometry is None:
        assert x is not None
        return x.view(1, -1)
    groups, (first, second, *kernel) = geometry.groups, shape
    # The operand that counts the first axis: one channel of a group of it stands for all, as of the other's.
    keeps_first = (g is not None) != geometry.transposed
    wanted = torch.Size((first, 1, *kernel) if keeps_first else (groups, second, *kernel))

    def or_ones(given: Tensor | None, of: Codes) -> Tensor:
        if given is not None:
            return given.contiguous()
        return torch.ones(1, groups, *of.shape[2:], dtype=torch.float32, device="cpu")

    grad = op.grad_weight(or_ones(g, of_g), or_ones(x, of_x), wanted)
    return grad if keeps_first else grad.repeat_interleave(first // groups, 0)
