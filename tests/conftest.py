"""What several tests need: the reference vectors, where they are present."""

from pathlib import Path

import pytest
import torch

ORACLES = Path(__file__).resolve().parents[2] / "shared" / "oracles"


class Vectors:
    """The arrays of one file of reference vectors as tensors."""

    def __init__(self, path: Path) -> None:
        import numpy as np

        with np.load(path, allow_pickle=False) as arrays:
            self._arrays = {name: arrays[name] for name in arrays.files}

    def __getitem__(self, name: str) -> torch.Tensor:
        return torch.from_numpy(self._arrays[name].copy())

    def __contains__(self, name: str) -> bool:
        return name in self._arrays


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
