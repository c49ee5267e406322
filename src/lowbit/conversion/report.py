"""The report of a conversion: a row per layer, and the share of the model that was converted."""

import math
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from torch import Tensor, nn

from lowbit.conversion.choice import Choice
from lowbit.conversion.rules import LeftBy, Plan, type_name
from lowbit.frames import data_frame
from lowbit.nn import kinds
from lowbit.numerics.formats import BF16, Format
from lowbit.tables import Table, html_of, json_text

_NOT_ASKED_FOR = ("rule", "conversion")


@dataclass(frozen=True, kw_only=True)
class Row:
    """What became of one layer.

    Args:
        name: the layer's name in the model; ``""`` where the model itself is the layer.
        type: its type before conversion.
        recipe: name of the recipe it runs; None if it was left as it is.
        reason: why it was left, or a remark.
        bits: widths of the operands by product, e.g. ``{"output": "8x8"}``.
        engines: how each product is executed.
        speed: how many times as fast as in full precision the most similar layer that was measured here is on that
            engine; None if nothing was measured or ``"auto"`` did not choose.
        weights: numbers in the weights of its matrix products and convolutions, see `lowbit.Report`.
        left_by: what leaves it as it is: a ``"rule"``, the ``"recipe"`` (first or last layer), or an earlier
            ``"conversion"``, which converted it.
        called: whether it is no layer that lowbit knows, and the products in functions of its forward run the recipe.
    """

    name: str
    type: str
    recipe: str | None
    reason: str = ""
    bits: dict[str, str] = field(default_factory=dict)
    engines: dict[str, str] = field(default_factory=dict)
    speed: float | None = None
    weights: int = 0
    left_by: LeftBy | None = None
    called: bool = False

    @property
    def converted(self) -> bool:
        """Whether the layer runs a recipe, itself or in the products that its forward calls."""
        return self.recipe is not None


@dataclass(frozen=True, kw_only=True)
class Report:
    """What `convert_` did, a row per layer; `print` shows it as a table.

    Its first line says which share of the weights of matrix products and convolutions is converted. These are the
    parameters with two axes or more of every layer that has products, and those with two axes longer than 1 of a layer
    of unknown type. Each tensor counts once. Embeddings and normalisations do not count, unless an embedding is also
    the weight of a layer.
    """

    recipe: str
    rows: tuple[Row, ...]
    notes: tuple[str, ...] = ()

    @property
    def share(self) -> float | None:
        """The converted share of these weights, 0 to 1, without those that a rule or an earlier conversion leaves.

        None if there are none.
        """
        return _share([row for row in self.rows if row.left_by not in _NOT_ASKED_FOR])

    @property
    def without_gain(self) -> tuple[str, ...]:
        """Names of the layers for which no engine is faster than full precision here, measured alone and in float32.

        A whole step may be slower without them converted: `lowbit.advise` measures that.
        """
        return tuple(row.name for row in self.rows if row.speed is not None and row.speed <= 1)

    def __str__(self) -> str:
        head, table, *notes = self._parts()
        return "\n".join([str(head), "", str(table), *map(str, notes)])

    def _repr_html_(self) -> str:
        return html_of(self._parts())

    def _parts(self) -> list[str | Table]:
        names = ("output", "grad_input", "grad_weight")
        table = [
            [
                row.name or "(model)",
                row.type,
                row.recipe or "left as it is",
                *(row.bits.get(product, "-") for product in names),
                ", ".join(dict.fromkeys(row.engines.values())) or "-",
                row.reason,
            ]
            for row in self.rows
        ]
        head = f"{self.recipe}: {self._converted()}; bits as first operand x second"
        body = Table(["layer", "type", "recipe", *names, "engine", "remark"], table)
        return [head, body, *("note: " + note for note in self.notes)]

    def to_dict(self) -> dict[str, Any]:
        """The first line, the table and the notes as plain values."""
        return {
            "version": 1,
            "recipe": self.recipe,
            "layers": len(self.rows),
            "converted": self._number,
            "share": self.share,
            "largest_left": [row.name for row in self._largest_left()],
            "without_gain": list(self.without_gain),
            "rows": [asdict(row) for row in self.rows],
            "notes": list(self.notes),
        }

    def to_json(self) -> str:
        """`to_dict` as JSON."""
        return json_text(self.to_dict())

    def to_dataframe(self) -> Any:
        """A ``pandas.DataFrame`` with a line per layer; bits and engines have a column for each product.

        Raises:
            RunError: pandas is missing.
        """
        products = list(dict.fromkeys(product for row in self.rows for product in row.bits))
        return data_frame(
            [
                {
                    **{name: value for name, value in asdict(row).items() if name not in ("bits", "engines")},
                    **{f"bits_{product}": row.bits.get(product) for product in products},
                    **{f"engine_{product}": row.engines.get(product) for product in products},
                }
                for row in self.rows
            ]
        )

    @property
    def _number(self) -> int:
        """How many layers are converted."""
        return sum(row.converted for row in self.rows)

    def _largest_left(self) -> list[Row]:
        """Of the layers that should have been converted and are not, the three with most weights."""
        left = [row for row in self.rows if row.weights and not row.converted and row.left_by not in _NOT_ASKED_FOR]
        return sorted(left, key=lambda row: -row.weights)[:3]

    def _converted(self) -> str:
        """How many layers and which share of the weights are converted, and where the largest of the others are."""
        called = sum(row.called for row in self.rows)
        by_calls = f", {called} of them by the products in their forwards," if called else ""
        layers = f"{self._number} of {len(self.rows)} layers converted{by_calls}"
        if self.share is None:
            return layers
        largest = [f"{row.name or '(model)'} ({row.type}, {row.weights:,})" for row in self._largest_left()]
        percent = math.floor(1000 * self.share) / 10  # 100 % is all of them
        others = f", largest not converted: {', '.join(largest)}" if largest else ""
        return f"{layers} with {percent:g} % of the weights of matrix products and convolutions{others}"


def _share(rows: Sequence[Row]) -> float | None:
    """The converted share of the weights of these layers; None if they have none."""
    total = sum(row.weights for row in rows)
    return sum(row.weights for row in rows if row.converted) / total if total else None


def warn_of_a_small_share(report: Report, model: nn.Module) -> None:
    """Warn if less than half of what neither a rule nor the recipe leaves is converted."""
    share = _share([row for row in report.rows if row.left_by is None])
    if share is not None and share < 0.5:
        warnings.warn(
            f"convert_({type(model).__name__}, {report.recipe!r}): {report._converted()}. What is left runs in the "
            "precision it has: replace layers of unknown types by torch's own, or say with rules=[(name, None)] that "
            "they stay",
            UserWarning,
            stacklevel=3,
        )


def count_weights(plans: Sequence[Plan]) -> dict[str, int]:
    """How many numbers each layer multiplies by, see `Report`; a shared tensor counts for a converted layer."""
    counts: dict[str, int] = {}
    seen: set[Tensor] = set()
    for plan in sorted(plans, key=lambda plan: plan.twin is None and plan.called is None):
        own = [p for p in kinds.weights(plan.layer) if p not in seen]
        seen.update(own)
        counts[plan.name] = sum(p.numel() for p in own)
    return counts


def row_of(plan: Plan, choice: Choice | None) -> Row:
    """The row of a layer, without its weights."""
    recipe = plan.recipe
    if plan.called is not None:
        return Row(name=plan.name, type=type_name(plan.layer), recipe=plan.called.name, reason=plan.reason, called=True)
    if recipe is None or plan.twin is None or choice is None:
        return Row(name=plan.name, type=type_name(plan.layer), recipe=None, reason=plan.reason)
    tables = plan.twin.formats(recipe)
    timing = choice.timing
    speed = None if timing is None else timing.speed(choice.engine)
    gain = f"no gain: {speed:.2f} times the speed of fp32 as {timing.shape}" if timing and speed and speed <= 1 else ""
    return Row(
        name=plan.name,
        type=type_name(plan.layer),
        recipe=recipe.name,
        reason="; ".join(filter(None, [plan.reason, gain])),
        bits={product: "x".join(str(f.bits) for f in formats) for product, formats in tables.items()},
        engines={p: _unit(choice.engine_of(p), formats) for p, formats in tables.items()},
        speed=speed,
    )


def _unit(engine: str, formats: tuple[Format, ...]) -> str:
    """The units that a product runs on: its engine's name, but bf16 on the int8 engine where an operand is bf16."""
    return "bf16" if engine == "int8" and BF16 in formats else engine
