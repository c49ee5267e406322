"""A probe of a converted model on real batches: error of each operand, sensitivity of each layer, bits for a budget.

Notation: b bits of `input` and `weight` of one layer, L the mean loss over the batches.
"""

import copy
import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lowbit.conversion.state import load_state_dict, state_dict
from lowbit.errors import UsageError, shown
from lowbit.evidence.meter import Meter
from lowbit.evidence.names import name_of_source
from lowbit.evidence.proof import WANTED_COSINE, OperandProof
from lowbit.evidence.records import OPERANDS, Total, per_layer
from lowbit.frames import data_frame
from lowbit.inputs.checks import checked, is_finite
from lowbit.methods.operands import SLOTS
from lowbit.methods.recipe import Recipe
from lowbit.nn.gate import release
from lowbit.nn.layers import QuantLayer, converted_layers, sites_of
from lowbit.nn.site import Site
from lowbit.numerics.formats import Format
from lowbit.precision.controller import PrecisionController
from lowbit.precision.layers import LayerRule
from lowbit.products import watch
from lowbit.products.watch import ProductRun
from lowbit.schedules import Option, allocate
from lowbit.tables import Table, html_of, json_text, text_table

FORWARD = ("input", "weight")
Loss = Callable[[nn.Module, Any], Tensor]


@dataclass(kw_only=True)
class OperandError(OperandProof):
    """One operand of one product of one layer over all batches.

    Attributes:
        layer: the layer's name.
        product: ``"output"``, ``"grad_input"`` or ``"grad_weight"``; a normalisation has operands but no product.
        operand: its name.
        underflowed: share of the values that are not 0 but became 0.
    """

    layer: str
    product: str
    operand: str
    calls: int = 0
    underflowed: float = 0.0

    @property
    def angle(self) -> float:
        """The angle to full precision in degrees."""
        return math.degrees(math.acos(max(-1.0, min(1.0, self.cosine))))


@dataclass(frozen=True, kw_only=True)
class Sensitivity:
    """What happens if one layer alone gets other bits.

    Args:
        layer: its name.
        bits: of its `input` and `weight`, in all products.
        loss_change: L with these bits, minus L of the model as it is.
        bit_operations: of this layer's three products in one step at these bits.
    """

    layer: str
    bits: int
    loss_change: float
    bit_operations: int


@dataclass(frozen=True, kw_only=True)
class Suggestion:
    """Bits for each layer under a budget.

    Args:
        rules: for ``convert_(model, recipe, rules=...)``: the layers whose bits differ from what they have.
        share: bit operations of the probed layers as a share of what they take now.
        loss_change: the sum of the loss changes of single layers; together they may change the loss by another amount.
    """

    rules: list[tuple[str, Recipe]]
    share: float
    loss_change: float

    def __str__(self) -> str:
        head = (
            f"{100 * self.share:.1f} % of the present bit operations; the layers' own loss changes sum to "
            f"{self.loss_change:+.4f}"
        )
        if not self.rules:
            return f"{head}. Every layer keeps its bits."
        rows = [[layer or "(model)", str(recipe.output.weight.bits)] for layer, recipe in self.rules]
        return f"{head}. Other layers keep their bits.\n\n" + text_table(["layer", "bits"], rows)


@dataclass(frozen=True, kw_only=True)
class Probe:
    """What `probe` found; `print` shows it.

    Args:
        loss: L of the model as it is.
        operands: a row for each operand of each product.
        sensitivities: a row for each layer and width; its present width is among them, with no change.
        recipes: of each probed layer.
        present: present bits of each probed layer.
        idle: converted layers that these batches did not run, so that nothing is known of them.
    """

    loss: float
    operands: list[OperandError]
    sensitivities: list[Sensitivity]
    recipes: Mapping[str, Recipe] = field(default_factory=dict)
    present: Mapping[str, int] = field(default_factory=dict)
    idle: Sequence[str] = ()

    def __str__(self) -> str:
        errors, *rest = self._parts()
        return "\n".join([str(errors), "", *map(str, rest)])

    def _repr_html_(self) -> str:
        return html_of(self._parts())

    def _parts(self) -> list[str | Table]:
        header = ["layer", "product", "operand", "bits", "SQNR dB", "angle", "clipped %", "underflow %"]
        header.append(f"bits for cos {WANTED_COSINE}")
        table = [
            [
                row.layer or "(model)",
                row.product,
                row.operand,
                row.width,
                f"{row.sqnr_db:.1f}",
                f"{row.angle:.2f}",
                f"{100 * row.clipped:.2f}",
                f"{100 * row.underflowed:.2f}",
                "-" if row.bits_needed is None else f"{row.bits_needed:.1f}",
            ]
            for row in self.operands
        ]
        parts: list[str | Table] = [
            Table(header, table),
            f"loss {self.loss:.4f}; its change when one layer alone goes to b bits:",
        ]
        widths = sorted({row.bits for row in self.sensitivities})
        changes = {(row.layer, row.bits): row.loss_change for row in self.sensitivities}
        layers = [
            [
                layer or "(model)",
                str(self.present[layer]),
                *(f"{changes[layer, b]:+.4f}" if (layer, b) in changes else "-" for b in widths),
            ]
            for layer in self.recipes
        ]
        parts.append(Table(["layer", "now", *(f"b={b}" for b in widths)], layers))
        if self.idle:
            parts.append(f"never ran: {', '.join(self.idle)}")
        return parts

    def to_dict(self) -> dict[str, Any]:
        """Both tables as plain values; angles are in degrees, shares go from 0 to 1."""
        return {
            "version": 1,
            "loss": self.loss,
            "operands": [_values(row) for row in self.operands],
            "sensitivities": [dataclasses.asdict(row) for row in self.sensitivities],
            "present": dict(self.present),
            "idle": list(self.idle),
        }

    def to_json(self) -> str:
        """`to_dict` as JSON; a figure that is infinite or nan is null."""
        return json_text(self.to_dict())

    def to_dataframe(self) -> Any:
        """A ``pandas.DataFrame`` with a line per operand; sensitivities are in `to_dict`.

        Raises:
            RunError: pandas is missing.
        """
        return data_frame([_values(row) for row in self.operands])

    def suggest(self, budget: float) -> Suggestion:
        """The bits of each layer that change the loss least within a budget.

        Only the widths on each layer's lower convex hull of (bit operations, loss change) count. Beginning with the
        cheapest, it takes the steps that lower the loss most for each bit operation, as long as the budget allows.

        Args:
            budget: bit operations of the probed layers as a share of what they take now, above 0, at most 1.

        Raises:
            UsageError: a budget outside this range, or below what the fewest probed bits need.
        """
        if not is_finite(budget) or not 0 < budget <= 1:
            raise UsageError(
                f"budget={shown(budget)}: give a share of the present bit operations, above 0 and at most 1"
            )
        options = {
            layer: [
                Option(bits=s.bits, cost=s.bit_operations, damage=s.loss_change)
                for s in self.sensitivities
                if s.layer == layer
            ]
            for layer in self.recipes
        }
        now = sum(s.bit_operations for s in self.sensitivities if s.bits == self.present[s.layer])
        chosen = allocate(options, budget * now)
        spent = sum(pick.cost for pick in chosen.values())
        if spent > budget * now:
            raise UsageError(
                f"budget={budget}: the fewest bits that were probed already take {spent / now:.3f} of the present bit "
                "operations; allow as much, or probe fewer bits"
            )
        return Suggestion(
            rules=[
                (layer, with_forward_bits(self.recipes[layer], pick.bits))
                for layer, pick in chosen.items()
                if pick.bits != self.present[layer]
            ],
            share=spent / now,
            loss_change=sum(pick.damage for pick in chosen.values()),
        )


def _values(row: OperandError) -> dict[str, Any]:
    return {
        "layer": row.layer,
        "product": row.product,
        "operand": row.operand,
        "format": row.format,
        "bits": row.bits,
        "most_bits": row.most_bits,
        "calls": row.calls,
        "sqnr_db": row.sqnr_db,
        "cosine": row.cosine,
        "angle": row.angle,
        "exact": row.exact,
        "clipped": row.clipped,
        "underflowed": row.underflowed,
        "bits_needed": row.bits_needed,
    }


def with_forward_bits(recipe: Recipe, bits: int) -> Recipe:
    """The recipe with these bits in every integer `input` and `weight`; float formats and gradients stay."""

    def changed(product: Any) -> Any:
        formats = {operand: getattr(product, operand) for operand in FORWARD if hasattr(product, operand)}
        return dataclasses.replace(
            product,
            **{o: fmt.with_bits(bits) for o, fmt in formats.items() if fmt.has_width},
        )

    return recipe.replace(
        name=f"{recipe.name}-forward{bits}",
        output=changed(recipe.output),
        grad_input=changed(recipe.grad_input),
        grad_weight=changed(recipe.grad_weight),
    )


@checked
def probe(model: nn.Module, batches: Iterable[Any], loss: Loss, *, bits: Sequence[int] = (2, 3, 4, 6)) -> Probe:
    """Measure a converted model on a few real batches. A copy runs in training mode; the model is not changed.

    Each batch runs forward and backward once for the errors, and forward once for each layer and each of `bits` for
    the sensitivities. Noise, dropout and running statistics start alike every time, so only the bits change the loss.
    Precision is constant: if a schedule, a rule or gates would change the bits, the copy has those that its recipe
    begins with, and the suggested rules are static too.

    Args:
        model: a converted model, with or without a controller.
        batches: what `loss` takes besides the model.
        loss: from model and batch to a scalar, e.g. ``lambda model, b: F.cross_entropy(model(b[0]), b[1])``.
        bits: widths of `input` and `weight` to try in each layer alone.

    Raises:
        UsageError: nothing is converted to integer formats, no batch, or bits that a format lacks.
    """
    batches = list(batches)
    if not batches:
        raise UsageError("probe got no batch: give one or more")
    layers = _probed_layers(model)
    if not layers:
        raise UsageError("probe: nothing in this model is converted to integer formats; call lowbit.convert_ first")
    for layer in layers.values():
        for site in _product_sites(layer):
            for operand in FORWARD:
                for width in bits:
                    _check_width(site, operand, width)
    trial = _static(copy.deepcopy(model).train())
    start = copy.deepcopy((trial.state_dict(), state_dict(trial)))
    errors, totals = _errors(trial, batches, loss)

    def mean_loss() -> float:
        trial.load_state_dict(start[0])
        load_state_dict(trial, start[1])
        with torch.random.fork_rng(), torch.no_grad():
            return sum(float(loss(trial, batch)) for batch in batches) / len(batches)

    def mean_loss_at(name: str, width: int) -> float:
        alone: LayerRule = (name, (width, None))
        controller = PrecisionController(trial, rules=[alone])
        try:
            return mean_loss()
        finally:
            controller.remove()

    base = mean_loss()
    found: list[Sensitivity] = []
    recipes: dict[str, Recipe] = {}
    present: dict[str, int] = {}
    idle: list[str] = []
    for name, layer in _probed_layers(trial).items():
        sites = _product_sites(layer)
        own = [total for part, each in totals.items() if part == name or part.startswith(name + ".") for total in each]
        if not own:
            idle.append(name)
            continue
        recipes[name] = sites[0].present
        present[name] = int(sites[0].bits[SLOTS.index(("output", "weight"))])
        for width in sorted({*bits, present[name]}):
            same = width == present[name]
            after = base if same else mean_loss_at(name, width)
            operations = sum(_bit_operations(total, sites[0].present, width) for total in own)
            found.append(Sensitivity(layer=name, bits=width, loss_change=after - base, bit_operations=operations))
    if not found:
        raise UsageError(f"probe: no converted layer ran in these batches: {', '.join(idle)}")
    return Probe(loss=base, operands=errors, sensitivities=found, recipes=recipes, present=present, idle=idle)


def _static(model: nn.Module) -> nn.Module:
    """The model without its controllers: each layer has the bits of its recipe, which no longer change."""
    release(model)
    for site in sites_of(model):
        site.hold()
    return model


def _product_sites(layer: QuantLayer) -> list[Site]:
    """The sites of a layer that multiply and whose `input` or `weight` has bits to set."""
    return [] if layer.operator(layer) is None else layer.sites()


def _check_width(site: Site, operand: str, width: int) -> None:
    """Raise a UsageError if an operand has bits to set but cannot have so many."""
    fmt: Format = getattr(site.present.output, operand)
    if fmt.has_width:
        fmt.with_bits(width)


def _probed_layers(model: nn.Module) -> dict[str, QuantLayer]:
    """The converted layers with an integer `input` and `weight`, by name."""
    return {
        name: layer
        for name, layer in converted_layers(model).items()
        if (sites := _product_sites(layer))
        and all(getattr(sites[0].present.output, operand).has_width for operand in FORWARD)
    }


def _bit_operations(total: Total, recipe: Recipe, bits: int) -> int:
    """Bit operations of a product with its integer `input` and `weight` at these bits."""
    product = total.product
    first, second = (
        bits if o in FORWARD and getattr(getattr(recipe, product.product), o).has_width else own
        for o, own in zip(OPERANDS[product.product], product.bits, strict=True)
    )
    return total._replace(product=dataclasses.replace(product, bits=(first, second))).bit_operations


def _errors(model: nn.Module, batches: Sequence[Any], loss: Loss) -> tuple[list[OperandError], dict[str, list[Total]]]:
    """The error of each operand over all batches, and the products that ran, by layer."""
    name_of = name_of_source(model)
    rows: dict[tuple[str, str, str], OperandError] = {}

    def observe(run: ProductRun) -> None:
        layer = name_of(run.source)
        if layer is None:
            return
        for operand, ran in run.operands.items():
            key = (layer, run.product, operand)
            row = rows.setdefault(
                key,
                OperandError(
                    layer=layer,
                    product=run.product,
                    operand=operand,
                    format=str(ran.format),
                    bits=ran.bits,
                    elements=ran.exact.numel(),
                    integer=ran.format.has_width,
                ),
            )
            row.calls += 1
            row.saw(ran.bits)
            row.sums.add(ran.exact, ran.quantized)
            row.clipped += (ran.clipped - row.clipped) / row.calls
            lost = ((ran.quantized == 0) & (ran.exact != 0)).sum() / (ran.exact != 0).sum().clamp(min=1)
            row.underflowed += (float(lost) - row.underflowed) / row.calls

    with torch.random.fork_rng(), torch.enable_grad(), Meter(model) as meter, watch.observed_by(observe):
        for batch in batches:
            loss(model, batch).backward()
    model.zero_grad()
    return list(rows.values()), dict(per_layer(meter.ledger.totals()))
