"""What a proof says: a row for each product of converted layers with its error, and for each kind outside them.

Notation: y product in full precision, y^ as it ran.
"""

import math
from dataclasses import asdict, dataclass, field
from typing import Any

from torch import Tensor

from lowbit.evidence.records import PRODUCTS
from lowbit.evidence.theory import angle_bound, bits_needed
from lowbit.frames import data_frame
from lowbit.tables import Table, html_of, json_text, text_table

# The cosine that the column "bits needed" asks for.
WANTED_COSINE = 0.98


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
        """``10 log10(sum y^2 / sum (y - y^)^2)``; inf if they are equal."""
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
    """Something that is compared with its full-precision self, over all calls."""

    sums: _Sums = field(default_factory=_Sums)

    @property
    def sqnr_db(self) -> float:
        """Signal to quantisation noise, dB; inf if nothing changed."""
        return self.sums.sqnr_db

    @property
    def cosine(self) -> float:
        """Cosine of the angle to full precision."""
        return self.sums.cosine

    @property
    def exact(self) -> bool:
        """Whether nothing changed."""
        return self.sums.error == 0


@dataclass(kw_only=True)
class OperandProof(_Compared):
    """One operand of one product, over all its calls.

    Attributes:
        format: its format as text, as the shape of the first call made it; several if calls are of several phases.
        bits: width of its codes, the smallest of all calls.
        most_bits: the largest.
        elements: number of elements in one call.
        clipped: share of values more than half a step outside the grid.
        floored: share of values whose scale is the floor of the format.
        two_codes: share of blocks that had two codes for each number.
    """

    format: str
    bits: int
    elements: int
    integer: bool
    clipped: float = 0.0
    floored: float = 0.0
    two_codes: float = 0.0
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
        """The cosine that SBM's theory guarantees; None for a float format."""
        return angle_bound(self.bits, self.elements) if self.integer else None

    @property
    def bits_needed(self) -> float | None:
        """The bits that the theory requires for `WANTED_COSINE`; None for a float format."""
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
        """The engine that executed it; several if calls differ."""
        return ", ".join(self.engines)

    @property
    def kernel(self) -> str:
        """The operator that executed it; several if calls differ."""
        return ", ".join(self.kernels)

    @property
    def bits(self) -> str:
        """Widths of the operands, e.g. ``"8x8"``, or ``"3-6x8"`` if calls differ."""
        return "x".join(o.width for o in self.operands.values())

    @property
    def clipped(self) -> float:
        """The larger share of clipped values of the two operands."""
        return max(o.clipped for o in self.operands.values())

    @property
    def angle_bound(self) -> float | None:
        """The smaller bound of the operands' cosines by SBM's theory; None if both are float."""
        return min((o.angle_bound for o in self.operands.values() if o.angle_bound is not None), default=None)

    @property
    def bits_needed(self) -> float | None:
        """The larger of the widths that the theory requires of the operands; None if both are float."""
        return max((o.bits_needed for o in self.operands.values() if o.bits_needed is not None), default=None)


@dataclass
class OutsideRow:
    """One kind of product that ran outside converted layers.

    Attributes:
        op: the operator.
        module: the innermost module it ran in.
        calls: how often.
        macs: multiply-accumulates of all calls; None if no formula is known.
        share: its share of the MACs of all products, inside and outside; None likewise.
        weights: parameters of converted layers that it multiplied by.
    """

    op: str
    module: str
    calls: int = 0
    macs: int | None = 0
    share: float | None = None
    weights: list[str] = field(default_factory=list)


@dataclass
class Proof:
    """What `verify` saw; complete when its context ends. `print` shows it as tables.

    Attributes:
        rows: a row per layer and product.
        outside: products that ran outside converted layers.
        notes: what should be known although it is not a failure, one sentence each.
        remarks: what changes in the run and how it was in these steps: phases, products that were skipped, and
            blocks that had two codes.
    """

    rows: list[ProofRow] = field(default_factory=list)
    outside: list[OutsideRow] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)

    @property
    def macs(self) -> int:
        """Multiply-accumulates inside converted layers."""
        return sum(row.macs for row in self.rows)

    @property
    def outside_share(self) -> float:
        """The share of the MACs of all products that ran outside converted layers, as far as they are counted."""
        return sum(row.share or 0 for row in self.outside)

    def __str__(self) -> str:
        table, *rest = self._parts()
        return "\n".join([str(table), "", *map(str, rest)])

    def _repr_html_(self) -> str:
        return html_of(self._parts())

    def _parts(self) -> list[str | Table]:
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
        parts: list[str | Table] = [Table(header, table), f"{self.macs:,} MACs inside converted layers."]
        if not self.outside:
            return [*parts, "No product ran outside them.", *self.remarks, *self.notes]
        hidden = sum(row.calls for row in self.outside if row.macs is None)
        share = f"{'At least ' if hidden else ''}{100 * self.outside_share:.2f} %"
        parts.append(f"{share} of all MACs ran outside them, in the precision that they were given:")
        rows = [
            [
                row.module or "(model)",
                row.op,
                str(row.calls),
                "not counted" if row.macs is None else f"{row.macs:,}",
                "-" if row.share is None else f"{100 * row.share:.2f}",
                ", ".join(row.weights),
            ]
            for row in self.outside
        ]
        header = ["module", "operator", "calls", "MACs", "share %", "weight of a converted layer"]
        if not any(row.weights for row in self.outside):
            header, rows = header[:-1], [row[:-1] for row in rows]
        return [*parts, Table(header, rows), *self.remarks, *self.notes]

    def summary(self) -> str:
        """A shorter table, a line per layer: the bits of each product and the smallest SQNR among them."""
        table = [
            [
                layer or "(model)",
                *(rows[name].bits if name in rows else "-" for name in PRODUCTS),
                ", ".join(dict.fromkeys(row.engine for row in rows.values())),
                f"{_lowest_sqnr_db(rows):.1f}",
            ]
            for layer, rows in self._layers().items()
        ]
        return text_table(["layer", *PRODUCTS, "engine", "lowest SQNR dB"], table)

    def _layers(self) -> dict[str, dict[str, ProofRow]]:
        """The rows by layer and product."""
        layers: dict[str, dict[str, ProofRow]] = {}
        for row in self.rows:
            layers.setdefault(row.layer, {})[row.product] = row
        return layers

    def to_dict(self) -> dict[str, Any]:
        """The summary, the tables and the text around them as plain values; shares go from 0 to 1."""
        return {
            "version": 1,
            "macs": self.macs,
            "outside_share": self.outside_share,
            "wanted_cosine": WANTED_COSINE,
            "layers": [
                {
                    "layer": layer,
                    "bits": {name: row.bits for name, row in rows.items()},
                    "engines": list(dict.fromkeys(engine for row in rows.values() for engine in row.engines)),
                    "lowest_sqnr_db": _lowest_sqnr_db(rows),
                }
                for layer, rows in self._layers().items()
            ],
            "rows": [_values(row) for row in self.rows],
            "outside": [asdict(row) for row in self.outside],
            "notes": list(self.notes),
            "remarks": list(self.remarks),
        }

    def to_json(self) -> str:
        """`to_dict` as JSON; a figure that is infinite or nan, such as the SQNR of an exact product, is null."""
        return json_text(self.to_dict())

    def to_dataframe(self) -> Any:
        """A ``pandas.DataFrame`` with a line per layer and product; operands are in `to_dict`.

        Raises:
            RunError: pandas is missing.
        """
        return data_frame([_flat(row) for row in self.rows])


def _flat(row: ProofRow) -> dict[str, Any]:
    values = _values(row)
    del values["operands"]
    return {**values, "engines": row.engine, "kernels": row.kernel}


def _values(row: ProofRow) -> dict[str, Any]:
    return {
        "layer": row.layer,
        "product": row.product,
        "engines": dict(row.engines),
        "kernels": dict(row.kernels),
        "calls": row.calls,
        "macs": row.macs,
        "bits": row.bits,
        **_figures(row),
        "operands": {
            name: {
                "format": operand.format,
                "bits": operand.bits,
                "most_bits": operand.most_bits,
                "elements": operand.elements,
                **_figures(operand),
                "floored": operand.floored,
                "two_codes": operand.two_codes,
            }
            for name, operand in row.operands.items()
        },
    }


def _figures(what: ProofRow | OperandProof) -> dict[str, Any]:
    return {
        "sqnr_db": what.sqnr_db,
        "cosine": what.cosine,
        "exact": what.exact,
        "clipped": what.clipped,
        "angle_bound": what.angle_bound,
        "bits_needed": what.bits_needed,
    }


def _lowest_sqnr_db(rows: dict[str, ProofRow]) -> float:
    return min(row.sqnr_db for row in rows.values())
