"""The way out: a converted model as a plain state, as 8-bit codes, or as an ONNX model."""

from lowbit.export.onnx_model import Checked, write_onnx
from lowbit.export.states import int8_state, plain_state, write_state

__all__ = ["Checked", "int8_state", "plain_state", "write_onnx", "write_state"]
