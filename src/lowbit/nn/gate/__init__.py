"""Gates: a small network that chooses bits for each block and sample, and the cost that it is trained by.

Notation: B samples, n blocks, K choices, p probabilities ``(B, K)``, m MACs of a block per sample, w, a, g bits of
`weight`, `input` and `grad_output`.

Source: Fu et al. 2020, FracTrain, arXiv:2012.13113, section 3.2; sizes, mixing and sign rule as in the authors' code.
"""

from lowbit.nn.gate.cost import direction, products_cost
from lowbit.nn.gate.gates import Block, Gates, gates_of, release
from lowbit.nn.gate.network import RecurrentGate, pooled

__all__ = [
    "Block",
    "Gates",
    "RecurrentGate",
    "direction",
    "gates_of",
    "pooled",
    "products_cost",
    "release",
]
