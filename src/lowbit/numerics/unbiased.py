"""Scales that make up for what nearest rounding loses, so that values are unbiased.

Notation: y value, q code, S scale, M the largest scale of a tensor, U unit of the scales.
"""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from lowbit.errors import UsageError
from lowbit.inputs.checks import check_fields
from lowbit.numerics.rounding import round_to_float, unit_of


@dataclass(frozen=True, kw_only=True)
class UnbiasedE4M3:
    """E4M3 scales that are rounded by noise and make up for what codes of nearest rounding lose, so that these may.

    The scale that codes are made with is ``U e4m3(256 S / M)``, with ``U = stretch M / 256``. The scale of the value is
    ``U e4m3(c S / U)``, rounded stochastically, with ``c = sum y**2 / sum y q S`` over a group of blocks, y the values
    and q their codes. Over random rotations of a group the values then have the mean y. That the largest scale is 256
    of 448 leaves room for c.

    Args:
        group: numbers of a group, along the axis that is cut into blocks; whole blocks.
        stretch: of the range of a block; below 1 the largest values are clipped.

    Source: Panferov et al. 2026, Quartet II, arXiv:2601.22813 (MS-EDEN).
    """

    kind: ClassVar[str] = "unbiased-e4m3"

    group: int = 128
    stretch: float = 17 / 16 * 0.93

    def __post_init__(self) -> None:
        check_fields(self)
        if self.group < 1:
            raise UsageError(f"group={self.group}: a group has at least one number")
        if not 0.5 <= self.stretch <= 1.5:
            raise UsageError(f"stretch={self.stretch}: give 0.5 to 1.5")

    def rounded(self, scale: Tensor, span: Tensor, levels: Tensor | float) -> Tensor:  # noqa: ARG002 - S says it
        """The scales that codes are made with; those that round to 0 become the smallest E4M3 number."""
        unit = unit_of(scale, 256.0)
        found = round_to_float((scale / unit).double(), 3, -6, None).clamp(2.0**-9, 448.0)
        return torch.where(scale == 0, scale, found.to(scale.dtype) * (unit * self.stretch))

    def reach(self, levels: Tensor | float) -> float:  # noqa: ARG002 - however many
        """Anything: a scale may round down to 0."""
        return math.inf

    def settled(self, y: Tensor, q: Tensor, scale: Tensor, most: float, noise: Tensor, axis: int) -> Tensor:
        """The scales of the values, in the shape of `scale`.

        Args:
            y: values, cut into blocks that lie along the axis after `axis`.
            q: their codes.
            scale: those that the codes were made with.
            most: the largest code.
            noise: draws in [0, 1) in the shape of `y`; a block takes its first.
            axis: counts blocks.
        """
        wide, within = y.double(), axis + 1
        squares = self._of_groups((wide * wide).sum(within, keepdim=True), y.shape[within], axis)
        found = self._of_groups((wide * q * scale).sum(within, keepdim=True), y.shape[within], axis)
        c = torch.where(found == 0, torch.ones_like(found), squares / found)
        largest = wide.abs().amax() if y.numel() else wide.new_zeros(())
        unit = self.stretch * largest / most / 256.0
        unit = torch.where(unit == 0, torch.ones_like(unit), unit)
        rounded = round_to_float((c * scale / unit).clamp(max=448.0), 3, -6, noise.narrow(within, 0, 1))
        return (rounded.clamp(max=448.0) * unit).to(scale.dtype)

    def _of_groups(self, each: Tensor, block: int, axis: int) -> Tensor:
        """The sum over the blocks of a group, for each of its blocks."""
        count, blocks = self.group // block, each.shape[axis]
        parts = [part.sum(axis, keepdim=True).expand_as(part) for part in each.split(count, axis)]
        return torch.cat(parts, axis) if blocks else each

    def __str__(self) -> str:
        return f"unbiased e4m3 scale, groups of {self.group}"
