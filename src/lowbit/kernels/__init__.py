"""Kernels: the passes over memory and the products that quantisation is made of.

`reference` holds the definition in plain torch, for any device. `cpu` holds the native form, which is optional: an
install without a compiler has none, and `native_instruction_sets` says so.
"""

from lowbit.kernels.cpu import instruction_sets as native_instruction_sets

__all__ = ["native_instruction_sets"]
