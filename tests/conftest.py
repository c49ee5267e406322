"""What several tests need: the reference vectors, where they are present."""

from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, settings

from helpers import ORACLES, Vectors

# No test is about time, and machines may be busy.
settings.register_profile("busy", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("busy")


@pytest.fixture
def vectors(request: pytest.FixtureRequest) -> Vectors:
    """The vectors named by the test module's `VECTORS`; skipped, saying so, where the folder is absent."""
    path = ORACLES / request.module.VECTORS
    if not path.exists():
        pytest.skip(f"the reference vectors {path} are not here")
    return Vectors(path)


@pytest.fixture(autouse=True)
def _no_measured_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No test meets the engine timings of whoever runs it."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture(autouse=True)
def _same_global_noise() -> None:
    """Every test begins with the same state of torch's own generator."""
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _no_terminal_width(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is printed is as in a pipe, also where several processes run the tests, which have COLUMNS set."""
    monkeypatch.delenv("COLUMNS", raising=False)
