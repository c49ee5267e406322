"""Code books of 256 numbers, with a scale for each block."""

import pytest
import torch
from torch import Tensor

from lowbit.kernels import cpu
from lowbit.numerics.codebooks import BOOKS, CodeBook, _tables, decode, encode

KINDS = pytest.mark.parametrize("book", BOOKS.values(), ids=BOOKS)


def defined(x: Tensor, book: CodeBook) -> Tensor:
    """The value of each element by looking at every number of the book, in blocks of 256 of a vector."""
    found = []
    for part in x.split(256):
        largest = part.abs().max()
        numbers = torch.tensor(book.unsigned if bool((part >= 0).all()) else book.signed)
        t = part / largest
        distance = (t[:, None].double() - numbers.double()).abs()
        found.append(numbers[distance.argmin(1)] * largest)
    return torch.cat(found)


def noise(count: int) -> Tensor:
    """Uniform draws."""
    return torch.rand(count, generator=torch.Generator().manual_seed(1))


@KINDS
@pytest.mark.parametrize("sign", ["signed", "unsigned"])
def test_every_code_stands_for_itself(book: CodeBook, sign: str) -> None:
    """Each number of the book, scaled, is encoded and decoded as it is, by nearest and by noise."""
    numbers = torch.tensor(getattr(book, sign)) * 3.0
    if sign == "signed":
        numbers = torch.cat([numbers, numbers[:1]])[:256]
    draws = noise(len(numbers))

    for given in (None, draws):
        codes, scales = encode(numbers, book, noise=given)
        assert torch.equal(decode(codes, scales, book), numbers)
    assert bool(scales.signbit().all()) == (sign == "unsigned")


@KINDS
def test_codes_are_the_nearest_numbers(book: CodeBook) -> None:
    """The values are those of the definition, also in a last block that is shorter."""
    x = torch.randn(1000, generator=torch.Generator().manual_seed(0)) ** 3

    for each in (x, x.square()):
        codes, scales = encode(each, book)
        assert codes.dtype == torch.uint8
        assert len(scales) == 4
        torch.testing.assert_close(decode(codes, scales, book), defined(each, book), rtol=1e-6, atol=0)
        assert not torch.equal(decode(codes, scales, book), each)


@KINDS
def test_noise_has_the_mean_of_the_value(book: CodeBook) -> None:
    """The mean of 40,000 draws lies within 5 standard errors of the value (false alarm < 1e-6)."""
    count, value = 40_000, 0.37
    x = torch.full((count,), value)
    x[::256] = -1.0

    codes, scales = encode(x, book, noise=noise(count))
    values = decode(codes, scales, book)[x > 0].double()

    assert values.std() > 0
    assert abs(values.mean() - value) < 5 * values.std() / len(values) ** 0.5


@KINDS
@pytest.mark.parametrize("value", [0.0, 1e-42, 1e-30, 3e38, -3e38])
def test_constants_are_themselves(book: CodeBook, value: float) -> None:
    """Zeros, denormal and huge constants come back exactly; -1 is not in the dynamic book, and -0.993 is."""
    x = torch.full((300,), value)

    codes, scales = encode(x, book)

    torch.testing.assert_close(decode(codes, scales, book), x, rtol=0.008 if value < 0 else 0, atol=0)


@KINDS
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_a_block_with_a_bad_value_is_nan(book: CodeBook, bad: float) -> None:
    """Not finite: nan and inf surface as nan in their block, and nowhere else."""
    x = torch.ones(512)
    x[3] = bad

    codes, scales = encode(x, book)
    values = decode(codes, scales, book)

    assert bool(values[:256].isnan().all())
    assert bool((values[256:] == 1).all())


def test_linear_second_moments_never_become_zero() -> None:
    """Beside a huge value, a small positive one keeps the smallest number, unlike a true zero block."""
    x = torch.tensor([1.0, 1e-9, 0.0])

    assert decode(*encode(x, BOOKS["int8"]), BOOKS["int8"]).tolist() == [1.0, 1 / 256, 1 / 256]
    assert decode(*encode(0 * x, BOOKS["int8"]), BOOKS["int8"]).tolist() == [0.0, 0.0, 0.0]


def test_the_dynamic_book_spans_seven_decades() -> None:
    """Its signed and unsigned lists have 256 numbers each, and the smallest is below a millionth."""
    book = BOOKS["dynamic8"]

    assert len(set(book.signed)) == len(set(book.unsigned)) == 256
    assert min(x for x in book.signed if x > 0) == pytest.approx(0.55e-6)
    assert min(x for x in book.unsigned if x > 0) == pytest.approx(0.325e-6)


@KINDS
@pytest.mark.parametrize("key", [None, (3, 5)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_native_pass_is_the_definition(
    book: CodeBook, key: tuple[int, int] | None, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Codes, scales and values are the same bits for random, special and limiting numbers, with ragged blocks."""
    if not cpu.runs(torch.ones(1)):
        pytest.skip("installed without native kernels")
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(200_000, generator=generator) ** 5
    x[50_000:100_000].abs_()
    x[1000:1300], x[2000], x[3000], x[4000:4600] = 0.0, torch.nan, -torch.inf, 1e-43
    limits = torch.tensor([*book.signed, *[(a + b) / 2 for a, b in zip(book.signed, book.signed[1:], strict=False)]])
    x = torch.cat([x, limits, limits.nextafter(torch.ones(1)), limits.nextafter(-torch.ones(1))]).to(dtype)

    native = encode(x, book, noise=key)
    values = decode(*native, book)
    monkeypatch.setattr(cpu, "runs", lambda _: False)
    defined = encode(x, book, noise=key)

    assert torch.equal(native[0], defined[0])
    assert torch.equal(
        native[1].view(torch.int32).where(native[1].isfinite(), 0), defined[1].nan_to_num(0.0).view(torch.int32)
    )
    torch.testing.assert_close(values, decode(*defined, book), rtol=0, atol=0, equal_nan=True)


@KINDS
@pytest.mark.parametrize("stochastic", [False, True])
def test_few_numbers_share_their_upper_bits(book: CodeBook, stochastic: bool) -> None:
    """Among numbers with the same upper 16 bits at most one limit lies, as the native pass supposes."""
    limits, starts = _tables(book, stochastic=stochastic)
    upper = torch.arange(2**15, dtype=torch.int32)
    highest = ((upper << 16) | 0xFFFF).view(torch.float32)
    inside = highest <= 1
    for row in range(2):
        passed = torch.bucketize(highest[inside], limits[row], right=stochastic)
        start = starts[row, : 2**15][inside]
        assert bool(((passed == start) | (passed == start + 1)).all())
