"""Range Batch-Norm: batch normalisation whose scale is the range of the batch instead of its variance.

Notation: x input ``(B, C, *size)``, mu mean, N = B * prod(size) values per channel, K chunks of n_k values
(batch-major), R_k their range, kappa a constant, d the divisor.

``sigma = kappa / K * sum_k R_k / sqrt(2 ln n_k)``, ``y = gamma (x - mu) / d + beta``.
"""

import itertools
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lowbit import products
from lowbit.formats import Format, Integer
from lowbit.kernels import cpu
from lowbit.nn.layers import QuantLayer
from lowbit.nn.site import Clock, Site, is_recomputing, runs_eagerly
from lowbit.quantizer import grid_of, levels_of, quantize
from lowbit.ranges import extremes
from lowbit.recipe import Constant, EpsilonPlace, RangeNorm, Recipe
from lowbit.rounding import Noise, field_of

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


def range_statistics(x: Tensor, *, constant: Constant, chunks: int) -> Statistics:
    """Mean and range estimate of each channel.

    The N values of a channel, batch-major, are cut into ``K = min(chunks, N // 2)`` chunks whose lengths differ by
    at most one; each is weighed with its own ``sqrt(2 ln n_k)``.

    Args:
        x: float ``(B, C, *size)``.
        constant: which kappa.
        chunks: at most so many chunks.

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
    lengths, first = chunk_lengths(count, chunks)
    number, longer = len(lengths), lengths.count(lengths[-1] + 1)
    short = lengths[-1]
    starts = torch.tensor(first, device=x.device)
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


def chunk_lengths(count: int, chunks: int) -> tuple[list[int], list[int]]:
    """Lengths and first indices of the chunks that `count` values are cut into, the longer ones first."""
    number = min(chunks, count // 2)
    short, longer = divmod(count, number)
    lengths = [short + 1] * longer + [short] * (number - longer)
    return lengths, [0, *itertools.accumulate(lengths[:-1])]


def divisor(sigma: Tensor, eps: float, place: EpsilonPlace) -> Tensor:
    """d: ``sqrt(sigma**2 + eps)`` (inside), as BatchNorm divides, or ``sigma + eps`` (outside)."""
    return torch.sqrt(sigma * sigma + eps) if place == "inside" else sigma + eps


@dataclass(frozen=True, kw_only=True)
class NormSetting:
    """How one Range BN call is computed.

    Args:
        norm: constant, chunks, place of epsilon and formats.
        eps: added to the divisor.
        noise: for the stochastic rounding of grad_output.
        bits: int64 ``(2,)``, widths of input and grad_output; None: the formats' own.
        input_range: lo and hi for the input; None: of the batch.
        layer: name for reports.
        engine: for reports.
        source: what calls, for observers.
    """

    norm: RangeNorm
    eps: float
    noise: Noise | None = None
    bits: Tensor | None = None
    input_range: tuple[Tensor, Tensor] | None = None
    layer: str = ""
    engine: str = "reference"
    source: object = None

    def quantized(self, x: Tensor, operand: str, expected: tuple[str, ...] = ()) -> Tensor:
        """`x`, which is the layer's ``"input"`` or ``"grad_output"``, in its format; shown to observers."""
        fmt: Format = getattr(self.norm, operand)
        if x.is_meta:  # shapes without values, as when a run is planned
            return torch.empty_like(x)
        noise, levels, width = None, None, fmt.bits
        if isinstance(fmt, Integer):
            if fmt.stochastic and self.noise is not None:
                noise = field_of(self.noise, "normalization", operand, x)
            if self.bits is not None:
                bits = self.bits[0 if operand == "input" else 1]
                levels, width = levels_of(fmt, bits), int(bits) if products.is_observed() else 0
        observed = self.input_range if operand == "input" else None
        hat = quantize(x, fmt, levels=levels, noise=noise, observed=observed, measure=products.is_observed())
        if products.is_observed():
            with products.inside():
                run = products.OperandRun(
                    format=fmt,
                    bits=width,
                    exact=x,
                    quantized=hat.values,
                    clipped=hat.clipped or 0.0,
                    view=tuple(x.shape),
                    dims=tuple(range(x.dim())),
                )
                self._notify(operand, run, expected)
        return hat.values

    def _notify(self, operand: str, run: products.OperandRun, expected: tuple[str, ...]) -> None:
        products.notify(
            products.ProductRun(
                source=self.source,
                layer=self.layer,
                product="output" if operand == "input" else "grad_input",
                kind="range_batch_norm",
                engine="reference",  # observed, the definition runs: codes are not shown
                kernel="range_batch_norm",
                macs=0,
                operands={operand: run},
                result=run.quantized,
                full_precision=lambda: run.exact,
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
        values = setting.quantized(x, "input", expected)
        norm = setting.norm
        stats = None
        if fixed is None:
            stats = range_statistics(values, constant=norm.constant, chunks=norm.chunks)
            mean, sigma = stats.mean, stats.sigma
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
            setting.quantized(grad_output, "grad_output"),
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
    channel = torch.arange(shape[1], device=index.device)[:, None]
    return ((index // positions * shape[1] + channel) * positions + index % positions).flatten()


def _codes(x: Tensor, setting: NormSetting, operand: str) -> tuple[Tensor, float, int] | None:
    """Codes of x as rows by channels, with scale and zero point; None where the native passes do not take it."""
    fmt: Format = getattr(setting.norm, operand)
    channels = x.shape[1]
    if setting.engine != "int8" or not cpu.runs(x) or not isinstance(fmt, Integer) or fmt.zero != "integer":
        return None
    bits = fmt.bits if setting.bits is None else int(setting.bits[0 if operand == "input" else 1])
    if bits > 8 or x.numel() == 0 or products.is_observed() or not cpu.is_channels_last(x):
        return None
    key = None
    if fmt.stochastic:
        key = None if setting.noise is None else setting.noise.words("normalization", operand)
        if key is None:
            return None
    observed = setting.input_range if operand == "input" else None
    lo, hi = observed or extremes(x, rule=fmt.range, dims=tuple(range(x.dim())))
    scale, zero, low, high = grid_of(lo.reshape(1), hi.reshape(1), fmt, float(2**bits - 1))
    grid = cpu.Grid(scale=scale, zero=zero, low=float(low), high=float(high), key=key)
    q = cpu.encode(x, (x.shape[0], channels, math.prod(x.shape[2:]), True), grid, signed=False)
    assert zero is not None
    point = float(zero)
    return q, float(scale), 0 if math.isnan(point) else int(point)


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
        codes: tuple[Tensor, float, int],
    ) -> tuple[Tensor, Tensor, Tensor]:
        q, scale, zero = codes
        channels = x.shape[1]
        found = None
        if fixed is None:
            found = code_statistics(q, channels, scale, zero, setting.norm)
            mean, sigma = found.mean, found.sigma
        else:
            mean, sigma = fixed
        d = divisor(sigma, setting.eps, setting.norm.epsilon)
        gamma = torch.ones_like(d) if weight is None else weight.float()
        beta = torch.zeros_like(d) if bias is None else bias.float()
        slope = gamma / d
        y = torch.empty_like(x)
        cpu.affine(q, slope * scale, beta - slope * (mean + zero * scale), y)
        ctx.save_for_backward(q, weight, mean, sigma, d)
        ctx.kept = (setting, found, scale, zero, bias is not None, x.shape, x.dtype)
        ctx.mark_non_differentiable(mean, sigma)
        return y, mean, sigma

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor, *_: object) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise RuntimeError(
                "Range BN has no second derivative here: call backward without create_graph=True, or restore_ the layer"
            )
        q, weight, mean, sigma, d = ctx.saved_tensors
        setting, found, scale, zero, has_bias, shape, dtype = ctx.kept
        if not cpu.is_channels_last(grad_output):
            grad_output = torch.empty_like(_in_rows(shape, grad_output.dtype)).copy_(grad_output)
        codes = _codes(grad_output, setting, "grad_output")
        if codes is None:  # an observer came, or recorded noise: the definition, on the values of the codes
            values = (_in_rows(shape, torch.float32, q).float() - zero) * scale
            normalized = (values - _per_channel(mean, values)) / _per_channel(d, values)
            stats = None if found is None else found.statistics()
            g = setting.quantized(grad_output.float(), "grad_output")
            grads = range_batch_norm_backward(g, normalized, weight, sigma, d, stats, setting.norm.epsilon)
            dx = grads[0].to(dtype)
        else:
            dx = _in_rows(shape, dtype)
            grads = _backward_of_codes(codes, q, scale, zero, weight, mean, sigma, d, found, setting, dx)
        grad_weight = None if weight is None else grads[1].to(weight.dtype)
        return dx, grad_weight, grads[2] if has_bias else None, None, None, None


def _in_rows(shape: torch.Size, dtype: torch.dtype, numbers: Tensor | None = None) -> Tensor:
    """A tensor (B, C, *size) whose memory is rows by channels: new, or of these numbers."""
    order = (shape[0], *shape[2:], shape[1])
    rows = torch.empty(order, dtype=dtype) if numbers is None else numbers.view(order)
    return rows.movedim(-1, 1)


@dataclass(frozen=True)
class CodeStatistics:
    """`Statistics` of codes: sums of codes ``(C,)``, rows of the extremes ``(K, C)``, the chunks' slopes ``(K,)``."""

    total: Tensor
    mean: Tensor
    sigma: Tensor
    argmax: Tensor
    argmin: Tensor
    slope: Tensor

    def statistics(self) -> Statistics:
        """The same with indices as `range_statistics` gives them."""
        return Statistics(self.mean, self.sigma, self.argmax.t().long(), self.argmin.t().long(), self.slope)


def code_statistics(q: Tensor, channels: int, scale: float, zero: int, norm: RangeNorm) -> CodeStatistics:
    """`range_statistics` of the values ``(q - zero) * scale`` of codes that are two rows or more by channels."""
    count = q.numel() // channels
    lengths, starts = chunk_lengths(count, norm.chunks)
    high, low, argmax, argmin = cpu.code_extremes(q, channels, [*starts, count])
    slope = torch.tensor([KAPPA[norm.constant] / len(lengths) / math.sqrt(2 * math.log(n)) for n in lengths])
    total, _ = cpu.code_sums(q, None, channels)
    mean = ((total.double() / count - zero) * scale).float()
    spread = (high.float() - low.float()) * scale
    return CodeStatistics(total, mean, (spread * slope[:, None]).sum(0), argmax, argmin, slope)


def _backward_of_codes(
    codes: tuple[Tensor, float, int],
    q: Tensor,
    scale: float,
    zero: int,
    weight: Tensor | None,
    mean: Tensor,
    sigma: Tensor,
    d: Tensor,
    found: CodeStatistics | None,
    setting: NormSetting,
    dx: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """`range_batch_norm_backward` on codes, into `dx`; sums are exact integers until they are scaled."""
    g, g_scale, g_zero = codes
    channels = d.numel()
    count = q.numel() // channels
    total, product = cpu.code_sums(g, q, channels)
    sum_q = (cpu.code_sums(q, None, channels)[0] if found is None else found.total).double()
    sum_g = total.double() - count * g_zero
    both = product.double() - g_zero * sum_q - zero * sum_g
    grad_bias = sum_g * g_scale
    grad_weight = ((both * (g_scale * scale) - mean.double() * grad_bias) / d.double()).float()
    grad_bias = grad_bias.float()
    gamma = torch.ones_like(d) if weight is None else weight.float()
    slope = gamma / d
    average = grad_bias / count if found is not None else torch.zeros_like(grad_bias)
    a, b = slope * g_scale, -slope * (g_zero * g_scale + average)
    cpu.affine(g, a, b, dx)
    if found is not None:
        slope_d = sigma / d if setting.norm.epsilon == "inside" else torch.ones_like(d)
        share = (-gamma * grad_weight / d * slope_d) * found.slope[:, None]
        # Chunks are apart, so a value gets the share of one largest and one smallest at most; of a constant chunk both.
        same = found.argmax == found.argmin
        rows = dx.movedim(1, -1).reshape(-1, channels)
        channel = torch.arange(channels).expand_as(found.argmax)
        for index, sign in ((found.argmax, 1.0), (found.argmin, -1.0)):
            at = index.long()
            exact = a * g.view(-1, channels)[at, channel].float() + b + torch.where(same, 0.0, sign * share)
            rows[at, channel] = exact.to(dx.dtype)
    return dx, grad_weight, grad_bias


def range_batch_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    *,
    setting: NormSetting,
    fixed: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Range Batch-Norm with its quantisers, differentiable in x, weight and bias.

    Args:
        x: float ``(B, C, *size)`` or ``(B, C)``.
        weight: gamma ``(C,)``, or None for 1.
        bias: beta ``(C,)``, or None for 0.
        setting: constant, chunks, epsilon, formats, noise.
        fixed: ``(mu, sigma)`` to normalise with, as evaluation does; None: of this batch.

    Returns:
        ``(y, mu, sigma)``: y in the dtype of `x`, mu and sigma ``(C,)`` without gradient.

    Raises:
        ValueError: fewer than 2 values per channel, unless `fixed` is given.

    Source: Banner et al. 2018, arXiv:1805.11046, section 3; backward derived and checked against the authors' code.
    """
    dtype = x.dtype
    if setting.engine == "int8" and x.device.type == "cpu" and not cpu.is_channels_last(x) and x.dim() > 1:
        x = (
            x.contiguous(memory_format=torch.channels_last)
            if x.dim() == 4
            else x.movedim(1, -1).contiguous().movedim(-1, 1)
        )
    codes = _codes(x, setting, "input") if fixed is not None or x.numel() > x.shape[1] else None
    if codes is not None:
        with torch.autocast("cpu", enabled=False):
            result: tuple[Tensor, Tensor, Tensor] = _RangeBatchNormOfCodes.apply(x, weight, bias, setting, fixed, codes)
        return result
    x = x.float() if dtype in (torch.bfloat16, torch.float16) else x
    with torch.autocast(products.autocast_device(x), enabled=False):
        expected = ("grad_input",) if torch.is_grad_enabled() and x.requires_grad else ()
        y, mean, sigma = _RangeBatchNorm.apply(x, weight, bias, setting, fixed, expected)
    return y.to(dtype), mean, sigma


class _RangeBatchNormNd(QuantLayer, nn.modules.batchnorm._BatchNorm):
    """Range BN with the parameters and buffers of batch normalisation.

    `running_mean` and `running_var` hold running averages of mu and sigma squared, so that the plain layer that
    `lowbit.restore_` gives back evaluates alike.
    """

    def attach(self, *, name: str, recipe: Recipe, clock: Clock, engine: str) -> None:
        """Give the layer its state."""
        norm = recipe.normalization
        if norm is None:
            raise TypeError(f"{name}: recipe {recipe.name!r} has no range normalisation")
        bits = [norm.input.bits, norm.grad_output.bits]
        self.site = Site(name=name, recipe=recipe, clock=clock, input_format=norm.input, bits=bits, engine=engine)
        self.norm = norm

    @runs_eagerly
    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - the plain layer's argument
        """See `range_batch_norm`; in training the running statistics move towards the batch's."""
        self._check_input_dim(input)
        fixed = None
        if not self.training and self.running_mean is not None and self.running_var is not None:
            fixed = (self.running_mean, self.running_var.sqrt())
        y, mean, sigma = range_batch_norm(
            input,
            self.weight,
            self.bias,
            setting=NormSetting(
                norm=self.norm,
                eps=self.eps,
                noise=self.site.noise(),
                bits=self.site.bits.clone(),
                input_range=self.site.input_range(input),
                layer=self.site.name,
                engine=self.site.engine,
                source=self.site,
            ),
            fixed=fixed,
        )
        if self.training and self.track_running_stats and not is_recomputing():
            self._track(mean, sigma)
        return y

    @torch.no_grad()
    def _track(self, mean: Tensor, sigma: Tensor) -> None:
        """Move the running statistics; momentum None is the cumulative mean, as in the plain layer."""
        assert self.num_batches_tracked is not None
        assert self.running_mean is not None
        assert self.running_var is not None
        self.num_batches_tracked.add_(1)
        momentum = self.momentum if self.norm.momentum is None else self.norm.momentum
        weight = 1.0 / self.num_batches_tracked.to(mean) if momentum is None else torch.as_tensor(momentum).to(mean)
        self.running_mean.lerp_(mean.to(self.running_mean), weight.to(self.running_mean))
        self.running_var.lerp_((sigma * sigma).to(self.running_var), weight.to(self.running_var))


class RangeBatchNorm1d(_RangeBatchNormNd, nn.BatchNorm1d):
    """Range BN of ``(B, C)`` or ``(B, C, L)`` in place of `torch.nn.BatchNorm1d`."""


class RangeBatchNorm2d(_RangeBatchNormNd, nn.BatchNorm2d):
    """Range BN of ``(B, C, H, W)`` in place of `torch.nn.BatchNorm2d`."""


class RangeBatchNorm3d(_RangeBatchNormNd, nn.BatchNorm3d):
    """Range BN of ``(B, C, D, H, W)`` in place of `torch.nn.BatchNorm3d`."""
