"""One step of training: its random state, its loss and its optimizer, and why a loss is not finite."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lowbit.errors import RunError
from lowbit.train.config import TrainConfig


def step_seed(seed: int, step: int, *, rank: int = 0) -> int:
    """The seed of torch's generator for one step of a process: 63 bits of two or three rounds of splitmix64.

    Rank 0 draws what one process does; the others draw something else, since their samples are others.

    Adding `step` to `seed` instead would give step 1 of seed 0 and step 0 of seed 1 the same draws.

    Source: Steele, Lea and Flood, "Fast splittable pseudorandom number generators", 2014.
    """
    mixed = _mix64(_mix64(seed) ^ step)
    return (_mix64(mixed ^ rank) if rank else mixed) >> 1


def _mix64(x: int) -> int:
    """A bijection of 64-bit integers that turns each changed bit into about 32 changed bits."""
    x = (x + 0x9E3779B97F4A7C15) % 2**64
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB % 2**64
    return x ^ (x >> 31)


def autocast(config: TrainConfig, device: str) -> torch.autocast:
    """The autocast that the settings ask for, on a type of device; switched off where they ask for none."""
    dtype = torch.float16 if config.amp == "fp16" else torch.bfloat16
    return torch.autocast(device, dtype, enabled=config.amp in ("bf16", "fp16"))


def loss_and_accuracy(logits: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Mean cross entropy in nats and the share of right predictions, of (..., classes) against (...)."""
    logits = logits.float().flatten(0, -2)  # bfloat16 under autocast, too coarse for a loss
    return F.cross_entropy(logits, y.flatten()), (logits.argmax(-1) == y.flatten()).double().mean()


def make_optimizer(config: TrainConfig, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    """The optimizer that the settings name, with their rate and decay."""
    assert config.lr is not None
    assert config.weight_decay is not None
    if config.optimizer == "sgd":
        return torch.optim.SGD(parameters, lr=config.lr, momentum=0.9, weight_decay=config.weight_decay)
    return torch.optim.AdamW(parameters, lr=config.lr, weight_decay=config.weight_decay)


class NotFiniteError(RunError):
    """A loss or a state that is not finite: the run diverged."""


def explain_non_finite(model: nn.Module, x: Tensor) -> str:
    """Where a loss that is not finite came from, found by running the forward pass once more.

    Args:
        model: the model in the state that gave the loss.
        x: the batch's input.

    Returns:
        The end of a sentence that begins with "the loss is nan at step 12: ".
    """
    for name, parameter in model.named_parameters():
        if not parameter.isfinite().all():
            return f"the parameter {name} is not finite, so an earlier update was too large"
    places: list[str] = []

    def look(name: str, inputs: tuple[object, ...], output: object) -> None:
        if any(map(_is_bad, inputs)):
            places.append(f"the first value that is not finite enters the layer {name}")
        elif _is_bad(output):
            places.append(f"the first layer whose output is not finite is {name}")

    handles = [
        module.register_forward_hook(lambda _, inputs, output, name=name: look(name, inputs, output))
        for name, module in model.named_modules()
        if not any(True for _ in module.children())
    ]
    try:
        with torch.no_grad():
            model(x)
    finally:
        for handle in handles:
            handle.remove()
    return places[0] if places else "every layer's output is finite, so it came up after the last layer"


def _is_bad(value: object) -> bool:
    return isinstance(value, Tensor) and not bool(value.isfinite().all())
