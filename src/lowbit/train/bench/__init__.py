"""Speed on this machine: training steps of networks in several variants, and passes over memory by kernel.

Everything is timed in paired rounds inside one process, see `lowbit.machine.paired`.
"""

from lowbit.train.bench.passes import kernels
from lowbit.train.bench.timing import DEVICES, rows, stepper, steps
from lowbit.train.bench.variants import COMPILED, VARIANTS, variant
from lowbit.train.bench.works import WORKS, Work

__all__ = ["COMPILED", "DEVICES", "VARIANTS", "WORKS", "Work", "kernels", "rows", "stepper", "steps", "variant"]
