"""A converted model's numbers as files that plain torch reads: parameters, or 8-bit codes with their scales."""

import importlib
import importlib.util
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from lowbit.errors import RunError, UsageError
from lowbit.export.frozen import freeze

SUFFIXES = (".pt", ".safetensors")


def plain_state(model: nn.Module) -> dict[str, Tensor]:
    """The state of the plain model: its keys and its full-precision parameters and buffers, on the CPU."""
    return {name: value.detach().cpu().contiguous() for name, value in model.state_dict().items()}


def int8_state(model: nn.Module, batch: Tensor) -> dict[str, Tensor]:
    """The state of the plain model with the weights of converted layers as codes of 8 bits.

    Beside each such ``NAME.weight`` (int8 or uint8) stand ``NAME.weight_scale`` (float32; one, or one for each output
    channel) and ``NAME.weight_zero`` (int64), so that the weight is ``(q - zero) * scale``; and where a layer keeps the
    range of its input, ``NAME.input_scale`` and ``NAME.input_zero``.

    Args:
        model: converted; it is not changed.
        batch: an input, for one evaluation that shows the formats.

    Raises:
        UsageError: a converted layer has formats that are not 8-bit integers.
    """
    state = plain_state(model)
    for layer in freeze(model, batch):
        prefix = f"{layer.name}." if layer.name else ""
        if layer.weight is not None:
            state[f"{prefix}weight"] = layer.weight.q.contiguous()
            state[f"{prefix}weight_scale"] = layer.weight.scale
            state[f"{prefix}weight_zero"] = torch.tensor(layer.weight.zero, dtype=torch.int64, device="cpu")
        if layer.rule.scale is not None:
            state[f"{prefix}input_scale"] = layer.rule.scale
            state[f"{prefix}input_zero"] = torch.tensor(layer.rule.zero, dtype=torch.int64, device="cpu")
    return state


def write_state(state: Mapping[str, Tensor], path: Path | str) -> None:
    """Write a state: ``.safetensors``, or ``.pt`` that ``torch.load(..., weights_only=True)`` reads.

    Raises:
        UsageError: another suffix.
        RunError: safetensors is not installed, or the file cannot be written.
    """
    path = Path(path)
    if path.suffix not in SUFFIXES:
        raise UsageError(f"{path}: give a file that ends in {' or '.join(SUFFIXES)}")
    try:
        if path.suffix == ".pt":
            torch.save(dict(state), path)
            return
        if importlib.util.find_spec("safetensors") is None:
            raise RunError("safetensors is not installed: pip install 'lowbit[export]', or write a .pt file")
        # Tied parameters share memory, which the format lacks.
        importlib.import_module("safetensors.torch").save_file(
            {name: value.clone() for name, value in state.items()}, path
        )
    except OSError as error:
        raise RunError(f"cannot write {path}: {error.strerror or error}") from error
