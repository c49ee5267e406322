"""What a recipe says of the optimiser's step: the formats of gradient, learning rate, states and stored weights."""

from dataclasses import dataclass

from lowbit.errors import UsageError
from lowbit.inputs.checks import check_fields
from lowbit.numerics.formats import FP32, Format


@dataclass(frozen=True, kw_only=True)
class Update:
    """The formats in which an optimiser reads and writes; each is fp32, values as they are, where it is left out.

    For momentum with the rate r and the factor m, `lowbit.optim.RoundedSGD` computes

    ``a = momentum(m a + gradient(g))`` and ``w = weight(w - lr(r) a)``.

    Args:
        weight: of a parameter, written after each step.
        gradient: of a gradient, before the optimiser reads it.
        vector_gradient: of the gradients of biases and normalisation, parameters with fewer than two dims; None: as
            `gradient`.
        lr: of the learning rate.
        states: pairs (name, format) of the optimiser's states, e.g. ``momentum_buffer`` of SGD; written after a step.
    """

    weight: Format = FP32
    gradient: Format = FP32
    vector_gradient: Format | None = None
    lr: Format = FP32
    states: tuple[tuple[str, Format], ...] = ()

    def __post_init__(self) -> None:
        check_fields(self)
        if self.lr.stochastic or self.lr.scale is not None:
            raise UsageError(f"update.lr is {self.lr}: a learning rate rounds to nearest and has no scale")
        names = [name for name, _ in self.states]
        if len(set(names)) < len(names):
            raise UsageError(f"update.states={names}: give each state once")
        for name, fmt in self.formats():
            _check_stored(name, fmt)

    def formats(self) -> list[tuple[str, Format]]:
        """All formats with their names, e.g. ``states.momentum_buffer``."""
        own = [("weight", self.weight), ("gradient", self.gradient), ("lr", self.lr)]
        if self.vector_gradient is not None:
            own.append(("vector_gradient", self.vector_gradient))
        return [*own, *((f"states.{name}", fmt) for name, fmt in self.states)]

    def gradient_of(self, dim: int) -> Format:
        """The format of the gradient of a parameter with that many dims."""
        return self.gradient if dim > 1 or self.vector_gradient is None else self.vector_gradient


def _check_stored(name: str, fmt: Format) -> None:
    """Raise a UsageError for a format that belongs to operands of products only."""
    if fmt.running is not None or fmt.delay is not None or fmt.widths:
        raise UsageError(f"update.{name} is {fmt}: it keeps no range, and its bits never change")
    if fmt.granularity not in ("tensor", "output-channel", "block"):
        raise UsageError(
            f"update.{name} has granularity={fmt.granularity!r}: outside a product there are tensor, output-channel "
            "and block (along the last axis)"
        )
    if fmt.scale is not None and fmt.scale.range.kind == "sample-mean":
        raise UsageError(f"update.{name}: it has no samples")
