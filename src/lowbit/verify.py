"""Proof of what ran: every product of converted layers with its error, and every product outside them.

Notation: y product in full precision, y^ as it ran; N elements of an operand, M its bits.
"""

import math
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from lowbit import products
from lowbit.callstack import Callstack
from lowbit.checks import checked
from lowbit.convert import plain_type, replaced
from lowbit.errors import RunError, UsageError
from lowbit.formats import Integer
from lowbit.nn.layers import QuantLayer
from lowbit.nn.site import Site
from lowbit.outside import UNCOUNTED, multiplications
from lowbit.products import OperandRun, ProductRun
from lowbit.tables import text_table

# The cosine that the column "bits needed" asks for.
WANTED_COSINE = 0.98


class VerificationError(RunError):
    """What ran is not what the conversion promised."""


def angle_bound(bits: int, elements: int) -> float:
    """The cosine that SBM's theory guarantees between a tensor and its quantised self.

    ``cos >= 2**M / (2**M + sqrt(ln N / 6))`` for N normally distributed values and a uniform grid of M bits.

    Source: Banner et al. 2018, arXiv:1805.11046, section 2.
    """
    return 2.0**bits / (2.0**bits + math.sqrt(math.log(max(elements, 1)) / 6))


def bits_needed(cosine: float, elements: int) -> float:
    """The bits for which `angle_bound` reaches a cosine: ``log2(c / (1 - c) sqrt(ln N / 6))``, at least 1.

    Source: Banner et al. 2018, arXiv:1805.11046, section 2, solved for M.
    """
    root = math.sqrt(math.log(max(elements, 1)) / 6)
    return max(1.0, math.log2(cosine / (1 - cosine) * root)) if root else 1.0


@dataclass
class _Sums:
    """Running sums over the calls of a product: of y^2, y^ ^2, y y^ and (y - y^)^2, in float64."""

    signal: float = 0.0
    result: float = 0.0
    both: float = 0.0
    error: float = 0.0

    def add(self, exact: Tensor, actual: Tensor) -> None:
        """Take in one pair of tensors of the same shape."""
        exact, actual = exact.double().flatten(), actual.double().flatten()
        self.signal += float(exact @ exact)
        self.result += float(actual @ actual)
        self.both += float(exact @ actual)
        difference = exact - actual
        self.error += float(difference @ difference)

    @property
    def sqnr_db(self) -> float:
        """``10 log10(sum y^2 / sum (y - y^)^2)``; inf where they are equal."""
        if self.error == 0:
            return math.inf
        return 10 * math.log10(self.signal / self.error) if self.signal > 0 else -math.inf

    @property
    def cosine(self) -> float:
        """The cosine of the angle between y and y^; 1 where both are zero."""
        norms = math.sqrt(self.signal) * math.sqrt(self.result)
        if norms == 0:
            return 1.0 if self.signal == self.result else 0.0
        return self.both / norms


@dataclass(kw_only=True)
class _Compared:
    """What is compared with its full-precision self, over all calls."""

    sums: _Sums = field(default_factory=_Sums)

    @property
    def sqnr_db(self) -> float:
        """Signal to quantisation noise, dB; inf where nothing changed."""
        return self.sums.sqnr_db

    @property
    def cosine(self) -> float:
        """Cosine of the angle to full precision."""
        return self.sums.cosine


@dataclass(kw_only=True)
class OperandProof(_Compared):
    """One operand of one product, over all its calls.

    Attributes:
        format: its format, as text, as the shape of the first call made it.
        bits: width of its codes, the smallest of all calls.
        most_bits: the largest.
        elements: number of elements in one call.
        clipped: share of values more than half a step outside the grid.
    """

    format: str
    bits: int
    elements: int
    integer: bool
    clipped: float = 0.0
    most_bits: int = 0

    def saw(self, bits: int) -> None:
        """Take in the width of one call."""
        self.bits, self.most_bits = min(self.bits, bits), max(self.most_bits, bits)

    @property
    def width(self) -> str:
        """The widths as text, e.g. ``"8"`` or ``"3-6"``."""
        return f"{self.bits}-{self.most_bits}" if self.most_bits > self.bits else str(self.bits)

    @property
    def angle_bound(self) -> float | None:
        """What SBM's theory guarantees for the cosine; None for a float format."""
        return angle_bound(self.bits, self.elements) if self.integer else None

    @property
    def bits_needed(self) -> float | None:
        """Bits that the theory asks for `WANTED_COSINE`; None for a float format."""
        return bits_needed(WANTED_COSINE, self.elements) if self.integer else None


@dataclass(kw_only=True)
class ProofRow(_Compared):
    """One product of one layer, over all its calls.

    Attributes:
        layer: the layer's name.
        product: ``"output"``, ``"grad_input"`` or ``"grad_weight"``.
        calls: how often it ran.
        macs: multiply-accumulates of all calls; 0 for a normalisation.
        operands: by operand.
        engines: calls by engine.
        kernels: calls by kernel.
    """

    layer: str
    product: str
    calls: int = 0
    macs: int = 0
    operands: dict[str, OperandProof] = field(default_factory=dict)
    engines: dict[str, int] = field(default_factory=dict)
    kernels: dict[str, int] = field(default_factory=dict)

    @property
    def engine(self) -> str:
        """How it was executed; several where calls differ."""
        return ", ".join(self.engines)

    @property
    def kernel(self) -> str:
        """The operator that executed it; several where calls differ."""
        return ", ".join(self.kernels)

    @property
    def bits(self) -> str:
        """Widths of the operands, e.g. ``"8x8"``, or ``"3-6x8"`` where calls differ."""
        return "x".join(o.width for o in self.operands.values())

    @property
    def clipped(self) -> float:
        """The larger share of clipped values of the two operands."""
        return max(o.clipped for o in self.operands.values())

    @property
    def angle_bound(self) -> float | None:
        """The smaller bound of the operands' cosines by SBM's theory; None where both are float."""
        return min((o.angle_bound for o in self.operands.values() if o.angle_bound is not None), default=None)

    @property
    def bits_needed(self) -> float | None:
        """The larger of the widths that the theory asks of the operands; None where both are float."""
        return max((o.bits_needed for o in self.operands.values() if o.bits_needed is not None), default=None)


@dataclass
class OutsideRow:
    """One kind of product that ran outside converted layers.

    Attributes:
        op: the operator.
        module: the innermost module it ran in.
        calls: how often.
        macs: multiply-accumulates of all calls; None where no formula is known.
        share: of the MACs of all products, inside and outside; None likewise.
    """

    op: str
    module: str
    calls: int = 0
    macs: int | None = 0
    share: float | None = None


@dataclass
class Proof:
    """What `verify` saw; complete when its context ends. `print` shows it as tables.

    Attributes:
        rows: a row per layer and product.
        outside: products that ran outside converted layers.
    """

    rows: list[ProofRow] = field(default_factory=list)
    outside: list[OutsideRow] = field(default_factory=list)

    def __str__(self) -> str:
        header = [
            "layer",
            "product",
            "engine",
            "kernel",
            "calls",
            "bits",
            "SQNR dB",
            "cosine",
            "clipped %",
            "angle bound",
        ]
        header.append(f"bits for cos {WANTED_COSINE}")
        table = [
            [
                row.layer or "(model)",
                row.product,
                row.engine,
                row.kernel,
                str(row.calls),
                row.bits,
                f"{row.sqnr_db:.1f}",
                f"{row.cosine:.5f}",
                f"{100 * row.clipped:.2f}",
                "-" if row.angle_bound is None else f"{row.angle_bound:.4f}",
                "-" if row.bits_needed is None else f"{row.bits_needed:.1f}",
            ]
            for row in self.rows
        ]
        inside = sum(row.macs for row in self.rows)
        parts = [text_table(header, table), "", f"{inside:,} MACs inside converted layers."]
        if not self.outside:
            return "\n".join([*parts, "No product ran outside them."])
        share = sum(row.share or 0 for row in self.outside)
        parts.append(f"{100 * share:.2f} % of all MACs ran outside them, in the precision they were given:")
        rows = [
            [
                row.module or "(model)",
                row.op,
                str(row.calls),
                "not counted" if row.macs is None else f"{row.macs:,}",
                "-" if row.share is None else f"{100 * row.share:.2f}",
            ]
            for row in self.outside
        ]
        return "\n".join([*parts, text_table(["module", "operator", "calls", "MACs", "share %"], rows)])

    def summary(self) -> str:
        """A shorter table, a line per layer: the bits of each product and the smallest SQNR among them."""
        names = ("output", "grad_input", "grad_weight")
        table = []
        for layer in dict.fromkeys(row.layer for row in self.rows):
            rows = {row.product: row for row in self.rows if row.layer == layer}
            bits = [rows[name].bits if name in rows else "-" for name in names]
            engines = ", ".join(dict.fromkeys(row.engine for row in rows.values()))
            table.append([layer or "(model)", *bits, engines, f"{min(row.sqnr_db for row in rows.values()):.1f}"])
        return text_table(["layer", *names, "engine", "lowest SQNR dB"], table)


class _Collector:
    """The observer that turns runs into rows and remembers what was promised and what was wrong.

    Args:
        model: whose layers' runs count; those of other models are not looked at.
    """

    def __init__(self, model: nn.Module) -> None:
        self.name_of = name_of_source(model)
        self.rows: dict[tuple[str, str], ProofRow] = {}
        self.promised: set[tuple[str, str]] = set()
        self.failures: list[str] = []
        self._lock = threading.Lock()

    def __call__(self, run: ProductRun) -> None:
        """Take in one product."""
        layer = self.name_of(run.source)
        if layer is not None:
            with self._lock:  # the model may run in several threads
                self._take(layer, run)

    def _take(self, layer: str, run: ProductRun) -> None:
        row = self.rows.setdefault((layer, run.product), ProofRow(layer=layer, product=run.product))
        row.engines[run.engine] = row.engines.get(run.engine, 0) + 1
        row.kernels[run.kernel] = row.kernels.get(run.kernel, 0) + 1
        row.calls += 1
        row.macs += run.macs
        off_grid = False
        for name, operand in run.operands.items():
            proof = row.operands.setdefault(
                name,
                OperandProof(
                    format=str(operand.applied),
                    bits=operand.bits,
                    elements=operand.exact.numel(),
                    integer=isinstance(operand.format, Integer),
                ),
            )
            proof.saw(operand.bits)
            proof.clipped += (operand.clipped - proof.clipped) / row.calls
            proof.sums.add(operand.exact, operand.quantized)
            off_grid |= not torch.equal(operand.exact, operand.quantized)
            values = distinct_values(operand)
            if isinstance(operand.format, Integer) and values > 2**operand.bits:
                self.failures.append(
                    f"{layer}: {name} of {run.product} has {values:,} distinct values under one scale, more than "
                    f"{operand.bits} bits can tell apart"
                )
        exact = run.full_precision()
        row.sums.add(exact, run.result)
        if off_grid and bool(run.result.any()) and torch.equal(exact, run.result):
            self.failures.append(
                f"{layer}: {run.product} equals the full-precision product although its operands were off the grid"
            )
        self.promised.update((layer, product) for product in run.expected)

    def missing(self, model: nn.Module) -> Iterator[str]:
        """A sentence for each quantiser that should have run and did not."""
        ran, names = set(self.rows), site_names(model)
        for layer in model.modules():
            if isinstance(layer, QuantLayer):
                for site in layer.sites():
                    if (names[site], "output") not in ran:
                        kind = plain_type(layer).__name__
                        yield f"{names[site]}: the quantisers of this converted {kind} did not run"
        if any(product != "output" for _, product in ran):  # a backward ran
            for name, product in sorted(self.promised - ran):
                yield f"{name}: {product} was due in the backward and did not run"


# How many numbers of an operand are counted at most: sorting all of a layer of 100 M weights takes minutes.
_MOST_COUNTED = 2**22


def distinct_values(operand: OperandRun) -> int:
    """The largest number of distinct values that share a scale in a quantised operand; 0 where it is not known.

    Of a large operand an even sample is counted: of each scale at least four times as many numbers as its codes can
    tell apart, and of the scales as many as that leaves. Blocks are not counted, nor is an operand with nan or inf.
    """
    if operand.dims is None or operand.quantized.numel() == 0 or not bool(operand.quantized.isfinite().all()):
        return 0
    x = operand.quantized.reshape(operand.view)
    kept = [d for d in range(x.dim()) if d not in operand.dims]
    rows = x.permute(*kept, *operand.dims).reshape(math.prod(x.shape[d] for d in kept), -1)
    least = 4 * 2**operand.bits
    rows = _evenly(rows, 1, max(least, _MOST_COUNTED // rows.shape[0]))
    rows = _evenly(rows, 0, max(1, _MOST_COUNTED // rows.shape[1])).sort(1).values
    return int((rows.diff(dim=1) != 0).sum(1).max()) + 1


def _evenly(x: Tensor, dim: int, most: int) -> Tensor:
    """At most so many indices of an axis, evenly spread."""
    length = x.shape[dim]
    if length <= most:
        return x
    return x.index_select(dim, torch.arange(most, dtype=torch.int64, device=x.device) * length // most)


def _macs_of_convolution(out: torch.Size, x: Tensor, w: Tensor, transposed: bool) -> int:
    return (x.shape if transposed else out).numel() * math.prod(w.shape[1:])


def _macs_of_attention(q: Tensor, k: Tensor, v: Tensor, *, inner: int, outer: int) -> int:
    """`inner` products over q's width and `outer` over v's, for every pair of positions."""
    return q.shape[:-1].numel() * k.shape[-2] * (inner * q.shape[-1] + outer * v.shape[-1])


def _macs_of_rnn(x: Tensor, w_input: Tensor, w_recurrent: Tensor) -> int:
    return x.shape[:-1].numel() * (w_input.numel() + w_recurrent.numel())


_aten = torch.ops.aten
# Operators of the backward pass whose MACs torch's own counter does not give or gives wrongly on a CPU.
_BACKWARD: dict[Any, Callable[[Sequence[Any]], int]] = {
    _aten.convolution_backward: lambda a: sum(a[10][:2]) * _macs_of_convolution(a[0].shape, a[1], a[2], a[7]),
    _aten._scaled_dot_product_flash_attention_for_cpu_backward: lambda a: _macs_of_attention(*a[1:4], inner=3, outer=2),
    _aten.mkldnn_rnn_layer_backward: lambda a: 2 * _macs_of_rnn(*a[:3]),
}


class _Outside(TorchDispatchMode):
    """Counts the products that are dispatched outside converted layers, forward and backward."""

    def __init__(self, callstack: Callstack) -> None:
        super().__init__()
        self.callstack = callstack
        self.rows: dict[tuple[str, str], OutsideRow] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        packet = func._overloadpacket
        self.callstack.mark()
        if products.is_inside():
            return out
        if packet in _BACKWARD:
            self._add(packet, _BACKWARD[packet](args))
        elif (found := multiplications(packet, args, kwargs or {}, out)) is not None:
            self._add(packet, sum(m.macs * m.times for m in found))
        elif packet in flop_registry:
            self._add(packet, flop_registry[packet](*args, **(kwargs or {}), out_val=out) // 2)
        elif packet in UNCOUNTED:
            self._add(packet, None)
        return out

    def _add(self, packet: Any, macs: int | None) -> None:
        module = self.callstack.name()
        if module is None:
            return
        row = self.rows.setdefault((str(packet), module), OutsideRow(op=str(packet), module=module))
        row.calls += 1
        row.macs = None if macs is None or row.macs is None else row.macs + macs


def site_names(model: nn.Module) -> dict[object, str]:
    """The layers' names in this model by their sites; a site of a recurrent layer is named after its weight."""
    names: dict[object, str] = {}
    for name, layer in model.named_modules():
        if isinstance(layer, QuantLayer):
            for site in layer.sites():
                suffix = site.name.rpartition(".")[2] if len(layer.sites()) > 1 else ""
                names[site] = ".".join(filter(None, [name, suffix]))
    return names


def name_of_source(model: nn.Module) -> Callable[[object], str | None]:
    """What tells the name of the layer of this model that a product came from; None for another model's, or nobody's.

    Layers are told by their sites, not by their names, which another model may share. The replicas of
    `torch.nn.DataParallel`, which no clock knows, go by the clock and the name that they share with their layer.
    """
    names = site_names(model)
    replicated = {(site.clock, site.name): name for site, name in names.items() if isinstance(site, Site)}

    def name_of(source: object) -> str | None:
        known = names.get(source)
        if known is None and isinstance(source, Site) and source not in source.clock.sites:
            return replicated.get((source.clock, source.name))
        return known

    return name_of


def _replaced(model: nn.Module) -> Iterator[str]:
    """A sentence for each converted layer that is no longer in the model."""
    for site, kind in replaced(model).items():
        yield (
            f"{site.name or 'the model'}: this layer was converted, and {kind} stands in its place now. Convert what "
            "runs there with lowbit.convert_(layer, recipe), or let the next lowbit.state_dict(model) forget the layer"
        )


def _by_layer(rows: dict[tuple[str, str], ProofRow]) -> list[ProofRow]:
    """Layers in the order they first ran, each with its products together."""
    layers = list(dict.fromkeys(layer for layer, _ in rows))
    order = [(layer, product) for layer in layers for product in ("output", "grad_input", "grad_weight")]
    return [rows[key] for key in order if key in rows]


@checked
@contextmanager
def verify(model: nn.Module) -> Iterator[Proof]:
    """Watch every product that runs in this context, and fail where it is not what the conversion promised.

    Run one training step (forward and backward) inside. Every product of a converted layer is computed a second time
    in full precision, so this is for a step, not for a run. A compiled model runs eagerly here.

    Args:
        model: a converted model.

    Yields:
        The proof, complete when the context ends.

    Raises:
        UsageError: nothing in the model is converted.
        VerificationError: at the end of the context, where a converted layer's quantisers did not run, or where a
            nonzero product with an operand off its grid equals the full-precision product exactly, or where a
            converted layer was replaced by one that is not.
    """
    if not any(isinstance(m, QuantLayer) for m in model.modules()):
        raise UsageError("verify: nothing in this model is converted; call lowbit.convert_ first")
    proof, collector = Proof(), _Collector(model)
    with Callstack(model) as callstack, _Outside(callstack) as outside, products.observed_by(collector):
        yield proof
    proof.rows.extend(_by_layer(collector.rows))
    total = sum(row.macs for row in proof.rows) + sum(row.macs or 0 for row in outside.rows.values())
    for row in outside.rows.values():
        row.share = None if row.macs is None else row.macs / max(total, 1)
        proof.outside.append(row)
    failures = [*collector.failures, *collector.missing(model), *_replaced(model)]
    if failures:
        more = f" (and {len(failures) - 5} more)" if len(failures) > 5 else ""
        raise VerificationError("verify: " + "; ".join(failures[:5]) + more)


@contextmanager
def tripwire(model: nn.Module | None = None) -> Iterator[None]:
    """Raise at the first operand of any product in this context that is not finite, naming layer and operand.

    Args:
        model: whose layers are watched and named; None: those of all models, in every thread.

    Raises:
        RunError: an inf or nan reached an operand.
    """
    name_of = None if model is None else name_of_source(model)

    def check(run: ProductRun) -> None:
        layer = run.layer if name_of is None else name_of(run.source)
        if layer is None:
            return
        for name, operand in run.operands.items():
            if not bool(operand.exact.isfinite().all()):
                raise RunError(f"{layer or 'the model'}: {name} of {run.product} has a nan or inf")

    with products.observed_by(check):
        yield
