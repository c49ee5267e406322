"""What a recipe says about normalisation."""

from dataclasses import dataclass
from typing import Literal

from lowbit.errors import UsageError
from lowbit.inputs.checks import check_fields
from lowbit.numerics.formats import Format
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
    """

    input: Format
    grad_output: Format
    constant: Constant = "authors"
    chunks: int = 16
    fewest_per_chunk: int = 16
    narrowest: Narrowest = "step"
    epsilon: EpsilonPlace = "inside"
    momentum: float | None = None

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
            if not isinstance(fmt.transform, NoTransform):
                raise UsageError(
                    f"normalization.{operand} has transform={fmt.transform.kind!r}: Range BN has formats without one"
                )
        if self.grad_output.running is not None:
            raise UsageError("normalization.grad_output: only `input` keeps a running range")
        if self.momentum is not None and not 0 < self.momentum <= 1:
            raise UsageError(f"momentum={self.momentum}: the weight of the new batch is in (0, 1]")
