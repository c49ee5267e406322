"""The page of other people's loops, run as a reader would, as far as the libraries are installed."""

import re
from pathlib import Path

import pytest

PAGE = Path(__file__).resolve().parents[2] / "docs" / "stack.md"
BLOCKS = re.findall(r"^## ([^\n]*)\n(?:(?!^## ).)*?^```python\n(.*?)^```", PAGE.read_text(), re.MULTILINE | re.DOTALL)


@pytest.mark.filterwarnings("default", "error:.*lowbit")  # the libraries' own warnings are not ours to mend
@pytest.mark.parametrize("code", [code for _, code in BLOCKS], ids=[heading for heading, _ in BLOCKS])
def test_an_example_runs(code: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each block runs by itself; it is skipped, saying so, where a library of its imports is not installed."""
    for library in re.findall(r"^(?:from|import) (\w+)", code, re.MULTILINE):
        pytest.importorskip(library, reason=f"{library} is not installed")
    monkeypatch.chdir(tmp_path)

    exec(compile(code, PAGE.name, "exec"), {"__name__": "stack"})


def test_the_blocks_are_found() -> None:
    """A section without a block, or a block that is not run, would show here."""
    assert len(BLOCKS) == PAGE.read_text().count("```python") == 8
