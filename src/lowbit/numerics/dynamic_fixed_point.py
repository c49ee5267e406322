"""Dynamic fixed point in whole numbers: the sums of an accumulator of 32 bits, and the way back to 16 bits.

Notation: I int16 numbers, E their shared exponent, x = I 2**E; P bits of a number, L products between two flushes.
The operands of recipe `dfp16` are such tensors. This file says what hardware does with them; the reference engine sums
their products in float32.

Source: Das et al. 2018, arXiv:1802.00930, as read here: the paper's text names pairs of int16 summed in int32 and
flushes to float32, and leaves the length between them open.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from lowbit.errors import UsageError

_INT32 = 2**31


class Shared(NamedTuple):
    """Numbers with one exponent: ``x = numbers * 2**exponent``.

    Args:
        numbers: int64, any shape.
        exponent: E.
    """

    numbers: Tensor
    exponent: int

    def values(self) -> Tensor:
        """The numbers that they stand for, float64."""
        return self.numbers.double() * 2.0**self.exponent


def encode(x: Tensor, bits: int = 16) -> Shared:
    """``E = floor(log2 max|x|) - (P - 2)`` and ``I = round(x 2**-E)``, halves to even, within ``+-(2**(P-1) - 1)``.

    Args:
        x: float, any shape; a tensor of zeros has E = 0.
        bits: P, 2 to 16.
    """
    most = x.abs().amax().double() if x.numel() else torch.zeros((), dtype=torch.float64, device=x.device)
    exponent = int(torch.frexp(most).exponent) - 1 - (bits - 2) if most > 0 else 0
    limit = 2 ** (bits - 1) - 1
    return Shared((x.double() * 2.0**-exponent).round().clamp(-limit, limit).to(torch.int64), exponent)


def multiply(a: Shared, b: Shared) -> Shared:
    """The exact product of two matrices: exponents add up, and sums are held without loss.

    Args:
        a: ``(M, K)``.
        b: ``(K, N)``.
    """
    return Shared(_exact(a.numbers, b.numbers), a.exponent + b.exponent)


def multiply_flushed(a: Shared, b: Shared, flush: int, shift: int = 0) -> Tensor:
    """The product as an int32 accumulator gives it that is flushed to float32 after every L products.

    Args:
        a: ``(M, K)``.
        b: ``(K, N)``.
        flush: L.
        shift: bits by which the numbers of `b` are shifted right beforehand, so that sums fit.

    Returns:
        float32 ``(M, N)``.

    Raises:
        UsageError: a sum of L products does not fit in 32 bits; it says how large it is.
    """
    if flush < 1:
        raise UsageError(f"flush={flush}: give 1 product or more")
    shifted = b.numbers >> shift
    total = torch.zeros(a.numbers.shape[0], shifted.shape[1], dtype=torch.float32, device=shifted.device)
    for start in range(0, a.numbers.shape[1], flush):
        part = _exact(a.numbers[:, start : start + flush], shifted[start : start + flush])
        if part.numel() and (most := int(part.abs().amax())) >= _INT32:
            raise UsageError(f"flush={flush}, shift={shift}: a sum of {most:,} does not fit in 32 bits; flush earlier")
        total += part.float()
    return total * 2.0 ** (a.exponent + b.exponent + shift)


def down_convert(acc: Shared, bits: int = 16) -> Shared:
    """Sums as numbers of P bits: shifted right by ``R = max(0, length(max|acc|) - (P - 1))``, which truncates.

    Args:
        acc: the sums.
        bits: P.
    """
    most = int(acc.numbers.abs().amax()) if acc.numbers.numel() else 0
    shift = max(0, most.bit_length() - (bits - 1))
    return Shared(acc.numbers >> shift, acc.exponent + shift)


def _exact(a: Tensor, b: Tensor) -> Tensor:
    """The product of matrices of int64."""
    return (a.unsqueeze(-1) * b.unsqueeze(0)).sum(1) if a.device.type != "cpu" else a @ b
