"""Kernels: the passes over memory and the products that quantisation is made of.

`memory` says where numbers lie, `operators` is the doorway into native code, and `cpu` says what each pass makes of
tensors. Native code is optional: an install without a compiler lacks it, and `native_instruction_sets` says so.
"""

from lowbit.kernels.operators import instruction_sets as native_instruction_sets

__all__ = ["native_instruction_sets"]
