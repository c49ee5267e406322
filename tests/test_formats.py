import dataclasses

import pytest

from lowbit.errors import UsageError, check_choice
from lowbit.formats import BF16, FP32, Format, check_bits, integer
from lowbit.numerics.elements import Zero

ZEROS: list[Zero] = ["symmetric", "integer", "offset"]


@pytest.mark.parametrize("bits", range(2, 17))
def test_symmetric_codes_are_the_same_on_both_sides(bits: int) -> None:
    """Of b bits come 2**b - 1 codes around zero: the most negative two's complement code is left out."""
    low, high = integer(bits=bits, zero="symmetric").code_range

    assert low == -high
    assert high - low + 1 == 2**bits - 1


@pytest.mark.parametrize("zero", ["integer", "offset"])
@pytest.mark.parametrize("bits", range(2, 17))
def test_other_codes_use_every_pattern(bits: int, zero: Zero) -> None:
    """Of b bits come the 2**b codes from 0 on."""
    assert integer(bits=bits, zero=zero).code_range == (0, 2**bits - 1)


def test_one_bit_exists_with_a_float_offset() -> None:
    """One bit has the codes 0 and 1."""
    assert integer(bits=1, zero="offset").code_range == (0, 1)


@pytest.mark.parametrize(
    ("bits", "zero"),
    [(b, z) for z in ("symmetric", "integer") for b in (-1, 0, 1, 17)] + [(0, "offset"), (33, "offset")],
)
def test_other_widths_are_refused(bits: int, zero: Zero) -> None:
    """Outside 2 to 16 bits, with an offset 1 to 32, the error names what was given and what is allowed."""
    low, high = (1, 32) if zero == "offset" else (2, 16)

    with pytest.raises(UsageError, match=f"bits={bits} .*from {low} to {high}"):
        integer(bits=bits, zero=zero)


@pytest.mark.parametrize("bits", [8.0, "8", None, True])
def test_a_width_is_a_whole_number(bits: object) -> None:
    """8.0, text, None and True are no widths."""
    with pytest.raises(UsageError, match="whole numbers"):
        check_bits(bits, "offset")


@pytest.mark.parametrize(
    ("field", "value", "nearest"),
    [
        ("zero", "symetric", "symmetric"),
        ("granularity", "kept_channel", "kept-channel"),
        ("range", "min-max", "minmax"),
        ("running_start", "firts", "first"),
        ("rounding", "stochastik", "stochastic"),
    ],
)
def test_a_misspelt_value_is_answered_with_the_nearest(field: str, value: str, nearest: str) -> None:
    """Every field of names refuses an unknown one and says which is near."""
    with pytest.raises(UsageError, match=f"unknown {field} '{value}'. Did you mean '{nearest}'"):
        integer(**{"bits": 8, "zero": "symmetric", field: value})


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"granularity": "block"}, "block length goes with"),
        ({"block": 32}, "block length goes with"),
        ({"granularity": "row", "block": 32}, "block length goes with"),
        ({"granularity": "block", "block": 0}, "at least one element"),
        ({"granularity": "block", "block": -4}, "at least one element"),
        ({"granularity": "row", "range": "sample-mean"}, "per tensor only"),
        ({"fewest": 8}, "only with it"),
        ({"fewest": 0, "range": "sample-mean"}, "1 or more"),
        ({"fewest": 1.5, "range": "sample-mean"}, "give a whole number or None"),
        ({"granularity": "sample", "running": 0.9}, "per tensor only"),
        ({"granularity": "block", "block": 4, "running": 0.9}, "per tensor only"),
        ({"running": 1.0}, r"in \[0, 1\)"),
        ({"running": -0.1}, r"in \[0, 1\)"),
        ({"running": float("nan")}, r"in \[0, 1\)"),
        ({"floor": -1e-8}, "finite and not negative"),
        ({"floor": float("inf")}, "finite and not negative"),
        ({"floor": float("nan")}, "finite and not negative"),
    ],
)
def test_what_does_not_fit_together_is_refused(fields: dict[str, object], message: str) -> None:
    """A combination without meaning is an error that says why."""
    with pytest.raises(UsageError, match=message):
        integer(bits=8, zero="symmetric", **fields)


@pytest.mark.parametrize(
    "fields",
    [
        {"granularity": "block", "block": 1},
        {"running": 0.0},
        {"running": 0.999, "range": "sample-mean"},
        {"floor": 1e-8},
        {"granularity": "kept-channel"},
    ],
)
def test_the_ends_of_what_is_allowed_are_allowed(fields: dict[str, object]) -> None:
    """Limits belong to the allowed values where the text says so."""
    fmt = integer(bits=8, zero="symmetric", **fields)

    kept = {name: getattr(fmt.scale, name) for name in fields}
    assert {name: getattr(value, "kind", value) for name, value in kept.items()} == fields


@pytest.mark.parametrize("fmt", [BF16, FP32, integer(bits=8, zero="offset")])
def test_a_format_cannot_be_changed(fmt: Format) -> None:
    """Formats are frozen."""
    field = dataclasses.fields(fmt)[0].name

    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(fmt, field, getattr(fmt, field))


def test_equal_formats_are_equal_keys() -> None:
    """Formats compare and hash by value."""
    first, second = (integer(bits=8, zero="integer", rounding="stochastic") for _ in range(2))

    assert first == second
    assert hash(first) == hash(second)
    assert first != first.replace(bits=7)


def test_only_stochastic_rounding_needs_noise() -> None:
    """`stochastic` is true for integers that round so, and never for floats."""
    nearest = integer(bits=8, zero="offset")

    assert nearest.replace(rounding="stochastic").stochastic
    assert not nearest.stochastic
    assert not BF16.stochastic


@pytest.mark.parametrize(("fmt", "bits"), [(FP32, 32), (BF16, 16)])
def test_floats_know_their_width(fmt: Format, bits: int) -> None:
    """fp32 is 32 bits wide and bf16 16."""
    assert fmt.bits == bits


@pytest.mark.parametrize(
    ("fmt", "text"),
    [
        (BF16, "bf16"),
        (integer(bits=8, zero="symmetric", granularity="kept-channel"), "8-bit symmetric, kept-channel"),
        (
            integer(bits=4, zero="integer", range="sample-mean", rounding="stochastic"),
            "4-bit integer, tensor, sample-mean, stochastic",
        ),
        (
            integer(bits=8, zero="integer", range="sample-mean", fewest=256),
            "8-bit integer, tensor, sample-mean from 256 values",
        ),
        (integer(bits=4, zero="offset", granularity="block", block=32), "4-bit offset, block 32"),
    ],
)
def test_a_format_says_what_it_is(fmt: Format, text: str) -> None:
    """Formats print as a short phrase for tables."""
    assert str(fmt) == text


def test_a_choice_is_checked_against_a_literal() -> None:
    """One of the strings passes, any other raises."""
    check_choice("zero", "offset", Zero)

    with pytest.raises(UsageError, match="unknown zero 'off'"):
        check_choice("zero", "off", Zero)
