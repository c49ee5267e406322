"""Precision schedules: step -> bits, one method of the literature a file; rules that follow the run; savings.

`source.py` holds what they share, `template.py` finds the kinds that recipes and the command line know: those that a
file of this folder lists in its ``MAKES``.
"""

from lowbit.schedules.allocation import Option, allocate
from lowbit.schedules.budget import Budget
from lowbit.schedules.constant import Constant
from lowbit.schedules.cost import bit_operations, saving
from lowbit.schedules.cyclic import Cyclic, Final, Profile, Shape
from lowbit.schedules.deficit import Deficit
from lowbit.schedules.gradient_noise import GradientNoise
from lowbit.schedules.layerwise import LayerBits, Layerwise, Measure
from lowbit.schedules.piecewise import Piecewise
from lowbit.schedules.plateau import PlateauRule
from lowbit.schedules.progressive import Progressive
from lowbit.schedules.range_test import Better, RangeTest, Tried
from lowbit.schedules.range_tested import RangeTested
from lowbit.schedules.source import Called, Follower, Follows, PureSchedule, Rule, Schedule, Source
from lowbit.schedules.suite import SUITE, Curve
from lowbit.schedules.template import KINDS, Template, kind_settings
from lowbit.schedules.times import Time, parse_steps

__all__ = [
    "KINDS",
    "SUITE",
    "Better",
    "Budget",
    "Called",
    "Constant",
    "Curve",
    "Cyclic",
    "Deficit",
    "Final",
    "Follower",
    "Follows",
    "GradientNoise",
    "LayerBits",
    "Layerwise",
    "Measure",
    "Option",
    "Piecewise",
    "PlateauRule",
    "Profile",
    "Progressive",
    "PureSchedule",
    "RangeTest",
    "RangeTested",
    "Rule",
    "Schedule",
    "Shape",
    "Source",
    "Template",
    "Time",
    "Tried",
    "allocate",
    "bit_operations",
    "kind_settings",
    "parse_steps",
    "saving",
]
