"""Hardware models: cycles, traffic and energy of a layer on an accelerator that was built for few bits."""

from lowbit.hardware.bitfusion import BitFusion, Counters, Energies, Estimate, Loop, TrainingEstimate, total

__all__ = ["BitFusion", "Counters", "Energies", "Estimate", "Loop", "TrainingEstimate", "total"]
