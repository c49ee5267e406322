"""Hardware models: cycles, traffic and energy of a product on an accelerator: BitFusion, or your own."""

from lowbit.hardware.accelerator import Accelerator
from lowbit.hardware.bitfusion import BitFusion
from lowbit.hardware.choice import ACCELERATORS, accelerator
from lowbit.hardware.energies import Energies
from lowbit.hardware.estimate import Estimate, Loop, Store, TrainingEstimate, total
from lowbit.hardware.matrix import Matrix, as_matrix
from lowbit.hardware.workloads import scale_sim, zigzag

__all__ = [
    "ACCELERATORS",
    "Accelerator",
    "BitFusion",
    "Energies",
    "Estimate",
    "Loop",
    "Matrix",
    "Store",
    "TrainingEstimate",
    "accelerator",
    "as_matrix",
    "scale_sim",
    "total",
    "zigzag",
]
