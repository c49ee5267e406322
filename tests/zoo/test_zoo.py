"""Public architectures convert, train, verify and restore; `make test-zoo` runs this in an environment of its own."""

import pytest
from zoo_models import ENTRIES, Entry
from zoo_trial import Outcome, trial

RECIPES = ("sbm8", "int8")
# These run both recipes, the others take turns.
BOTH = {"alexnet (small)", "resnet18", "densenet121", "mobilenet_v2", "convnext_tiny", "vit (small)", "gpt2 (small)"}
CHANNELS_LAST = {"resnet18", "densenet121", "mobilenet_v2", "convnext_tiny"}


def _recipes(turn: int, entry: Entry) -> tuple[str, ...]:
    return RECIPES if entry.name in BOTH else (RECIPES[turn % 2],)


CASES = [
    *((entry, recipe, False) for turn, entry in enumerate(ENTRIES) for recipe in _recipes(turn, entry)),
    *((entry, RECIPES[turn % 2], True) for turn, entry in enumerate(ENTRIES) if entry.name in CHANNELS_LAST),
]


@pytest.mark.filterwarnings("default")  # the libraries' own warnings are not ours to mend
@pytest.mark.parametrize(
    ("entry", "recipe", "channels_last"),
    CASES,
    ids=[f"{e.library}-{e.name}-{r}{'-channels_last' * c}".replace(" ", "") for e, r, c in CASES],
)
def test_the_model_converts_trains_verifies_and_restores(
    entry: Entry, recipe: str, channels_last: bool, outcomes: list[Outcome]
) -> None:
    """Three steps have finite losses that are not full precision's, the proof holds, and the way back is exact."""
    outcome = trial(entry, recipe, channels_last=channels_last)
    outcomes.append(outcome)

    assert outcome.failure == ""
    assert outcome.verified
    assert outcome.restored
    assert outcome.converted > 0
