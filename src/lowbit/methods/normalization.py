"""What a recipe says about normalisation."""

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

from lowbit.errors import UsageError
from lowbit.inputs.checks import check_fields
from lowbit.numerics.formats import FP32, Format
from lowbit.numerics.transforms import NoTransform

Constant = Literal["paper", "authors"]
EpsilonPlace = Literal["inside", "outside"]
Narrowest = Literal["zero", "step"]


@dataclass(frozen=True, kw_only=True)
class RangeNorm:
    """Range Batch-Norm in place of batch normalisation, see `lowbit.nn.norm.range_batch_norm`.

    Args:
        input: format of the layer's input.
        grad_output: format of the gradient that arrives at its output.
        constant: the factor of ``range / sqrt(2 ln n)``: ``"paper"`` 1, ``"authors"`` 0.5402 as in their code.
        chunks: the range is the mean over at most this number of chunks of the batch.
        fewest_per_chunk: the fewest values of a channel in each chunk, 2 or more; a channel with fewer is one chunk.
            The mean over chunks of 2 to 8 values can be almost 0 although the values are not.
        narrowest: the range of a chunk in a channel whose codes are all equal: ``"zero"``, so that epsilon alone is the
            divisor, or one ``"step"`` of the input's grid, the smallest difference of codes.
        epsilon: ``"inside"``: divide by ``sqrt(sigma**2 + eps)`` as BatchNorm does; ``"outside"``: by ``sigma + eps``.
        momentum: weight of the new batch in the running statistics; None keeps the layer's own.
        synchronized: whether the batch is that of all processes of a distributed run, or of each alone.
    """

    kind: ClassVar[str] = "range"

    input: Format
    grad_output: Format
    constant: Constant = "authors"
    chunks: int = 16
    fewest_per_chunk: int = 16
    narrowest: Narrowest = "step"
    epsilon: EpsilonPlace = "inside"
    momentum: float | None = None
    synchronized: bool = False

    def __post_init__(self) -> None:
        check_fields(self)
        if self.chunks < 1:
            raise UsageError(f"chunks={self.chunks!r}: give a whole number, 1 or more")
        if self.fewest_per_chunk < 2:
            raise UsageError(f"fewest_per_chunk={self.fewest_per_chunk!r}: give a whole number, 2 or more")
        for operand in ("input", "grad_output"):
            fmt = getattr(self, operand)
            if fmt.granularity != "tensor":
                raise UsageError(
                    f"normalization.{operand} is per {fmt.granularity}: Range BN has formats per tensor only"
                )
            if fmt.widths:
                raise UsageError(f"normalization.{operand} is {fmt}: Range BN has one format at all widths")
            if fmt.delay is not None:
                raise UsageError(f"normalization.{operand} has a delayed range: Range BN remembers running ranges only")
            if not isinstance(fmt.transform, NoTransform):
                raise UsageError(
                    f"normalization.{operand} has transform={fmt.transform.kind!r}: Range BN has formats without one"
                )
        if self.grad_output.running is not None:
            raise UsageError("normalization.grad_output: only `input` keeps a running range")
        if self.momentum is not None and not 0 < self.momentum <= 1:
            raise UsageError(f"momentum={self.momentum}: the weight of the new batch is in (0, 1]")

    def __str__(self) -> str:
        return (
            f"Range BN, input {self.input}; grad_output {self.grad_output}; constant of the {self.constant}, epsilon "
            f"{self.epsilon}, at most {self.chunks} chunks"
        )


TERMS = ("normalized", "mean", "deviation", "weight", "bias")
"""The terms of a batch normalisation that can have formats."""


@dataclass(frozen=True, kw_only=True)
class TermNorm:
    """Batch normalisation whose terms have formats, see `lowbit.nn.norm.terms`; fp32 is a term as it is.

    Args:
        normalized: of ``(x - mean) / deviation``.
        mean: of the mean of a channel.
        deviation: of its standard deviation.
        weight: of gamma.
        bias: of beta.
        grad_output: of the gradient that arrives at the output.
        epsilon: what is added to the deviation; None: the layer's own.
    """

    kind: ClassVar[str] = "terms"

    normalized: Format
    mean: Format = FP32
    deviation: Format = FP32
    weight: Format = FP32
    bias: Format = FP32
    grad_output: Format = FP32
    epsilon: float | None = None

    def __post_init__(self) -> None:
        check_fields(self)
        for _, name, fmt in self.table():
            if fmt.granularity != "tensor" or fmt.running is not None or fmt.widths or fmt.transform.along_axis:
                raise UsageError(
                    f"normalization.{name} is {fmt}: the terms of a normalisation share one scale, keep no running "
                    "range, have one format at all widths and no transform along an axis"
                )
        if self.normalized == FP32:
            raise UsageError("normalization.normalized is fp32: leave the normalisation out of the recipe")
        if self.epsilon is not None and not 0 < self.epsilon < math.inf:
            raise UsageError(f"normalization.epsilon={self.epsilon}: give a positive number")

    def table(self) -> list[tuple[str, str, Format]]:
        """The terms and the gradient that have formats: (product, name, format)."""
        forward = [("output", name, getattr(self, name)) for name in TERMS]
        found = [*forward, ("grad_input", "grad_output", self.grad_output)]
        return [row for row in found if row[2] != FP32]

    def __str__(self) -> str:
        epsilon = "" if self.epsilon is None else f"; epsilon {self.epsilon:g}"
        return "; ".join(f"{name} {fmt}" for _, name, fmt in self.table()) + epsilon


Normalization = RangeNorm | TermNorm
NORMALIZATIONS: dict[str, type[Normalization]] = {RangeNorm.kind: RangeNorm, TermNorm.kind: TermNorm}
