"""What a run costs, from its ledger: every metric, a hardware model's cycles and energy, and what was measured.

A `Cost` is a view of a ledger as text, JSON or CSV; it computes and keeps nothing else.
"""

import csv
import dataclasses
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from lowbit.errors import RunError, UsageError
from lowbit.evidence import metrics
from lowbit.evidence.ledger import Ledger
from lowbit.evidence.metrics import METRICS, Terms
from lowbit.evidence.records import PRODUCTS, Convention, Product, Total
from lowbit.frames import data_frame
from lowbit.hardware import Accelerator, Estimate, total
from lowbit.inputs import userfile
from lowbit.inputs.checks import check_fields, check_type
from lowbit.report.rows import Row, estimate_values, first_layers, layer_of, row_values
from lowbit.report.spent import FULL_PRECISION, Spent
from lowbit.tables import Table, html_of, json_text

CONVENTIONS: tuple[Convention, ...] = ("as-ran", "as-charged")


@dataclass(frozen=True)
class Cost:
    """What a run costs, or would cost; `print` shows it.

    Args:
        ledger: the ledger of the run, or of a plan.
        hardware: an accelerator to estimate cycles and energy on, e.g. `lowbit.hardware.BitFusion()`.
        measured: what was measured beside the ledger, by name with unit, e.g. ``{"seconds per step": "0.19"}``.
        gated: bit operations per MAC by layer, where gates choose the bits of a plan; savings count these.

    Raises:
        UsageError: the ledger has no step, or `hardware` is not an accelerator.
        RunError: the accelerator raised anything but a UsageError; this is raised when it is asked.
    """

    ledger: Ledger
    hardware: Accelerator | None = None
    measured: Mapping[str, str] = field(default_factory=dict)
    gated: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_fields(self)
        if isinstance(self.hardware, type):
            name = self.hardware.__name__
            raise UsageError(f"hardware={name} is a class: give an object of it, e.g. {name}()")
        if not self.ledger.steps:
            raise UsageError(
                "the ledger has no step: nothing ran yet, or Meter.step() was never called; there is no cost to show"
            )

    @cached_property
    def rows(self) -> list[Row]:
        """A row for each layer, product, shape and pair of widths that ran."""
        totals = self.ledger.totals()
        first = first_layers(totals)
        return [self._row(total, first_layer=total.product.layer in first) for total in totals]

    def _row(self, ran: Total, *, first_layer: bool) -> Row:
        if self.hardware is None:
            return Row(ran, first_layer=first_layer)
        name, asked = f"{type(self.hardware).__name__}.product", f"{ran.product.product} of {layer_of(ran.product)}"
        try:
            with userfile.blamed(f"{name} raises for {asked}:", userfile.file_of(self.hardware), RunError):
                once = self.hardware.product(ran.product, first_layer=first_layer)
        except UsageError as error:
            return Row(ran, reason=str(error), first_layer=first_layer)
        check_type(f"{name}(...)", once, Estimate)
        return Row(ran, once, first_layer=first_layer)

    @cached_property
    def best(self) -> Ledger | None:
        """The ledger up to the best checkpoint; None if no evaluation has a score."""
        best = self.ledger.best()
        return None if best is None else self.ledger.until(best.step)

    def terms(self, convention: Convention = "as-ran") -> dict[str, Terms]:
        """Every metric of the whole run by name."""
        totals = self.ledger.totals(convention)
        return {metric.name: metric(totals) for metric in METRICS}

    def on_hardware(self) -> dict[str, Estimate]:
        """The estimates by product and together (``"total"``), of the rows that have one."""
        found = {
            name: [row.estimate for row in self.rows if row.total.product.product == name and row.estimate is not None]
            for name in PRODUCTS
        }
        sums = {name: total(estimates) for name, estimates in found.items() if estimates}
        return {**sums, "total": total(sums.values())} if sums else {}

    def in_full_precision(self) -> Estimate:
        """What the products that have an estimate would cost on the hardware at 32 x 32 bits.

        Raises:
            UsageError: no product has an estimate, or one has none at these bits.
        """
        estimated = [row for row in self.rows if row.estimate is not None]
        wide = [
            self._row(
                row.total._replace(product=dataclasses.replace(row.total.product, bits=FULL_PRECISION)),
                first_layer=row.first_layer,
            )
            for row in estimated
        ]
        for row in wide:
            if row.estimate is None:
                raise UsageError(f"{layer_of(row.total.product)}: {row.reason}")
        return total(row.estimate for row in wide if row.estimate is not None)

    def saved(self) -> dict[str, float]:
        """Percent of the bit operations that the run saves, by what it is compared with; negative if it takes more.

        ``"static 8 bits"``: the products of converted layers at 8 x 8 bits, those of others as they ran; ``"fp32"``:
        all products at 32 x 32 bits. Empty where nothing ran.
        """
        spent = Spent()
        spent.add(self.ledger.totals(), self.gated)
        return spent.saved()

    def notes_on_hardware(self) -> dict[str, list[str]]:
        """What the accelerator assumed for some products, each with its layers."""
        notes: dict[str, list[str]] = {}
        for row in self.rows:
            for note in row.once.notes if row.once is not None else ():
                if row.total.product.layer not in notes.setdefault(note, []):
                    notes[note].append(row.total.product.layer)
        return notes

    def not_estimated(self) -> dict[str, list[str]]:
        """The reasons why rows have no estimate, each with its layers."""
        reasons: dict[str, list[str]] = {}
        for row in self.rows:
            if row.reason and row.total.product.layer not in reasons.setdefault(row.reason, []):
                reasons[row.reason].append(row.total.product.layer)
        return reasons

    # As text.

    def __str__(self) -> str:
        parts = [self._headline(), str(self._layer_table()), str(self._metric_table())]
        if self.hardware is not None:
            parts.append("\n".join(map(str, self._hardware_parts())))
        return "\n\n".join([*parts, "\n".join(self._remarks())])

    def _repr_html_(self) -> str:
        on_hardware = self._hardware_parts() if self.hardware is not None else []
        return html_of([self._headline(), self._layer_table(), self._metric_table(), *on_hardware, *self._remarks()])

    def _headline(self) -> str:
        ledger = self.ledger
        steps = f"{len(ledger.steps):,} steps" + (f" from step {ledger.first_step:,}" if ledger.first_step else "")
        return f"{ledger.model or 'model'}: {steps}, {ledger.samples:,} samples"

    def _layer_table(self) -> Table:
        whole = metrics.gbitops(self.ledger.totals()).total or 1
        header = ["layer", "kind", *PRODUCTS, "GMACs", "GBitOPs", "share %"]
        header += ["Mcycles", "bound", "mJ"] if self.hardware else []
        by_layer: dict[str, list[Row]] = {}
        for row in self.rows:
            by_layer.setdefault(row.total.product.layer, []).append(row)
        table = []
        for layer, rows in by_layer.items():
            totals = [row.total for row in rows]
            operations = metrics.gbitops(totals).total
            cells = [layer or "(model)", ", ".join(dict.fromkeys(t.product.kind for t in totals))]
            cells += [_widths([t.product for t in totals if t.product.product == name]) for name in PRODUCTS]
            cells += [
                _number(sum(t.macs for t in totals) / 1e9),
                _number(operations),
                f"{100 * operations / whole:.2f}",
            ]
            if self.hardware:
                known = [row.estimate for row in rows if row.estimate is not None]
                summed = total(known) if known else None
                cells += (
                    ["-"] * 3
                    if summed is None
                    else [
                        _number(summed.cycles / 1e6),
                        summed.bound,
                        _number(summed.energy_nj / 1e6),
                    ]
                )
            table.append(cells)
        return Table(header, table)

    def _metric_table(self) -> Table:
        ledgers = {"": self.ledger} | ({", until best": self.best} if self.best is not None else {})
        header = ["metric", "as in", "unit", *PRODUCTS]
        values: list[list[Terms]] = []
        for when, ledger in ledgers.items():
            header += [f"total{when}", f"as charged{when}"]
            values += [[metric(ledger.totals(convention)) for metric in METRICS] for convention in CONVENTIONS]
        table = []
        for i, metric in enumerate(METRICS):
            terms = values[0][i]
            cells = [metric.name, metric.source, metric.unit]
            cells += [_number(getattr(terms, name)) for name in PRODUCTS]
            table.append([*cells, *(_number(column[i].total) for column in values)])
        return Table(header, table)

    def _hardware_parts(self) -> list[str | Table]:
        name, estimates = type(self.hardware).__name__, self.on_hardware()
        lines: list[str | Table] = [] if estimates else [f"{name}: no product has an estimate"]
        if estimates:
            stores = [store.name for store in estimates["total"].stores]
            header = [name, "Mcycles", "stall %", "s", "core J", *(f"{store} J" for store in stores), "J"]
            header += ["MAC/cycle", f"MAC/{stores[-1]} bit"]
            lines += [Table(header, [_hardware_cells(*each) for each in estimates.items()])]
            lines += [self._saving(estimates["total"])]
        lines += [f"assumed for {_some(layers)}: {note}" for note, layers in self.notes_on_hardware().items()]
        lines += [f"not estimated: {_some(layers)}: {reason}" for reason, layers in self.not_estimated().items()]
        return lines

    def _saving(self, ran: Estimate) -> str:
        """What full precision would cost in the units of what ran."""
        bits = "x".join(map(str, FULL_PRECISION))
        try:
            wide = self.in_full_precision()
        except UsageError as error:
            return f"no comparison with {bits} bits: {error}"
        energy = f" and {wide.energy_nj / ran.energy_nj:.2f} times the energy" if ran.energy_nj else ""
        return f"at {bits} bits the same products take {wide.cycles / ran.cycles:.2f} times the cycles{energy}"

    def _remarks(self) -> list[str]:
        """What stands below the tables: what was left out, and what was measured."""
        ledger = self.ledger
        lines = [
            "as charged: the grad_input of the first layer, which nothing needs, is charged too, as the papers count."
        ]
        best = ledger.best()
        if best is not None:
            lines.append(f"best: {best.name} {best.score:.6g} after {best.step:,} steps.")
        if ledger.evaluations:
            done = metrics.macs(ledger.totals(evaluations=True)).total
            lines.append(
                f"evaluations: {len(ledger.evaluations):,}, {_number(done / 1e9)} GMACs, in none of the above."
            )
        if hidden := [op for op in ledger.uncounted(evaluations=True) if op.endswith("(multiplies)")]:
            lines.append(f"evaluations also ran operators whose products are not counted: {_some(hidden)}.")
        if ledger.held_bytes is not None:
            lines.append(f"held for the backward: {ledger.held_bytes / 2**20:,.1f} MiB by one forward pass, at most.")
        if ledger.sent_bytes:
            lines.append(f"sent for gradients: {ledger.sent_bytes / 2**20:,.1f} MiB by this process.")
        lines += [f"{name}: {value}" for name, value in self.measured.items()]
        if idle := ledger.never_ran():
            lines.append(f"never ran, so they cost nothing: {_some(idle)}.")
        if left := ledger.uncounted():
            listed = [f"{op} {calls:,}" for op, calls in left.items()]
            lines.append(f"not counted (operators outside converted layers, calls in forward): {_some(listed, 12)}.")
        lines += [f"note: {note}" for note in ledger.notes]
        saved = [f"{_saved(percent)} {name}" for name, percent in self.saved().items()]
        return [*lines, f"bit operations: {', '.join(saved)}."] if saved else lines

    # As data.

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain values; costs are in the units that the metrics say, energies in nJ."""
        ledger, best = self.ledger, self.ledger.best()
        ledgers = {"whole_run": ledger} | ({"until_best": self.best} if self.best is not None else {})
        data: dict[str, Any] = {
            "model": ledger.model,
            "first_step": ledger.first_step,
            "steps": len(ledger.steps),
            "samples": ledger.samples,
            "best": None if best is None else {"name": best.name, "score": best.score, "step": best.step},
            "metrics": [
                {
                    "name": metric.name,
                    "source": metric.source,
                    "unit": metric.unit,
                    "formula": metric.formula,
                    **{when: {c: _terms(metric(led.totals(c))) for c in CONVENTIONS} for when, led in ledgers.items()},
                }
                for metric in METRICS
            ],
            "layers": [row_values(row) for row in self.rows],
            "evaluations": {
                "number": len(ledger.evaluations),
                "macs": metrics.macs(ledger.totals(evaluations=True)).total,
            },
            "saved_percent": self.saved(),
            "held_bytes": ledger.held_bytes,
            "sent_bytes": ledger.sent_bytes,
            "measured": dict(self.measured),
            "never_ran": ledger.never_ran(),
            "uncounted": ledger.uncounted(),
            "notes": ledger.notes,
        }
        if self.hardware is not None:
            data["hardware"] = {name: estimate_values(e) for name, e in self.on_hardware().items()}
            data["not_estimated"] = self.not_estimated()
            data["assumed"] = self.notes_on_hardware()
            data["in_full_precision"] = self._full_precision_data()
        return data

    def _full_precision_data(self) -> dict[str, Any] | None:
        try:
            return estimate_values(self.in_full_precision())
        except UsageError:
            return None

    def to_json(self) -> str:
        """`to_dict` as JSON; a score that is infinite is null."""
        return json_text(self.to_dict())

    def to_csv(self) -> str:
        """A line for each row, with a header."""
        flat = [row_values(row) for row in self.rows]
        text = io.StringIO()
        writer = csv.DictWriter(text, list(dict.fromkeys(key for row in flat for key in row)), lineterminator="\n")
        writer.writeheader()
        writer.writerows(flat)
        return text.getvalue()

    def to_dataframe(self) -> Any:
        """A ``pandas.DataFrame`` with a line for each row, as `to_csv` has them.

        Raises:
            RunError: pandas is missing.
        """
        return data_frame([row_values(row) for row in self.rows])


def _hardware_cells(name: str, e: Estimate) -> list[str]:
    return [
        name,
        _number(e.cycles / 1e6),
        f"{100 * e.stall_cycles / e.cycles:.1f}",
        _number(e.seconds),
        _number(e.core_nj / 1e9),
        *(_number(store.energy_nj / 1e9) for store in e.stores),
        _number(e.energy_nj / 1e9),
        f"{e.operations_per_cycle:.1f}",
        f"{e.operations_per_memory_bit:.3f}",
    ]


def _saved(percent: float) -> str:
    if abs(percent) < 0.05:
        return "the same as"
    return f"{percent:.1f} % saved against" if percent > 0 else f"{-percent:.1f} % more than"


def _terms(terms: Terms) -> dict[str, float]:
    return {**{name: getattr(terms, name) for name in PRODUCTS}, "total": terms.total}


def _widths(ran: Sequence[Product]) -> str:
    """The widths of two operands, as ranges if they changed: ``"3..8x8"``."""
    if not ran:
        return "-"
    pairs = zip(*(product.bits for product in ran), strict=True)
    return "x".join(f"{min(each)}..{max(each)}" if min(each) < max(each) else str(each[0]) for each in pairs)


def _number(value: float) -> str:
    """Four digits, with commas, or an exponent if there would be more than nine."""
    if value == 0 or 1e-3 <= abs(value) < 1e9:
        return f"{value:,.0f}" if abs(value) >= 1000 or value == 0 else f"{value:.4g}"
    return f"{value:.4g}"


def _some(names: Sequence[str], most: int = 8) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(name or "(model)" for name in names[:most]) + more
