"""Code books: 256 numbers in [-1, 1] that stand for a tensor's values, with a scale for each block of them.

Notation: x real value, S the largest magnitude in a block, t = x / S, b_i the sorted numbers of the book, q code.
The value of a code is ``b_q S``. A block without negative values, such as of second moments, has the book of numbers
without a sign; the sign bit of its stored scale says so.
"""

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from lowbit.kernels import cpu
from lowbit.numerics.rounding import uniform_noise

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


@cache
def _tables(book: CodeBook, *, stochastic: bool) -> tuple[Tensor, Tensor]:
    """Limits and starts as `lowbit.kernels.cpu.encode_book` takes them.

    Numbers that share the upper 16 bits of a float32 lie so close that at most one limit is among them.
    """
    with torch.inference_mode(mode=False):
        upper = torch.arange(2**16, dtype=torch.int32, device="cpu")
        # Of negative numbers the smallest has all lower bits set.
        lowest = ((upper << 16) | (upper >> 15) * 0xFFFF).view(torch.float32).nan_to_num(0.0).clamp(-1.0, 1.0)
        limits, starts = torch.full((2, 256), torch.inf, dtype=torch.float32, device="cpu"), []
        for row, numbers in enumerate((book.signed, book.unsigned)):
            values = book.table[row, : len(numbers)]
            if stochastic:
                starts.append(_below(lowest, values))
                limits[row, : len(numbers) - 2] = values[1:-1]
            else:
                starts.append(torch.bucketize(lowest, _middles(values), out_int32=True))
                limits[row, : len(numbers) - 1] = _middles(values)
        return limits, torch.stack(starts)


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


def encode(
    x: Tensor, book: CodeBook, *, block: int = BLOCK, noise: Tensor | tuple[int, int] | None = None
) -> tuple[Tensor, Tensor]:
    """Codes and scales of a tensor: ``q`` of the nearest number to t, of the smaller one at equal distance.

    With noise u the number above t is taken iff ``u < (t - below) / (above - below)``, so that the mean over u is t.

    Args:
        x: floating point, any shape; blocks follow its elements in row-major order. It is rounded to float32 first.
        book: the numbers.
        block: values that share a scale.
        noise: draws in [0, 1), of the shape of `x`, or the two words of a noise field; None: nearest.

    Returns:
        uint8 codes of the shape of `x`, contiguous; float32 scales ``(blocks,)``, negative (or -0) where the block has
        the book without a sign, nan where a value of the block is not finite. Zeros give zeros.
    """
    x = x.detach()
    if not isinstance(noise, Tensor) and cpu.runs(x) and x.numel():
        limits, starts = _tables(book, stochastic=noise is not None)
        found, found_scales = cpu.encode_book(x.contiguous(), block, book.table, limits, starts, noise)
        return found.view(x.shape), found_scales
    if isinstance(noise, tuple):
        noise = uniform_noise(torch.tensor(noise, dtype=torch.int64, device="cpu"), x.shape, x.device)
    flat = _in_blocks(x.float(), block)
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
    if cpu.runs(scales) and codes.is_cpu and codes.numel():
        return cpu.decode_book(codes.contiguous(), scales, block, book.table).view(codes.shape)
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
    return torch.bucketize(t.nan_to_num(0.0), _middles(values), out_int32=True).to(torch.uint8)


def _middles(values: Tensor) -> Tensor:
    return values[:-1] + (values[1:] - values[:-1]) / 2


def _drawn(t: Tensor, values: Tensor, noise: Tensor) -> Tensor:
    below = _below(t.nan_to_num(0.0), values)
    low, high = values[below], values[below + 1]
    return (below + (noise < (t - low) / (high - low))).to(torch.uint8)


def _below(t: Tensor, values: Tensor) -> Tensor:
    """The code of the largest number that is not above t, of all but the last number; 0 below the first."""
    return (torch.bucketize(t, values, out_int32=True, right=True) - 1).clamp_(0, len(values) - 2)
