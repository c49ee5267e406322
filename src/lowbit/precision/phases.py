"""What a controller writes beside bits: the phase of each layer, and whether it skips `grad_weight`."""

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from lowbit.errors import UsageError
from lowbit.methods.recipe import Recipe, Skipping
from lowbit.nn.site import Site
from lowbit.schedules import parse_steps


@dataclass(frozen=True, kw_only=True, eq=False)
class TimedLayer:
    """One layer whose recipe has phases, or skips `grad_weight` in some steps.

    Args:
        sites: all sites of the layer.
        starts: the first step of each phase after the first.
        skip: what says in which steps it skips; None: it does not.
        turn: its number among the layers that skip.
    """

    sites: tuple[Site, ...]
    starts: tuple[int, ...]
    skip: Skipping | None
    turn: int

    def at(self, step: int) -> tuple[int, bool]:
        """The phase of a step, and whether the step skips `grad_weight`."""
        return bisect_right(self.starts, step), self.skip is not None and self.skip.skips(step, self.turn)

    def write(self, step: int) -> None:
        """Go to the phase of a step; training and evaluation have the same."""
        phase, skips = self.at(step)
        for site in self.sites:
            if site.phase != phase:
                site.set_phase(phase)
            site.skips = skips


def timed_layers(
    layers: Sequence[Sequence[Site]], *, total_steps: int | None, steps_per_epoch: int | None, turn: int = 0
) -> list[TimedLayer]:
    """The layers, given by their sites, whose recipe has phases or skips `grad_weight` in some steps.

    `turn` is the number of the first of these that skips.

    Raises:
        UsageError: phases that are not in order, or that begin after the run.
    """
    timed = []
    turns = turn
    for sites in layers:
        recipe = sites[0].recipe
        skip = recipe.skip if sites[0].may_skip else None
        if recipe.phases or (skip is not None and skip.update_every is not None):
            starts = _starts(recipe, total_steps, steps_per_epoch)
            timed.append(TimedLayer(sites=tuple(sites), starts=starts, skip=skip, turn=turns))
            turns += skip is not None
    return timed


def _starts(recipe: Recipe, total_steps: int | None, steps_per_epoch: int | None) -> tuple[int, ...]:
    starts = tuple(
        parse_steps(phase.start, total_steps=total_steps, steps_per_epoch=steps_per_epoch) for phase in recipe.phases
    )
    if any(later <= earlier for earlier, later in pairwise((0, *starts))):
        raise UsageError(
            f"the phases of {recipe.name!r} start at steps {', '.join(map(str, (0, *starts)))}: give them in order of "
            "time, each start once"
        )
    if starts and total_steps is not None and starts[-1] >= total_steps:
        raise UsageError(
            f"a phase of {recipe.name!r} starts at step {starts[-1]}, after the last of total_steps={total_steps}: "
            "start it earlier, or give more steps"
        )
    return starts
