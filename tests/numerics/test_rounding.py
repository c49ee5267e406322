import math
import zlib
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lowbit.numerics.rounding import (
    CounterNoise,
    RecordedNoise,
    exponent_of,
    noise_key,
    power_of_two,
    round_nearest,
    round_stochastic,
    step_key,
    tensor_id,
    uniform_noise,
)

MASK = 2**32 - 1
N = 2**20


def _noise(
    shape: tuple[int, ...], *, seed: int = 0, step: int = 1, rank: int = 0, layer: str = "layer", use: int = 0
) -> Tensor:
    key = step_key(seed, torch.tensor(step), rank=rank)
    return CounterNoise(key=key, layer=layer, use=use).draw("grad_input", "grad_output", torch.empty(shape))


# What may differ between two uses of noise: each entry is another field than `_noise(shape)`.
OTHERS = {
    "step": {"step": 2},
    "distant step": {"step": 1 + 2**32},
    "rank": {"rank": 1},
    "seed": {"seed": 1},
    "distant seed": {"seed": 2**32},
    "layer": {"layer": "layes"},
    "use": {"use": 1},
}


def _excess(cells: Tensor, bins: int) -> float:
    """How many standard deviations chi-square of equally likely cells lies above its mean."""
    expected = cells.numel() / bins
    chi_square = ((torch.bincount(cells, minlength=bins).double() - expected) ** 2 / expected).sum()
    return (float(chi_square) - (bins - 1)) / math.sqrt(2 * (bins - 1))


def _pairs(u: Tensor, v: Tensor) -> Tensor:
    """The cells of pairs in a 16 by 16 table."""
    return (u * 16).long() * 16 + (v * 16).long()


class TestNearest:
    """Rounding to nearest."""

    def test_halves_go_to_the_even_number(self) -> None:
        """Ties are broken towards even, on both sides of zero."""
        t = torch.tensor([-3.5, -2.5, -1.5, -0.5, 0.5, 1.5, 2.5, 3.5, 126.5, 127.5])

        assert round_nearest(t).tolist() == [-4, -2, -2, 0, 0, 2, 2, 4, 126, 128]

    @given(st.floats(-1e6, 1e6, width=32))
    @settings(deadline=None, max_examples=100)
    def test_python_rounds_alike(self, value: float) -> None:
        """`round` of Python is half-to-even too and agrees everywhere."""
        assert round_nearest(torch.tensor(value)).item() == round(value)

    def test_what_is_not_finite_stays(self) -> None:
        """Infinities and nan are not made numbers of."""
        assert torch.equal(
            round_nearest(torch.tensor([math.inf, -math.inf, math.nan])).isfinite(), torch.zeros(3).bool()
        )


class TestStochastic:
    """Stochastic rounding of given numbers with given noise."""

    @pytest.mark.parametrize("whole", [-(2.0**24), -127.0, -1.0, -0.0, 0.0, 1.0, 127.0, 255.0, 2.0**24])
    @pytest.mark.parametrize("u", [0.0, 0.5, 1 - 2**-24])
    def test_whole_numbers_never_move(self, whole: float, u: float) -> None:
        """A whole number stays, also with the largest noise: 127 + 0.99999994 would be 128 in float32."""
        assert round_stochastic(torch.tensor([whole]), torch.tensor([u])).item() == whole

    @pytest.mark.parametrize("t", [-2.75, -0.25, 0.25, 2.75, 126.75])
    def test_up_if_and_only_if_noise_is_below_the_fraction(self, t: float) -> None:
        """Noise just below the fraction rounds up; noise equal to it or above rounds down."""
        fraction = t - math.floor(t)
        noise = torch.tensor([0.0, fraction - 2**-24, fraction, fraction + 2**-24, 1 - 2**-24])

        q = round_stochastic(torch.full((5,), t), noise)

        assert (q - math.floor(t)).tolist() == [1, 1, 0, 0, 0]

    @given(st.floats(-65536, 65536, width=32), st.integers(0, 2**24 - 1))
    @settings(deadline=None, max_examples=200)
    def test_the_result_is_a_neighbour(self, t: float, u: int) -> None:
        """The result is floor or ceiling, so less than 1 away."""
        q = round_stochastic(torch.tensor(t), torch.tensor(u / 2**24)).item()

        assert q in (math.floor(t), math.ceil(t))

    @pytest.mark.parametrize("t", [-126.9, -0.5, -0.01, 0.3, 0.999, 5.5, 254.125])
    def test_the_mean_is_the_number(self, t: float) -> None:
        """With n = 200,000 draws the mean lies within 5 standard errors of t (false alarm < 1e-6)."""
        n = 200_000
        noise = torch.rand(n, generator=torch.Generator().manual_seed(1))
        p = t - math.floor(t)

        q = round_stochastic(torch.full((n,), t), noise)

        assert q.unique().tolist() == [math.floor(t), math.ceil(t)]
        assert abs(q.double().mean().item() - t) < 5 * math.sqrt(p * (1 - p) / n) + 1e-6

    @pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
    def test_what_is_not_finite_becomes_nan(self, value: float) -> None:
        """Infinities and nan surface as nan and do not touch their neighbours."""
        q = round_stochastic(torch.tensor([value, 1.5]), torch.tensor([0.5, 0.25]))

        assert q[0].isnan()
        assert q[1] == 2

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    def test_the_dtype_stays(self, dtype: torch.dtype) -> None:
        """Values keep their dtype with float32 noise."""
        assert round_stochastic(torch.ones(2, dtype=dtype) / 3, torch.zeros(2)).dtype == dtype

    def test_arguments_are_not_changed(self) -> None:
        """Neither the values nor the noise are written to."""
        t, u = torch.tensor([0.25, 1.75]), torch.tensor([0.5, 0.5])

        q = round_stochastic(t, u)

        assert q.tolist() == [0, 2]
        assert (t.tolist(), u.tolist()) == ([0.25, 1.75], [0.5, 0.5])


def _mix(h: int) -> int:
    h = (h ^ h >> 16) * 0x7FEB352D & MASK
    h = (h ^ h >> 15) * 0x846CA68B & MASK
    return h ^ h >> 16


def _scalar_noise(seed: int, step: int, name: str, i: int) -> float:
    """One draw by the written definition, in Python's integers."""
    key = _mix(seed & MASK) ^ seed >> 32 & MASK
    key = _mix(_mix(_mix(key) ^ step & MASK) ^ step >> 32)
    tensor = zlib.crc32(name.encode())
    first = _mix(_mix(key ^ 0xA511E9B3) ^ tensor)
    second = _mix(_mix(tensor ^ 0x63D83595) ^ key)
    h = i * 0x9E3779B1 + first & MASK
    h = (h ^ h >> 16) * 0x7FEB352D & MASK
    h ^= second
    h = (h ^ h >> 15) * 0x846CA68B & MASK
    return ((h ^ h >> 16) >> 8) / 2**24


class TestNoise:
    """The counter-based noise: its definition, and that it is uniform and independent."""

    @pytest.mark.parametrize(("seed", "step"), [(0, 0), (0, 1), (7, 123_456), (-1, 2**31), (2**63 + 5, 2**40 + 3)])
    def test_it_is_what_the_definition_says(self, seed: int, step: int) -> None:
        """Draws equal the formula in Python's integers, for large and negative seeds and large steps."""
        u = _noise((3_000_001,), seed=seed, step=step, layer="a.b", use=2)

        for i in (*range(50), 65_535, 65_536, 2**21, 3_000_000):
            assert u[i].item() == _scalar_noise(seed, step, "a.b/grad_input/grad_output/2", i)

    def test_it_lies_in_the_unit_interval(self) -> None:
        """Draws are multiples of 2**-24 from 0 to just below 1, and come close to both ends."""
        u = _noise((2**22,))

        assert torch.equal(u * 2**24, (u * 2**24).round())
        assert 0 <= u.min() < 1e-5
        assert 1 - 1e-5 < u.max() < 1

    @pytest.mark.parametrize("word", [0, 1, 2**31 - 1, 2**31, 2**32 - 1])
    def test_it_is_never_one_for_any_key(self, word: int) -> None:
        """Keys at the ends of 32 bits wrap like all others."""
        u = uniform_noise(torch.tensor([word, MASK - word]), (100_000,))

        assert u.min() >= 0
        assert u.max() < 1
        assert 0.45 < u.mean() < 0.55

    @pytest.mark.parametrize("seed", range(4))
    def test_mean_and_variance_are_those_of_a_uniform_variable(self, seed: int) -> None:
        """With n = 2**20, mean and variance lie within 5 standard errors of 1/2 and 1/12 (false alarm < 2e-6)."""
        u = _noise((N,), seed=seed).double()

        assert abs(u.mean().item() - 1 / 2) < 5 * math.sqrt(1 / 12 / N)
        assert abs(u.var().item() - 1 / 12) < 5 * math.sqrt(1 / 180 / N)

    @pytest.mark.parametrize("seed", range(4))
    def test_it_is_uniform(self, seed: int) -> None:
        """Chi-square of n = 2**20 draws in 256 bins is within 6 standard deviations (false alarm < 1e-6)."""
        u = _noise((N,), seed=seed)

        assert -6 < _excess((u * 256).long(), 256) < 6

    @pytest.mark.parametrize("bit", range(24))
    def test_every_bit_is_fair(self, bit: int) -> None:
        """Each of the 24 bits is set in half of n = 2**20 draws, within 5 standard errors (false alarm < 1e-6)."""
        share = ((_noise((N,)) * 2**24).long() >> bit & 1).double().mean().item()

        assert abs(share - 0.5) < 5 * 0.5 / math.sqrt(N)

    @pytest.mark.parametrize("lag", [1, 2, 3, 8, 255, 65_536])
    def test_neighbours_are_independent(self, lag: int) -> None:
        """Chi-square of n = 2**20 pairs at a distance in 16 x 16 cells is within 6 deviations (false alarm < 1e-6)."""
        u = _noise((N + lag,))

        assert -6 < _excess(_pairs(u[:-lag], u[lag:]), 256) < 6

    @pytest.mark.parametrize("other", OTHERS)
    def test_fields_are_independent(self, other: str) -> None:
        """Chi-square of n = 2**20 pairs of two fields in 16 x 16 cells is within 6 deviations (false alarm < 1e-6)."""
        u, v = _noise((N,)), _noise((N,), **OTHERS[other])

        assert -6 < _excess(_pairs(u, v), 256) < 6

    @pytest.mark.parametrize("other", OTHERS)
    def test_no_field_is_another_one_shifted(self, other: str) -> None:
        """Over all n = 2**16 shifts the correlation stays below 7 / sqrt(n) (false alarm < 1e-6); a copy has 1."""
        n = 2**16
        u, v = _noise((n,)).double(), _noise((n,), **OTHERS[other]).double()

        spectrum = torch.fft.rfft(u - 0.5).conj() * torch.fft.rfft(v - 0.5)
        correlation = torch.fft.irfft(spectrum) * 12 / n

        assert correlation.abs().max() < 7 / math.sqrt(n)

    @pytest.mark.parametrize("element", [0, 1, 100])
    def test_one_element_is_uniform_over_the_steps(self, element: int) -> None:
        """Over n = 4096 steps an element has a mean within 5 standard errors of 1/2 (false alarm < 1e-6)."""
        n = 4096

        u = torch.stack([_noise((101,), step=step)[element] for step in range(n)]).double()

        assert abs(u.mean().item() - 0.5) < 5 * math.sqrt(1 / 12 / n)
        assert abs(((u[1:] - 0.5) * (u[:-1] - 0.5)).mean().item() * 12) < 5 / math.sqrt(n)
        assert u.unique().numel() > n - 10

    def test_threads_do_not_matter(self) -> None:
        """One thread and two give the same draws."""
        threads = torch.get_num_threads()
        try:
            torch.set_num_threads(1)
            one = _noise((N,))
            torch.set_num_threads(2)
            two = _noise((N,))
        finally:
            torch.set_num_threads(threads)

        assert torch.equal(one, two)

    def test_only_the_logical_index_counts(self) -> None:
        """A tensor in channels_last, a strided one and a flat one of as many elements get the same draws."""
        noise = CounterNoise(key=step_key(0, torch.tensor(1)), layer="layer")
        x = torch.empty(2, 3, 4, 5)

        draws = [
            noise.draw("output", "input", t)
            for t in (x, x.to(memory_format=torch.channels_last), torch.empty(4, 6, 4, 5)[::2, ::2], torch.empty(120))
        ]

        assert draws[1].is_contiguous()
        assert all(torch.equal(draws[0].flatten(), d.flatten()) for d in draws)

    def test_a_longer_field_begins_like_a_shorter_one(self) -> None:
        """The number of elements does not enter the noise of an element."""
        assert torch.equal(_noise((1000,))[:10], _noise((10,)))

    @pytest.mark.parametrize("shape", [(0,), (3, 0, 2), ()])
    def test_any_shape_can_be_drawn(self, shape: tuple[int, ...]) -> None:
        """Empty tensors and a single number have noise of their shape in float32."""
        u = _noise(shape)

        assert u.shape == shape
        assert u.dtype == torch.float32

    def test_drawing_twice_gives_the_same(self) -> None:
        """Noise has no state, and torch's global generator is not touched."""
        before = torch.get_rng_state()

        assert torch.equal(_noise((1000,)), _noise((1000,)))
        assert torch.equal(before, torch.get_rng_state())

    @pytest.mark.parametrize("difference", list(OTHERS))
    def test_nearly_all_draws_of_two_fields_differ(self, difference: str) -> None:
        """Of 10,000 draws at most 5 are equal by chance (expected 0.0006, false alarm < 1e-6)."""
        u, v = _noise((10_000,)), _noise((10_000,), **OTHERS[difference])

        assert (u == v).sum() <= 5

    @pytest.mark.parametrize(("product", "operand"), [("output", "input"), ("grad_weight", "grad_output")])
    def test_product_and_operand_select_the_field(self, product: str, operand: str) -> None:
        """Each operand of each product has noise of its own."""
        noise = CounterNoise(key=step_key(0, torch.tensor(1)), layer="layer")
        x = torch.empty(1000)

        assert (noise.draw("grad_input", "grad_output", x) == noise.draw(product, operand, x)).sum() <= 5


class TestKeys:
    """Keys of steps and tensors."""

    def test_steps_of_one_seed_have_different_keys(self) -> None:
        """The first 300 steps, and steps around powers of two, share no key."""
        steps = {*range(300), *(2**p + d for p in range(10, 40) for d in (-1, 0, 1))}

        keys = {int(step_key(3, torch.tensor(step))) for step in steps}

        assert len(keys) == len(steps)

    def test_ranks_of_one_step_have_different_keys(self) -> None:
        """300 ranks over 5 steps share no key; rank 0 has that of one process."""
        keys = [int(step_key(3, torch.tensor(step), rank=rank)) for step in range(5) for rank in range(300)]

        assert len(set(keys)) == len(keys)
        assert keys[300] == int(step_key(3, torch.tensor(1)))

    @pytest.mark.parametrize("rank", [0, 7])
    def test_a_key_is_a_32_bit_number(self, rank: int) -> None:
        """Keys lie in [0, 2**32) in int64."""
        key = step_key(-5, torch.tensor(9), rank=rank)

        assert key.dtype == torch.int64
        assert key.shape == ()
        assert 0 <= key < 2**32

    def test_the_low_64_bits_of_a_seed_count(self) -> None:
        """A seed and the same plus 2**64 are one; plus 2**32 and negated they are others."""
        keys = [int(step_key(seed, torch.tensor(1))) for seed in (5, 5 + 2**64, 5 + 2**32, -5)]

        assert keys[0] == keys[1]
        assert len(set(keys)) == 3

    def test_a_field_is_selected_by_two_words(self) -> None:
        """Both words are 32-bit numbers that differ between tensors."""
        key = step_key(0, torch.tensor(1))

        a, b = noise_key(key, tensor_id("a", "output", "input")), noise_key(key, tensor_id("b", "output", "input"))

        assert a.shape == (2,)
        assert bool(((a >= 0) & (a < 2**32)).all())
        assert bool((a != b).all())

    def test_the_identity_of_a_tensor_is_fixed(self) -> None:
        """It is a CRC of its names, the same in every process, and not Python's salted `hash`."""
        assert tensor_id("net.0", "output", "input", 1) == zlib.crc32(b"net.0/output/input/1")

    def test_names_and_uses_make_identities(self) -> None:
        """Layer, product, operand and use all count."""
        ids = {
            tensor_id(layer, product, operand, use)
            for layer in ("a", "b", "a.a")
            for product in ("output", "grad_input", "grad_weight")
            for operand in ("input", "weight", "grad_output")
            for use in range(3)
        }

        assert len(ids) == 81


class TestRecorded:
    """Noise that was drawn elsewhere."""

    def test_it_replays(self) -> None:
        """The recorded draws of that operand come back."""
        draws = torch.rand(2, 3)
        noise = RecordedNoise(draws={("output", "input"): draws})

        assert torch.equal(noise.draw("output", "input", torch.empty(2, 3)), draws)

    @pytest.mark.parametrize(("product", "shape"), [("grad_input", (2, 3)), ("output", (3, 2)), ("output", (6,))])
    def test_what_was_not_recorded_is_an_error(self, product: str, shape: tuple[int, ...]) -> None:
        """Another product or shape raises and says what is recorded."""
        noise = RecordedNoise(draws={("output", "input"): torch.rand(2, 3)})

        with pytest.raises(ValueError, match=r"no recorded noise of shape .* recorded: .*\(2, 3\)"):
            noise.draw(product, "input", torch.empty(shape))


@pytest.mark.parametrize("lag", [1, 2, 3, 12, 16, 32, 48, 512, 768, 1024, 4096])
def test_elements_a_row_apart_are_independent(lag: int) -> None:
    """Pairs (u[i], u[i + lag]) fill a 32 x 32 table evenly: chi-square within 6 deviations, for 8 seeds."""
    for seed in range(8):
        u = (_noise((2**20 + lag,), seed=seed) * 32).long()
        counts = torch.bincount(u[:-lag] * 32 + u[lag:], minlength=1024).double()
        expected = 2**20 / 1024
        chi_square = ((counts - expected) ** 2 / expected).sum().item()

        assert abs(chi_square - 1023) < 6 * math.sqrt(2 * 1023)


class TestExponents:
    """Exponents by extraction."""

    @pytest.mark.parametrize(
        "move", [lambda x: x, lambda x: torch.nextafter(x, x * 2), lambda x: torch.nextafter(x, x * 0)]
    )
    def test_they_are_exact_at_the_ends_of_binades(self, move: Callable[[Tensor], Tensor]) -> None:
        """At every power of two of float32 and at the numbers beside it, where float32 logarithms are wrong."""
        x = move(2.0 ** torch.arange(-149, 128, dtype=torch.float64).float())
        x = x[x > 0].double()

        assert exponent_of(x).tolist() == [math.frexp(v)[1] - 1 for v in x.tolist()]

    def test_powers_are_exact_and_stay_normal(self) -> None:
        """From -1022 to 1023 they are the powers; beyond, the nearest of these."""
        exponents = torch.arange(-1022, 1024)

        assert power_of_two(exponents).tolist() == [2.0**e for e in range(-1022, 1024)]
        assert power_of_two(torch.tensor([-2000, 2000])).tolist() == [2.0**-1022, 2.0**1023]
