"""``lowbit bench``: time training steps or kernels, or measure which engine to choose."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

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
    with threads_of_torch(threads):
        if calibrate:
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
