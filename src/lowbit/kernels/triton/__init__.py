"""Kernels for NVIDIA GPUs in Triton, an optional dependency: nothing imports this folder before it is asked for.

Files named ``device_*.py`` hold Triton's language, which looks like Python and is compiled for the GPU; the others hold
what launches it. With ``TRITON_INTERPRET=1`` the same code runs on CPU tensors, which is how it is tested.
"""
