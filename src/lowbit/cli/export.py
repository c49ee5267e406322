"""``lowbit export``: the trained model of a run in a form that other programs read."""

from pathlib import Path
from typing import Any

from lowbit.errors import UsageError

DESCRIPTION = "Write the model of a run's checkpoint for other programs: plain parameters, ONNX, or 8-bit codes."
HELP = "write a run's model for other programs"
EXAMPLE = "lowbit export runs/first --to onnx"

# The file of each form, in the run folder unless --output names another.
FILES = {"plain": "model.safetensors", "onnx": "model.onnx", "torch-int8": "model-int8.safetensors"}


def add_arguments(parser: Any) -> None:
    """What the command takes."""
    parser.add_argument("run", type=Path, help="run folder")
    parser.add_argument("--to", choices=tuple(FILES), required=True, help=f"{', '.join(FILES)}")
    parser.add_argument("-o", "--output", type=Path, help="the file (model.onnx or the like in the run folder)")
    parser.add_argument("--samples", type=int, default=32, help="test samples that an ONNX file is checked on (32)")


def run(*, run: Path, to: str, output: Path | None, samples: int) -> None:
    """Write the file and say what it holds."""
    import torch

    from lowbit.export import int8_state, plain_state, write_onnx, write_state
    from lowbit.train.trainer import trained

    if samples < 2:
        raise UsageError(f"--samples must be at least 2, got {samples}.")
    path = run / FILES[to] if output is None else output
    if path.is_dir():
        raise UsageError(f"--output {path} is a folder: give the name of a file, e.g. {path / FILES[to]}.")
    model, data = trained(run)
    batch = next(iter(data.test))[0][:samples]
    if to == "onnx":
        print(write_onnx(model, batch, path))
        return
    with torch.no_grad():
        state = plain_state(model) if to == "plain" else int8_state(model, batch)
    write_state(state, path)
    size = sum(value.numel() * value.element_size() for value in state.values())
    print(f"{path}: {len(state)} tensors, {size / 1e6:.2f} MB")
