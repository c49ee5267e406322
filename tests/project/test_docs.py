"""What the pages of documentation promise: links lead somewhere, and tutorials run as a reader would run them."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
TUTORIALS = sorted((ROOT / "docs" / "tutorials").glob("*.md"))
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "benchmarks").glob("*.md")])

# Runs the blocks of a page in order in one namespace. A block is a file for tracebacks and `inspect`.
RUNNER = """
import re, sys
names = {"__name__": "__main__"}
for block in re.findall(r"(?ms)^```python\\n(.*?)^```", open(sys.argv[1], encoding="utf-8").read()):
    exec(compile(block, sys.argv[1], "exec"), names)
"""


def _prose(text: str) -> str:
    """A page without its blocks of code, in which brackets are no links."""
    return re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)


def _anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", _prose(page.read_text(encoding="utf-8")), re.MULTILINE)
    words = [re.sub(r"[^\w\- ]", "", re.sub(r"\]\([^)]*\)", "", heading).lower()) for heading in headings]
    return {word.strip().replace(" ", "-") for word in words}


def broken_links(page: Path) -> list[str]:
    """Relative links of a page whose file or heading is not there."""
    links = re.findall(r"\]\(([^)\s]+)\)", re.sub(r"`[^`\n]*`", "", _prose(page.read_text(encoding="utf-8"))))
    broken = []
    for link in links:
        path, _, anchor = link.partition("#")
        if ":" in path:
            continue
        target = (page.parent / path).resolve() if path else page
        if not target.exists() or (anchor and anchor not in _anchors(target)):
            broken.append(link)
    return broken


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_every_relative_link_leads_to_a_file_and_a_heading(page: Path) -> None:
    """No page links to a file that is not there, or to a heading that the file does not have."""
    assert broken_links(page) == []


def test_a_broken_link_is_seen(tmp_path: Path) -> None:
    """The check above sees a missing file and a missing heading, and not links in code."""
    page = tmp_path / "page.md"
    page.write_text(
        "# A *heading*, twice\n[a](page.md#a-heading-twice) [b](no.md) [c](#no)\n```\n[d](no.md)\n```\n`[e](f)`"
    )

    assert broken_links(page) == ["no.md", "#no"]


@pytest.mark.parametrize("page", TUTORIALS, ids=lambda p: p.stem)
def test_the_blocks_of_a_tutorial_run_in_order(page: Path, tmp_path: Path) -> None:
    """All Python blocks of a tutorial run one after the other in one namespace, without a warning."""
    environment = os.environ | {"XDG_CACHE_HOME": str(tmp_path), "OMP_NUM_THREADS": "1"}

    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", RUNNER, str(page)],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
        cwd=tmp_path,
        env=environment,
    )

    assert done.returncode == 0, done.stderr
    assert done.stdout
