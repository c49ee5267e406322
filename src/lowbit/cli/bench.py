"""``lowbit bench``: time training steps or kernels, or measure which engine to choose."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from lowbit.cli.shapes import MOST_NUMBERS, task_of
from lowbit.errors import RunError, UsageError, shown

DESCRIPTION = "Time training steps here, or passes by kernel, or measure which engine is faster for which layers."
HELP = "time training steps, kernels, or what engines to choose"
EXAMPLE = "lowbit bench --model resnet18 --input 3,32,32 --batch-size 32"


def add_arguments(parser: Any) -> None:
    """What the command takes."""
    group = parser.add_argument_group("how to train one model here")
    group.add_argument("--model", metavar="NAME", help="say how to train it: a name, or FILE.py:CLASS")
    group.add_argument("--input", metavar="SIZES", help="its input: C,H,W of an image or T of a text")
    group.add_argument("--batch-size", type=int, metavar="N", help="samples per step (32)")
    group.add_argument("--classes", type=int, metavar="N", help="its outputs (10; 256 for text)")
    group.add_argument("--recipes", nargs="+", metavar="NAME", help="recipes to try (int8 sbm8)")
    group = parser.add_argument_group("steps of known networks")
    group.add_argument("--works", nargs="+", metavar="NAME", help="mlp gpt-512 gpt-1024 resnet18 resnet20 (all)")
    variants = "fp32, bf16, torchao, recipes, RECIPE:ENGINE (fp32 bf16 sbm8 int8 torchao)"
    group.add_argument("--variants", nargs="+", metavar="NAME", help=variants)
    group.add_argument("--compile", action="store_true", help="also fp32 and bf16 through torch.compile")
    group.add_argument("--device", metavar="NAME", help="where steps run: cpu or cuda (cpu)")
    group = parser.add_argument_group("engines and kernels")
    group.add_argument("--calibrate", action="store_true", help="measure and keep what engine=auto chooses by")
    group.add_argument("--kernels", action="store_true", help="time passes over memory in place of steps")
    group = parser.add_argument_group("measuring")
    group.add_argument("--rounds", type=int, metavar="N", help="rounds that count (9; 5 with --calibrate)")
    group.add_argument("--threads", type=int, metavar="N", help="threads of torch (as many as it takes)")


_MOST_ROUNDS = 10_000


def run(
    *,
    works: list[str] | None,
    variants: list[str] | None,
    compile: bool,  # noqa: A002 - the flag
    kernels: bool,
    calibrate: bool,
    model: str | None,
    input: str | None,  # noqa: A002 - the flag
    batch_size: int | None,
    classes: int | None,
    recipes: list[str] | None,
    device: str | None,
    rounds: int | None,
    threads: int | None,
) -> None:
    """Measure, and print each line as it is known."""
    import torch

    from lowbit.train import bench
    from lowbit.train.busy import Others

    given = {"--works": works, "--variants": variants, "--compile": compile, "--device": device}
    of_steps = [flag for flag, value in given.items() if value]
    if rounds is not None and rounds > _MOST_ROUNDS:
        raise UsageError(f"--rounds must be at most {_MOST_ROUNDS:,}, got {shown(rounds)}.")
    if kernels and calibrate:
        raise UsageError("--kernels and --calibrate are two commands: give either.")
    if of_steps and (kernels or calibrate):
        other = "--kernels" if kernels else "--calibrate"
        raise UsageError(f"{', '.join(of_steps)} choose what training steps to time, and {other} times none.")
    of_model = {"--input": input, "--batch-size": batch_size, "--classes": classes, "--recipes": recipes}
    if model is None and (given_too := [flag for flag, value in of_model.items() if value is not None]):
        raise UsageError(f"{', '.join(given_too)} describe a model of your own: give --model, e.g. --model net.py:Net.")
    others = [*of_steps, *(["--rounds"] if rounds is not None else [])]
    others += [flag for flag, on in (("--kernels", kernels), ("--calibrate", calibrate)) if on]
    if model is not None and others:
        raise UsageError(f"--model is a command of its own, and {', '.join(others)} belong to others: leave them out.")
    processes = Others()
    with threads_of_torch(threads):
        if model is not None:
            lines = _advise(model, input, 32 if batch_size is None else batch_size, classes, recipes)
        elif calibrate:
            lines = _calibrate(rounds)
        elif kernels:
            lines = bench.kernels(9 if rounds is None else rounds)
        else:
            names = [*(variants or bench.VARIANTS), *(bench.COMPILED if compile else ())]
            names, rounds = list(dict.fromkeys(names)), 9 if rounds is None else rounds
            lines = bench.steps(works or list(bench.WORKS), names, rounds, device or "cpu")
        for i, line in enumerate(lines):
            if i == 0 and threads is None and (advice := processes.advice(torch.get_num_threads())):
                print(advice, file=sys.stderr)
            print(line, flush=True)


@contextmanager
def threads_of_torch(count: int | None) -> Iterator[None]:
    """So many threads of torch in this context; None: as many as there are.

    Raises:
        UsageError: fewer than 1.
    """
    import torch

    from lowbit.train.config import MOST_THREADS

    if count is not None and not 1 <= count <= MOST_THREADS:
        raise UsageError(f"--threads must be 1 to {MOST_THREADS}, got {shown(count)}.")
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _calibrate(rounds: int | None) -> Iterator[str]:
    from lowbit.conversion import calibration
    from lowbit.engines.int8 import missing
    from lowbit.machine import here

    if why := missing("int8") or missing("bf16"):
        raise RunError(f"there is no choice of engines on this machine: {why}.")
    yield f"{here()}\nmeasuring, 10 to 60 seconds ..."
    table = calibration.measure(rounds=calibration.ROUNDS if rounds is None else rounds)
    yield f"\n{table}\n\nkept in {calibration.save(table)}: engine='auto' goes by it from now on"


def _advise(
    model: str, shape: str | None, batch_size: int, classes: int | None, recipes: list[str] | None
) -> Iterator[str]:
    """What is the fastest way to train a model on random inputs and labels."""
    import torch
    import torch.nn.functional as F

    import lowbit
    from lowbit.advice import RECIPES
    from lowbit.train import models

    if shape is None:
        raise UsageError("--model needs --input, C,H,W of an image or T of a text, e.g. --input 3,224,224.")
    if shape.count(",") in (1, 3):  # as it was written before
        size, _, rest = shape.partition(",")
        raise UsageError(f"--input is of one sample, and {shape} has a batch: give --input {rest} --batch-size {size}.")
    if not 1 <= batch_size <= MOST_NUMBERS:
        raise UsageError(f"--batch-size must be at least 1, got {shown(batch_size)}.")
    task = task_of(shape, classes, "--input")
    torch.manual_seed(0)
    # As written, not channels last as the trainer has it: advice tries both.
    network = models.build(model, task).to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
    images, sizes = task.kind == "image", (batch_size, *task.shape)
    x = torch.empty(sizes, dtype=torch.float32 if images else torch.int64, device="cpu")
    x = x.normal_() if images else x.random_(task.classes)
    labels = torch.empty(sizes[:1] if images else sizes, dtype=torch.int64, device="cpu").random_(task.classes)

    def loss(logits: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(logits.float().flatten(0, -2), labels.flatten())

    yield f"timing steps of {model} on a batch of {batch_size} of {shape}, about 15 seconds ..."
    yield f"\n{lowbit.advise(network, x, loss=loss, recipes=recipes or RECIPES)}"
