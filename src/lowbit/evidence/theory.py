"""SBM's theory of the angle between a tensor and its quantised self.

Notation: N elements of a tensor, M the bits of its codes.

Source: Banner et al. 2018, arXiv:1805.11046, section 2.
"""

import math


def angle_bound(bits: int, elements: int) -> float:
    """The cosine that SBM's theory guarantees between a tensor and its quantised self.

    ``cos >= 2**M / (2**M + sqrt(ln N / 6))`` for N normally distributed values and a uniform grid of M bits.

    Source: Banner et al. 2018, arXiv:1805.11046, section 2.
    """
    return 2.0**bits / (2.0**bits + math.sqrt(math.log(max(elements, 1)) / 6))


def bits_needed(cosine: float, elements: int) -> float:
    """The bits for which `angle_bound` reaches a cosine: ``log2(c / (1 - c) sqrt(ln N / 6))``, at least 1.

    Source: Banner et al. 2018, arXiv:1805.11046, section 2, solved for M.
    """
    root = math.sqrt(math.log(max(elements, 1)) / 6)
    return max(1.0, math.log2(cosine / (1 - cosine) * root)) if root else 1.0
