"""What rules that give each layer its own bits see of a step: gradients, their noise, errors of outputs.

Notation: y output, g its gradient, G weight gradient; a hat marks what ran, none what its operands give unrounded.
"""

import math
import threading
import weakref
from collections import Counter
from collections.abc import Iterable

import torch
from torch import Tensor

from lowbit import ranks
from lowbit.methods.operands import SLOTS
from lowbit.nn.site import Site
from lowbit.precision.layers import ControlledLayer
from lowbit.products import watch
from lowbit.products.watch import ProductRun
from lowbit.schedules import Measure

_Widths = tuple[int | None, int | None]
# The sums that are kept of each layer.
_OUTPUTS, _OUTPUT_ERROR, _GRAD_OUTPUT, _GRADIENT, _GRADIENT_ERROR = range(5)


class Measuring:
    """An observer of one training step of these layers; `finish` ends it.

    Every product of an observed step is computed a second time in full precision; what runs is not changed by that.

    Args:
        layers: what is measured.
    """

    def __init__(self, layers: Iterable[ControlledLayer]) -> None:
        self._layers = list(layers)
        self._names = {site: layer.name for layer in self._layers for site in layer.sites}
        self._sums = {layer.name: [0.0] * 5 for layer in self._layers}
        self._macs: dict[str, Counter[_Widths]] = {layer.name: Counter() for layer in self._layers}
        self._lock = threading.Lock()
        # A model that is dropped within a step is not kept by its observer, which goes with it.
        here = weakref.ref(self, lambda _: _remove(observe))

        def observe(run: ProductRun) -> None:
            measuring = here()
            if measuring is not None:
                measuring.take(run)

        self._observe = observe
        watch.observers.append(observe)

    def take(self, run: ProductRun) -> None:
        """Take in one product of a training forward or of its backward."""
        site = run.source
        if isinstance(site, Site) and site in self._names and site.training:
            with self._lock:  # the model may run in several threads
                self._add(site, self._names[site], run)

    def _add(self, site: Site, name: str, run: ProductRun) -> None:
        sums, macs = self._sums[name], self._macs[name]
        free = site.slots("input", "weight", "grad_output")
        first, second = (
            None if SLOTS.index((run.product, operand)) in free else ran.bits for operand, ran in run.operands.items()
        )
        macs[first, second] += run.macs
        if run.product == "grad_input":
            return
        exact = run.full_precision()
        error = _square(run.result - exact)
        if run.product == "output":
            sums[_OUTPUTS] += exact.numel()
            sums[_OUTPUT_ERROR] += error
        else:
            sums[_GRAD_OUTPUT] += _square(run.operands["grad_output"].exact)
            sums[_GRADIENT] += _square(exact)
            sums[_GRADIENT_ERROR] += error

    def stop(self) -> None:
        """Stop observing; what comes after does not count."""
        _remove(self._observe)

    def finish(self) -> dict[str, Measure]:
        """What was measured of each layer whose weight gradient ran, summed over all ranks; the end of observing."""
        self.stop()
        found = {}
        for layer in self._layers:
            device = layer.sites[0].bits.device
            sums = _over_ranks(self._sums[layer.name], device)
            keys = sorted(self._macs[layer.name], key=str)
            counts = _over_ranks([float(self._macs[layer.name][key]) for key in keys], device)
            bits, _ = layer.first(layer.training(0))
            if sums[_GRADIENT] + sums[_GRADIENT_ERROR] > 0 and sums[_OUTPUTS]:
                assert bits is not None
                found[layer.name] = Measure(
                    bits=bits,
                    gradient=sums[_GRADIENT],
                    gradient_error=sums[_GRADIENT_ERROR],
                    loss_error=math.sqrt(sums[_GRAD_OUTPUT] * sums[_OUTPUT_ERROR] / sums[_OUTPUTS]),
                    macs={key: int(count) for key, count in zip(keys, counts, strict=True)},
                )
        return found


def _remove(observer: watch.Observer) -> None:
    """Take an observer away if it is there."""
    if observer in watch.observers:
        watch.observers.remove(observer)


def _square(x: Tensor) -> float:
    """The squared norm in float64."""
    return float(x.detach().double().square().sum())


def _over_ranks(values: list[float], device: torch.device) -> list[float]:
    """The sums over all processes of a distributed run, bit for bit the same on each of them."""
    if not values:
        return values
    own = torch.tensor(values, dtype=torch.float64, device=device)
    return [float(total) for total in ranks.gathered(own).sum(0)]
