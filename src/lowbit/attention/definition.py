"""The definition of quantised attention, in plain torch, tile by tile.

Notation: B samples, H heads, L queries, S keys, E head size; s a tile of scores, p of shares; a hat marks a value on
its format's grid. Tiles of queries are rows, those of keys columns.

Forward, for each row of tiles, with the running maximum m and sum l of the flash attention algorithm:
``s = scale q^ k^T``, ``r = max s``, ``p = exp(s - r)``, ``l += exp(r - m) sum p``, ``O += exp(r - m) p^ v^``.
In the end ``O /= l`` and ``lse = m + log l``.

Backward, with ``D = rowsum(g O)``: ``p = exp(s - lse)``, ``dP = g^ v^T``, ``ds = p (dP - D)``, ``dV += p^T g^``,
``dQ += scale ds^ k^``, ``dK += scale ds^T q^``.

Dropped shares are zeros of p^, and what is kept is divided by ``1 - dropout``. Rounding is differentiated straight
through, and the mean that `smooth_k` subtracts is a constant: the gradient of the scores sums to 0 over the keys.

Source: Dao 2023, FlashAttention-2, arXiv:2307.08691; Zhang et al. 2026, SageBwd, arXiv:2603.02170.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lowbit.engines.reference import in_full
from lowbit.methods.attention import OPERANDS, Attention
from lowbit.numerics.quantizer import quantize
from lowbit.numerics.rounding import Noise, uniform_noise_at


@dataclass(frozen=True, kw_only=True)
class Call:
    """How one call of attention is computed.

    Args:
        formats: of its operands, and how they are cut.
        scale: the factor of the scores.
        causal: whether query i sees the keys up to i alone.
        dropout: the probability that a share is dropped.
        mask: broadcasts to (B, H, L, S): True where a query sees a key, or float to add to the scores; None for none.
        noise: where noise comes from; needed with dropout and for formats that round stochastically.
        layer: for messages.
    """

    formats: Attention
    scale: float
    causal: bool = False
    dropout: float = 0.0
    mask: Tensor | None = None
    noise: Noise | None = None
    layer: str = ""

    def noise_of(self, what: str) -> Noise:
        """The noise, which something needs."""
        if self.noise is None:
            raise ValueError(f"{self.layer or 'attention'}: {what} needs noise, and the setting has none")
        return self.noise


@dataclass(kw_only=True)
class Trace:
    """What a run of the definition computed, whole: the matrices of `lowbit.verify`, L x S each.

    Attributes:
        exact: operands before they were rounded, by (part, product, operand).
        rounded: the same after.
    """

    exact: dict[tuple[str, str, str], Tensor] = field(default_factory=dict)
    rounded: dict[tuple[str, str, str], Tensor] = field(default_factory=dict)

    def put(self, place: tuple[str, str, str], x: Tensor, hat: Tensor, at: "_At") -> None:
        """Write a tile of an operand where it belongs."""
        for store, tile in ((self.exact, x), (self.rounded, hat)):
            if place not in store:
                store[place] = tile.new_zeros(at.shape)
            store[place][at.index] = tile


@dataclass(frozen=True)
class _At:
    """Where a tile lies: rows and columns of a matrix (B, H, height, width)."""

    shape: tuple[int, ...]
    rows: slice
    columns: slice

    @property
    def index(self) -> tuple[slice, ...]:
        return (slice(None), slice(None), self.rows, self.columns)

    def noise(self, words: tuple[int, int], device: torch.device) -> Tensor:
        """The noise of a tile: that of the elements' numbers in the whole matrix."""
        batch, heads, height, width = self.shape
        first = torch.arange(batch * heads, dtype=torch.int64, device=device).view(batch, heads, 1, 1) * height
        row = torch.arange(self.rows.start, self.rows.stop, dtype=torch.int64, device=device).view(-1, 1)
        column = torch.arange(self.columns.start, self.columns.stop, dtype=torch.int64, device=device)
        return uniform_noise_at(torch.tensor(words, dtype=torch.int64, device=device), (first + row) * width + column)


def tiles(length: int, size: int) -> Iterator[slice]:
    """The positions of each tile; the last one may be shorter."""
    for start in range(0, length, size):
        yield slice(start, min(start + size, length))


class Run:
    """One run of the definition: what rounds, masks and drops a tile."""

    def __init__(self, call: Call, q: Tensor, k: Tensor, v: Tensor, trace: Trace | None) -> None:
        self.call, self.trace = call, trace
        self.q, self.k, self.v = q, smoothed(k, call.formats), v
        self.square = (*q.shape[:-1], k.shape[-2])

    def rounded(self, x: Tensor, part: str, product: str, role: str, at: _At) -> Tensor:
        """A tile of an operand on its grid."""
        name = dict(OPERANDS[part, product])[role]
        fmt = getattr(self.call.formats, name)
        noise = None
        if fmt.stochastic:
            source, product_name = self.call.noise_of(f"{name}, which rounds stochastically,"), f"{part}.{product}"
            words = source.words(product_name, role)
            whole = source.draw(product_name, role, x.new_empty(at.shape)) if words is None else None
            noise = at.noise(words, x.device) if words is not None else None if whole is None else whole[at.index]
        dims = (2, 3) if fmt.granularity == "tensor" else (SUMMED[part, product, role],)
        hat = quantize(x.contiguous(), fmt, dims=dims if fmt.scale is not None else None, noise=noise).values
        if self.trace is not None:
            self.trace.put((part, product, role), x, hat, at)
        return hat

    def positions(self, x: Tensor, rows: slice, part: str, product: str, role: str) -> Tensor:
        """A tile of positions of q, k, v or grad_output on its grid."""
        at = _At(tuple(x.shape), rows, slice(0, x.shape[-1]))
        return self.rounded(x[..., rows, :], part, product, role, at)

    def skips(self, rows: slice, columns: slice) -> bool:
        """Whether no query of these rows sees a key of these columns."""
        return self.call.causal and columns.start >= rows.stop

    def scores(self, q_hat: Tensor, k_hat: Tensor, rows: slice, columns: slice) -> Tensor:
        """A tile of scores; -inf where a query does not see a key."""
        s = (q_hat @ k_hat.mT) * self.call.scale
        mask = self.call.mask
        if mask is not None:
            mask = mask.expand(self.square)[..., rows, columns]
            s = torch.where(mask, s, -math.inf) if mask.dtype == torch.bool else s + mask.to(s.dtype)
        if self.call.causal:
            index = torch.arange(rows.start, rows.stop, dtype=torch.int64, device=s.device).unsqueeze(1)
            seen = index >= torch.arange(columns.start, columns.stop, dtype=torch.int64, device=s.device)
            s = torch.where(seen, s, -math.inf)
        return s

    def kept(self, rows: slice, columns: slice, like: Tensor) -> Tensor | None:
        """Which shares of a tile are not dropped; None without dropout."""
        call = self.call
        if not call.dropout:
            return None
        source, at = call.noise_of("dropout"), _At(self.square, rows, columns)
        words = source.words("attention", "dropout")
        if words is None:
            drawn = source.draw("attention", "dropout", like.new_empty(self.square))
            assert drawn is not None
            return drawn[at.index] >= call.dropout
        return at.noise(words, like.device) >= call.dropout


# The axis of a tile that each product sums over.
SUMMED = {
    ("scores", "output", "input"): 3,
    ("scores", "output", "weight"): 3,
    ("scores", "grad_input", "grad_output"): 3,
    ("scores", "grad_input", "weight"): 2,
    ("scores", "grad_weight", "grad_output"): 2,
    ("scores", "grad_weight", "input"): 2,
    ("values", "output", "input"): 3,
    ("values", "output", "weight"): 2,
    ("values", "grad_input", "grad_output"): 3,
    ("values", "grad_input", "weight"): 3,
    ("values", "grad_weight", "grad_output"): 2,
    ("values", "grad_weight", "input"): 2,
}


def smoothed(k: Tensor, formats: Attention) -> Tensor:
    """The keys without their mean over positions, which is summed in float64."""
    if not formats.smooth_k or not k.shape[-2]:
        return k
    return k - k.mean(-2, keepdim=True, dtype=torch.float64).to(k.dtype)


def forward(q: Tensor, k: Tensor, v: Tensor, call: Call, trace: Trace | None = None) -> tuple[Tensor, Tensor]:
    """The output and the log-sum-exp of the scores of each query.

    Args:
        q: float32 or float64 ``(B, H, L, E)``.
        k: ``(B, H, S, E)``, a head for each of the queries'.
        v: ``(B, H, S, F)``.
        call: how.
        trace: takes the operands.

    Returns:
        ``(B, H, L, F)`` and ``(B, H, L)``; 0 and -inf where a query sees no key.
    """
    run, size = Run(call, q, k, v, trace), call.formats.tile
    out = q.new_zeros((*q.shape[:-1], v.shape[-1]))
    lse = q.new_full(q.shape[:-1], -math.inf)
    columns = list(tiles(k.shape[-2], size))
    keys = [run.positions(run.k, c, "scores", "output", "weight") for c in columns]
    values = [run.positions(v, c, "values", "output", "weight") for c in columns]
    for r in tiles(q.shape[-2], size):
        q_hat = run.positions(q, r, "scores", "output", "input")
        total, top = torch.zeros_like(lse[..., r, None]), lse[..., r, None].clone()
        o = torch.zeros_like(out[..., r, :])
        for c, k_hat, v_hat in zip(columns, keys, values, strict=True):
            if run.skips(r, c):
                continue
            s = run.scores(q_hat, k_hat, r, c)
            peak = s.amax(-1, keepdim=True)
            p = exp_from(s, peak)
            p_hat = run.rounded(p, "values", "output", "input", _At(run.square, r, c))
            kept = run.kept(r, c, p)
            p_hat = p_hat if kept is None else p_hat * kept
            new = torch.maximum(top, peak)
            old, share = exp_from(top, new), exp_from(peak, new)
            o = o * old + (p_hat @ v_hat) * share
            total, top = total * old + p.sum(-1, keepdim=True) * share, new
        out[..., r, :] = torch.where(total == 0, 0.0, o / total / (1 - call.dropout))
        lse[..., r] = (top + total.log()).squeeze(-1)
    return out, lse


def exp_from(x: Tensor, top: Tensor) -> Tensor:
    """``exp(x - top)``; 0 where `top` is -inf, so that nothing is seen."""
    return torch.where(top == -math.inf, 0.0, (x - top).exp())


def backward(
    g: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, call: Call, trace: Trace | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """The gradients of q, k, v, and of a float mask that requires one.

    Args:
        g: grad_output ``(B, H, L, F)``.
        q: as for `forward`.
        k: as for `forward`.
        v: as for `forward`.
        out: its output.
        lse: its log-sum-exp.
        call: how.
        trace: takes the operands.
    """
    run, size = Run(call, q, k, v, trace), call.formats.tile
    dq, dk, dv = torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
    mask = call.mask
    dmask = torch.zeros_like(mask, dtype=q.dtype) if mask is not None and mask.requires_grad else None
    d, lse = (g * out).sum(-1, keepdim=True), lse.unsqueeze(-1)
    rows = list(tiles(q.shape[-2], size))
    keep = 1 / (1 - call.dropout)
    by_row = {
        "q": [run.positions(q, r, "scores", "output", "input") for r in rows],
        "q in dk": [run.positions(q, r, "scores", "grad_weight", "input") for r in rows],
        "g in dp": [run.positions(g, r, "values", "grad_input", "grad_output") for r in rows],
        "g in dv": [run.positions(g, r, "values", "grad_weight", "grad_output") for r in rows],
    }
    for c in tiles(k.shape[-2], size):
        k_hat = run.positions(run.k, c, "scores", "output", "weight")
        k_in_dq = run.positions(run.k, c, "scores", "grad_input", "weight")
        v_in_dp = run.positions(v, c, "values", "grad_input", "weight")
        for i, r in enumerate(rows):
            if run.skips(r, c):
                continue
            at = _At(run.square, r, c)
            p = exp_from(run.scores(by_row["q"][i], k_hat, r, c), lse[..., r, :])
            p_hat = run.rounded(p, "values", "grad_weight", "input", at)
            dp = by_row["g in dp"][i] @ v_in_dp.mT
            kept = run.kept(r, c, p)
            if kept is not None:
                p_hat, dp = p_hat * kept * keep, dp * kept * keep
            ds = p * (dp - d[..., r, :])
            dv[..., c, :] += p_hat.mT @ by_row["g in dv"][i]
            in_dq = run.rounded(ds, "scores", "grad_input", "grad_output", at)
            dq[..., r, :] += in_dq @ k_in_dq * call.scale
            in_dk = run.rounded(ds, "scores", "grad_weight", "grad_output", at)
            dk[..., c, :] += in_dk.mT @ by_row["q in dk"][i] * call.scale
            if dmask is not None:
                _add_to_mask(dmask, ds, r, c)
    return dq, dk, dv, dmask


def _add_to_mask(dmask: Tensor, ds: Tensor, rows: slice, columns: slice) -> None:
    """Add the gradient of a tile of scores to that of what was added to them, which may be broadcast."""
    dmask = dmask[(None,) * (4 - dmask.dim())]
    at = tuple(
        span if size > 1 else slice(0, 1)
        for span, size in zip((slice(None), slice(None), rows, columns), dmask.shape, strict=True)
    )
    part = dmask[at]
    part += ds.sum_to_size(part.shape)


class Reference:
    """The definition as an engine, for tensors of any type on any device."""

    engine = "reference"
    forward_kernel = backward_kernel = "aten::matmul"

    def forward(self, q: Tensor, k: Tensor, v: Tensor, call: Call) -> tuple[Tensor, Tensor]:
        """The output, in the dtype of `q`, and the log-sum-exp; a meta tensor has a shape but no values."""
        if q.is_meta:
            return q.new_empty((*q.shape[:-1], v.shape[-1])), q.new_empty(q.shape[:-1])
        out, lse = forward(in_full(q), in_full(per_query_head(k, q)), in_full(per_query_head(v, q)), call)
        made = q.new_empty((out.shape[0], out.shape[2], out.shape[1], out.shape[3])).transpose(1, 2)
        return made.copy_(out), lse

    def backward(
        self, g: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, call: Call
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """The gradients of q, k, v and of a mask that requires one."""
        if q.is_meta:
            mask = call.mask
            dmask = torch.empty_like(mask) if mask is not None and mask.requires_grad else None
            return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v), dmask
        wide_k, wide_v = in_full(per_query_head(k, q)), in_full(per_query_head(v, q))
        dq, dk, dv, dmask = backward(in_full(g), in_full(q), wide_k, wide_v, in_full(out), lse, call)
        dk, dv = (per_key_head(t, k.shape[1]) for t in (dk, dv))
        return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype), dmask


def per_query_head(x: Tensor, q: Tensor) -> Tensor:
    """Keys or values with a head for each of the queries'."""
    return x if x.shape[1] == q.shape[1] else x.repeat_interleave(q.shape[1] // max(x.shape[1], 1), 1)


def per_key_head(x: Tensor, groups: int) -> Tensor:
    """Gradients of such keys or values, summed over the queries' heads that share one."""
    return x if x.shape[1] == groups else x.unflatten(1, (groups, -1)).sum(2)
