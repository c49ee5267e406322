"""Range Batch-Norm: batch normalisation whose scale is the range of the batch instead of its variance.

Notation: x input ``(B, C, *size)``, mu mean, N = B * prod(size) values per channel, K chunks of n_k values
(batch-major), R_k their range, kappa a constant, d the divisor.

``sigma = kappa / K * sum_k R_k / sqrt(2 ln n_k)``, ``y = gamma (x - mu) / d + beta``.
"""

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any, ClassVar, TypeGuard

import torch
from torch import Tensor, nn

from lowbit.engines.int8 import missing, takes
from lowbit.functional import autocast_device
from lowbit.kernels import cpu
from lowbit.methods.recipe import Constant, EpsilonPlace, Narrowest, RangeNorm, Recipe
from lowbit.nn.callstack import others_look_on
from lowbit.nn.layers import QuantLayer
from lowbit.nn.site import Clock, Site, is_recomputing
from lowbit.numerics.elements import Steps
from lowbit.numerics.formats import Format, largest_code
from lowbit.numerics.quantizer import Grid, Quantized, quantize, sharing_of
from lowbit.numerics.rounding import Noise, field_of
from lowbit.products import strides, watch

# The authors' constant makes sigma nearly the standard deviation of a normal x; the paper's is 1.7 to 1.85 of it.
KAPPA: dict[Constant, float] = {"paper": 1.0, "authors": 0.5 * 0.35 * (1 + math.sqrt(math.pi * math.log(4)))}


@dataclass(frozen=True)
class Statistics:
    """What one batch says of each channel.

    Args:
        mean: mu, ``(C,)``.
        sigma: the estimate of the standard deviation, ``(C,)``.
        argmax: batch-major index of the first largest value of each chunk, ``(C, K)`` in 0..N-1.
        argmin: likewise of the smallest.
        slope: d sigma / d R_k, ``(K,)``.
    """

    mean: Tensor
    sigma: Tensor
    argmax: Tensor
    argmin: Tensor
    slope: Tensor


def range_statistics(x: Tensor, *, constant: Constant, chunks: int, fewest: int = 2) -> Statistics:
    """Mean and range estimate of each channel.

    The N values of a channel, batch-major, are cut into ``K = min(chunks, N // fewest)`` chunks, one at least, whose
    lengths differ by at most one; each is weighed with its own ``sqrt(2 ln n_k)``.

    Args:
        x: float ``(B, C, *size)``.
        constant: which kappa.
        chunks: at most so many chunks.
        fewest: values in a chunk, unless the channel has fewer.

    Raises:
        ValueError: N < 2: one value has no range.

    Source: Banner et al. 2018, section 3 (``"paper"``); their code's RangeBN (``"authors"``).
    """
    channels = x.shape[1]
    rows = x.transpose(0, 1).reshape(channels, -1)
    count = rows.shape[1]
    if count < 2:
        raise ValueError(
            f"Range BN got an input of shape {tuple(x.shape)}: {count} value(s) per channel have no range. Use a "
            "larger batch, or leave this layer out with a rule"
        )
    lengths, first = chunk_lengths(count, chunks, fewest)
    number, longer = len(lengths), lengths.count(lengths[-1] + 1)
    short = lengths[-1]
    starts = torch.tensor(first, dtype=torch.int64, device=x.device)
    split = longer * (short + 1)
    parts = [rows[:, :split].unflatten(1, (longer, short + 1))] if longer else []
    parts.append(rows[:, split:].unflatten(1, (number - longer, short)))
    # torch.max over a dim gives the first of several equal values, as the authors' code does.
    high = [part.max(2) for part in parts]
    low = [part.min(2) for part in parts]
    spread = torch.cat([h.values - w.values for h, w in zip(high, low, strict=True)], 1)
    slope = x.new_tensor([KAPPA[constant] / number / math.sqrt(2 * math.log(n)) for n in lengths])
    return Statistics(
        mean=rows.mean(1),
        sigma=(spread * slope).sum(1),
        argmax=torch.cat([h.indices for h in high], 1) + starts,
        argmin=torch.cat([w.indices for w in low], 1) + starts,
        slope=slope,
    )


def chunk_lengths(count: int, chunks: int, fewest: int) -> tuple[list[int], list[int]]:
    """Lengths and first indices of the chunks that `count` values are cut into, the longer ones first."""
    number = max(1, min(chunks, count // fewest))
    short, longer = divmod(count, number)
    lengths = [short + 1] * longer + [short] * (number - longer)
    return lengths, [0, *itertools.accumulate(lengths[:-1])]


def divisor(sigma: Tensor, eps: float, place: EpsilonPlace) -> Tensor:
    """d: ``sqrt(sigma**2 + eps)`` (inside), as BatchNorm divides, or ``sigma + eps`` (outside)."""
    return torch.sqrt(sigma * sigma + eps) if place == "inside" else sigma + eps


def _bounded(stats: Statistics, grid: Grid | None, narrowest: Narrowest) -> Tensor:
    """The batch's sigma, and where all codes of a channel are equal that of the narrowest ranges.

    Divided by ``sqrt(eps)`` alone, their gradient, and what a rounded mean leaves of them, would grow by hundreds.
    """
    if grid is None or narrowest == "zero":
        return stats.sigma
    return torch.where(stats.sigma == 0, stats.slope.sum() * grid.steps.scale.reshape(()), stats.sigma)


@dataclass(frozen=True, kw_only=True)
class NormSetting:
    """How one Range BN call is computed.

    Args:
        norm: constant, chunks, place of epsilon and formats.
        eps: added to the divisor.
        noise: for the stochastic rounding of grad_output.
        bits: widths of input and grad_output; None: the formats' own.
        input_range: lo and hi for the input; None: of the batch.
        layer: name for reports.
        engine: how it is executed.
        source: what calls, for observers.
        rectify: whether the result is to be 0 where it would be less, as a ReLU after it makes it.
    """

    norm: RangeNorm
    eps: float
    noise: Noise | None = None
    bits: tuple[int, ...] | None = None
    input_range: tuple[Tensor, Tensor] | None = None
    layer: str = ""
    engine: str = "reference"
    source: object = None
    rectify: bool = False

    def quantized(self, x: Tensor, operand: str, expected: tuple[str, ...] = ()) -> Quantized:
        """`x`, which is the layer's ``"input"`` or ``"grad_output"``, in its format; shown to observers."""
        fmt: Format = getattr(self.norm, operand)
        if x.is_meta:  # shapes without values, as when a run is planned
            return Quantized(torch.empty_like(x))
        noise = None
        if fmt.stochastic and self.noise is not None:
            noise = field_of(self.noise, "normalization", operand, x)
        levels = largest_code(fmt, self.width(operand)) if fmt.has_width else None
        observed = self.input_range if operand == "input" else None
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


class _RangeBatchNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        setting: NormSetting,
        fixed: tuple[Tensor, Tensor] | None,
        expected: tuple[str, ...],
    ) -> tuple[Tensor, Tensor, Tensor]:
        hat = setting.quantized(x, "input", expected)
        values, norm = hat.values, setting.norm
        stats = None
        if fixed is None:
            stats = range_statistics(values, constant=norm.constant, chunks=norm.chunks, fewest=norm.fewest_per_chunk)
            mean, sigma = stats.mean, stats.sigma
            d = divisor(_bounded(stats, hat.grid, norm.narrowest), setting.eps, norm.epsilon)
        else:
            mean, sigma = fixed
            d = divisor(sigma, setting.eps, norm.epsilon)
        normalized = (values - _per_channel(mean, x)).div_(_per_channel(d, x))
        y = normalized.clone() if weight is None else normalized * _per_channel(weight, x)
        y = y if bias is None else y.add_(_per_channel(bias, x))
        ctx.save_for_backward(normalized, weight, sigma, d)
        ctx.kept = (setting, stats, bias is not None)
        ctx.mark_non_differentiable(mean, sigma)
        return y, mean, sigma

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor, *_: object) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise RuntimeError(
                "Range BN has no second derivative here: call backward without create_graph=True, or restore_ the layer"
            )
        normalized, weight, sigma, d = ctx.saved_tensors
        setting, stats, has_bias = ctx.kept
        grads = range_batch_norm_backward(
            setting.quantized(grad_output, "grad_output").values,
            normalized,
            weight,
            sigma,
            d,
            stats,
            setting.norm.epsilon,
        )
        return grads[0], grads[1] if weight is not None else None, grads[2] if has_bias else None, None, None, None


def range_batch_norm_backward(
    g: Tensor,
    normalized: Tensor,
    weight: Tensor | None,
    sigma: Tensor,
    d: Tensor,
    stats: Statistics | None,
    place: EpsilonPlace,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, gamma and beta.

    With ``G = gamma g``: ``dx = (G - mean G) / d``, and the extremes of chunk k further receive plus (largest) and
    minus (smallest) ``-(sum G x_normalised) / d * (dd/dsigma) * (dsigma/dR_k)``. Fixed statistics: ``dx = G / d``.
    """
    axes = (0, *range(2, g.dim()))
    grad_weight = (g * normalized).sum(axes)
    grad_bias = g.sum(axes)
    gamma = torch.ones_like(d) if weight is None else weight
    if stats is None:
        return g * _per_channel(gamma / d, g), grad_weight, grad_bias
    count = g.numel() // g.shape[1]
    dx = (g - _per_channel(grad_bias / count, g)).mul_(_per_channel(gamma / d, g)).contiguous()
    slope_d = sigma / d if place == "inside" else torch.ones_like(d)
    grad_sigma = -gamma * grad_weight / d * slope_d
    share = grad_sigma[:, None] * stats.slope
    flat = dx.view(-1)
    flat.index_add_(0, _flat_index(stats.argmax, g.shape), share.flatten())
    flat.index_add_(0, _flat_index(stats.argmin, g.shape), -share.flatten())
    return dx, grad_weight, grad_bias


def _per_channel(v: Tensor, x: Tensor) -> Tensor:
    return v.reshape(1, -1, *[1] * (x.dim() - 2))


def _flat_index(index: Tensor, shape: torch.Size) -> Tensor:
    """Batch-major indices ``(C, K)`` within each channel as indices into contiguous ``(B, C, *size)``."""
    positions = math.prod(shape[2:])
    channel = torch.arange(shape[1], dtype=torch.int64, device=index.device)[:, None]
    return ((index // positions * shape[1] + channel) * positions + index % positions).flatten()


def _codes(x: Tensor, setting: NormSetting, operand: str) -> cpu.Codes | None:
    """Codes of x as rows by channels; None where the native passes do not take it."""
    fmt: Format = getattr(setting.norm, operand)
    if setting.engine != "int8" or not cpu.runs(x) or fmt.zero != "integer" or not takes(fmt):
        return None
    bits, scale_of = setting.width(operand), fmt.scale
    if bits > 8 or x.numel() == 0 or not cpu.is_channels_last(x) or scale_of is None:
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
    """What codes stand for, float32 in the shape of the tensor they were made of."""
    return (_in_rows(shape, torch.float32, codes.q).float() - codes.zero) * codes.scale


class _RangeBatchNormOfCodes(torch.autograd.Function):
    """The same on codes: one pass to encode, one for statistics, one to normalise; codes are kept for the backward."""

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
        if torch.is_grad_enabled():
            raise RuntimeError(
                "Range BN has no second derivative here: call backward without create_graph=True, or restore_ the layer"
            )
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
    """As native passes read it."""
    return None if v is None else cpu.in_memory(v.detach().float()).contiguous()


def _as_given(fixed: tuple[Tensor, Tensor]) -> cpu.Statistics:
    """Statistics that are not of this batch."""
    mean, sigma = (cpu.in_memory(v.float()).contiguous() for v in fixed)
    return cpu.Statistics(mean=mean, sigma=sigma)


def _in_rows(shape: torch.Size, dtype: torch.dtype, numbers: Tensor | None = None) -> Tensor:
    """A tensor (B, C, *size) whose memory is rows by channels: new, or of these numbers."""
    if numbers is None:
        return torch.empty_strided(shape, strides.channels_last(shape), dtype=dtype, device="cpu")
    return numbers.view(shape[0], *shape[2:], shape[1]).movedim(-1, 1)


@cache
def _slopes(constant: Constant, lengths: tuple[int, ...]) -> Tensor:
    """The derivative of sigma for the range of each chunk, float32 ``(K,)``; not to be changed."""
    slopes = [KAPPA[constant] / len(lengths) / math.sqrt(2 * math.log(n)) for n in lengths]
    return torch.tensor(slopes, dtype=torch.float32, device="cpu")


def code_statistics(codes: cpu.Codes, channels: int, norm: RangeNorm) -> cpu.Statistics:
    """`range_statistics` of the values of codes that are two rows or more by channels."""
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
    """Gradients of x, in `dx` or of its dtype, gamma and beta; by the definition where g gets no codes."""
    grad_output = cpu.in_memory(grad_output)
    if not cpu.is_channels_last(grad_output):
        grad_output = strides.laid_out(grad_output, strides.channels_last(grad_output.shape))
    weight, bias = parameters
    if setting.rectify:
        grad_output = cpu.rectify_backward(
            grad_output, codes, stats, gamma=_float(weight), beta=_float(bias), d=d, dtype=dx.dtype
        )
    g = _codes(grad_output, setting, "grad_output")
    place = setting.norm.epsilon
    if g is not None:
        grads = cpu.normalize_backward(g, codes, stats, inside=place == "inside", gamma=_float(weight), d=d, dx=dx)
        _show_codes(g, grad_output, setting, "grad_output", "lowbit::normalize_backward")
        return dx, *grads
    # Recorded noise, or more than 8 bits.
    values = _values(codes, dx.shape)
    normalized = (values - _per_channel(stats.mean, values)) / _per_channel(d, values)
    grad = setting.quantized(grad_output.float(), "grad_output").values
    found = _by_value(stats)
    found_dx, *found_grads = range_batch_norm_backward(grad, normalized, weight, stats.sigma, d, found, place)
    return found_dx.to(dx.dtype), found_grads[0], found_grads[1]


def _by_value(stats: cpu.Statistics) -> Statistics | None:
    """The same as `range_statistics` gives them; None where they were given."""
    if stats.argmax is None or stats.argmin is None or stats.slopes is None:
        return None
    return Statistics(stats.mean, stats.sigma, stats.argmax.t().long(), stats.argmin.t().long(), stats.slopes)


def range_batch_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    *,
    setting: NormSetting,
    fixed: tuple[Tensor, Tensor] | None = None,
    tape: "Tape | None" = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Range Batch-Norm with its quantisers, differentiable in x, weight and bias.

    Args:
        x: float ``(B, C, *size)`` or ``(B, C)``.
        weight: gamma ``(C,)``, or None for 1.
        bias: beta ``(C,)``, or None for 0.
        setting: constant, chunks, epsilon, formats, noise.
        fixed: ``(mu, sigma)`` to normalise with, as evaluation does; None: of this batch.
        tape: what takes the place of autograd; None: autograd.

    Returns:
        ``(y, mu, sigma)``: y in the dtype of `x`, mu and sigma ``(C,)`` without gradient.

    Raises:
        ValueError: fewer than 2 values per channel, unless `fixed` is given.
        RuntimeError: gamma, beta or fixed statistics that are not one number for each channel.

    Source: Banner et al. 2018, arXiv:1805.11046, section 3; backward derived and checked against the authors' code.
    """
    mean, sigma = fixed or (None, None)
    for what, v in (("gamma", weight), ("beta", bias), ("running mean", mean), ("running variance", sigma)):
        if v is not None and v.shape != x.shape[1:2]:
            raise RuntimeError(
                f"{setting.layer or 'Range BN'}: {what} of shape {tuple(v.shape)} for an input of shape "
                f"{tuple(x.shape)}: give one number for each of {x.shape[1]} channels"
            )
    x, dtype, wanted = cpu.in_memory(x), x.dtype, strides.of_normalization(x)
    if setting.engine == "int8" and x.device.type == "cpu" and not cpu.is_channels_last(x) and x.dim() > 1:
        x = strides.laid_out(x, strides.channels_last(x.shape))
    codes = _codes(x, setting, "input") if fixed is not None or x.numel() > x.shape[1] else None
    expected = ("grad_input",) if torch.is_grad_enabled() and x.requires_grad else ()
    if codes is not None:
        with torch.autocast("cpu", enabled=False):
            run = _run(_RangeBatchNormOfCodes, tape)
            y, mean, sigma = run(x, weight, bias, setting, fixed, codes, expected)
        return strides.laid_out(y, wanted), mean, sigma
    x = x.float() if dtype in (torch.bfloat16, torch.float16) else x
    with torch.autocast(autocast_device(x), enabled=False):
        y, mean, sigma = _run(_RangeBatchNorm, tape)(x, weight, bias, setting, fixed, expected)
    y = strides.laid_out(y.to(dtype), wanted)
    y = y.relu() if setting.rectify else y
    if tape is not None and setting.rectify:
        tape.rectified = y
    return y, mean, sigma


class Tape:
    """What autograd keeps of a function for its backward, where the backward is asked for apart.

    Attributes:
        saved_tensors: as of a context of autograd.
        kept: what else the function keeps.
        rectified: the result, where a ReLU after the function made it.
        function: the function that ran.
    """

    saved_tensors: tuple[Tensor | None, ...] = ()
    kept: Any = None
    rectified: Tensor | None = None
    function: Any = None

    def save_for_backward(self, *tensors: Tensor | None) -> None:
        """Keep tensors."""
        self.saved_tensors = tensors

    def mark_non_differentiable(self, *_: Tensor) -> None:
        """Nothing: whoever asks for the backward asks for that of y."""

    @torch.no_grad()
    def backward(self, g: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """The gradients of input, gamma and beta."""
        if self.rectified is not None:
            g = g * (self.rectified > 0)
        g = g.float() if self.function is _RangeBatchNorm and g.dtype in (torch.bfloat16, torch.float16) else g
        with torch.autocast(autocast_device(g), enabled=False):
            dx, d_gamma, d_beta, *_ = self.function.backward(self, g, None, None)
        return dx, d_gamma, d_beta


def _run(function: Any, tape: Tape | None) -> Callable[..., tuple[Tensor, Tensor, Tensor]]:
    """A function of autograd, or its forward alone, which keeps on a tape."""
    if tape is None:
        applied: Callable[..., tuple[Tensor, Tensor, Tensor]] = function.apply
        return applied
    tape.function = function
    return partial(function.forward, tape)


class NormSite(Site):
    """The site of a Range BN."""

    def formats(self) -> list[tuple[str, str, Format]]:
        """Its own; it has no products."""
        norm = self.recipe.normalization
        assert norm is not None
        return [("output", "input", norm.input), ("grad_input", "grad_output", norm.grad_output)]

    def setting_of_norm(self, x: Tensor, eps: float, *, rectify: bool, compiled: bool = False) -> NormSetting:
        """How a call is computed for input `x`."""
        norm = self.recipe.normalization
        assert norm is not None
        return NormSetting(
            norm=norm,
            eps=eps,
            noise=self.noise(compiled=compiled),
            bits=self.widths_now(),
            input_range=self.input_range(x),
            layer=self.name,
            engine=self.engine,
            source=self,
            rectify=rectify,
        )

    def forward_norm(
        self,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        fixed: tuple[Tensor, Tensor] | None,
        eps: float,
        rectify: bool,
        needs: tuple[bool, bool, bool],
    ) -> tuple[Tensor, Tensor, Tensor, Callable[[Tensor], tuple[Tensor | None, Tensor | None, Tensor | None]]]:
        """What an operator of a compiled model calls, see `lowbit.products.compiled`."""
        tape = Tape()
        setting = self.setting_of_norm(x, eps, rectify=rectify, compiled=True)
        y, mean, sigma = range_batch_norm(x, weight, bias, setting=setting, fixed=fixed, tape=tape)

        def backward(g: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
            found = zip(tape.backward(g), (x, weight, bias), needs, strict=True)
            dx, d_gamma, d_beta = (
                d.to(t.dtype) if needed and d is not None and t is not None else None for d, t, needed in found
            )
            return dx, d_gamma, d_beta

        return y.clone() if y is x else y, mean.clone(), sigma.clone(), backward


class _RangeBatchNormNd(QuantLayer, nn.modules.batchnorm._BatchNorm):
    """Range BN with the parameters and buffers of batch normalisation.

    `running_mean` and `running_var` hold running averages of mu and sigma squared, so that the plain layer that
    `lowbit.restore_` gives back evaluates alike.
    """

    remark: ClassVar[str] = "range normalisation"

    @classmethod
    def is_in(cls, recipe: Recipe) -> bool:
        """Whether the recipe replaces normalisations."""
        return recipe.normalization is not None

    @classmethod
    def refusal(cls, layer: Any, recipe: Recipe) -> str:  # noqa: ARG003 - always so
        """Nothing is refused."""
        return ""

    @classmethod
    def operator(cls, layer: Any) -> None:
        """It has no product."""

    @classmethod
    def weights(cls, layer: Any) -> list[Tensor]:  # noqa: ARG003 - always so
        """None: gamma multiplies each channel apart."""
        return []

    @classmethod
    def input_channels(cls, layer: Any) -> int:
        """C."""
        return int(layer.num_features)

    @classmethod
    def formats(cls, recipe: Recipe) -> dict[str, tuple[Format, ...]]:
        """One operand forward, one backward."""
        norm = recipe.normalization
        return {} if norm is None else {"output": (norm.input,), "grad_input": (norm.grad_output,)}

    @classmethod
    def engine_refusal_of_formats(cls, layer: Any, recipe: Recipe, engine: str) -> str:  # noqa: ARG003 - recipe alone
        """Native passes work on codes of a byte; no other engine normalises."""
        if engine != "int8":
            return "range normalisation, which runs on the int8 and the reference engine"
        of_products = cls.formats(recipe).values()
        if not all(f.zero == "integer" and f.bits <= 8 for formats in of_products for f in formats):
            return "range normalisation runs on codes of up to 8 bits with an integer zero point"
        return missing("int8")

    def attach(self, *, name: str, recipe: Recipe, clock: Clock, engine: str) -> None:
        """Give the layer its state."""
        norm = recipe.normalization
        if norm is None:
            raise TypeError(f"{name}: recipe {recipe.name!r} has no range normalisation")
        bits = [norm.input.bits, norm.grad_output.bits]
        self.site = NormSite(name=name, recipe=recipe, clock=clock, input_format=norm.input, bits=bits, engine=engine)
        self.norm = norm

    def undo(self) -> None:
        """Become the plain layer again."""
        del self.norm
        super().undo()

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - the plain layer's argument
        """See `range_batch_norm`; in training the running statistics move towards the batch's."""
        return self.normalize(input)

    def normalize(self, input: Tensor, *, rectify: bool = False) -> Tensor:  # noqa: A002 - the plain layer's argument
        """What `forward` does; with `rectify` the result is 0 where it would be less, as a ReLU after it makes it."""
        self._check_input_dim(input)
        fixed = None
        if not self.training and self.running_mean is not None and self.running_var is not None:
            fixed = (self.running_mean, self.running_var.sqrt())
        assert isinstance(self.site, NormSite)
        if torch.compiler.is_compiling():
            y, mean, sigma = self._compiled(input, fixed, rectify)
        else:
            setting = self.site.setting_of_norm(input, self.eps, rectify=rectify)
            y, mean, sigma = range_batch_norm(input, self.weight, self.bias, setting=setting, fixed=fixed)
        if self.training and self.track_running_stats and (torch.compiler.is_compiling() or not is_recomputing()):
            self._track(mean, sigma)
        return y

    def _compiled(self, x: Tensor, fixed: tuple[Tensor, Tensor] | None, rectify: bool) -> tuple[Tensor, Tensor, Tensor]:
        """One operator of `lowbit.products.compiled`."""
        recorded = torch.is_grad_enabled()
        needs = [recorded and t is not None and t.requires_grad for t in (x, self.weight, self.bias)]
        mean, deviation = (None, None) if fixed is None else fixed
        y: Tensor
        mu: Tensor
        sigma: Tensor
        y, mu, sigma, _ = torch.ops.lowbit.range_norm(
            x,
            self.weight,
            self.bias,
            self.site.clock.pulse,
            mean,
            deviation,
            self.site.number,
            self.eps,
            rectify,
            needs,
        )
        return y, mu, sigma

    @torch.no_grad()
    def _track(self, mean: Tensor, sigma: Tensor) -> None:
        """Move the running statistics; momentum None is the cumulative mean, as in the plain layer."""
        assert self.num_batches_tracked is not None
        assert self.running_mean is not None
        assert self.running_var is not None
        self.num_batches_tracked.add_(1)
        momentum = self.momentum if self.norm.momentum is None else self.norm.momentum
        weight = 1.0 / self.num_batches_tracked.to(self.running_mean) if momentum is None else momentum
        self.running_mean.lerp_(mean.to(self.running_mean), weight)
        self.running_var.lerp_((sigma * sigma).to(self.running_var), weight)


class RangeBatchNorm1d(_RangeBatchNormNd, nn.BatchNorm1d):
    """Range BN of ``(B, C)`` or ``(B, C, L)`` in place of `torch.nn.BatchNorm1d`."""

    plain = nn.BatchNorm1d


class RangeBatchNorm2d(_RangeBatchNormNd, nn.BatchNorm2d):
    """Range BN of ``(B, C, H, W)`` in place of `torch.nn.BatchNorm2d`."""

    plain = nn.BatchNorm2d


class RangeBatchNorm3d(_RangeBatchNormNd, nn.BatchNorm3d):
    """Range BN of ``(B, C, D, H, W)`` in place of `torch.nn.BatchNorm3d`."""

    plain = nn.BatchNorm3d


class FusedSequential(nn.Sequential):
    """`torch.nn.Sequential` in which a Range BN does the ReLU right after it in its own pass over memory.

    Only here is it known that nothing else sees what lies between them: a call of the normalisation on its own, a slice
    without the ReLU, or a hook that looks at either of them gets what it got before.
    """

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - the plain container's argument
        """Call the modules one after the other, a Range BN together with the ReLU after it.

        A compiled model calls each on its own, with the same numbers.
        """
        if torch.compiler.is_compiling():
            for part in self:
                input = part(input)  # noqa: A001 - the plain container's argument
            return input
        x, modules = input, iter(self)
        following = next(modules, None)
        while (module := following) is not None:
            following = next(modules, None)
            if is_fusible(module, following) and _is_called_plainly(module) and _is_called_plainly(following):
                x = module.normalize(x, rectify=True)
                following = next(modules, None)
            else:
                x = module(x)
        return x


def has_fused_pair(module: nn.Module) -> bool:
    """Whether this is a plain `torch.nn.Sequential` with a Range BN on the int8 engine right before a ReLU."""
    return type(module) is nn.Sequential and any(is_fusible(*pair) for pair in itertools.pairwise(module))


def is_fusible(norm: nn.Module, relu: nn.Module | None) -> TypeGuard[_RangeBatchNormNd]:
    """Whether these are a Range BN and a ReLU that could run as one, and the engine of the first makes it a gain."""
    return isinstance(norm, _RangeBatchNormNd) and type(relu) is nn.ReLU and norm.site.engine == "int8"


# What a plain call of either module runs.
_PLAIN_FORWARDS = (_RangeBatchNormNd.forward, nn.ReLU.forward)
_HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")


def _is_called_plainly(module: nn.Module | None) -> bool:
    """Whether calling the module runs its class's own forward and nothing else: no hook, no replaced forward."""
    return (
        module is not None
        and type(module).forward in _PLAIN_FORWARDS
        and type(module).__call__ is nn.Module.__call__
        and "forward" not in module.__dict__
        and module._compiled_call_impl is None
        and not any(getattr(module, hooks) for hooks in _HOOKS)
        and not others_look_on()
    )
