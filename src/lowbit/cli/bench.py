"""``lowbit bench``: time training steps or kernels, or measure which engine to choose."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from lowbit.cli.shapes import task_of, whole
from lowbit.errors import RunError, UsageError, shown
from lowbit.train.config import MOST_THREADS

DESCRIPTION = "Time training steps here, or passes by kernel, or measure which engine is faster for which layers."
HELP = "time training steps, kernels, or what engines to choose"


def add_arguments(parser: Any) -> None:
    """What the command takes."""
    parser.add_argument("--works", type=str, nargs="+", help="networks: mlp gpt-512 gpt-1024 resnet18 resnet20 (all)")
    variants = "fp32, bf16, torchao, recipes, RECIPE:ENGINE (fp32 bf16 sbm8 int8 torchao)"
    parser.add_argument("--variants", type=str, nargs="+", help=variants)
    parser.add_argument("--compile", action="store_true", help="also fp32 and bf16 through torch.compile")
    parser.add_argument("--kernels", action="store_true", help="time passes over memory in place of steps")
    parser.add_argument("--calibrate", action="store_true", help="measure and keep what engine=auto chooses by")
    parser.add_argument("--model", type=str, help="say how to train this model here: a name, or FILE.py:CLASS")
    parser.add_argument("--input", type=str, help="with --model: its batch, B,C,H,W of images or B,T of text")
    parser.add_argument("--classes", type=int, help="with --model: its outputs (10; 256 for text)")
    parser.add_argument("--recipes", type=str, nargs="+", help="with --model: recipes to try (int8 sbm8)")
    parser.add_argument("--device", type=str, help="where steps run: cpu or cuda (cpu)")
    parser.add_argument("--rounds", type=int, help="rounds that count (9; 5 with --calibrate)")
    parser.add_argument("--threads", type=int, help="threads of torch (as many as it takes)")


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
    classes: int | None,
    recipes: list[str] | None,
    device: str | None,
    rounds: int | None,
    threads: int | None,
) -> None:
    """Measure, and print each line as it is known."""
    from lowbit.train import bench

    given = {"--works": works, "--variants": variants, "--compile": compile, "--device": device}
    of_steps = [flag for flag, value in given.items() if value]
    if rounds is not None and rounds > _MOST_ROUNDS:
        raise UsageError(f"--rounds must be at most {_MOST_ROUNDS:,}, got {shown(rounds)}.")
    if kernels and calibrate:
        raise UsageError("--kernels and --calibrate are two commands: give either.")
    if of_steps and (kernels or calibrate):
        other = "--kernels" if kernels else "--calibrate"
        raise UsageError(f"{', '.join(of_steps)} choose what training steps to time, and {other} times none.")
    of_model = {"--input": input, "--classes": classes, "--recipes": recipes}
    if model is None and (given_too := [flag for flag, value in of_model.items() if value is not None]):
        raise UsageError(f"{', '.join(given_too)} describe a model of your own: give --model, e.g. --model net.py:Net.")
    others = [*of_steps, *(["--rounds"] if rounds is not None else [])]
    others += [flag for flag, on in (("--kernels", kernels), ("--calibrate", calibrate)) if on]
    if model is not None and others:
        raise UsageError(f"--model is a command of its own, and {', '.join(others)} belong to others: leave them out.")
    with threads_of_torch(threads):
        if model is not None:
            lines = _advise(model, input, classes, recipes)
        elif calibrate:
            lines = _calibrate(rounds)
        elif kernels:
            lines = bench.kernels(9 if rounds is None else rounds)
        else:
            names = [*(variants or bench.VARIANTS), *(bench.COMPILED if compile else ())]
            names, rounds = list(dict.fromkeys(names)), 9 if rounds is None else rounds
            lines = bench.steps(works or list(bench.WORKS), names, rounds, device or "cpu")
        for line in lines:
            print(line, flush=True)


@contextmanager
def threads_of_torch(count: int | None) -> Iterator[None]:
    """So many threads of torch in this context; None: as many as there are.

    Raises:
        UsageError: fewer than 1.
    """
    import torch

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


def _advise(model: str, batch: str | None, classes: int | None, recipes: list[str] | None) -> Iterator[str]:
    """What is the fastest way to train a model on random inputs and labels."""
    import torch
    import torch.nn.functional as F

    import lowbit
    from lowbit.advice import RECIPES
    from lowbit.train import models

    if batch is None:
        raise UsageError("--model needs --input, B,C,H,W of images or B,T of text, e.g. --input 8,3,224,224.")
    size, _, shape = batch.partition(",")
    if not whole(size):
        raise UsageError(f"--input must be B,C,H,W of images or B,T of text, e.g. 8,3,224,224, got {shown(batch)}.")
    task = task_of(shape, classes, "--input after its batch size")
    torch.manual_seed(0)
    # As written, not channels last as the trainer has it: advice tries both.
    network = models.build(model, task).to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
    images, sizes = task.kind == "image", (whole(size), *task.shape)
    x = torch.empty(sizes, dtype=torch.float32 if images else torch.int64, device="cpu")
    x = x.normal_() if images else x.random_(task.classes)
    labels = torch.empty(sizes[:1] if images else sizes, dtype=torch.int64, device="cpu").random_(task.classes)

    def loss(logits: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(logits.float().flatten(0, -2), labels.flatten())

    yield f"timing steps of {model} on a batch of {batch}, about 15 seconds ..."
    yield f"\n{lowbit.advise(network, x, loss=loss, recipes=recipes or RECIPES)}"
