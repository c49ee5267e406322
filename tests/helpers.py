"""What several test files share."""

import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

import torch

from lowbit.formats import Format
from lowbit.recipe import SLOTS, GradInput, GradWeight, Output, Recipe

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"


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
