"""One width for each of several layers under a common budget: a knapsack, solved greedily on convex hulls.

Notation: c what a width costs a layer, e.g. bit operations; d the damage that it does, in any unit.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise


@dataclass(frozen=True, kw_only=True)
class Option:
    """One width that a layer may have.

    Args:
        bits: the width.
        cost: c.
        damage: d.
    """

    bits: int
    cost: float
    damage: float


def allocate(options: Mapping[str, Sequence[Option]], budget: float) -> dict[str, Option]:
    """The option of each layer that does the least damage together, for at most `budget` of cost.

    Only options on a layer's lower convex hull of (c, d) count. Beginning with the cheapest, it takes the steps that
    lower the damage most for each unit of cost, as long as the budget allows. The result depends on the values and on
    the order of the layers alone. If even the cheapest options cost more than the budget, it is these.

    Args:
        options: of each layer, one or more.
        budget: in the unit of the costs.
    """
    hulls = {layer: _hull(of_layer) for layer, of_layer in options.items()}
    chosen = {layer: hull[0] for layer, hull in hulls.items()}
    spent = sum(option.cost for option in chosen.values())
    steps = [(_gain(a, b), layer, a, b) for layer, hull in hulls.items() for a, b in pairwise(hull)]
    blocked: set[str] = set()
    for _, layer, here, there in sorted(steps, key=lambda step: -step[0]):
        cost = there.cost - here.cost
        if chosen[layer] is here and layer not in blocked and spent + cost <= budget:
            chosen[layer] = there
            spent += cost
        else:
            blocked.add(layer)
    return chosen


def _gain(here: Option, there: Option) -> float:
    """By how much a step to more cost lowers the damage, for each unit of it."""
    return (here.damage - there.damage) / (there.cost - here.cost)


def _hull(points: Sequence[Option]) -> list[Option]:
    """The lower convex hull of a layer's options, from the cheapest on, as long as the damage falls."""
    hull: list[Option] = []
    for point in sorted(points, key=lambda p: (p.cost, p.damage)):
        if hull and point.damage >= hull[-1].damage:
            continue
        while len(hull) > 1 and _gain(hull[-2], hull[-1]) <= _gain(hull[-1], point):
            hull.pop()
        hull.append(point)
    return hull
