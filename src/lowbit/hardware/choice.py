"""Which accelerator a text means: a name of the table, or a class in a user's file, with its settings."""

import inspect
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lowbit.errors import UsageError, unknown
from lowbit.hardware.accelerator import Accelerator
from lowbit.hardware.bitfusion import BitFusion
from lowbit.inputs import settings, userfile
from lowbit.inputs.checks import checked

ACCELERATORS: dict[str, type[Accelerator]] = {"bitfusion": BitFusion}


@checked
def accelerator(name: str, values: Sequence[str] = ()) -> Accelerator:
    """The accelerator that ``lowbit cost --hardware NAME --set ...`` estimates on.

    Args:
        name: a key of `ACCELERATORS`, or ``FILE.py:CLASS``: that file is executed.
        values: its settings, texts ``NAME=VALUE``. The fields of a dataclass are its settings.

    Raises:
        UsageError: there is no such name, file or class, the class lacks a fitting `product`, there is no such
            setting, or its constructor raises.
    """
    if name in ACCELERATORS:
        return settings.make(ACCELERATORS[name], values)
    if ":" not in name:
        raise UsageError(f"{unknown('hardware', name, ACCELERATORS)} Your own is FILE.py:CLASS, e.g. mine.py:Mine.")
    cls = userfile.load_class(name)
    _check_product(name, cls)
    with userfile.blamed(f"the constructor of {name} raises", str(Path(name.rpartition(":")[0]))):
        made: Accelerator = settings.make(cls, values)
    return made


def _check_product(name: str, cls: Any) -> None:
    """Refuse a class that cannot be asked for a product."""
    wanted = "product(self, product, *, first_layer=False)"
    method = getattr(cls, "product", None)
    if not callable(method):
        raise UsageError(f"{name} is not an accelerator, as it lacks a method {wanted}: add it")
    try:
        inspect.signature(method).bind(object(), object(), first_layer=False)
    except TypeError as error:
        raise UsageError(f"product of {name} cannot be called as it must ({error}): write {wanted}") from error
