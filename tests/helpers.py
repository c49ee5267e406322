"""What several test files share."""

import importlib.util
import json
import math
import multiprocessing
import os
import pickle
import socket
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from lowbit.methods.recipe import SLOTS, GradInput, GradWeight, Output, Recipe
from lowbit.numerics.element import Element
from lowbit.numerics.formats import Format
from lowbit.numerics.quantizer import quantize
from lowbit.numerics.scales import Scale
from lowbit.schedules import Schedule

_FORKS = multiprocessing.get_context("forkserver")
_FORKS.set_forkserver_preload(["lowbit.train.trainer", "sklearn.datasets", "torch.utils.tensorboard"])

ORACLES = Path(__file__).resolve().parents[2] / "shared" / "oracles"
BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"


class Vectors:
    """The arrays of one file of reference vectors as tensors."""

    def __init__(self, path: Path) -> None:
        import numpy as np

        with np.load(path, allow_pickle=False) as arrays:
            self._arrays = {name: arrays[name] for name in arrays.files}

    def __getitem__(self, name: str) -> torch.Tensor:
        return torch.from_numpy(self._arrays[name].copy())

    def __contains__(self, name: str) -> bool:
        return name in self._arrays


def script(name: str) -> ModuleType:
    """A script of the benchmarks as a module."""
    spec = importlib.util.spec_from_file_location(name, BENCHMARKS / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def recipe_of(default: Format, **slots: Format) -> Recipe:
    """A recipe of one format, but for the slots named ``product__operand``."""
    tables: dict[str, dict[str, Format]] = {"output": {}, "grad_input": {}, "grad_weight": {}}
    for product, operand in SLOTS:
        tables[product][operand] = slots.pop(f"{product}__{operand}", default)
    assert not slots
    return Recipe(
        name="test",
        summary="",
        source="",
        output=Output(**tables["output"]),
        grad_input=GradInput(**tables["grad_input"]),
        grad_weight=GradWeight(**tables["grad_weight"]),
    )


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Run with this many threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def recorded(name: str) -> Any:
    """One file of the dynamic methods' reference data; the test is skipped, saying so, where the folder is absent."""
    path = ORACLES / "dynamic" / name
    if not path.exists():
        pytest.skip(f"the reference vectors {path} are not here")
    return json.loads(path.read_text(encoding="utf-8"))


def sequence(schedule: Schedule) -> list[int]:
    """The bits of every step of a schedule with an end."""
    assert schedule.total_steps is not None
    return [schedule(step) for step in range(schedule.total_steps)]


def range_by_loop(x: Tensor, kappa: float, chunks: int = 16, fewest: int = 16) -> tuple[list[float], list[float]]:
    """Mean and range estimate of each channel of ``(B, C, *size)``, written as the definition reads."""
    means, sigmas = [], []
    for channel in range(x.shape[1]):
        values = [v for sample in x[:, channel] for v in sample.flatten().tolist()]
        number = max(1, min(chunks, len(values) // fewest))
        parts, start = [], 0
        for k in range(number):
            stop = start + len(values) // number + (k < len(values) % number)
            parts.append(values[start:stop])
            start = stop
        assert start == len(values)
        terms = [(max(part) - min(part)) / math.sqrt(2 * math.log(len(part))) for part in parts]
        means.append(sum(values) / len(values))
        sigmas.append(kappa * sum(terms) / number)
    return means, sigmas


def rounded(x: Tensor, element: Element, noise: Tensor | None = None, scale: Scale | None = None) -> Tensor:
    """Values of an element, on the CPU's plain or native pass as `quantize` chooses."""
    rounding = "nearest" if noise is None else "stochastic"
    return quantize(x, Format(element=element, scale=scale, rounding=rounding), noise=noise).values


def in_processes(function: Callable[..., Any], world: int, *arguments: Any, wait: float = 200) -> list[Any]:
    """What a function of a test module returns in each of several processes, with the variables that torchrun sets.

    They are forked from one that has imported what takes long, so a start takes a moment. The first may be slow.

    Args:
        function: called with `arguments` in each process.
        world: the number of processes.
        arguments: what can be pickled.
        wait: the most seconds.

    Returns:
        Results in the order of ranks; a process that was killed gives None.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    pipes = [_FORKS.Pipe(duplex=False) for _ in range(world)]
    started = [
        _FORKS.Process(target=_one_of, args=(rank, world, port, pipe[1], function, arguments))
        for rank, pipe in enumerate(pipes)
    ]
    for process, (_, end) in zip(started, pipes, strict=True):
        process.start()
        end.close()
    results: list[Any] = []
    for receiver, _ in pipes:
        assert receiver.poll(wait), "a process said nothing"
        try:
            results.append(pickle.loads(receiver.recv_bytes()))
        except EOFError:
            results.append(None)
    for process in started:
        process.join()
    failed = [result for result in results if isinstance(result, _Raised)]
    assert not failed, failed[0].text
    return results


class _Raised(NamedTuple):
    """An error in another process."""

    text: str


def _one_of(rank: int, world: int, port: int, end: Any, function: Callable[..., Any], arguments: tuple[Any]) -> None:
    torch.set_num_threads(1)
    os.environ |= {"TORCHELASTIC_RUN_ID": "test", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "GROUP_RANK": "0"}
    os.environ |= {"WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world)}
    try:
        result: Any = function(*arguments)
    except BaseException:
        result = _Raised(traceback.format_exc())
    end.send_bytes(pickle.dumps(result))  # torch would send tensors by files of a process that is gone by then
    end.close()
    os._exit(0)  # gloo's threads may outlive their group, and the interpreter's end then aborts now and then
