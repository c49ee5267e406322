"""Train neural networks in few bits: published methods as recipes, with proof of what ran.

>>> report = lowbit.convert_(model, "sbm8")   # in place; print(report)
>>> with lowbit.verify(model) as proof: ...   # one training step; print(proof)
"""

from importlib import import_module
from importlib.metadata import version
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lowbit.exports import *  # noqa: F403 - its `__all__` lists them
    from lowbit.exports import __all__ as __all__
    from lowbit.exports import amp as amp
    from lowbit.exports import formats as formats
    from lowbit.exports import hardware as hardware
    from lowbit.exports import metrics as metrics
    from lowbit.exports import optim as optim
    from lowbit.exports import plot as plot
    from lowbit.exports import schedules as schedules

__version__ = version("lowbit")


def __getattr__(name: str) -> Any:
    """A submodule or an export, imported when it is first asked for: the help of the command line needs no torch."""
    if find_spec(f"{__name__}.{name}") is not None:
        return import_module(f"{__name__}.{name}")
    exports = import_module("lowbit.exports")
    if not hasattr(exports, name):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    found = globals()[name] = getattr(exports, name)
    return found


def __dir__() -> list[str]:
    """All exports, imported or not."""
    return sorted({*globals(), *import_module("lowbit.exports").__all__})
