"""What a schedule costs in bit operations, and what it saves against static precision.

Source: the authors' code of FracTrain (arXiv:2012.13113) and CPT (arXiv:2101.09868).
"""

from lowbit.errors import UsageError, shown
from lowbit.inputs.checks import check_type
from lowbit.schedules.checks import check_bits
from lowbit.schedules.constant import Constant
from lowbit.schedules.source import Schedule


def bit_operations(schedule: Schedule, grad_bits: int | Schedule) -> float:
    """Bit operations per MAC of `output`, summed over the three products and averaged over the steps: b² + 2 b g.

    One multiplication of an m-bit by an n-bit number counts as m n bit operations: b b in `output`, b g in each of
    `grad_input` and `grad_weight`. The whole run is counted, with the bits of each step. Additions, quantisation,
    normalisation, optimizer, evaluation and memory traffic are not counted.

    Args:
        schedule: bits of `input` and `weight`.
        grad_bits: bits of `grad_output`, in both of its products.

    Raises:
        UsageError: the two schedules have different lengths.

    Source: the authors' code of FracTrain and CPT, which divide it by 3 * 32**2.
    """
    if not isinstance(schedule, Schedule):
        raise UsageError(f"schedule={shown(schedule)}: give a schedule, e.g. Constant(bits=8)")
    check_type("grad_bits", grad_bits, int | Schedule)
    backward = Constant(bits=grad_bits) if isinstance(grad_bits, int) else grad_bits
    lengths = {total for total in (schedule.total_steps, backward.total_steps) if total is not None}
    if len(lengths) > 1:
        raise UsageError(f"schedules of {sorted(lengths)} steps: give them the same total_steps")
    steps = range(max(lengths, default=1))
    return sum(b * b + 2 * b * g for b, g in zip(map(schedule, steps), map(backward, steps), strict=True)) / len(steps)


def saving(schedule: Schedule, *, grad_bits: int = 8, high: int = 8) -> float:
    """Percent of bit operations that a schedule saves against `high` bits all the time, with the same gradients.

    Args:
        schedule: bits of `input` and `weight`.
        grad_bits: bits of `grad_output`.
        high: bits of `input` and `weight` in the static run.

    Returns:
        ``100 (1 - mean(b² + 2 b g) / (high² + 2 high g))``, see `bit_operations`; negative if it costs more.
    """
    check_type("grad_bits", grad_bits, int)
    check_bits("high", high)
    return 100 * (1 - bit_operations(schedule, grad_bits) / bit_operations(Constant(bits=high), grad_bits))
