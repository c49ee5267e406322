"""CPT's precision range test by itself: it finds the lowest precision at which a model makes progress.

The rule is `lowbit.schedules.RangeTest`; here it drives a model's bits and is shown as a table and a plot.
"""

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from lowbit.errors import UsageError
from lowbit.frames import data_frame
from lowbit.inputs.checks import checked
from lowbit.precision.controller import PrecisionController
from lowbit.precision.layers import LayerRule
from lowbit.schedules import Better, RangeTest, Schedule, Tried
from lowbit.tables import Table, html_of, json_text

_WIDTH, _HEIGHT = 64, 8  # of the plot in characters
_EIGHTHS = " ▁▂▃▄▅▆▇█"


@dataclass(frozen=True, kw_only=True)
class RangeTestResult:
    """What a range test found; `print` shows the table, the plot and the choice.

    Args:
        bits: the chosen width, `low` of a cyclic schedule.
        rows: what was gained at each width that was trained.
        history: (bits, measure) of every step.
        threshold: the gain that is progress.
        better: whether the measure should get ``"higher"`` or ``"lower"``.
        significance: how many standard errors a gain must also exceed; None: no such condition.
        state: the state of the test at its end, see `lowbit.schedules.RangeTest.state_dict`.
    """

    bits: int
    rows: tuple[Tried, ...]
    history: tuple[tuple[int, float], ...]
    threshold: float
    better: Better
    significance: float | None
    state: dict[str, Any]

    @staticmethod
    def of(test: RangeTest, history: Sequence[tuple[int, float]] = ()) -> "RangeTestResult":
        """The result of a test that is over."""
        if test.chosen is None:
            raise UsageError(f"{test!r} is not over")
        return RangeTestResult(
            bits=test.chosen,
            rows=test.tried,
            history=tuple(history),
            threshold=test.threshold,
            better=test.better,
            significance=test.significance,
            state=test.state_dict(),
        )

    def __str__(self) -> str:
        return "\n\n".join(map(str, self._parts()))

    def _repr_html_(self) -> str:
        return html_of(self._parts())

    def to_dict(self) -> dict[str, Any]:
        """The choice, the table and the history as plain values; `state` is not among them."""
        return {
            "version": 1,
            "bits": self.bits,
            "threshold": self.threshold,
            "better": self.better,
            "significance": self.significance,
            "rows": [_values(row) for row in self.rows],
            "history": [list(step) for step in self.history],
        }

    def to_json(self) -> str:
        """`to_dict` as JSON; a figure that is infinite or nan is null."""
        return json_text(self.to_dict())

    def to_dataframe(self) -> Any:
        """A ``pandas.DataFrame`` with a line for each width that was trained.

        Raises:
            RunError: pandas is missing.
        """
        return data_frame([_values(row) for row in self.rows])

    def _parts(self) -> list[str | Table]:
        unit = "rise of the measure" if self.better == "higher" else "fall of the measure, relative"
        chosen = [row.bits for row in self.rows if row.progress][:1]
        rows = [
            [
                str(row.bits),
                str(row.steps),
                f"{row.first:.4f}",
                f"{row.last:.4f}",
                f"{row.gain:+.4f}",
                "-" if row.error is None else f"{row.error:.4f}",
                "chosen" if [row.bits] == chosen else "progress" if row.progress else "no progress",
            ]
            for row in self.rows
        ]
        needed = f"{self.threshold:g}"
        if self.significance is not None:
            needed += f" and more than {self.significance:g} standard errors"
        if not chosen:
            rows = [row for row in rows if row[0] != str(self.bits)]
            rows.append([str(self.bits), *["-"] * 5, f"chosen: no lower width gained more than {needed}"])
        header = ["bits", "steps", "first half", "last half", "gain", "standard error", ""]
        parts: list[str | Table] = [
            f"precision range test: {self.bits} bits",
            Table(header, rows),
            f"gain: {unit}, from the first to the last half of the steps; progress: more than {needed}",
        ]
        return [*parts, plot(self.history)] if self.history else parts


def _values(row: Tried) -> dict[str, Any]:
    names = ("bits", "steps", "first", "last", "gain", "error", "progress")
    return {name: getattr(row, name) for name in names}


@checked
def range_test(
    model: nn.Module,
    step_fn: Callable[[], float | Tensor],
    *,
    low: int = 2,
    high: int = 8,
    backward: Schedule | int | None = None,
    rules: Sequence[LayerRule] = (),
    steps_per_bit: int = 100,
    threshold: float = 0.01,
    better: Better = "higher",
    significance: float | None = 3.0,
    every: bool = False,
) -> RangeTestResult:
    """Train a converted model at `low` bits, then at one bit more, ... until a width makes progress.

    The model is trained in place and stays as the test leaves it: go on from there, as CPT does in its first cycle, or
    load what you saved before. Afterwards its bits are those of the recipe again.

    Args:
        model: a converted model without a controller.
        step_fn: does one whole training step (forward, backward, update) and returns the measure of that batch, e.g.
            its training accuracy.
        low: the first width of inputs and weights.
        high: the last width; it is chosen, without training, if no lower one makes progress.
        backward: bits of gradients; None: the recipe's own.
        rules: layers with other bits, as for `lowbit.PrecisionController`.
        steps_per_bit: steps at each width, 4 or more; without `significance` 2 or more.
        threshold: the gain that counts as progress; 0.01 of an accuracy is one point.
        better: whether the measure should get ``"higher"`` (a gain is a difference) or ``"lower"`` (a gain is a
            relative fall).
        significance: how many standard errors a gain must also exceed, so that noise does not count as progress; None:
            the threshold decides alone. See `lowbit.schedules.RangeTest`.
        every: whether to train at each width up to `high`, for the table; the choice is the same.

    Raises:
        UsageError: a value outside the above, or a model that is not converted or has a controller.
        RunError: the measure is not finite.

    Source: Fu et al. 2021, CPT, arXiv:2101.09868, section 3.3.
    """
    test = RangeTest(
        low=low,
        high=high,
        steps_per_bit=steps_per_bit,
        threshold=threshold,
        better=better,
        significance=significance,
        every=every,
    )
    controller = PrecisionController(model, forward=test, backward=backward, rules=rules)
    history: list[tuple[int, float]] = []
    try:
        while not test.done:
            bits = test.current_bits
            measure = float(step_fn())
            history.append((bits, measure))
            controller.step(measure)
    finally:
        controller.remove()
    return RangeTestResult.of(test, history)


def plot(history: Sequence[tuple[int, float]]) -> str:
    """The measure over the steps as a column chart of text, with the widths below it.

    Args:
        history: (bits, measure) of every step; if there are more steps than columns, neighbours are averaged.
    """
    columns = min(len(history), _WIDTH)
    bounds = [round(i * len(history) / columns) for i in range(columns + 1)]
    cells = [history[a:b] for a, b in itertools.pairwise(bounds)]
    values = [math.fsum(m for _, m in cell) / len(cell) for cell in cells]
    bottom, top = min(values), max(values)
    span = top - bottom or 1.0
    eighths = [round((value - bottom) / span * (8 * _HEIGHT - 1)) + 1 for value in values]
    lines = ["".join(_EIGHTHS[min(max(e - 8 * row, 0), 8)] for e in eighths) for row in reversed(range(_HEIGHT))]
    labels = [f"{top:.4g}", *[""] * (_HEIGHT - 2), f"{bottom:.4g}"]
    wide = max(map(len, labels))
    widths = [cell[0][0] for cell in cells]
    axis = "".join(str(b) if i == 0 or widths[i - 1] != b else " " * len(str(b)) for i, b in enumerate(widths))
    body = [f"{label.rjust(wide)} |{line}" for label, line in zip(labels, lines, strict=True)]
    return "\n".join([*(line.rstrip() for line in body), f"{'bits'.rjust(wide)}  {axis}".rstrip()])
