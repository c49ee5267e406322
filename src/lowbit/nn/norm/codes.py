"""Range BN on codes of a byte, by native passes.

Notation: as in `lowbit.nn.norm`.
"""

import math
from dataclasses import replace
from functools import cache
from typing import Any

import torch
from torch import Tensor

from lowbit.engines.int8 import takes
from lowbit.kernels import cpu
from lowbit.kernels.memory import in_memory, is_channels_last
from lowbit.methods.normalization import Constant, RangeNorm
from lowbit.nn.norm.definition import per_channel, range_batch_norm_backward, refuse_second_derivative
from lowbit.nn.norm.setting import NormSetting
from lowbit.nn.norm.statistics import Statistics, chunk_lengths, slopes
from lowbit.numerics.element import Steps
from lowbit.numerics.formats import Format, largest_code
from lowbit.numerics.quantizer import Grid, Quantized, sharing_of
from lowbit.products import strides, watch


def codes_of(x: Tensor, setting: NormSetting, operand: str) -> cpu.Codes | None:
    """Codes of x as rows by channels; None if the native passes do not take it."""
    fmt: Format = getattr(setting.norm, operand)
    if setting.engine != "int8" or not cpu.runs(x) or fmt.zero != "integer" or not takes(fmt):
        return None
    bits, scale_of = setting.width(operand), fmt.scale
    if bits > 8 or x.numel() == 0 or not is_channels_last(x) or scale_of is None:
        return None
    key = None
    if fmt.stochastic:
        key = None if setting.noise is None else setting.noise.words("normalization", operand)
        if key is None:
            return None
    q, scale, zero = cpu.quantize(
        x,
        (x.shape[0], x.shape[1], math.prod(x.shape[2:]), True),
        symmetric=False,
        floor=scale_of.floor,
        levels=largest_code(fmt, bits),
        samples=scale_of.range.samples(x.shape),
        observed=setting.input_range if operand == "input" else None,
        key=key,
    )
    return cpu.Codes(q=q, scale=scale, zero=zero)


def _show_codes(
    codes: cpu.Codes, x: Tensor, setting: NormSetting, operand: str, kernel: str, expected: tuple[str, ...] = ()
) -> None:
    """Show observers the codes of `x` that a native pass works on."""
    if not watch.observers:
        return
    with watch.inside():
        fmt: Format = getattr(setting.norm, operand)
        high = largest_code(fmt, setting.width(operand))
        steps = Steps(scale=codes.scale.view((1,) * x.dim()), zero=codes.zero, low=0.0, high=high)
        grid = Grid(format=fmt, sharing=sharing_of(fmt, x.shape), steps=steps)
        hat = Quantized(_values(codes, x.shape), grid)
        setting.show(operand, x.detach().float(), hat, "int8", kernel, expected)


def _values(codes: cpu.Codes, shape: torch.Size) -> Tensor:
    """The values of codes, float32 in the shape of the tensor that they were made of."""
    return (_in_rows(shape, torch.float32, codes.q).float() - codes.zero) * codes.scale


class RangeBatchNormOfCodes(torch.autograd.Function):
    """As `RangeBatchNorm`, in passes that encode, measure and normalise; it keeps codes for the backward."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        setting: NormSetting,
        fixed: tuple[Tensor, Tensor] | None,
        codes: cpu.Codes,
        expected: tuple[str, ...],
    ) -> tuple[Tensor, Tensor, Tensor]:
        """y, mu and sigma."""
        norm = setting.norm
        stats = code_statistics(codes, x.shape[1], norm) if fixed is None else _as_given(fixed)
        y = torch.empty_like(x)
        d = cpu.normalize(
            codes,
            stats,
            eps=setting.eps,
            narrowest=norm.narrowest == "step",
            inside=norm.epsilon == "inside",
            gamma=_float(weight),
            beta=_float(bias),
            rectify=setting.rectify,
            y=y,
        )
        kernel = "lowbit::normalize_relu" if setting.rectify else "lowbit::normalize"
        _show_codes(codes, x, setting, "input", kernel, expected)
        ctx.save_for_backward(codes.q, weight, bias, stats.mean, stats.sigma, d)
        ctx.kept = (setting, codes.scale, codes.zero, stats, x.shape, x.dtype)
        mean, sigma = fixed or (stats.mean, stats.sigma)
        ctx.mark_non_differentiable(mean, sigma)
        return y, mean, sigma

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor, *_: object) -> tuple[Tensor | None, ...]:
        """Gradients of x, gamma and beta."""
        refuse_second_derivative()
        q, weight, bias, mean, sigma, d = ctx.saved_tensors
        setting, scale, zero, stats, shape, dtype = ctx.kept
        dx, grad_weight, grad_bias = _backward_of_codes(
            grad_output,
            cpu.Codes(q=q, scale=scale, zero=zero),
            (weight, bias),
            replace(stats, mean=mean, sigma=sigma),
            d,
            setting,
            _in_rows(shape, dtype),
        )
        return (
            dx,
            None if weight is None else grad_weight.to(weight.dtype),
            None if bias is None else grad_bias,
            *[None] * 4,
        )


def _float(v: Tensor | None) -> Tensor | None:
    """The tensor as native passes read it."""
    return None if v is None else in_memory(v.detach().float()).contiguous()


def _as_given(fixed: tuple[Tensor, Tensor]) -> cpu.Statistics:
    """Given statistics, which are not those of this batch."""
    mean, sigma = (in_memory(v.float()).contiguous() for v in fixed)
    return cpu.Statistics(mean=mean, sigma=sigma)


def _in_rows(shape: torch.Size, dtype: torch.dtype, numbers: Tensor | None = None) -> Tensor:
    """A tensor (B, C, *size) whose memory is rows by channels: a new one, or one of these numbers."""
    if numbers is None:
        return torch.empty_strided(shape, strides.channels_last(shape), dtype=dtype, device="cpu")
    return numbers.view(shape[0], *shape[2:], shape[1]).movedim(-1, 1)


@cache
def _slopes(constant: Constant, lengths: tuple[int, ...]) -> Tensor:
    """`slopes` as the native pass reads them, float32 ``(K,)``; do not change them."""
    return torch.tensor(slopes(constant, lengths), dtype=torch.float32, device="cpu")


def code_statistics(codes: cpu.Codes, channels: int, norm: RangeNorm) -> cpu.Statistics:
    """`range_statistics` of the values of codes with two rows or more."""
    count = codes.q.numel() // channels
    lengths, starts = chunk_lengths(count, norm.chunks, norm.fewest_per_chunk)
    return cpu.code_statistics(codes, channels, [*starts, count], _slopes(norm.constant, tuple(lengths)))


def _backward_of_codes(
    grad_output: Tensor,
    codes: cpu.Codes,
    parameters: tuple[Tensor | None, Tensor | None],
    stats: cpu.Statistics,
    d: Tensor,
    setting: NormSetting,
    dx: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x (in `dx` or its dtype), gamma and beta; by the definition if g cannot have codes."""
    grad_output = in_memory(grad_output)
    if not is_channels_last(grad_output):
        grad_output = strides.laid_out(grad_output, strides.channels_last(grad_output.shape))
    weight, bias = parameters
    if setting.rectify:
        grad_output = cpu.rectify_backward(
            grad_output, codes, stats, gamma=_float(weight), beta=_float(bias), d=d, dtype=dx.dtype
        )
    g = codes_of(grad_output, setting, "grad_output")
    place = setting.norm.epsilon
    if g is not None:
        grads = cpu.normalize_backward(g, codes, stats, inside=place == "inside", gamma=_float(weight), d=d, dx=dx)
        _show_codes(g, grad_output, setting, "grad_output", "lowbit::normalize_backward")
        return dx, *grads
    # Recorded noise, or more than 8 bits.
    values = _values(codes, dx.shape)
    normalized = (values - per_channel(stats.mean, values)) / per_channel(d, values)
    grad = setting.quantized(grad_output.float(), "grad_output").values
    found = _by_value(stats)
    found_dx, *found_grads = range_batch_norm_backward(grad, normalized, weight, stats.sigma, d, found, place)
    return found_dx.to(dx.dtype), found_grads[0], found_grads[1]


def _by_value(stats: cpu.Statistics) -> Statistics | None:
    """The statistics as `range_statistics` gives them; None if they were given."""
    if stats.argmax is None or stats.argmin is None or stats.slopes is None:
        return None
    return Statistics(stats.mean, stats.sigma, stats.argmax.t().long(), stats.argmin.t().long(), stats.slopes)
