"""What a recipe says about what changes in a run: bits by a schedule or gates, formats, and which weights train."""

import re
from dataclasses import dataclass
from typing import Literal

from lowbit.errors import UsageError
from lowbit.inputs.checks import check_fields, check_whole
from lowbit.methods.operands import GradInput, GradWeight, Output
from lowbit.numerics.formats import Format
from lowbit.schedules import PlateauRule, Template, Time, parse_steps
from lowbit.schedules.checks import MOST_STEPS

Mixing = Literal["input", "output"]
Weighting = Literal["macs", "equal"]


_MOST_UNITS = 2**16  # of a layer of a gate


@dataclass(frozen=True, kw_only=True)
class Scheduling:
    """Bits that change over the run; a `lowbit.PrecisionController` applies them.

    Args:
        forward: bits of `input` and `weight`.
        backward: bits of `grad_output`; None: what a plateau rule in `forward` says, or the formats' own.
    """

    forward: Template
    backward: Template | None = None

    def __post_init__(self) -> None:
        check_fields(self)


@dataclass(frozen=True, kw_only=True)
class Phase:
    """Formats that take the place of a recipe's own from some step on.

    Args:
        start: the first step; a step, ``"10ep"``, or ``"0.9"`` of the run, see `lowbit.schedules.parse_steps`.
        name: of the recipe whose formats they are.
        output: formats of ``output``.
        grad_input: formats of ``grad_input``.
        grad_weight: formats of ``grad_weight``.
        bias: format of the bias.
    """

    start: Time
    name: str
    output: Output
    grad_input: GradInput
    grad_weight: GradWeight
    bias: Format

    def __post_init__(self) -> None:
        check_fields(self)
        # A run long enough for any start: what fails here fails in every run.
        if parse_steps(self.start, total_steps=10**9, steps_per_epoch=10**6) == 0:
            raise UsageError(f"start={self.start!r}: a run begins in the recipe's own formats; give a later start")


@dataclass(frozen=True, kw_only=True)
class Skipping:
    """Steps in which no `grad_weight` is computed, so that the optimizer leaves the weight alone.

    Args:
        update_every: the gradient of a weight is computed in one step of so many, the first of them; None: never.
        stagger: whether the layers take turns, so that each step computes the gradients of some of them.
        skip_layers: a regular expression that matches the whole names of the layers; all by default.

    Raises:
        UsageError: a value outside the above.
    """

    update_every: int | None = None
    stagger: bool = False
    skip_layers: str = ".*"

    def __post_init__(self) -> None:
        check_fields(self)
        if self.update_every is not None:
            check_whole("update_every", self.update_every, 2, MOST_STEPS)
        if self.stagger and self.update_every is None:
            raise UsageError("stagger goes with update_every: layers that never train have no turns to take")
        try:
            re.compile(self.skip_layers)
        except re.error as error:
            raise UsageError(f"skip_layers={self.skip_layers!r} is not a regular expression: {error}") from error

    def takes(self, layer: str) -> bool:
        """Whether a layer of this name skips steps."""
        return re.fullmatch(self.skip_layers, layer) is not None

    def skips(self, step: int, turn: int) -> bool:
        """Whether a layer computes no `grad_weight` in a step.

        Args:
            step: the step, from 0.
            turn: the number of the layer among those that skip steps.
        """
        return self.update_every is None or (step - turn * self.stagger) % self.update_every != 0


@dataclass(frozen=True, kw_only=True)
class Gating:
    """Bits that a gate chooses for each block and sample; a `lowbit.PrecisionController` applies them.

    Costs are in percent of full precision: ``100 (w a + w g + a g) / (3 * 32**2)`` for w, a, g bits of `weight`,
    `input` and `grad_output`, averaged over the MACs of the gated blocks.

    Args:
        choices: pairs (bits of `input`, bits of `grad_output`) to choose from, e.g. ``[[3, 6], [8, 8]]``; the pair
            ``[0, 0]`` skips the block.
        targets: the cost to train towards, in percent, or several costs, one for each stage of PFQ's plateau rule.
        strength: beta, weight of the cost in the loss.
        band: the cost term counts in full only where the cost is farther than this from its target.
        inside: weight of the cost term inside the band.
        mixing: ``"input"``: a layer runs each sample at its choice, and batch normalisation sees them all together;
            ``"output"``: a block runs all samples at every choice in training, and its outputs are mixed.
        weighting: how much a block counts in the cost: ``"macs"``: its share of the MACs of all blocks; ``"equal"``:
            the same as any other, as in the authors' code for ResNets.
        hidden: outputs of the first projection of the gate; None leaves it and its ReLU out.
        features: outputs of the last projection, the inputs of the LSTM.
        state: hidden units of the LSTM.
        threshold: epsilon of the plateau rule; needed iff there are several targets.
        decay: alpha of the plateau rule; needed iff there are several targets.

    Raises:
        UsageError: a value outside the above.
    """

    choices: tuple[tuple[int, int], ...]
    targets: tuple[float, ...]
    strength: float = 1e-3
    band: float = 0.0
    inside: float = 0.1
    mixing: Mixing = "input"
    weighting: Weighting = "macs"
    hidden: int | None = 32
    features: int = 16
    state: int = 16
    threshold: float | None = None
    decay: float | None = None

    def __post_init__(self) -> None:
        check_fields(self)
        pairs = self.choices
        if len(pairs) < 2 or any(bits < 0 for pair in pairs for bits in pair):
            raise UsageError(
                f"choices={self.choices}: give two or more pairs (bits of input, bits of grad_output), e.g. [4, 8]"
            )
        if any((a == 0) != (g == 0) for a, g in pairs) or sum(a == 0 for a, _ in pairs) > 1:
            raise UsageError(f"choices={self.choices}: the pair that skips a block is [0, 0], once")
        if len(set(pairs)) < len(pairs):
            raise UsageError(f"choices={self.choices}: give each pair once")
        if not self.targets or not all(0 < t <= 100 for t in self.targets):
            raise UsageError(
                f"targets={self.targets}: give costs in percent of full precision, above 0 and at most 100"
            )
        for name in ("strength", "band", "inside"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise UsageError(f"{name}={getattr(self, name)!r}: give a finite number, 0 or more")
        for name in ("hidden", "features", "state"):
            value = getattr(self, name)
            if value is not None:
                check_whole(name, value, 1, _MOST_UNITS)
        needed = len(self.targets) > 1
        if (self.threshold is not None) != needed or (self.decay is not None) != needed:
            raise UsageError(
                f"targets={self.targets}, threshold={self.threshold}, decay={self.decay}: threshold and decay belong "
                "to the plateau rule between several targets; give both with several, neither with one"
            )
        self.rule()

    def rule(self) -> PlateauRule | None:
        """A new plateau rule that goes from target to target; None if there is one."""
        if self.threshold is None or self.decay is None:
            return None
        return PlateauRule(stages=len(self.targets), threshold=self.threshold, decay=self.decay)
