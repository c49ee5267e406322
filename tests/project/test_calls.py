"""How far it is from a layer to its kernel, as `benchmarks/calls.py` counts it."""

import pytest
from tests.helpers import script

from lowbit.engines.int8 import missing

MOST_FILES, MOST_CALLS = 6, 30


@pytest.mark.skipif(bool(missing("int8")), reason=f"no 8-bit units: {missing('int8')}")
def test_a_forward_passes_few_files_and_calls_on_its_way_to_the_kernel() -> None:
    """One forward of an `int8` linear layer runs at most 30 functions of at most 6 files of the package."""
    seen = script("calls").calls_of_forward("int8", "int8")

    assert seen["kernels/operators.py", "Native.__call__"] == 4, "three operands are encoded and multiplied once"
    assert len({file for file, _ in seen}) <= MOST_FILES
    assert seen.total() <= MOST_CALLS
