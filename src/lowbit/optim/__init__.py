"""Optimisers whose states, weights and updates have few bits.

>>> optimizer = lowbit.optim.LowBitOptimizer(torch.optim.AdamW(model.parameters()), states="dynamic8")
"""

from lowbit.optim.recipes import from_recipe
from lowbit.optim.rounded import RoundedSGD
from lowbit.optim.wrapper import LowBitOptimizer

__all__ = ["LowBitOptimizer", "RoundedSGD", "from_recipe"]
