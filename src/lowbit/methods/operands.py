"""The formats of the three products, each of two operands."""

import dataclasses
from dataclasses import dataclass

from lowbit.errors import UsageError
from lowbit.inputs.checks import check_fields
from lowbit.numerics.formats import Format


@dataclass(frozen=True, kw_only=True)
class Output:
    """The formats of ``output = input x weight``."""

    input: Format
    weight: Format

    def __post_init__(self) -> None:
        check_fields(self)


@dataclass(frozen=True, kw_only=True)
class GradInput:
    """The formats of ``grad_input = grad_output x weight``."""

    grad_output: Format
    weight: Format

    def __post_init__(self) -> None:
        check_fields(self)


@dataclass(frozen=True, kw_only=True)
class GradWeight:
    """The formats of ``grad_weight = grad_output x input``."""

    grad_output: Format
    input: Format

    def __post_init__(self) -> None:
        check_fields(self)


def check_operand(where: str, operand: str, fmt: Format) -> None:
    """Raise a UsageError if no operand of that name can have the format."""
    if operand != "input" and fmt.running is not None:
        raise UsageError(f"{where}: only `input` keeps a running range")
    if operand != "weight" and fmt.granularity == "output-channel":
        raise UsageError(f"{where}: only a weight has output channels; 'kept-channel' goes for every operand")
    per_sample = fmt.granularity == "sample" or (fmt.scale is not None and fmt.scale.range.kind == "sample-mean")
    if operand == "weight" and per_sample:
        raise UsageError(f"{where}: a weight has no samples")


def range_of(fmt: Format) -> tuple[object, ...] | None:
    """What identifies the running range that a format keeps, for comparison; None without a scale."""
    s = fmt.scale
    return None if s is None else (s.range, s.running, s.running_start, s.granularity)


SLOTS = tuple(
    (product, f.name)
    for product, table in (("output", Output), ("grad_input", GradInput), ("grad_weight", GradWeight))
    for f in dataclasses.fields(table)
)
