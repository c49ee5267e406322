"""The cost metrics of the literature, each a pure function of a ledger's totals, named by its source.

Notation: m MACs of a product (one fused multiply-add is one), a and b the widths of its two operands in bits; w, a, g
the widths of weight, input and grad_output. Sums run over all calls and thus the bits of every step, never over mean
bits. Each metric has three terms, one for each product.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from lowbit.evidence.records import OPERANDS, PRODUCTS, Product, Total

FULL = 32 * 32  # bit operations of a multiplication in full precision


@dataclass(frozen=True)
class Terms:
    """A cost by product; `total` is their sum."""

    output: float
    grad_input: float
    grad_weight: float

    @property
    def total(self) -> float:
        """The three together."""
        return self.output + self.grad_input + self.grad_weight


@dataclass(frozen=True, kw_only=True)
class Metric:
    """A way of counting.

    Args:
        name: short, unique.
        source: who counts so.
        unit: of its values.
        formula: of one product, or of the whole.
        of: the function.
    """

    name: str
    source: str
    unit: str
    formula: str
    of: Callable[[Iterable[Total]], Terms]

    def __call__(self, totals: Iterable[Total]) -> Terms:
        """The metric of these totals, e.g. ``ledger.totals()`` or those of one layer."""
        return self.of(list(totals))


def _sums(totals: Iterable[Total], each: Callable[[Product], float]) -> dict[str, float]:
    """``sum calls * each(product)`` by product; exact for whole numbers."""
    sums = dict.fromkeys(PRODUCTS, 0.0)
    for name in PRODUCTS:
        sums[name] = sum(total.calls * each(total.product) for total in totals if total.product.product == name)
    return sums


def _bit_operations(product: Product) -> int:
    return product.bit_operations


def macs(totals: Iterable[Total]) -> Terms:
    """Multiply-accumulates, whatever their widths: ``sum m``."""
    return Terms(**_sums(totals, lambda product: product.macs))


def effective_macs(totals: Iterable[Total]) -> Terms:
    """``sum m a b / 1024``: MACs that would cost the same in 32 by 32 bits.

    Source: FracTrain's code (Fu et al. 2020, arXiv:2012.13113).
    """
    return Terms(**{name: value / FULL for name, value in _sums(totals, _bit_operations).items()})


def relative_cost(totals: Iterable[Total]) -> Terms:
    """cp: ``100 sum m a b / (1024 sum m)``, percent of the same products in 32 by 32 bits; 0 without products.

    Both sums run over all three products, so the terms add up.

    Source: FracTrain's code (Fu et al. 2020, arXiv:2012.13113).
    """
    totals = list(totals)
    whole = macs(totals).total
    return Terms(**{name: 100 * value / (FULL * whole or 1) for name, value in _sums(totals, _bit_operations).items()})


def gbitops(totals: Iterable[Total]) -> Terms:
    """``1e-9 sum m a b``.

    Source: CPT (Fu et al. 2021, arXiv:2101.09868); the formula reproduces its published tables.
    """
    return Terms(**{name: value / 10**9 for name, value in _sums(totals, _bit_operations).items()})


def bitops(totals: Iterable[Total]) -> Terms:
    """``sum m a b / 1024``, called BitOPs: the same number as `effective_macs`.

    Source: the authors' code of Wolfe and Kyrillidis 2024, arXiv:2403.02243.
    """
    return effective_macs(totals)


def dorefa_complexity(totals: Iterable[Total]) -> Terms:
    """``sum m a b / sum m`` over `output`, plus the same of `grad_input` over the MACs of `output`: ``w a + w g``.

    The term of `grad_weight` is left out. Layers of one width give w a + w g exactly, if every layer has a `grad_input`
    (the convention ``"as-charged"``).

    Source: the column "training complexity" of Zhou et al. 2016, arXiv:1606.06160.
    """
    totals = list(totals)
    forward = macs(totals).output or 1
    sums = _sums(totals, _bit_operations)
    return Terms(sums["output"] / forward, sums["grad_input"] / forward, 0.0)


def bops(totals: Iterable[Total]) -> Terms:
    """``sum m (w a + w + a + log2 K)`` over `output`, K the products that are summed up in one output value.

    It counts the forward pass only. K is ``k k C`` for a convolution of C channels in a group.

    Source: UNIQ (Baskin et al. 2018, arXiv:1804.10969).
    """

    def each(product: Product) -> float:
        first, second = product.bits
        return product.macs * (first * second + first + second + math.log2(summed(product)))

    return Terms(_sums(totals, each)["output"], 0.0, 0.0)


def summed(product: Product) -> int:
    """K: how many products are summed in one value of the layer's output, taps on the padding included."""
    if product.transposed:
        return max(1, product.weight[0] // product.groups * math.prod(product.weight[2:]))
    if product.kind.startswith("conv"):
        return max(1, math.prod(product.weight[1:]))
    return max(1, product.input[-1])


def operand_bytes(totals: Iterable[Total]) -> Terms:
    """Bytes of both operands of every product, each read once at its width: ``sum (n_a a + n_b b) / 8``.

    n counts elements. It leaves out results, which are written in full precision, and what a cache or a second reading
    of an operand saves or adds.
    """

    def each(product: Product) -> int:
        shapes = {"input": product.input, "weight": product.weight, "grad_output": product.output}
        pairs = zip(OPERANDS[product.product], product.bits, strict=True)
        return sum(math.prod(shapes[operand]) * bits for operand, bits in pairs)

    return Terms(**{name: value / 8 for name, value in _sums(totals, each).items()})


METRICS = (
    Metric(name="MACs", source="-", unit="MAC", formula="sum m", of=macs),
    Metric(name="effective MACs", source="FracTrain", unit="MAC 32x32", formula="sum m a b / 1024", of=effective_macs),
    Metric(name="cp", source="FracTrain", unit="%", formula="100 sum m a b / (1024 sum m)", of=relative_cost),
    Metric(name="GBitOPs", source="CPT", unit="1e9 bit op", formula="1e-9 sum m a b", of=gbitops),
    Metric(name="BitOPs", source="Wolfe and Kyrillidis", unit="MAC 32x32", formula="sum m a b / 1024", of=bitops),
    Metric(
        name="training complexity",
        source="DoReFa-Net",
        unit="bit op per MAC",
        formula="w a + w g, without grad_weight",
        of=dorefa_complexity,
    ),
    Metric(name="BOPs", source="UNIQ", unit="bit op", formula="sum m (w a + w + a + log2 K), output only", of=bops),
    Metric(
        name="operand bytes",
        source="-",
        unit="byte",
        formula="sum (n_a a + n_b b) / 8, each read once",
        of=operand_bytes,
    ),
)
