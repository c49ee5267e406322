"""The ten schedules of Wolfe and Kyrillidis: four growth profiles, repeated or in triangles.

Source: Wolfe and Kyrillidis 2024, Better Schedules for Low Precision Training, arXiv:2403.02243.
"""

from collections.abc import Mapping
from types import MappingProxyType
from typing import TypedDict

from lowbit.schedules.cyclic import Profile, Shape


class Curve(TypedDict):
    """The two arguments of `Cyclic` that distinguish the ten schedules of Wolfe and Kyrillidis."""

    profile: Profile
    shape: Shape


# The keys are the authors' names: growth Cosine, Linear, Rex or Exponential; Repeated or Triangular; Vertical or
# Horizontal reflection. `Cyclic(low=3, high=8, cycles=8, total_steps=64_000, **SUITE["RTH"])`
SUITE: Mapping[str, Curve] = MappingProxyType(
    {
        "CR": {"profile": "cosine", "shape": "repeated"},
        "CT": {"profile": "cosine", "shape": "triangular-vertical"},
        "LR": {"profile": "linear", "shape": "repeated"},
        "LT": {"profile": "linear", "shape": "triangular-vertical"},
        "RR": {"profile": "rex", "shape": "repeated"},
        "RTV": {"profile": "rex", "shape": "triangular-vertical"},
        "RTH": {"profile": "rex", "shape": "triangular-horizontal"},
        "ER": {"profile": "exponential", "shape": "repeated"},
        "ETV": {"profile": "exponential", "shape": "triangular-vertical"},
        "ETH": {"profile": "exponential", "shape": "triangular-horizontal"},
    }
)
