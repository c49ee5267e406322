"""Blocks of a matrix that have two codes for each number: how the int8 engine encodes the second ones and adds them.

Notation: ``x = (2 n q + r) S'`` with codes q and r from -n to n; k what a product sums over. As
``sum_b 2 n S'_a S_b sum_k q_a q_b`` is the product of the first codes, ``sum_b S'_a S_b sum_k r_a q_b`` is left to add,
over the blocks b that have second codes. It is one integer product for each row, or column, of blocks of the result.
"""

from dataclasses import dataclass
from itertools import groupby

import torch
import torch.nn.functional as F
from torch import Tensor

from lowbit.kernels import cpu
from lowbit.kernels.cpu import Rows
from lowbit.numerics.formats import Format


@dataclass(frozen=True, kw_only=True)
class Residual:
    """The second codes of a matrix.

    Args:
        numbers: int8 ``(blocks, rows, columns)``, zeros beyond the end of the matrix.
        where: int64 ``(blocks, 2)``, the row and the column of each block among all blocks, in order.
        scale: float32 ``(blocks,)``, S'.
        finer: 2n.
    """

    numbers: Tensor
    where: Tensor
    scale: Tensor
    finer: float

    def finer_of(self, scale: Tensor) -> Tensor:
        """Of blocks with these scales, how much finer the steps of each are: 2n or 1."""
        finer = torch.ones_like(scale)
        finer[self.where.unbind(1)] = self.finer
        return finer


def split(
    x: Tensor, q: Tensor, scale: Tensor, block: tuple[int, int], fmt: Format, levels: float
) -> tuple[Tensor, Residual]:
    """Codes of which some blocks have second ones.

    Args:
        x: float32 or bfloat16 ``(R, C)``.
        q: int8 ``(R, C)``, its codes if no block has two.
        scale: float32, of each block.
        block: rows and columns of a block.
        fmt: the format, which says which blocks have two.
        levels: n.
    """
    cut = _cut(x, block)
    twice = fmt.falls_back(_magnitudes(x, cut, block))
    where = twice.nonzero()
    i, j = where.unbind(1)
    finer = 2 * levels
    fine = scale[i, j] / finer
    each = fine.view(-1, 1, 1)
    whole = (cut[i, :, j, :].float() / each).round_().clamp_(-levels * finer, levels * finer)
    first = (whole / finer).round_()
    residual = whole.sub_(first * finer).to(torch.int8)
    return _with(q, block, where, first.to(torch.int8)), Residual(
        numbers=residual, where=where, scale=fine, finer=finer
    )


def values(x: Tensor, q: Tensor, block: tuple[int, int], residual: Residual) -> Tensor:
    """The values `x` of first codes `q`, with those of the second ones put in."""
    i, j = residual.where.unbind(1)
    whole = _cut(q, block)[i, :, j, :] * residual.finer + residual.numbers
    return _with(x, block, residual.where, whole * residual.scale.view(-1, 1, 1))


def _cut(x: Tensor, block: tuple[int, int]) -> Tensor:
    """A matrix as (rows of blocks, rows of a block, columns of blocks, columns of a block), filled with zeros."""
    short = [-n % size for n, size in zip(x.shape, block, strict=True)]
    x = F.pad(x, (0, short[1], 0, short[0])) if any(short) else x
    return x.view(x.shape[0] // block[0], block[0], x.shape[1] // block[1], block[1])


def _with(x: Tensor, block: tuple[int, int], where: Tensor, replaced: Tensor) -> Tensor:
    """A matrix in which some blocks are replaced; a new one where its last blocks are short."""
    i, j = where.unbind(1)
    cut = _cut(x, block)
    cut[i, :, j, :] = replaced
    return cut.flatten(2).flatten(0, 1)[: x.shape[0], : x.shape[1]].contiguous()


def _magnitudes(x: Tensor, cut: Tensor, block: tuple[int, int]) -> Tensor:
    """The largest magnitude of each block, in float32."""
    rows, tall, columns, wide = cut.shape
    if wide == 1 or x.shape[1] % block[1]:
        return cut.abs().amax((1, 3)).float()
    lo, hi = cpu.extremes(x, (1, x.numel() // wide, wide, False))
    most = F.pad(torch.maximum(-lo, hi).view(x.shape[0], columns), (0, 0, 0, rows * tall - x.shape[0]))
    return most.view(rows, tall, columns).amax(1).float()


def add(
    out: Tensor, residual: Residual, of: Rows, other: Rows, other_scales: Tensor, block: int, *, first: bool
) -> None:
    """Add what the second codes of an operand contribute to a product.

    Args:
        out: float32 ``(..., N)``.
        residual: the second codes.
        of: the first codes that they belong to, as they lie.
        other: the codes of the other operand.
        other_scales: float32 ``(blocks of k, width)`` of the other operand.
        block: numbers of k in a block.
        first: whether the operand with second codes is the first one, whose kept axis counts the rows of `out`.
    """
    out = out.view(-1, out.shape[-1])
    kept_axis, summed_axis = (0, 1) if of.along else (1, 0)
    kept, depth = (of.rows, of.width) if of.along else (of.width, of.rows)
    length = residual.numbers.shape[1 + kept_axis]
    matrix = other.data.view(other.rows, other.width)
    places = sorted((place[kept_axis], place[summed_axis], n) for n, place in enumerate(residual.where.tolist()))
    for at, group in groupby(places, key=lambda place: place[0]):
        blocks, numbers = (list(each) for each in zip(*((s, n) for _, s, n in group), strict=True))
        index = _positions(blocks, block, depth)
        count = min(length, kept - at * length)
        mine = residual.numbers[numbers]
        if of.along:
            mine = mine.transpose(0, 1).flatten(1)[:count, : len(index)].contiguous()
        else:
            mine = mine.flatten(0, 1)[: len(index), :count].contiguous()
        theirs = matrix.index_select(1 if other.along else 0, index)
        sides = [_rows(mine, along=of.along), _rows(theirs, along=other.along)]
        scales = [residual.scale[numbers].view(-1, 1).expand(-1, count).contiguous(), other_scales[blocks].contiguous()]
        where = slice(at * length, at * length + count)
        into = out[where] if first else out[:, where]
        part = torch.empty(into.shape, dtype=torch.float32, device="cpu")
        if not first:
            sides.reverse()
            scales.reverse()
        cpu.multiply_blocks(sides[0], sides[1], part, block=block, scales=(scales[0], scales[1]), bias=None)
        into.add_(part)


def _positions(blocks: list[int], size: int, depth: int) -> Tensor:
    """The indices of k in some blocks, of which the last may be short."""
    index = torch.tensor(blocks, dtype=torch.int64, device="cpu").view(-1, 1) * size
    index = (index + torch.arange(size, dtype=torch.int64, device="cpu")).flatten()
    return index[index < depth]


def _rows(matrix: Tensor, *, along: bool) -> Rows:
    rows, width = matrix.shape
    return Rows(data=matrix, rows=rows, width=width, stride=width, along=along)
