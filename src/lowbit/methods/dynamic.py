"""What a recipe says about bits that change in a run: a schedule, or gates."""

from dataclasses import dataclass
from typing import Literal

from lowbit.errors import UsageError
from lowbit.inputs.checks import check_fields, check_whole
from lowbit.schedules import PlateauRule, Template

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
