import math
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lowbit.kernels import native_instruction_sets, operators
from lowbit.numerics.formats import Format, integer
from lowbit.numerics.quantizer import quantize
from lowbit.numerics.ranges import extremes, new_running_range, observed_extremes, record_range
from lowbit.numerics.scales import MinMax, RangeRule, SampleMean


def _randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


KEEPS = integer(bits=8, zero="integer", running=0.75)
_FEWEST = {"range": "sample-mean", "fewest": 61}  # one more than samples of (3, 4, 5) have
_ENOUGH = {"range": "sample-mean", "fewest": 60}


def clipped_share(x: torch.Tensor, fmt: Format) -> float:
    """The share of `x` that its grid clips."""
    grid = quantize(x, fmt).grid
    assert grid is not None
    return grid.clipped(x)


class TestExtremes:
    """The extremes of one tensor."""

    @pytest.mark.parametrize("dims", [(0,), (1,), (2,), (0, 2), (1, 2), (0, 1, 2), (-1,), (0, -1)])
    def test_minmax_is_taken_over_the_dims(self, dims: tuple[int, ...]) -> None:
        """Each slice has its own smallest and largest value, the dims kept as 1."""
        x = _randn(3, 4, 5)
        numpy_x = x.numpy()

        lo, hi = extremes(x, rule=MinMax(), dims=dims)

        assert (lo.numpy() == numpy_x.min(dims, keepdims=True)).all()
        assert (hi.numpy() == numpy_x.max(dims, keepdims=True)).all()
        assert lo.shape == numpy_x.min(dims, keepdims=True).shape

    def test_no_dims_leave_every_element_alone(self) -> None:
        """Without dims each element is its own range."""
        x = _randn(3, 4)

        lo, hi = extremes(x, rule=MinMax(), dims=())

        assert torch.equal(lo, x)
        assert torch.equal(hi, x)

    def test_the_mean_over_samples_is_inside_the_extremes(self) -> None:
        """sample-mean gives the mean of each sample's extremes, which an outlier moves by its share only."""
        x = torch.tensor([[-1.0, 2.0, 0.0], [-3.0, 100.0, 1.0]])

        lo, hi = extremes(x, rule=SampleMean(), dims=(0, 1))

        assert lo.tolist() == [[-2.0]]
        assert hi.tolist() == [[51.0]]

    def test_samples_have_any_number_of_axes(self) -> None:
        """Samples of images are taken over channels and positions."""
        x = _randn(4, 3, 5, 6)

        lo, hi = extremes(x, rule=SampleMean(), dims=(0, 1, 2, 3))

        assert lo.shape == (1, 1, 1, 1)
        torch.testing.assert_close(lo.item(), sum(s.min().item() for s in x) / 4, rtol=1e-6, atol=0)
        torch.testing.assert_close(hi.item(), sum(s.max().item() for s in x) / 4, rtol=1e-6, atol=0)

    @pytest.mark.parametrize(("fewest", "expected"), [(None, (-2, 3)), (2, (-2, 3)), (3, (-3, 4))])
    def test_samples_of_too_few_values_have_the_extremes_of_all(self, fewest: int, expected: tuple[int, int]) -> None:
        """Samples of 2 values are averaged where 2 suffice, and from 3 on the batch's extremes are taken."""
        lo, hi = extremes(torch.tensor([[-1.0, 2.0], [-3.0, 4.0]]), rule=SampleMean(fewest=fewest), dims=(0, 1))

        assert (lo.item(), hi.item()) == expected

    @pytest.mark.parametrize(("values", "low", "high"), [(64, 0.015, 0.025), (256, 0.003, 0.006)])
    def test_share_that_the_mean_of_extremes_clips(self, values: int, low: float, high: float) -> None:
        """Of normal samples of n values about 1.1 / n is clipped: the reason for 256 (n = 32,768; alarm < 1e-4)."""
        x = _randn(32_768 // values, values)
        fmt = integer(bits=8, zero="integer", range="sample-mean")

        assert low < clipped_share(x, fmt) < high
        assert clipped_share(x, fmt.replace(fewest=values + 1)) < 1e-4

    def test_a_vector_is_one_sample(self) -> None:
        """In one axis nothing can be averaged: the extremes are those of the vector."""
        lo, hi = extremes(torch.tensor([3.0, -1.0, 7.0]), rule=SampleMean(), dims=(0,))

        assert (lo.tolist(), hi.tolist()) == ([-1.0], [7.0])

    @pytest.mark.parametrize("rule", [MinMax(), SampleMean()])
    def test_a_number_is_its_own_range(self, rule: RangeRule) -> None:
        """A tensor without axes has lo = hi = its value."""
        lo, hi = extremes(torch.tensor(-2.5), rule=rule, dims=())

        assert (lo.shape, lo.item(), hi.item()) == ((), -2.5, -2.5)

    @pytest.mark.parametrize("rule", [MinMax(), SampleMean()])
    @pytest.mark.parametrize("shape", [(0,), (0, 3), (3, 0), (2, 0, 4)])
    def test_an_empty_tensor_has_a_zero_range(self, rule: RangeRule, shape: tuple[int, ...]) -> None:
        """Zeros, with all dims kept as 1."""
        lo, hi = extremes(torch.empty(shape), rule=rule, dims=tuple(range(len(shape))))

        assert lo.shape == (1,) * len(shape)
        assert lo.sum() == hi.sum() == 0

    @pytest.mark.parametrize("rule", [MinMax(), SampleMean()])
    def test_a_nan_shows_in_both(self, rule: RangeRule) -> None:
        """One nan makes lo and hi of its slice nan."""
        x = _randn(3, 4)
        x[1, 2] = math.nan

        lo, hi = extremes(x, rule=rule, dims=(0, 1))

        assert lo.isnan().all()
        assert hi.isnan().all()

    def test_an_inf_shows_on_its_side(self) -> None:
        """An inf is the largest value; the other slices do not know of it."""
        x = _randn(2, 4)
        x[1, 2] = math.inf

        _, hi = extremes(x, rule=MinMax(), dims=(1,))

        assert hi.isinf().tolist() == [[False], [True]]

    def test_layout_does_not_matter(self) -> None:
        """channels_last gives what contiguous gives."""
        x = _randn(4, 3, 5, 6)

        for rule in (MinMax(), SampleMean()):
            lo, hi = extremes(x, rule=rule, dims=(0, 1, 2, 3))
            other = extremes(x.to(memory_format=torch.channels_last), rule=rule, dims=(0, 1, 2, 3))
            torch.testing.assert_close((lo, hi), other, rtol=1e-6, atol=0)

    def test_float64_stays_float64(self) -> None:
        """The extremes have the dtype of the tensor."""
        assert extremes(_randn(3).double(), rule=MinMax(), dims=(0,))[0].dtype == torch.float64


class TestRunning:
    """The range that evaluation uses."""

    def test_it_starts_empty(self) -> None:
        """Three zeros: lo, hi and the number of batches."""
        assert new_running_range().tolist() == [0, 0, 0]

    def test_first_takes_the_first_batch_whole(self) -> None:
        """With start "first" one batch is the range, and later ones enter with weight 1 - m."""
        running = new_running_range()

        record_range(running, torch.tensor(-1.0), torch.tensor(3.0), momentum=0.75, start="first")
        first = running.tolist()
        record_range(running, torch.tensor(-5.0), torch.tensor(7.0), momentum=0.75, start="first")

        assert first == [-1, 3, 1]
        assert running.tolist() == [-2, 4, 2]

    def test_zero_is_not_corrected(self) -> None:
        """With start "zero" the first batch enters with weight 1 - m, as in the authors' codes."""
        running = new_running_range()

        record_range(running, torch.tensor(-1.0), torch.tensor(3.0), momentum=0.75, start="zero")

        assert running.tolist() == [-0.25, 0.75, 1]

    def test_no_momentum_keeps_the_newest(self) -> None:
        """Momentum 0 forgets what was before."""
        running = new_running_range()
        for lo, hi in ((-1.0, 3.0), (-0.5, 9.0)):
            record_range(running, torch.tensor(lo), torch.tensor(hi), momentum=0.0, start="zero")

        assert running.tolist() == [-0.5, 9, 2]

    @given(
        st.lists(st.floats(-100, 100, width=32), min_size=1, max_size=8),
        st.floats(0, 0.99),
        st.sampled_from(["first", "zero"]),
    )
    @settings(deadline=None, max_examples=50)
    def test_it_follows_the_recurrence(self, values: list[float], momentum: float, start: str) -> None:
        """After any batches the range is ``r = m r + (1 - m) new`` from its start on."""
        running, expected = new_running_range(), 0.0 if start == "zero" else values[0]
        for value in values:
            record_range(
                running,
                torch.tensor(value),
                torch.tensor(value),
                momentum=momentum,
                start=start,
            )
            expected = momentum * expected + (1 - momentum) * value

        assert running[2] == len(values)
        assert running[0] == running[1]
        assert math.isclose(running[0].item(), expected, rel_tol=1e-5, abs_tol=1e-4)

    def test_training_returns_the_batch_and_records_it(self) -> None:
        """Training uses the batch's own extremes, not the running ones."""
        running = torch.tensor([-10.0, 10.0, 4.0])

        observed = observed_extremes(torch.tensor([[-2.0, 6.0]]), KEEPS, running, training=True)

        assert observed is not None
        assert [v.tolist() for v in observed] == [[[-2.0]], [[6.0]]]
        assert running.tolist() == [-8, 9, 5]

    def test_evaluation_returns_the_running_range_and_records_nothing(self) -> None:
        """Evaluation uses what was recorded, in the shape that broadcasts, and changes nothing."""
        running = torch.tensor([-10.0, 11.0, 4.0])

        observed = observed_extremes(_randn(2, 3, 4), KEEPS, running, training=False)

        assert observed is not None
        assert [v.tolist() for v in observed] == [[[[-10.0]]], [[[11.0]]]]
        assert running.tolist() == [-10, 11, 4]

    def test_evaluation_before_training_takes_the_batch(self) -> None:
        """Where nothing was recorded yet, evaluation has the batch's extremes and still records nothing."""
        running = new_running_range()

        observed = observed_extremes(torch.tensor([[-2.0, 6.0]]), KEEPS, running, training=False)

        assert observed is not None
        assert [v.item() for v in observed] == [-2, 6]
        assert running.tolist() == [0, 0, 0]

    def test_a_recorded_zero_range_is_a_range(self) -> None:
        """A first batch of zeros counts as recorded: evaluation does not fall back to its own batch."""
        running = new_running_range()
        observed_extremes(torch.zeros(2, 2), KEEPS, running, training=True)

        observed = observed_extremes(torch.ones(2, 2), KEEPS, running, training=False)

        assert observed is not None
        assert [v.item() for v in observed] == [0, 0]

    def test_the_rule_of_the_format_is_recorded(self) -> None:
        """A sample-mean format records means over samples."""
        running = new_running_range()
        fmt = integer(bits=8, zero="integer", range="sample-mean", running=0.9)

        observed_extremes(torch.tensor([[-1.0, 2.0], [-3.0, 4.0]]), fmt, running, training=True)

        assert running.tolist() == [-2, 3, 1]

    @pytest.mark.parametrize("training", [True, False])
    def test_a_format_without_running_range_has_none(self, training: bool) -> None:
        """None says that the quantizer measures for itself."""
        running = new_running_range()
        fmt = integer(bits=8, zero="integer")

        assert observed_extremes(torch.ones(2, 2), fmt, running, training=training) is None
        assert running.tolist() == [0, 0, 0]

    def test_an_empty_batch_is_not_recorded(self) -> None:
        """No elements have no range."""
        running = new_running_range()

        assert observed_extremes(torch.empty(0, 3), KEEPS, running, training=True) is None
        assert running.tolist() == [0, 0, 0]

    def test_a_recorded_range_carries_no_gradient(self) -> None:
        """The buffer stays a plain tensor when the input needs a gradient."""
        running = new_running_range()

        observed_extremes(_randn(2, 3).requires_grad_(), KEEPS, running, training=True)

        assert not running.requires_grad
        assert running[2] == 1


def test_a_batch_that_is_not_finite_is_not_recorded() -> None:
    """One nan batch does not decide every later evaluation."""
    fmt = integer(bits=8, zero="integer", running=0.9)
    running = new_running_range()
    observed_extremes(torch.tensor([-1.0, 2.0]), fmt, running, training=True)

    observed_extremes(torch.tensor([math.nan, 2.0]), fmt, running, training=True)
    observed_extremes(torch.tensor([-math.inf, 2.0]), fmt, running, training=True)

    assert running.tolist() == [-1.0, 2.0, 1.0]


@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
def test_evaluation_of_a_batch_that_is_not_finite_gives_nan(bad: float) -> None:
    """An inf does not become the largest number of the running range."""
    fmt = integer(bits=8, zero="integer", running=0.9)
    running = new_running_range()
    observed_extremes(torch.tensor([-1.0, 2.0]), fmt, running, training=True)
    x = torch.tensor([0.5, bad])

    observed = observed_extremes(x, fmt, running, training=False)

    assert quantize(x, fmt, observed=observed).values.isnan().all()


@pytest.mark.skipif(native_instruction_sets() is None, reason="lowbit has no native kernels in this install")
@given(data=st.data())
@settings(deadline=None, max_examples=100)
def test_the_native_pass_records_what_torch_records(data: st.DataObject) -> None:
    """Ranges used and kept are the same numbers to the bit, batches that are not finite included."""
    fmt = integer(
        bits=8,
        zero="integer",
        **data.draw(st.sampled_from([{"range": "minmax"}, {"range": "sample-mean"}, _FEWEST, _ENOUGH])),
        running=data.draw(st.floats(0, 0.99)),
        running_start=data.draw(st.sampled_from(["first", "zero"])),
    )
    kept = new_running_range(), new_running_range()
    for step in range(4):
        x = _randn(6, 3, 4, 5, seed=data.draw(st.integers(0, 99))) * 10.0 ** data.draw(st.integers(-30, 30))
        x = x.to(data.draw(st.sampled_from([torch.float32, torch.bfloat16])))
        x.view(-1)[step] = data.draw(st.sampled_from([0.0, 0.0, math.nan, math.inf, -math.inf]))
        x = x.to(memory_format=data.draw(st.sampled_from([torch.contiguous_format, torch.channels_last])))
        training = data.draw(st.booleans())

        native = observed_extremes(x, fmt, kept[0], training=training)
        with mock.patch.object(operators, "INSTALLED", False):
            plain = observed_extremes(x, fmt, kept[1], training=training)

        assert native is not None
        assert plain is not None
        for ours, theirs in ((kept[0], kept[1]), *zip(native, plain, strict=True)):
            torch.testing.assert_close(ours, theirs.float(), rtol=0, atol=0, equal_nan=True)
