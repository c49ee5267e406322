"""PFQ's plateau rule: the authors' recorded runs, when stages turn, and that its state resumes."""

import json
import math
import re
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from helpers import recorded
from lowbit.errors import RunError, UsageError
from lowbit.schedules import (
    PlateauRule,
    Progressive,
)


def _replay(case: dict[str, Any]) -> tuple[Progressive, list[int], list[int], list[int]]:
    """The rule after a recorded trace: bits and gradient bits of each epoch, and the epochs that ended a stage."""
    rule = Progressive(
        bits=case["bits_schedule"],
        grad_bits=case["grad_bits_schedule"],
        threshold=case["initial_threshold"],
        decay=case["decay"],
    )
    bits, grad_bits, turns = [], [], []
    for epoch, loss in enumerate(case["trace"], start=1):
        bits.append(rule.current_bits)
        grad_bits.append(rule.current_grad_bits)
        if rule.update(loss):
            turns.append(epoch)
    return rule, bits, grad_bits, turns


def test_every_recorded_case_of_pfq_is_tested() -> None:
    """The tests below go through all 41 recorded cases, in each of which an epoch is one iteration."""
    cases = recorded("pfq_stages.json")["cases"]

    assert len(cases) == 41
    assert all(case["eval_every"] == case["loader_len"] == 1 for case in cases)


@pytest.mark.parametrize("case", range(41))
def test_bits_are_those_of_the_authors_run(case: int) -> None:
    """The bits of every iteration equal those of the authors' training loop, forward and backward."""
    run = recorded("pfq_stages.json")["cases"][case]

    _, bits, grad_bits, _ = _replay(run)

    assert (bits, grad_bits) == (run["bits"], run["grad_bits"])


@pytest.mark.parametrize("case", range(41))
def test_stages_turn_where_the_authors_turn(case: int) -> None:
    """`update` reports a new stage in exactly the recorded epochs."""
    run = recorded("pfq_stages.json")["cases"][case]

    assert _replay(run)[3] == run["turning_epochs"]


@pytest.mark.parametrize("case", range(41))
def test_threshold_and_scale_end_as_the_authors(case: int) -> None:
    """The last threshold and scale equal the recorded ones to the last bit."""
    run = recorded("pfq_stages.json")["cases"][case]

    rule = _replay(run)[0]

    assert (rule.threshold, rule.scale) == (run["final_threshold"], run["final_scale_loss"])


def _four_stages() -> Progressive:
    return Progressive(bits=[3, 4, 6, 8], grad_bits=[6, 6, 8, 8], threshold=0.05, decay=0.3)


def test_a_flat_loss_moves_on_every_five_epochs() -> None:
    """Each of the first three stages lasts five epochs, the last one for good."""
    rule = _four_stages()
    turns = [epoch for epoch in range(1, 41) if rule.update(1.0)]

    assert turns == [5, 10, 15]
    assert (rule.current_bits, rule.current_grad_bits) == (8, 8)


def test_the_third_switch_keeps_the_threshold() -> None:
    """The threshold shrinks after the first and the second switch only."""
    rule = _four_stages()
    seen = [rule.threshold for epoch in range(20) if rule.update(1.0)]

    assert seen == [0.05 * 0.3, 0.05 * 0.3 * 0.3, 0.05 * 0.3 * 0.3]


def test_a_rising_loss_never_moves_on() -> None:
    """A loss that moves by more than the threshold in five epochs is no plateau, whatever its direction."""
    rule = _four_stages()

    assert not any(rule.update(1 + 0.1 * epoch) for epoch in range(50))


def test_a_move_of_exactly_the_threshold_is_a_plateau() -> None:
    """Only a larger move refuses; all numbers here are exact in binary."""
    rule = Progressive(bits=[3, 8], grad_bits=[8, 8], threshold=0.25, decay=0.5)
    # The mean of 5, 5, 3, 3, 4 is 4, and every move to the last is at most 1 = 0.25 * 4.
    switched = [rule.update(loss) for loss in (5.0, 5.0, 3.0, 3.0, 4.0)]

    assert switched == [False, False, False, False, True]


def test_a_move_just_beyond_the_threshold_is_not() -> None:
    """The same losses with a threshold that is one float smaller are no plateau."""
    rule = Progressive(bits=[3, 8], grad_bits=[8, 8], threshold=math.nextafter(0.25, 0), decay=0.5)

    assert not any(rule.update(loss) for loss in (5.0, 5.0, 3.0, 3.0, 4.0))


def test_losses_of_zero_are_a_plateau_and_the_smallest_move_is_not() -> None:
    """Where the first losses are all 0 nothing is divided by them."""
    flat, moved = _four_stages(), _four_stages()
    for _ in range(10):
        moved.update(0.0)

    assert [flat.update(0.0) for _ in range(5)] == [False] * 4 + [True]
    assert not any(moved.update(loss) for loss in (0.0, 0.0, 0.0, 0.0, 1e-30))


def test_evaluation_can_know_the_bits_of_the_last_stage() -> None:
    """`max_bits` is that of the last stage from the beginning."""
    assert _four_stages().max_bits == 8


@pytest.mark.parametrize("loss", [math.nan, math.inf, -math.inf])
def test_a_loss_that_is_no_number_is_an_error(loss: float) -> None:
    """The message names epoch and loss, and nothing is remembered of it."""
    rule = _four_stages()
    rule.update(1.0)
    before = rule.state_dict()

    with pytest.raises(RunError, match=f"the loss of epoch 2 is {loss}: training diverged"):
        rule.update(loss)
    assert rule.state_dict() == before


def test_negative_losses_are_refused() -> None:
    """The rule divides by the mean of the first losses; a negative one would call every loss a plateau."""
    with pytest.raises(UsageError, match=re.escape("mean loss of the first epochs is -1.0")):
        _four_stages().update(-1.0)


@given(
    losses=st.lists(st.sampled_from([2.0, 2.0625, 1.9375, 1.5, 3.0]), min_size=1, max_size=40),
    cut=st.integers(0, 40),
)
def test_a_saved_rule_continues_identically(losses: list[float], cut: int) -> None:
    """N epochs give what k epochs, saving as JSON, loading and N - k epochs give, in the middle of a window too."""
    whole, first, second = _four_stages(), _four_stages(), _four_stages()
    uncut = [(whole.update(loss), whole.current_bits, whole.threshold, whole.scale) for loss in losses]

    for loss in losses[:cut]:
        first.update(loss)
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    rest = [(second.update(loss), second.current_bits, second.threshold, second.scale) for loss in losses[cut:]]

    assert rest == uncut[cut:]
    assert second.state_dict() == whole.state_dict()


def test_a_saved_state_is_a_copy() -> None:
    """What was saved does not change when the rule goes on."""
    rule = _four_stages()
    rule.update(2.0)
    saved = rule.state_dict()
    rule.update(3.0)

    assert saved == {"threshold": 0.05, "stage": 0, "epochs": 1, "first_losses": 2.0, "window": [2.0]}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"stage": 2}, "stage 2 of a rule with 2 stages"),
        ({"extra": 1}, "state of a plateau rule has the unknown entry .extra"),
    ],
)
def test_a_state_that_does_not_fit_is_refused(change: dict[str, int], message: str) -> None:
    """Loading names what is wrong with a state."""
    state = {**_four_stages().state_dict(), **change}

    with pytest.raises(UsageError, match=message):
        Progressive(bits=[3, 8], grad_bits=[6, 8], threshold=0.05, decay=0.3).load_state_dict(state)


@pytest.mark.parametrize(("stages", "message"), [(0, "stages=0"), (True, "stages=True")])
def test_a_plateau_rule_has_a_stage(stages: int, message: str) -> None:
    """The number of stages is a whole number."""
    with pytest.raises(UsageError, match=message):
        PlateauRule(stages=stages, threshold=0.1, decay=1)
