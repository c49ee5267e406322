"""The precision range test: what it chooses, that it trains, and how it is shown."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lowbit
from lowbit import RunError, UsageError
from lowbit.precision.range_test import plot
from lowbit.schedules import RangeTest


def model() -> nn.Sequential:
    """A converted linear layer."""
    made = nn.Sequential(nn.Linear(8, 4), nn.ReLU(), nn.Linear(4, 2))
    lowbit.convert_(made, "w8a8g8")
    return made


def measured(test: RangeTest, gains: dict[int, float]) -> list[int]:
    """Run a test whose measure rises at each width by `gains`; the widths it trained at."""
    widths = []
    while not test.done:
        bits = test.current_bits
        widths.append(bits)
        done = len(test.state_dict()["measures"]) >= test.steps_per_bit // 2
        test.update(0.5 + gains.get(bits, 0.0) * done)
    return widths


def test_the_first_width_that_gains_is_chosen() -> None:
    """2 and 3 bits gain less than the threshold, 4 bits gain more: 4, and nothing above is trained."""
    test = RangeTest(steps_per_bit=4, better="higher", threshold=0.01)

    widths = measured(test, {2: 0.005, 3: -0.3, 4: 0.02, 5: 0.5})

    assert test.chosen == 4
    assert widths == [2] * 4 + [3] * 4 + [4] * 4
    assert [row.gain for row in test.tried] == pytest.approx([0.005, -0.3, 0.02])


def test_a_gain_at_the_threshold_is_none() -> None:
    """Only a gain above the threshold is progress."""
    test = RangeTest(low=2, high=3, steps_per_bit=4, better="higher", threshold=0.25)
    measured(test, {2: 0.25})

    assert test.chosen == 3


def test_high_is_chosen_where_nothing_gains() -> None:
    """Without progress anywhere the choice is `high`, which is not trained at."""
    test = RangeTest(low=3, high=6, steps_per_bit=2, significance=None)

    assert measured(test, {}) == [3, 3, 4, 4, 5, 5]
    assert test.chosen == test.current_bits == 6


def test_every_width_is_tried_on_demand() -> None:
    """every=True goes on to the last width and keeps the first choice."""
    test = RangeTest(low=2, high=4, steps_per_bit=2, better="higher", significance=None, every=True)

    assert measured(test, {2: 0.5, 4: 0.9}) == [2, 2, 3, 3, 4, 4]
    assert test.chosen == test.current_bits == 2


def test_a_loss_gains_by_falling_in_proportion() -> None:
    """With better="lower" the gain is the relative fall, whatever the unit of the loss."""
    for unit in (1.0, 1000.0):
        test = RangeTest(steps_per_bit=2, better="lower", threshold=0.1, significance=None)
        for value in (2.0, 1.9, 1.9, 1.5):
            test.update(value * unit)

        assert test.chosen == 3
        assert [row.gain for row in test.tried] == pytest.approx([0.05, 0.4 / 1.9])


def test_one_width_is_no_test() -> None:
    """Low == high is over before it begins."""
    assert RangeTest(low=5, high=5).chosen == 5


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"low": 9}, "low=9, high=8"),
        ({"low": 0}, "low=0"),
        ({"steps_per_bit": 1}, "two steps or more"),
        ({"steps_per_bit": 3}, "4 steps or more"),
        ({"significance": 0}, "significance=0"),
        ({"significance": float("inf")}, "significance=inf"),
        ({"threshold": float("nan")}, "threshold=nan"),
        ({"better": "up"}, "'up'"),
    ],
)
def test_impossible_arguments_are_refused(arguments: dict[str, Any], message: str) -> None:
    """Each value that no test could have is a UsageError."""
    with pytest.raises(UsageError, match=message):
        RangeTest(**arguments)


def test_a_measure_that_is_not_finite_stops_the_test() -> None:
    """Nan is a RunError that names the width, and is not counted."""
    test = RangeTest(steps_per_bit=4)

    with pytest.raises(RunError, match="nan at 2 bits"):
        test.update(float("nan"))
    assert test.state_dict()["measures"] == []


@pytest.mark.parametrize("stop", range(0, 13, 2))
def test_state_continues_the_test(stop: int) -> None:
    """Saved and loaded at any step, a test makes the same choice with the same rows."""
    values = [0.5, 0.5, 0.5, 0.5, 0.5, 0.5, 0.5, 0.502, 0.5, 0.5, 0.65, 0.7]
    whole, first, second = (RangeTest(steps_per_bit=4, better="higher") for _ in range(3))
    for value in values:
        whole.update(value)
    for value in values[:stop]:
        first.update(value)
    second.load_state_dict(first.state_dict())
    for value in values[stop:]:
        second.update(value)

    assert (second.chosen, second.tried) == (whole.chosen, whole.tried) == (4, whole.tried)


def test_a_state_of_another_test_is_refused() -> None:
    """A state with other widths or keys does not load."""
    test = RangeTest(low=2, steps_per_bit=2, significance=None)
    test.update(1.0)
    test.update(1.0)

    with pytest.raises(UsageError, match=r"tried \[2\] bits.*from 3 to 8"):
        RangeTest(low=3, steps_per_bit=2, significance=None).load_state_dict(test.state_dict())
    with pytest.raises(UsageError, match="state of a range test"):
        RangeTest().load_state_dict({})


def test_it_trains_at_each_width_and_gives_the_bits_back() -> None:
    """step_fn runs at 2, 3, ... bits; afterwards the model has its recipe's bits and no controller."""
    net = model()
    site: Any = net[0].site
    seen = []

    def step() -> Tensor:
        net(torch.randn(3, 8)).sum().backward()
        seen.append(site.bits.tolist()[:4])
        return torch.tensor(1.0 if len(seen) > 6 else 0.0)

    result = lowbit.range_test(net, step, high=4, steps_per_bit=4, backward=7)

    assert seen == [[2, 2, 7, 2]] * 4 + [[3, 3, 7, 3]] * 4
    assert (result.bits, len(result.history), result.rows[1].gain) == (3, 8, 1.0)
    assert site.bits.tolist() == [8] * 6
    assert site.controller is None


def test_a_failing_step_leaves_no_controller() -> None:
    """Where step_fn raises, the model is free and at its recipe's bits."""
    net = model()

    with pytest.raises(ZeroDivisionError):
        lowbit.range_test(net, lambda: 1 / 0)

    assert net[0].site.controller is None
    assert net[0].site.bits[0] == 8


def test_print_shows_table_plot_and_choice() -> None:
    """The text has the choice, a row for each width, and the measure over the steps."""
    values = iter([0.1, 0.1, 0.1, 0.1, 0.1, 0.1, 0.8, 0.9])
    net = model()
    result = lowbit.range_test(net, lambda: next(values), low=3, steps_per_bit=4)
    lines = str(result).splitlines()

    assert lines[0] == "precision range test: 4 bits"
    assert [line.split()[-1] for line in lines[4:6]] == ["progress", "chosen"]
    assert lines[-1].split() == ["bits", "3", "4"]
    assert any(line.lstrip().startswith("0.9 |") for line in lines)


def test_print_says_where_nothing_gained() -> None:
    """`high` is shown as chosen without training."""
    result = lowbit.range_test(model(), lambda: 0.5, low=3, high=4, steps_per_bit=2, significance=None)

    assert "chosen: no lower width gained more than 0.01" in str(result)


def noise(seed: int, *, gains: bool) -> RangeTest:
    """A test up to 8 bits whose measure is an accuracy of noise; with gains it grows by 0.05 from 4 bits on."""
    test = RangeTest(better="higher", steps_per_bit=40)
    generator = torch.Generator().manual_seed(seed)
    while not test.done:
        rises = gains and test.current_bits >= 4 and len(test.state_dict()["measures"]) >= 20
        test.update(0.1 + 0.03 * torch.randn((), generator=generator).item() + 0.05 * rises)
    return test


def test_noise_is_no_progress() -> None:
    """Of 40 runs of pure noise 38 or more choose `high`; by the threshold alone 20 or more choose less."""
    tests = [noise(seed, gains=False) for seed in range(40)]

    assert sum(test.chosen == 8 for test in tests) >= 38
    assert sum(any(row.gain > test.threshold for row in test.tried) for test in tests) >= 20


def test_progress_above_the_noise_is_found() -> None:
    """Of 40 runs that rise by 5 standard errors from 4 bits on, 38 or more choose 4."""
    tests = [noise(seed, gains=True) for seed in range(40)]

    assert sum(test.chosen == 4 for test in tests) >= 38


def test_the_standard_error_is_that_of_the_two_means() -> None:
    """Halves 1, 3 and 2, 6 have variances 2 and 8: sqrt(10 / 2), over |2| where the gain is relative."""
    tests = [RangeTest(steps_per_bit=4, better=better) for better in ("higher", "lower")]
    for test in tests:
        for value in (1.0, 3.0, 2.0, 6.0):
            test.update(value)

    assert [test.tried[0].gain for test in tests] == [2.0, -1.0]
    assert [test.tried[0].error for test in tests] == pytest.approx([5**0.5, 5**0.5 / 2])
    assert [test.tried[0].progress for test in tests] == [False, False]


@pytest.mark.parametrize("steps", [1, 63, 64, 65, 1000])
def test_plot_fits_a_terminal(steps: int) -> None:
    """Any number of steps becomes at most 64 columns, with both extremes as labels."""
    lines = plot([(2 + i * 3 // steps, i / steps) for i in range(steps)]).splitlines()

    assert len(lines) == 9
    assert max(map(len, lines)) <= 64 + 9
    assert "█" in lines[-2] or steps == 1
