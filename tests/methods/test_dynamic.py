"""Settings of gates that no run could have."""

from typing import Any

import pytest

from lowbit.errors import UsageError
from lowbit.methods.recipe import Recipe


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"choices": [[3, 6]]}, "two or more pairs|give a tuple"),
        ({"choices": [[3, 6], [3, 6]]}, "each pair once"),
        ({"choices": [[0, 6], [3, 6]]}, r"\[0, 0\]"),
        ({"choices": [3, 6]}, "two or more pairs|give a tuple"),
        ({"choices": 3}, "choices=3: give a tuple"),
        ({"targets": []}, "above 0"),
        ({"targets": [0]}, "above 0"),
        ({"targets": [1, 2]}, "threshold and decay"),
        ({"threshold": 0.1, "decay": 0.3}, "threshold and decay"),
        ({"mixing": "inputs"}, "Did you mean 'input'"),
        ({"strength": -1}, "strength=-1"),
        ({"hidden": 0}, "hidden=0"),
        ({"low": 3}, "no setting 'low'"),
    ],
)
def test_impossible_settings_are_refused(changes: dict[str, Any], message: str) -> None:
    """Each setting of gates that no run could have is a UsageError."""
    with pytest.raises(UsageError, match=message):
        Recipe.from_name("dfq").tuned(**changes)
