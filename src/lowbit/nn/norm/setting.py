"""How one Range BN call is computed, and what observers are shown of it."""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from lowbit.methods.normalization import RangeNorm
from lowbit.numerics.formats import Format, largest_code
from lowbit.numerics.quantizer import Quantized, quantize
from lowbit.numerics.ranges import shared_extremes
from lowbit.numerics.rounding import Noise, field_of
from lowbit.products import watch


@dataclass(frozen=True, kw_only=True)
class NormSetting:
    """How one Range BN call is computed.

    Args:
        norm: constant, chunks, place of epsilon and formats.
        eps: a small number in the divisor.
        noise: for the stochastic rounding of grad_output.
        bits: widths of input and grad_output; None: the formats' own.
        input_range: lo and hi for the input; None: those of the batch.
        layer: name for reports.
        engine: how it is executed.
        source: the caller, for observers.
        shared: whether this is a part of a batch that several processes share.
        group: these processes; None: all.
        rectify: whether the result is that of a ReLU after it: 0 where it would be less.
    """

    norm: RangeNorm
    eps: float
    noise: Noise | None = None
    bits: tuple[int, ...] | None = None
    input_range: tuple[Tensor, Tensor] | None = None
    layer: str = ""
    engine: str = "reference"
    source: object = None
    shared: bool = False
    group: dist.ProcessGroup | None = None
    rectify: bool = False

    def quantized(self, x: Tensor, operand: str, expected: tuple[str, ...] = ()) -> Quantized:
        """`x`, which is the layer's ``"input"`` or ``"grad_output"``, in its format; shown to observers."""
        fmt: Format = getattr(self.norm, operand)
        if x.is_meta:  # it has a shape but no values, as when a run is planned
            return Quantized(torch.empty_like(x))
        noise = None
        if fmt.stochastic and self.noise is not None:
            noise = field_of(self.noise, "normalization", operand, x)
        levels = largest_code(fmt, self.width(operand)) if fmt.has_width else None
        observed = self.input_range if operand == "input" else None
        if self.shared and observed is None and fmt.scale is not None:
            observed = shared_extremes(x, rule=fmt.scale.range, group=self.group)
        hat = quantize(x, fmt, levels=levels, noise=noise, observed=observed)
        if watch.observers:
            self.show(operand, x, hat, "reference", "range_batch_norm", expected)
        return hat

    def width(self, operand: str) -> int:
        """The bits of an operand's codes in this call."""
        fmt: Format = getattr(self.norm, operand)
        if self.bits is None or not fmt.has_width:
            return fmt.bits
        return self.bits[0 if operand == "input" else 1]

    def show(
        self, operand: str, x: Tensor, hat: Quantized, engine: str, kernel: str, expected: tuple[str, ...] = ()
    ) -> None:
        """Show observers what became of `x` and what ran on it."""
        if operand == "input" and 0 < x.numel() // x.shape[1] < 2 * self.norm.fewest_per_chunk and self.norm.chunks > 1:
            kernel += " (one chunk)"
        with watch.inside():
            watch.notify(
                watch.ProductRun(
                    source=self.source,
                    layer=self.layer,
                    product="output" if operand == "input" else "grad_input",
                    kind="range_batch_norm",
                    engine=engine,
                    kernel=kernel,
                    macs=0,
                    operands={
                        operand: watch.OperandRun(
                            format=getattr(self.norm, operand),
                            bits=self.width(operand),
                            exact=x,
                            quantized=hat.values,
                            view=tuple(x.shape),
                            dims=tuple(range(x.dim())),
                            grid=hat.grid,
                        )
                    },
                    result=hat.values,
                    full_precision=lambda: x,
                    expected=expected,
                )
            )
