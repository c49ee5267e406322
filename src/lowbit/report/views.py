"""What figures and the report page need of a run, as plain values: scores, costs, curves, proof and settings."""

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from lowbit.evidence.ledger import Ledger
from lowbit.evidence.memory import StepMemory
from lowbit.evidence.metrics import METRICS, Terms
from lowbit.evidence.records import Total

ACCURACY, BITS_PER_BYTE = "accuracy", "bits per byte"


@dataclass(frozen=True, kw_only=True)
class ProductError:
    """The error of one product of one layer in the step that was proved.

    Args:
        layer: the layer's name.
        product: ``"output"``, ``"grad_input"`` or ``"grad_weight"``.
        bits: widths of its operands, e.g. ``"8x8"``.
        engine: what executed it; several if calls differ.
        kernel: the operator, likewise.
        sqnr_db: signal to quantisation noise in dB; None if it was exact or is not known.
        angle: to full precision, in degrees; None if it is not known.
        exact: whether nothing changed.
        clipped: the larger share of clipped values of its operands, 0 to 1; None if it is not known.
    """

    layer: str
    product: str
    bits: str
    engine: str
    kernel: str
    sqnr_db: float | None
    angle: float | None
    exact: bool
    clipped: float | None


@dataclass(frozen=True, kw_only=True)
class LayerConversion:
    """What became of one layer.

    Args:
        layer: its name.
        type: its type before conversion.
        recipe: name of the recipe it runs; ``""`` if it was left as it is.
        bits: widths of the operands by product.
        engines: engines by product.
        remark: why it was left, or a remark.
    """

    layer: str
    type: str
    recipe: str
    bits: Mapping[str, str]
    engines: Mapping[str, str]
    remark: str


@dataclass(frozen=True, kw_only=True)
class View:
    """One run as figures and the page see it.

    Args:
        name: unique among the runs that are shown.
        task: model and data, e.g. ``"resnet20 on digits"``.
        recipe: name of the recipe.
        label: recipe, and the settings that tell apart runs of one recipe: runs with one label differ in seed only.
        seed: of the run.
        steps: steps in the ledger.
        complete: whether the run reached its end.
        score_name: `ACCURACY`, in percent, or `BITS_PER_BYTE`.
        score: after the last step that was evaluated; None without one.
        loss: on the test set, likewise.
        ledger: what ran.
        columns: figures that were logged: for each name, steps and values.
        errors: by layer and product, of the proof.
        conversion: by layer.
        notes: sentences of the conversion, the proof and the ledger.
        seconds_per_step: median.
        joules: of the whole run; None if the machine reports none.
        energy: where the joules come from, or why there are none.
        settings: all settings of the run.
        memory: bytes of one step by part, see `StepMemory`; None if the run did not measure them. This and the next two
            are None or empty for unfinished runs and for those of earlier versions.
        engines: products of converted layers by the engine that executes them.
        versions: of ``lowbit``, ``torch`` and ``python`` at the end of the run.
        machines: versions, processor and threads of the run's starts, as text; empty if it did not write them.
        problems: what could not be read.
    """

    name: str
    task: str
    recipe: str
    label: str
    seed: int | None
    steps: int
    complete: bool
    score_name: str
    score: float | None
    loss: float | None
    ledger: Ledger
    columns: Mapping[str, tuple[Sequence[float], Sequence[float]]]
    errors: Sequence[ProductError] = ()
    conversion: Sequence[LayerConversion] = ()
    notes: Sequence[str] = ()
    seconds_per_step: float | None = None
    joules: float | None = None
    energy: str = "not measured"
    settings: Mapping[str, Any] = field(default_factory=dict)
    memory: StepMemory | None = None
    engines: Mapping[str, int] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)
    machines: Sequence[str] = ()
    problems: Sequence[str] = ()

    @cached_property
    def costs(self) -> Mapping[str, Terms]:
        """Every metric of the whole run, as it ran, by name."""
        return {metric.name: metric(self.totals) for metric in METRICS}

    @cached_property
    def totals(self) -> Sequence[Total]:
        """What ran over the whole run."""
        return self.ledger.totals()

    @property
    def higher_is_better(self) -> bool:
        """The direction of the score."""
        return self.score_name != BITS_PER_BYTE

    @property
    def command(self) -> str:
        """The command that trains this run again."""
        flags = [
            f"--{name.replace('_', '-')} {shlex.quote(str(value))}"
            for name, value in self.settings.items()
            if value is not None and name != "out"
        ]
        return " ".join(["lowbit train", *flags])
