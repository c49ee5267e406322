import dataclasses
import tomllib
from typing import Any

import pytest

from lowbit.errors import UsageError, check_choice
from lowbit.numerics.element import Zero
from lowbit.numerics.elements import FixedPoint, Integer, Minifloat, PowerOfTwo, Real
from lowbit.numerics.formats import BF16, FP32, Format, check_bits, check_defined, from_table, integer
from lowbit.numerics.scales import E4M3, Constant, IntegerScale, MinMax, PowerOfTwoScale, SampleMean, Scale
from lowbit.numerics.transforms import NO_TRANSFORM, Clip, Hadamard, TanhMax

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
        (
            Format(
                element=Minifloat(exponent=2, mantissa=1, top="finite"),
                scale=Scale(granularity="square", block=16, format=E4M3()),
                transform=Hadamard(size=16),
                rounding="stochastic",
            ),
            "e2m1 (max 6), blocks of 16 x 16, e4m3 scale, Hadamard 16, stochastic",
        ),
        (
            integer(bits=2, zero="offset", range=Constant(low=0, high=1), transform=Clip(low=0, high=1)),
            "2-bit offset, tensor, range 0 to 1, clipped to [0, 1]",
        ),
        (Format(element=FixedPoint(integer=2, fraction=6), rounding="stochastic"), "fixed point 2.6, stochastic"),
        (Format(element=Real(), transform=TanhMax()), "fp32, tanh/max"),
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


E2M1 = Minifloat(exponent=2, mantissa=1, top="finite")
EIGHT = integer(bits=8, zero="symmetric", granularity="row")


class TestReplace:
    """Another format with other parts, or other fields of its parts."""

    @pytest.mark.parametrize(
        ("changes", "wanted"),
        [
            ({"bits": 4}, integer(bits=4, zero="symmetric", granularity="row")),
            ({"granularity": "block", "block": 16}, integer(bits=8, zero="symmetric", granularity="block", block=16)),
            ({"format": "e4m3"}, integer(bits=8, zero="symmetric", granularity="row", format=E4M3())),
            ({"transform": "tanh-max"}, integer(bits=8, zero="symmetric", granularity="row", transform=TanhMax())),
            (
                {"rounding": "stochastic", "floor": 1e-8},
                integer(bits=8, zero="symmetric", granularity="row", floor=1e-8, rounding="stochastic"),
            ),
            ({"element": E2M1}, Format(element=E2M1, scale=Scale(granularity="row"))),
            ({"element": "real", "scale": None}, FP32),
            (
                {"element": PowerOfTwo(bits=3), "bits": 4},
                Format(element=PowerOfTwo(bits=4), scale=Scale(granularity="row")),
            ),
            (
                {"granularity": "tensor", "range": "sample-mean", "fewest": 9},
                integer(bits=8, zero="symmetric", range=SampleMean(fewest=9)),
            ),
            ({}, EIGHT),
        ],
        ids=str,
    )
    def test_what_is_named_changes_and_nothing_else(self, changes: dict[str, Any], wanted: Format) -> None:
        """Fields of the element and of the scale, whole parts, and kinds."""
        assert EIGHT.replace(**changes) == wanted
        assert integer(bits=8, zero="symmetric", granularity="row") == EIGHT

    def test_fewest_values_can_be_left_out_again(self) -> None:
        """None is a value, not a field that was not given."""
        fmt = integer(bits=8, zero="integer", range="sample-mean", fewest=256)

        assert fmt.replace(fewest=None).scale == Scale(range=SampleMean())
        assert fmt.replace(bits=4).scale == fmt.scale

    @pytest.mark.parametrize(
        ("fmt", "changes", "message"),
        [
            (EIGHT, {"bit": 4}, "unknown field to replace .*'bit'. Did you mean 'bits'.*granularity.*rounding"),
            (EIGHT, {"kind": "real"}, "unknown field to replace of a format .8-bit symmetric, row.: 'kind'"),
            (EIGHT.replace(transform=Clip(low=0, high=1)), {"low": -1}, "'low'"),
            (FP32, {"granularity": "row"}, "unknown field to replace of a format .fp32.: 'granularity'"),
            (EIGHT, {"bits": 8.0}, "bits=8.0"),
            (EIGHT, {"transform": "clop"}, "unknown transform 'clop'. Did you mean 'clip'"),
            (EIGHT, {"transform": "clip"}, "transform 'clip' lacks high, low"),
            (EIGHT, {"element": "real"}, "fp32 has no scale"),
            (EIGHT, {"fewest": 4}, "go with range 'sample-mean', and only with it"),
            (EIGHT, {"fewest": None}, "go with range 'sample-mean', and only with it"),
            (EIGHT, {"range": "sample-mean"}, "per tensor only"),
            (EIGHT, {"scale": "row"}, "scale='row': give a Scale or None"),
            (EIGHT, {"element": Integer}, "element=.*give a part of a format"),
        ],
        ids=str,
    )
    def test_a_mistake_is_named(self, fmt: Format, changes: dict[str, Any], message: str) -> None:
        """What was given and what is allowed; no name is allowed that is refused."""
        with pytest.raises(UsageError, match=message) as error:
            fmt.replace(**changes)
        assert "Known: " not in str(error.value) or "low" not in str(error.value).split("Known: ")[1]


class TestWidths:
    """Codes of another width."""

    def test_integers_have_other_widths(self) -> None:
        """All else stays; its own width gives the format itself."""
        assert EIGHT.with_bits(3) == EIGHT.replace(bits=3)
        assert EIGHT.with_bits(8) is EIGHT

    @pytest.mark.parametrize("bits", [8.0, True, 1, 17, "8", None])
    def test_what_is_not_a_width_is_refused(self, bits: Any) -> None:
        """A whole number from 2 to 16, and 8.0 is none."""
        with pytest.raises(UsageError, match=f"bits={bits!r} for zero='symmetric': allowed are whole numbers"):
            EIGHT.with_bits(bits)

    @pytest.mark.parametrize(
        "fmt",
        [FP32, BF16, Format(element=E2M1, scale=Scale()), Format(element=PowerOfTwo(bits=4), scale=Scale())],
        ids=str,
    )
    def test_others_have_their_own_alone(self, fmt: Format) -> None:
        """Which they give, and refuse any other, saying which."""
        assert fmt.with_bits(fmt.bits) is fmt
        for bits in (fmt.bits + 1, float(fmt.bits)):
            with pytest.raises(UsageError, match=f"bits={bits} of .*: it has {fmt.bits}"):
                fmt.with_bits(bits)  # type: ignore[arg-type]  # the test


class TestApplied:
    """A format as it works on samples of a size."""

    def test_samples_of_too_few_values_have_the_range_of_the_tensor(self) -> None:
        """From the fewest on it is the format itself."""
        fmt = integer(bits=8, zero="integer", range="sample-mean", fewest=256)

        assert fmt.applied(255) == fmt.replace(range=MinMax())
        assert fmt.applied(256) is fmt

    @pytest.mark.parametrize("fmt", [FP32, BF16, EIGHT, integer(bits=8, zero="integer", range="sample-mean")], ids=str)
    def test_other_formats_are_what_they_are(self, fmt: Format) -> None:
        """Of any size."""
        assert fmt.applied(1) is fmt


TABLES = [
    ('bits = 8\nzero = "symmetric"\ngranularity = "row"', EIGHT),
    (
        'element = { kind = "integer", bits = 8, zero = "symmetric" }\nscale = { granularity = "row" }',
        EIGHT,
    ),
    (
        'bits = 4\nzero = "integer"\nrange = "sample-mean"\nfewest = 9\nrunning = 0.9\nrounding = "stochastic"',
        integer(bits=4, zero="integer", range=SampleMean(fewest=9), running=0.9, rounding="stochastic"),
    ),
    (
        'bits = 4\nzero = "integer"\nrange = { kind = "sample-mean", fewest = 9 }',
        integer(bits=4, zero="integer", range=SampleMean(fewest=9)),
    ),
    (
        'element = { kind = "integer", bits = 4, zero = "integer" }\nscale = { range = "sample-mean", fewest = 9 }',
        integer(bits=4, zero="integer", range=SampleMean(fewest=9)),
    ),
    (
        'bits = 2\nzero = "offset"\nrange = { kind = "constant", low = -1, high = 1 }\ntransform = "tanh-max"\n'
        'format = { kind = "integer", bits = 8 }',
        integer(
            bits=2, zero="offset", range=Constant(low=-1, high=1), transform=TanhMax(), format=IntegerScale(bits=8)
        ),
    ),
    ('element = "real"', FP32),
    ('element = { kind = "minifloat", exponent = 8, mantissa = 7, overflow = "infinite" }', BF16),
    (
        'element = { kind = "fixed-point", integer = 2, fraction = 6 }',
        Format(element=FixedPoint(integer=2, fraction=6)),
    ),
    (
        'element = { kind = "minifloat", exponent = 2, mantissa = 1, top = "finite" }\n'
        'scale = { granularity = "block", block = 32, format = { kind = "power-of-two", direction = "floor" } }\n'
        'transform = { kind = "hadamard", size = 32 }\nrounding = "stochastic"',
        Format(
            element=E2M1,
            scale=Scale(granularity="block", block=32, format=PowerOfTwoScale(direction="floor")),
            transform=Hadamard(size=32),
            rounding="stochastic",
        ),
    ),
    ('element = { kind = "power-of-two", bits = 4 }\nscale = {}', Format(element=PowerOfTwo(bits=4), scale=Scale())),
]


class TestTables:
    """Formats from TOML, by their parts or by the fields of an integer."""

    @pytest.mark.parametrize(("text", "fmt"), TABLES, ids=[str(i) for i in range(len(TABLES))])
    def test_a_table_is_the_format_it_describes(self, text: str, fmt: Format) -> None:
        """Equal to the one made in Python, and hashed alike; the table is not changed."""
        table = tomllib.loads(text)
        found = from_table("formats.x", table)

        assert found == fmt
        assert hash(found) == hash(fmt)
        assert table == tomllib.loads(text)
        check_defined(found)

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("", "formats.x lacks bits, zero"),
            ("bits = 8", "formats.x lacks zero"),
            ('bits = 8\nzero = "symetric"', "formats.x: unknown zero 'symetric'. Did you mean 'symmetric'"),
            (
                'bits = 8\nzero = "offset"\ngranularity = "rows"',
                "formats.x: unknown granularity 'rows'. Did you mean 'row'",
            ),
            ('bits = 8\nzero = "offset"\nscal = 1', "unknown field of formats.x 'scal'. Did you mean 'scale'"),
            ('bits = 8\nzero = "offset"\nformat = "e4m2"', "formats.x: unknown format 'e4m2'. Did you mean 'e4m3'"),
            ('bits = 8\nzero = "offset"\nformat = "integer"', "formats.x: format 'integer' lacks bits"),
            ('bits = 8\nzero = "offset"\nfewest = 8', "formats.x: fewest=8 with range='minmax'"),
            (
                'element = "integr"',
                "formats.x: unknown element 'integr'. Did you mean 'integer'.*Known: fallback, fixed-point",
            ),
            ("element = 8", "formats.x: element=8: give a kind of element, or a table with kind and its fields"),
            ('element = { kind = "minifloat", exponent = 4 }', "formats.x: element 'minifloat' lacks mantissa"),
            (
                'element = { kind = "minifloat", exponent = 4, mantissa = 3, tap = "nan" }',
                "unknown field of formats.x: element 'minifloat' 'tap'. Did you mean 'top'",
            ),
            (
                'element = { kind = "minifloat", exponent = 9, mantissa = 3 }',
                "formats.x: element 'minifloat': exponent=9, mantissa=3: a minifloat has 2 to 8 bits of exponent",
            ),
            (
                'element = { kind = "integer", bits = 4, zero = "offset" }',
                "formats.x: 4-bit offset needs a scale: give one",
            ),
            ('element = "real"\nscale = {}', "formats.x: fp32 has no scale: leave it out"),
            ('element = "real"\nscale = "row"', "formats.x: scale='row': give a table of its fields"),
            (
                'element = { kind = "power-of-two", bits = 4 }\nscale = { block = 4 }',
                "formats.x: scale: block=4 with gran",
            ),
            (
                'element = { kind = "power-of-two", bits = 4 }\nscale = { blok = 4 }',
                "formats.x: scale 'blok'. Did you mean",
            ),
            (
                'element = "real"\nbits = 8',
                r"unknown field of formats.x 'bits'.*Known: element, rounding, scale, transform, widths",
            ),
            ('element = "real"\nrounding = "stochastic"', "formats.x: values that stay as they are do not round"),
            ('element = "real"\ntransform = { kind = "clip", low = 0 }', "formats.x: transform 'clip' lacks high"),
        ],
    )
    def test_a_mistake_is_named_with_its_place(self, text: str, message: str) -> None:
        """What was given, where, and what is allowed."""
        with pytest.raises(UsageError, match=message):
            from_table("formats.x", tomllib.loads(text))


class TestTogether:
    """Parts that do not fit together."""

    @pytest.mark.parametrize("transform", [TanhMax(), Clip(low=0, high=1), Hadamard(size=4)], ids=str)
    def test_a_running_range_is_of_values_before_a_transform(self, transform: Any) -> None:
        """So there is no format with both."""
        with pytest.raises(UsageError, match=f"running=0.9 with transform='{transform.kind}'.*Leave one of them out"):
            integer(bits=8, zero="integer", running=0.9, transform=transform)
        assert integer(bits=8, zero="integer", running=0.9, transform=NO_TRANSFORM).running == 0.9

    @pytest.mark.parametrize("fields", [{"granularity": "sample"}, {"range": "sample-mean"}], ids=str)
    def test_samples_are_not_told_apart_along_the_axis_of_a_product(self, fields: dict[str, Any]) -> None:
        """A Hadamard transform lies along it; others do not mind."""
        with pytest.raises(UsageError, match="transform='hadamard' with ranges of samples"):
            integer(bits=8, zero="integer", transform=Hadamard(size=4), **fields)
        assert integer(bits=8, zero="integer", transform=TanhMax(), **fields).transform == TanhMax()
