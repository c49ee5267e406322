"""Code books: 256 numbers in [-1, 1] that stand for a tensor's values, with a scale for each block of them.

Notation: x real value, S the largest magnitude in a block, t = x / S, b_i the sorted numbers of the book, q code.
The value of a code is ``b_q S``. A block without negative values, such as of second moments, has the book of numbers
without a sign; the sign bit of its stored scale says so.
"""

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

BLOCK = 256


@dataclass(frozen=True, kw_only=True)
class CodeBook:
    """Two sorted lists of at most 256 numbers.

    Args:
        name: by which it is asked for.
        signed: numbers in [-1, 1], 0 and 1 among them.
        unsigned: numbers in [0, 1], 1 among them.
    """

    name: str
    signed: tuple[float, ...]
    unsigned: tuple[float, ...]

    @property
    def table(self) -> Tensor:
        """float32 ``(2, 256)``, signed and unsigned; where a list is shorter, its last number repeats."""
        return _table(self)


@cache
def _table(book: CodeBook) -> Tensor:
    rows = [[*values, *[values[-1]] * (256 - len(values))] for values in (book.signed, book.unsigned)]
    with torch.inference_mode(mode=False):
        return torch.tensor(rows, dtype=torch.float32, device="cpu")


def linear() -> CodeBook:
    """Even steps: ``k / 127`` from -1 to 1, and ``k / 256`` from 1/256 to 1 for blocks without negative values.

    The latter leaves 0 out, as a second moment that becomes 0 would make its update huge. A block of zeros stays zeros.

    Source: blocks of linear codes: Dettmers et al. 2022, arXiv:2110.02861; without zero: Li et al. 2023,
    arXiv:2309.01507.
    """
    return CodeBook(
        name="int8",
        signed=tuple(k / 127 for k in range(-127, 128)),
        unsigned=tuple((k + 1) / 256 for k in range(256)),
    )


def dynamic() -> CodeBook:
    """Seven decades below 1, each with a fraction of its own number of bits: small values keep relative precision.

    Decade i, 0 to 6, covers ``10**(i-6) * [0.1, 1]`` in ``2**i`` equal parts, each with its midpoint as a number;
    without a sign in ``2**(i+1)`` parts. 0 and 1 are numbers too, and -1 is not.

    Source: dynamic tree quantisation, Dettmers et al. 2022, arXiv:2110.02861, section 1.3 and 2.2.
    """

    def numbers(more: int) -> list[float]:
        found = [1.0]
        for i in range(7):
            parts = 2 ** (i + more)
            found += [10.0 ** (i - 6) * (0.1 + 0.9 * (k + 0.5) / parts) for k in range(parts)]
        return found

    positive = numbers(0)
    return CodeBook(
        name="dynamic8",
        signed=tuple(sorted([0.0, *positive, *(-x for x in positive if x != 1.0)])),
        unsigned=tuple(sorted([0.0, *numbers(1)])),
    )


BOOKS = {book.name: book for book in (linear(), dynamic())}


def blocks_of(count: int, block: int) -> int:
    """How many blocks that many values have; the last one may be shorter."""
    return -(-count // block)


def encode(x: Tensor, book: CodeBook, *, block: int = BLOCK, noise: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Codes and scales of a tensor: ``q`` of the nearest number to t, of the smaller one at equal distance.

    With noise u the number above t is taken iff ``u < (t - below) / (above - below)``, so that the mean over u is t.

    Args:
        x: floating point, any shape; blocks follow its elements in row-major order. It is rounded to float32 first.
        book: the numbers.
        block: values that share a scale.
        noise: draws in [0, 1), of the shape of `x`; None: nearest.

    Returns:
        uint8 codes of the shape of `x`, contiguous; float32 scales ``(blocks,)``, negative (or -0) where the block has
        the book without a sign, nan where a value of the block is not finite. Zeros give zeros.
    """
    flat = _in_blocks(x.detach().float(), block)
    largest = flat.abs().amax(1)
    # A value that is not finite leaves nothing to scale: the block becomes nan.
    largest = largest.where(largest.isfinite(), torch.nan)
    unsigned = flat.amin(1) >= 0
    t = flat / largest.where(largest != 0, 1.0)[:, None]
    draws = None if noise is None else _in_blocks(noise.float(), block)
    q = torch.empty(flat.shape, dtype=torch.uint8, device=x.device)
    for row, (numbers, which) in enumerate(zip((book.signed, book.unsigned), (~unsigned, unsigned), strict=True)):
        if bool(which.any()):
            values = book.table[row, : len(numbers)].to(x.device)
            q[which] = _nearest(t[which], values) if draws is None else _drawn(t[which], values, draws[which])
    codes = q.reshape(-1)[: x.numel()].reshape(x.shape)
    return codes.clone() if codes.numel() < q.numel() else codes, torch.where(unsigned, -largest, largest)


def decode(codes: Tensor, scales: Tensor, book: CodeBook, *, block: int = BLOCK) -> Tensor:
    """The values of codes, float32 of their shape, contiguous; a block whose scale is nan gives nan."""
    flat = _in_blocks(codes, block)
    rows = scales.signbit().to(torch.int32)[:, None] * 256 + flat.to(torch.int32)
    values = book.table.to(codes.device).flatten().index_select(0, rows.flatten()).view_as(flat)
    return values.mul_(scales.abs()[:, None]).reshape(-1)[: codes.numel()].reshape(codes.shape)


def _in_blocks(x: Tensor, block: int) -> Tensor:
    """The elements in row-major order as rows of `block`, the last one filled with zeros."""
    flat = x.reshape(-1)
    lacking = -flat.numel() % block
    if lacking:
        flat = torch.cat([flat, flat.new_zeros(lacking)])
    return flat.view(-1, block)


def _nearest(t: Tensor, values: Tensor) -> Tensor:
    middles = values[:-1] + (values[1:] - values[:-1]) / 2
    return torch.bucketize(t.nan_to_num(0.0), middles, out_int32=True).to(torch.uint8)


def _drawn(t: Tensor, values: Tensor, noise: Tensor) -> Tensor:
    below = (torch.bucketize(t.nan_to_num(0.0), values, out_int32=True, right=True) - 1).clamp_(0, len(values) - 2)
    low, high = values[below], values[below + 1]
    return (below + (noise < (t - low) / (high - low))).to(torch.uint8)
