"""The precision range test of a model by its name."""

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor

import lowbit
from lowbit.errors import RunError
from lowbit.nn.kinds import is_depthwise
from lowbit.precision.range_test import RangeTestResult
from lowbit.train import data
from lowbit.train.assembly import build, threads_of
from lowbit.train.config import RangeTestConfig
from lowbit.train.progress import SILENT, Progress
from lowbit.train.step import explain_non_finite, loss_and_accuracy, make_optimizer, step_seed


def range_test(config: RangeTestConfig, progress: Progress = SILENT) -> RangeTestResult:
    """Train a fresh model at rising precision until a width makes progress, see `lowbit.range_test`.

    Args:
        config: the settings.
        progress: hears how far it is; the test may end before the last step that it could have.

    Raises:
        UsageError: a name is unknown, or the settings do not fit together.
        RunError: the loss is not finite.
    """
    settings = config.training().resolved(threads=torch.get_num_threads(), amp="none")
    loaded, model = build(settings, config.model)
    recipe = lowbit.Recipe.find(config.recipe)
    static = recipe.replace(schedule=None, gates=None, depthwise=None)
    lowbit.convert_(model, static, seed=config.seed)
    depthwise = recipe.depthwise if any(map(is_depthwise, model.modules())) else None
    optimizer = make_optimizer(settings, list(model.parameters()))
    batches = _endless(loaded.train)
    steps = 0

    def step() -> float:
        nonlocal steps
        torch.manual_seed(step_seed(config.seed, steps))
        x, y = next(batches)
        loss, accuracy = loss_and_accuracy(model(x), y)
        if not loss.isfinite():
            raise RunError(f"the loss is {loss.item()} at step {steps}: {explain_non_finite(model, x)}.")
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        steps += 1
        bits = config.low + (steps - 1) // config.steps_per_bit
        progress.move(steps, lambda: [f"bits {bits}", f"loss {loss.item():.3f}", f"acc {100 * accuracy.item():.1f} %"])
        return accuracy.item() if config.measure == "accuracy" else loss.item()

    widths = config.high - config.low + config.every
    with threads_of(settings), contextlib.closing(progress):
        progress.begin("range test", widths * config.steps_per_bit)
        return lowbit.range_test(
            model.train(),
            step,
            low=config.low,
            high=config.high,
            backward=config.backward,
            rules=[] if depthwise is None else [(is_depthwise, depthwise)],
            steps_per_bit=config.steps_per_bit,
            threshold=config.gain,
            significance=config.significance,
            better="higher" if config.measure == "accuracy" else "lower",
            every=config.every,
        )


def _endless(loader: data.Batches) -> Iterator[tuple[Tensor, Tensor]]:
    while True:
        yield from loader
