from pathlib import Path

import pytest
from report_runs import gated, make_run, unfinished


@pytest.fixture(scope="session")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Runs by name: two seeds of fp32 and of int8, a schedule (cpt), a run with gates, one without an end."""
    base = tmp_path_factory.mktemp("runs")
    made = {
        name: make_run(base / name, recipe, seed, cycles=4 if recipe == "cpt" else None)
        for name, recipe, seed in (
            ("fp32-0", "fp32", 0),
            ("fp32-1", "fp32", 1),
            ("int8-0", "int8", 0),
            ("int8-1", "int8", 1),
            ("cpt-0", "cpt", 0),
        )
    }
    made["dfq-0"] = gated(made["cpt-0"], base / "dfq-0")
    made["stopped"] = unfinished(made["int8-0"], base / "stopped")
    return made
