"""Proof of what ran: every product of converted layers with its error, and every product outside them."""

import math
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from lowbit.conversion.rules import some
from lowbit.conversion.state import replaced
from lowbit.errors import RunError, UsageError
from lowbit.evidence.names import name_of_source, site_names
from lowbit.evidence.proof import OperandProof, OutsideRow, Proof, ProofRow
from lowbit.evidence.records import PRODUCTS
from lowbit.evidence.watch import Operation, watched_by
from lowbit.inputs.checks import checked
from lowbit.nn.calls.call import QuantCall
from lowbit.nn.calls.caller import callers
from lowbit.nn.kinds import plain_type
from lowbit.nn.layers import converted_layers
from lowbit.nn.site import Site
from lowbit.products import watch
from lowbit.products.watch import OperandRun, ProductRun

# The largest share of an operand's values that a healthy layer clips, see docs/limitations.md.
MOST_CLIPPED = 0.2
# The largest share of an operand's values at the floor of the scale that is not worth a note.
MOST_FLOORED = 0.01


class VerificationError(RunError):
    """What ran is not what the conversion promised."""


class _Collector:
    """The observer that turns runs into rows and remembers what was promised and what was wrong.

    Args:
        model: the model whose layers are watched; other models are not.
    """

    def __init__(self, model: nn.Module) -> None:
        self.name_of = name_of_source(model)
        self.rows: dict[tuple[str, str], ProofRow] = {}
        self.ran: set[str] = set()
        self.promised: set[tuple[str, str]] = set()
        self.failures: list[str] = []
        self.not_finite: dict[tuple[str, str], str] = {}
        self.phases: dict[str, list[str]] = {}
        self.skipping: list[str] = []
        self._lock = threading.Lock()

    def __call__(self, run: ProductRun) -> None:
        """Take in one product."""
        layer = self.name_of(run.source)
        if layer is not None:
            with self._lock:  # the model may run in several threads
                if run.product == "output":
                    self.ran.add(layer)
                self._take_source(layer, run)
                self._take(".".join(filter(None, (layer, run.part))), run)

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
                    integer=operand.format.has_width,
                ),
            )
            proof.saw(operand.bits)
            if str(operand.applied) not in proof.format.split(" | "):
                proof.format += f" | {operand.applied}"
            proof.clipped += (operand.clipped - proof.clipped) / row.calls
            proof.floored += (operand.floored - proof.floored) / row.calls
            proof.two_codes += (operand.two_codes - proof.two_codes) / row.calls
            proof.sums.add(operand.exact, operand.quantized)
            off_grid |= not torch.equal(operand.exact, operand.quantized)
            if not bool(operand.exact.isfinite().all()):
                self.not_finite[layer, run.product] = name
                continue
            values = distinct_values(operand)
            if operand.format.has_width and values > 2**operand.bits:
                self.failures.append(
                    f"{layer}: {name} of {run.product} has {values:,} distinct values under one scale, more than "
                    f"{operand.bits} bits can distinguish"
                )
        exact = run.full_precision()
        row.sums.add(exact, run.result)
        if off_grid and bool(run.result.any()) and torch.equal(exact, run.result):
            self.failures.append(
                f"{layer}: {run.product} equals the full-precision product although its operands were off the grid"
            )
        self.promised.update((layer, product) for product in run.expected)

    def _take_source(self, layer: str, run: ProductRun) -> None:
        """Note the phase of the layer that ran, and whether it skips `grad_weight`."""
        site = run.source
        if not isinstance(site, Site):
            return
        if site.recipe.phases:
            where = f"phase {site.phase + 1} of {len(site.recipes)} ({site.present.name})"
            if layer not in self.phases.setdefault(where, []):
                self.phases[where].append(layer)
        if site.skips and site.training and layer not in self.skipping:
            self.skipping.append(layer)

    def remarks(self) -> Iterator[str]:
        """A sentence for each phase, for layers that skipped `grad_weight`, and for operands that had two codes."""
        for where, layers in self.phases.items():
            yield f"{some(layers)}: {where}."
        if self.skipping:
            yield f"{some(self.skipping)}: grad_weight was skipped as the recipe says, and the weights get no gradient."
        twice: dict[tuple[str, str], list[float]] = {}
        for row in self.rows.values():
            for name, operand in row.operands.items():
                if operand.two_codes:
                    twice.setdefault((name, row.product), []).append(operand.two_codes)
        for (name, product), shares in twice.items():
            share, most = 100 * sum(shares) / len(shares), 100 * max(shares)
            yield (
                f"{name} of {product} had two codes for each number in {share:.1f} % of its blocks, the mean of "
                f"{len(shares)} layers; at most {most:.1f} %."
            )

    def missing(self, model: nn.Module, users: Callable[[str], list[OutsideRow]]) -> Iterator[str]:
        """A sentence for each quantiser that should have run but did not; `users` says what multiplied instead."""
        ran, names = set(self.rows), site_names(model)
        layers = converted_layers(model)
        called = {
            id(p)
            for layer in layers.values()
            if isinstance(layer, QuantCall) and names[layer.site] in self.ran
            for p in layer.multiplied
        }
        for name, layer in layers.items():
            if isinstance(layer, QuantCall) or any(id(p) in called for p in layer.weights(layer)):
                continue  # a call runs where its module's forward needs it, and may multiply by a layer's weight
            idle = [names[site] for site in layer.sites() if names[site] not in self.ran]
            if not idle:
                continue
            shown, kind = " and ".join(n or "the model" for n in idle), plain_type(layer).__name__
            yield f"{shown}: the quantisers of this converted {kind} did not run{_instead(name, users(name))}"
        if any(product != "output" for _, product in ran):  # a backward ran
            for name, product in sorted(self.promised - ran):
                yield f"{name}: {product} was due in the backward and did not run"

    def unproven(self) -> Iterator[str]:
        """A sentence if an operand has a nan or inf, which makes every figure of its products meaningless."""
        if self.not_finite:
            (layer, product), name = next(iter(self.not_finite.items()))
            yield (
                f"{layer or 'the model'}: {name} of {product} has a nan or inf, the first of {len(self.not_finite)} "
                "products with one, so nothing is proven of them. lowbit.tripwire(model) stops a step at the first; "
                "verify a state and a batch that are finite"
            )

    def clipped(self, model: nn.Module) -> Iterator[str]:
        """A sentence for each operand that had more than `MOST_CLIPPED` of its values outside its grid."""
        names = site_names(model)
        layers = {names[site]: name for name, layer in converted_layers(model).items() for site in layer.sites()}
        for row in self.rows.values():
            for name, operand in row.operands.items():
                if operand.clipped > MOST_CLIPPED:
                    layer = layers.get(row.layer, row.layer)
                    yield (
                        f"{row.layer or 'the model'}: {100 * operand.clipped:.0f} % of the values of {name} in "
                        f"{row.product} lie outside the grid of {operand.format} and were clipped, more than the "
                        f"{100 * MOST_CLIPPED:.0f} % that a healthy layer clips. Its range does not fit these values: "
                        f"leave the layer with rules=[({layer!r}, None)], give it a recipe whose ranges are those of "
                        "the tensor, e.g. 'int8', or train the running range before you evaluate"
                    )

    def floored(self) -> Iterator[str]:
        """A sentence for each kind of operand whose values are so small that the floor of the scale decided."""
        found: dict[tuple[str, str, str], list[tuple[float, str]]] = {}
        for row in self.rows.values():
            for name, operand in row.operands.items():
                if operand.floored > MOST_FLOORED:
                    found.setdefault((name, row.product, operand.format), []).append((operand.floored, row.layer))
        for (name, product, fmt), layers in found.items():
            share, worst = max(layers)
            yield (
                f"{name} of {product} is so small in {len(layers)} layers that the floor of the scale decides its "
                f"steps ({fmt}): for {100 * share:.0f} % of the values in {worst or 'the model'}. What is smaller than "
                "a step is lost. Multiply the loss by a constant and divide the gradients by it before the update, or "
                "take a recipe without a floor, e.g. 'sbm8' or 'int8'"
            )


def _instead(layer: str, users: list[OutsideRow]) -> str:
    """What multiplied by the weight of a layer that did not run, if it was seen, and how to leave the layer."""
    leave = f"leave the layer as it is with rules=[({layer!r}, None)]"
    if not users:
        return f". If a forward reads its parameters but does not call it, or never needs it, {leave}"
    seen = ", ".join(f"{row.op} in {row.module or 'the model'} by {' and '.join(row.weights)}" for row in users)
    return (
        f". Its weight was multiplied in full precision: {seen}. That code reads the parameter and does not call the "
        f"layer; {leave}"
    )


# The most numbers of an operand that are counted: sorting all of a layer of 100 M weights takes minutes.
_MOST_COUNTED = 2**22


def distinct_values(operand: OperandRun) -> int:
    """The largest number of distinct values that share a scale in a quantised operand; 0 where it is not known.

    A large operand is sampled evenly: at least four numbers of each scale for each value that its codes can have, and
    as many scales as that leaves room for. It is not known for blocks, for values that a transform mixes after they
    were rounded, or for an operand with nan or inf.
    """
    if operand.dims is None or operand.format.transform.along_axis:
        return 0
    if operand.quantized.numel() == 0 or not bool(operand.quantized.isfinite().all()):
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


class _Weights:
    """Finds the weights of converted layers, and views and casts of them, among the arguments of operators.

    Args:
        model: its converted layers' parameters of two axes or more are looked for.
    """

    def __init__(self, model: nn.Module) -> None:
        self._names: dict[int, list[str]] = {}
        self._copies: list[Tensor] = []  # kept, so that no other tensor gets their memory
        self._layers: dict[str, str] = {}
        for name, layer in converted_layers(model).items():
            for part, p in layer.named_parameters():
                if p.dim() > 1:
                    full = ".".join(filter(None, [name, part]))
                    self._names.setdefault(_memory(p), []).append(full)
                    self._layers[full] = name

    def among(self, tensors: list[Tensor]) -> list[str]:
        """The names of the parameters that these are."""
        return [name for t in tensors for name in self._names.get(_memory(t), ())]

    def layer(self, parameter: str) -> str:
        """The layer that a parameter belongs to."""
        return self._layers[parameter]

    def follow(self, operation: Operation) -> None:
        """Take a cast or a dense copy of a weight, as autocast makes it, for the weight itself."""
        copy = operation.result
        if operation.func._schema.name in ("aten::_to_copy", "aten::clone") and isinstance(copy, Tensor):
            names = self.among(operation.tensors)
            if names:
                self._names[_memory(copy)] = names
                self._copies.append(copy)


def _memory(x: Tensor) -> int:
    """The address that a tensor shares with its views; 0 if its memory is not in one piece."""
    return 0 if x.layout != torch.strided or x.is_nested else int(x.untyped_storage()._cdata)


class _Outside:
    """The watcher that lists the products that run outside converted layers, forward and backward.

    Args:
        model: the model whose products are listed.
    """

    def __init__(self, model: nn.Module) -> None:
        self.weights = _Weights(model)
        self.rows: dict[tuple[str, str], OutsideRow] = {}

    def __call__(self, operation: Operation) -> None:
        """Take in one operator."""
        self.weights.follow(operation)
        op, module = operation.name, operation.module
        if module is None or not operation.multiplies:
            return
        row = self.rows.setdefault((op, module), OutsideRow(op=op, module=module))
        macs = operation.macs()
        row.calls += 1
        row.macs = None if macs is None or row.macs is None else row.macs + macs
        row.weights.extend(name for name in self.weights.among(operation.tensors) if name not in row.weights)

    def users(self, layer: str) -> list[OutsideRow]:
        """The rows of operators that multiplied by a weight of a converted layer."""
        return [row for row in self.rows.values() if layer in map(self.weights.layer, row.weights)]


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
    order = [(layer, product) for layer in layers for product in PRODUCTS]
    return [rows[key] for key in order if key in rows]


@checked
@contextmanager
def verify(model: nn.Module) -> Iterator[Proof]:
    """Watch every product that runs in this context, and fail if one is not what the conversion promised.

    Run one training step (forward and backward) inside. Every product of a converted layer is computed a second time
    in full precision, so this is for a step, not for a run. A compiled model runs eagerly here. Other models that run
    meanwhile are not watched, nor are products that other threads compute outside converted layers.

    Args:
        model: a converted model.

    Yields:
        The proof, complete when the context ends.

    Raises:
        UsageError: nothing in the model is converted.
        VerificationError: at the end of the context, if a converted layer's quantisers did not run, a nonzero product
            with an operand off its grid equals the full-precision product exactly, a converted layer was replaced by a
            plain one, an operand has a nan or inf, or more than `MOST_CLIPPED` of an operand lay outside its grid.

    Warns:
        RuntimeWarning: values are so small that the floor of a format's scale decided; see `Proof.notes`.
    """
    if not converted_layers(model) and not callers(model):
        raise UsageError("verify: nothing in this model is converted; call lowbit.convert_ first")
    proof, collector, plain = Proof(), _Collector(model), _Outside(model)
    with watched_by(plain, model), watch.observed_by(collector):
        yield proof
    proof.rows.extend(_by_layer(collector.rows))
    total = proof.macs + sum(row.macs or 0 for row in plain.rows.values())
    for row in plain.rows.values():
        row.share = None if row.macs is None else row.macs / max(total, 1)
        proof.outside.append(row)
    proof.notes.extend(collector.floored())
    proof.remarks.extend(collector.remarks())
    failures = [
        *collector.failures,
        *collector.missing(model, plain.users),
        *_replaced(model),
        *collector.unproven(),
        *collector.clipped(model),
    ]
    if failures:
        more = [f"and {len(failures) - 5} more"] if len(failures) > 5 else []
        raise VerificationError("\n".join(["verify: " + failures[0], *failures[1:5], *more]))
    for note in proof.notes:
        warnings.warn(f"verify: {note}", RuntimeWarning, stacklevel=3)


@contextmanager
def tripwire(model: nn.Module | None = None) -> Iterator[None]:
    """Raise at the first operand of a product in this context that is not finite, and name layer and operand.

    Args:
        model: the model whose layers are watched and named; None: all models, in every thread.

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

    with watch.observed_by(check):
        yield
