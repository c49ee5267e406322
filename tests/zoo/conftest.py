"""The zoo's table: `--zoo-table FILE` writes what came of each model."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from zoo_models import LIBRARIES
from zoo_trial import STEPS, Outcome, table

from lowbit.machine import here

LONGEST_REMARK = 300
_OUTCOMES: list[Outcome] = []


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the option."""
    parser.addoption("--zoo-table", metavar="FILE", type=Path, help="write a Markdown table of all outcomes here")


@pytest.fixture
def outcomes(request: pytest.FixtureRequest) -> Iterator[list[Outcome]]:
    """Where each test puts its outcome; the table is written after each, so that it outlives a run cut short."""
    yield _OUTCOMES
    path: Path | None = request.config.getoption("--zoo-table")
    if path is not None:
        path.write_text(_page(), encoding="utf-8")


def _page() -> str:
    """The table with what it needs to be read and repeated."""
    versions = ", ".join(f"{name} {module.__version__}" for name, module in LIBRARIES.items())
    good = sum(o.verified and o.restored and not o.failure for o in _OUTCOMES)
    names = len({(o.entry.library, o.entry.name) for o in _OUTCOMES})
    lines = [
        "# The zoo",
        "",
        f"{len(_OUTCOMES)} trials of {names} models, {good} of them without a failure: converted, trained for {STEPS} "
        "steps of SGD on one batch of random data, verified for one step more, evaluated and restored. The restored "
        "model then gives bit for bit what a plain model of its weights gives.",
        "",
        f"```\nmake test-zoo TABLE=benchmarks/ZOO.md\n```\n\n{here()}; {versions}.",
        "",
        "*Layers left* counts what could hold products and stays as it is. `strict=False` says that layers were "
        "refused by name, rules that `verify` asked for them. *MACs in the recipe* is their share of all MACs of a "
        "training step, as proven. Losses are distances to random targets: read them for being finite and close to "
        "those of full precision, not for accuracy. Seconds are of the converted model, of a shared machine.",
        "",
        table(_OUTCOMES),
        "",
        "What was said:",
        "",
        *(
            f"- {o.entry.name}, `{o.recipe}`: {_short(text)}"
            for o in _OUTCOMES
            for text in [*o.remarks, o.failure]
            if text
        ),
    ]
    return "\n".join(lines) + "\n"


def _short(text: str) -> str:
    """The beginning of a long remark, in one line."""
    line = " ".join(text.split())
    return line if len(line) <= LONGEST_REMARK else line[:LONGEST_REMARK] + " …"
