"""Settings of Range BN that have no meaning."""

import pytest

from lowbit.errors import UsageError
from lowbit.methods.recipe import RangeNorm
from lowbit.numerics.formats import integer

X = integer(bits=8, zero="symmetric")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"constant": "author"}, "Did you mean 'authors'"),
        ({"epsilon": "in"}, "unknown epsilon 'in'"),
        ({"chunks": 0}, "chunks=0: give a whole number, 1 or more"),
        ({"fewest_per_chunk": 1}, "fewest_per_chunk=1: give a whole number, 2 or more"),
        ({"momentum": 0.0}, r"in \(0, 1\]"),
        ({"momentum": 1.5}, r"in \(0, 1\]"),
    ],
)
def test_a_normalisation_without_meaning_is_refused(changes: dict[str, object], message: str) -> None:
    """Range BN settings check themselves."""
    with pytest.raises(UsageError, match=message):
        RangeNorm(**{"input": X, "grad_output": X, **changes})


@pytest.mark.parametrize("granularity", ["sample", "row", "kept-channel"])
def test_range_norm_takes_formats_per_tensor_only(granularity: str) -> None:
    """A granularity that Range BN would ignore is refused."""
    fmt = integer(bits=8, zero="integer", granularity=granularity)

    with pytest.raises(UsageError, match="per tensor"):
        RangeNorm(input=fmt, grad_output=fmt)
