"""Kernels: the passes over memory that quantisation is made of.

`reference` holds the definition in plain torch, for any device. The native module `_cpu` is optional: an install
without a compiler has none, and `native_instruction_sets` says so.
"""

import importlib
import importlib.util
from typing import cast


def native_instruction_sets() -> list[str] | None:
    """Instruction sets native kernels may use here, e.g. ``["avx2", "avx512vnni"]``; None without the module."""
    if importlib.util.find_spec("lowbit.kernels._cpu") is None:
        return None
    module = importlib.import_module("lowbit.kernels._cpu")
    return cast("list[str]", module.instruction_sets())
