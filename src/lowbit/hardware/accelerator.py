"""What an accelerator is: a class that says what one product of a layer costs on it."""

from typing import Protocol, runtime_checkable

from lowbit.evidence.records import Product
from lowbit.hardware.estimate import Estimate


@runtime_checkable
class Accelerator(Protocol):
    """An accelerator: `lowbit.Cost` and ``lowbit cost --hardware`` ask it for every product of a run.

    Your own class needs only `product`. Make it a frozen dataclass: its fields are then its settings, on the command
    line too.
    """

    def product(self, product: Product, *, first_layer: bool = False) -> Estimate:
        """What one call of a product costs.

        Args:
            product: from a ledger: layer, shapes, stride, groups and bits. `lowbit.hardware.as_matrix` gives it as
                a matrix product.
            first_layer: whether its layer reads the network's input.

        Raises:
            UsageError: the accelerator cannot run it. Reports then name the layer and give this reason.
        """
        ...
