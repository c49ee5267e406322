"""One watched forward: the products that it ran outside converted layers, and those that its backward computes."""

from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from lowbit.evidence.formulas import Multiplication
from lowbit.evidence.ledger import Ledger
from lowbit.evidence.names import plain_name
from lowbit.evidence.records import PLAIN, Product
from lowbit.evidence.watch import Operation
from lowbit.nn.layers import QuantLayer
from lowbit.nn.norm import FusedSequential
from lowbit.products.operators import Convolution
from lowbit.products.watch import ProductCall


class Forward:
    """What one watched forward ran outside converted layers; it stands for all forwards of its signature.

    Attributes:
        calls: how often each product ran.
        due: the gradients that its backward may compute.
        seen: the gradients that the backward of the watched forward did compute.
        uncounted: operators that were not counted.
        held: bytes that it kept for its backward.
    """

    def __init__(self, watch: "ForwardWatcher", held: int, ledger: Ledger) -> None:
        self.calls: Counter[int] = Counter()
        self.due: Counter[int] = Counter()
        self.seen: Counter[int] = Counter()
        self.uncounted = watch.uncounted
        self.held = held
        for found in watch.found:
            self.calls[ledger.intern(found.product("output"))] += found.times
            for product in found.gradients:
                index = ledger.intern(found.product(product))
                found.indices.append(index)
                self.due[index] += found.times

    def gradients(self) -> Counter[int]:
        """What a backward computes: what was seen, or everything that is due if no backward was watched."""
        return self.seen or self.due


class _Found:
    """One product of a plain operator in a watched forward."""

    def __init__(self, layer: str, what: Multiplication, result: Any) -> None:
        self.layer = layer
        self.what = what
        self.times = what.times
        self.result = result  # autograd gives it a node after the operator
        self.indices: list[int] = []
        recorded = torch.is_grad_enabled()
        self.gradients = [
            product
            for product, needed in zip(("grad_input", "grad_weight"), what.needs, strict=True)
            if needed and recorded
        ]

    def product(self, product: str) -> Product:
        """The record of one of its products; a gradient has the width of the first factor's dtype."""
        first, second = self.what.bits
        bits = (first, first) if product == "grad_weight" else (first, second)
        charged = (first, second) if product == "grad_weight" and "grad_input" not in self.gradients else None
        return record(self.layer, self.what, bits, charged, product=product)


class ForwardWatcher:
    """The watcher of one forward: the products that run outside converted layers, and what is not counted."""

    def __init__(self, model: nn.Module) -> None:
        self.found: list[_Found] = []
        self.uncounted: Counter[str] = Counter()
        # What a fused container dispatches itself belongs to the Range BN in it.
        converted = (QuantLayer, FusedSequential)
        self._converted = {name for name, module in model.named_modules() if isinstance(module, converted)}

    def __call__(self, operation: Operation) -> None:
        """Take in one operator."""
        if operation.is_view:
            return
        module = operation.module or ""
        found = operation.multiplications()
        if found is not None:
            self.found.extend(_Found(plain_name(module), what, operation.result) for what in found)
        elif operation.multiplies:
            self.uncounted[f"{operation.name} (multiplies)"] += 1
        elif module not in self._converted and operation.tensors:
            self.uncounted[operation.name] += 1

    def see_backward(self, forward: Forward, add: Callable[[Counter[int]], None]) -> None:
        """Count the gradients of each product when the backward comes to it."""
        for found in self.found:
            result = found.result if isinstance(found.result, Tensor) else tree_leaves(found.result)[0]
            node, found.result = result.grad_fn, None
            if node is not None and found.indices:
                calls = Counter(dict.fromkeys(found.indices, found.times))

                def arrived(_: Any, calls: Counter[int] = calls) -> None:
                    forward.seen.update(calls)
                    add(calls)

                node.register_prehook(arrived)


def record(
    layer: str,
    ran: ProductCall | Multiplication,
    bits: tuple[int, int],
    charged: tuple[int, int] | None,
    *,
    product: str = "",
) -> Product:
    """The record of a product, of a converted layer or of a plain operator."""
    window: dict[str, Any] = {}
    if isinstance(ran.op, Convolution):
        window = {"stride": ran.op.stride, "groups": ran.op.groups, "transposed": ran.op.transposed}
    return Product(
        layer=layer,
        product=ran.product if isinstance(ran, ProductCall) else product,
        kind=ran.op.kind,
        engine=ran.engine if isinstance(ran, ProductCall) else PLAIN,
        bits=bits,
        macs=ran.macs,
        input=tuple(ran.input),
        weight=tuple(ran.weight),
        output=tuple(ran.output),
        grad_input_bits=charged,
        **window,
    )
