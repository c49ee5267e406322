import json
import re
import time
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from report_runs import copied

import lowbit.report.page as page_module
from lowbit import Cost, RunError, UsageError
from lowbit.hardware import BitFusion
from lowbit.report.page import LIMIT, json_for_html, page_of, write_report
from lowbit.report.reading import view_of, views_of

EVIL = "</script><script>alert(1)</script><!-- ' \" \u2028 & {{ 7 }}"


class _Page(HTMLParser):
    """What a browser's parser makes of a page: elements with an address, scripts and their texts."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.addresses: list[str] = []
        self.scripts: list[dict[str, str | None]] = []
        self.texts: list[str] = []
        self.within = False
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.addresses += [value or "" for name, value in attrs if name in ("src", "href")]
        self.within = tag == "script"
        if self.within:
            self.scripts.append(dict(attrs))
            self.texts.append("")

    def handle_endtag(self, tag: str) -> None:
        self.within = self.within and tag != "script"

    def handle_data(self, data: str) -> None:
        if self.within:
            self.texts[-1] += data


def _written(folders: list[Path], out: Path) -> str:
    write_report(folders, out)
    return out.read_text(encoding="utf-8")


def _data(text: str) -> Any:
    page = _Page(text)
    ids = [script.get("id") for script in page.scripts]
    return json.loads(page.texts[ids.index("data")])


def test_the_page_loads_nothing(runs: dict[str, Path], tmp_path: Path) -> None:
    """It has no address outside itself, its policy forbids the network, and it stays under the limit."""
    text = _written(list(runs.values()), tmp_path / "report.html")

    assert [a for a in _Page(text).addresses if not a.startswith(("#", "data:"))] == []
    assert "default-src 'none'" in text
    assert 1_000_000 < len(text.encode()) < LIMIT


def test_the_numbers_are_those_of_the_runs(runs: dict[str, Path], tmp_path: Path) -> None:
    """The mean accuracy of the table is that of the results, and the facts name the run's own score."""
    text = _written([runs["int8-0"], runs["int8-1"]], tmp_path / "report.html")
    views = [view_of(runs[name]) for name in ("int8-0", "int8-1")]
    mean = sum(view.score or 0 for view in views) / 2
    (task,) = _data(text)["tasks"]

    assert f"<strong>{mean:.2f}</strong>" in text
    assert [dict(run["facts"])["test accuracy"] for run in task["runs"]] == [f"{view.score:.2f} %" for view in views]


def test_texts_of_runs_are_harmless(runs: dict[str, Path], tmp_path: Path) -> None:
    """Names, settings and notes that look like HTML add no element to the page and arrive as they are."""
    run = copied(runs["int8-0"], tmp_path / "<script>alert(2)<", recipe=EVIL, model=EVIL)
    proof = json.loads((run / "proof.json").read_text())
    proof["rows"][0]["layer"] = EVIL
    (run / "proof.json").write_text(json.dumps(proof | {"notes": [EVIL]}))
    plain = _Page(_written([runs["int8-0"]], tmp_path / "plain.html"))

    text = _written([run, tmp_path / "<img src=x>"], tmp_path / "evil.html")
    (task,) = _data(text)["tasks"]

    assert len(_Page(text).scripts) == len(plain.scripts) == 3
    assert _Page(text).addresses == plain.addresses
    assert task["runs"][0]["label"] == EVIL
    assert EVIL in task["runs"][0]["notes"]
    assert "&lt;img src=x&gt;" in text


def test_a_run_without_figures_and_half_a_character_is_shown(runs: dict[str, Path], tmp_path: Path) -> None:
    """The table of a gated run may be empty, and a setting may hold what UTF-8 cannot."""
    run = copied(runs["dfq-0"], tmp_path / "run", recipe="\ud800")
    table = run / "csv" / "metrics.csv"
    table.write_text(table.read_text().splitlines()[0] + "\n")

    (task,) = _data(_written([run], tmp_path / "report.html"))["tasks"]

    assert task["curves"] == {}
    assert "gates" not in task["runs"][0]["charts"]
    assert task["runs"][0]["label"] == "?"


@pytest.mark.parametrize("value", ["</script>", "<!--", "]]>", "\u2028", "&lt;", "\ud800", 1e400, float("nan"), "\0"])
def test_json_cannot_leave_its_element(value: object) -> None:
    """No value puts one of the characters into the page that HTML reads, and all of it stays JSON in UTF-8."""
    text = json_for_html({"x": [value], "y": {str(value): 1}})

    assert re.search("[<>&\u2028\u2029]", text) is None
    assert json.loads(text.encode())["y"]


def test_energy_is_that_of_the_cost(runs: dict[str, Path], tmp_path: Path) -> None:
    """With an accelerator each run has the energy of its units and stores, which sum to the estimate of `Cost`."""
    hardware = BitFusion()
    estimate = Cost(view_of(runs["int8-0"]).ledger, hardware).on_hardware()["total"]

    write_report([runs["int8-0"]], tmp_path / "report.html", hardware=hardware)
    data = _data((tmp_path / "report.html").read_text())
    (run,) = data["tasks"][0]["runs"]
    bars = data["pool"][run["charts"]["energy"]]["data"]

    assert sum(sum(bar["x"]) for bar in bars) == pytest.approx(estimate.energy_nj / 1e9, rel=1e-4)
    assert len(bars) == 1 + len(estimate.stores)
    assert any(note.startswith("on BitFusion, a model") for note in run["notes"])


def test_the_same_runs_give_the_same_page(runs: dict[str, Path], tmp_path: Path) -> None:
    """Nothing in the page depends on the time or the place of the report."""
    first = _written([runs["cpt-0"]], tmp_path / "a.html")

    assert _written([runs["cpt-0"]], tmp_path / "b.html") == first


def test_what_is_not_shown_is_named(runs: dict[str, Path], tmp_path: Path) -> None:
    """A foreign and a corrupt folder are in the result and in the page, and the others are shown."""
    (tmp_path / "foreign").mkdir()
    corrupt = copied(runs["int8-0"], tmp_path / "corrupt")
    (corrupt / "config.yaml").write_bytes(b"\x00\xff")

    skipped = write_report([tmp_path / "foreign", corrupt, runs["int8-0"]], tmp_path / "report.html")
    text = (tmp_path / "report.html").read_text()

    assert list(skipped) == [str(tmp_path / "foreign"), str(corrupt)]
    assert all(name in text for name in skipped)
    assert len(_data(text)["tasks"][0]["runs"]) == 1


def test_without_a_run_there_is_no_page(tmp_path: Path) -> None:
    """The error says why each folder is not shown, and no file is written."""
    with pytest.raises(UsageError, match="not a run folder"):
        write_report([tmp_path], tmp_path / "report.html")

    assert not (tmp_path / "report.html").exists()


def test_a_missing_library_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without plotly one line says what to install."""

    def missing(name: str) -> None:
        raise ModuleNotFoundError(name=name)

    page_module._plotly_script.cache_clear()
    monkeypatch.setattr(page_module.resources, "files", missing)
    with pytest.raises(RunError, match=r"needs plotly: pip install 'lowbit\[report\]'"):
        page_module._plotly_script()


def test_200_runs_fit_in_a_page(runs: dict[str, Path], tmp_path: Path) -> None:
    """40 settings of 5 seeds with 2,000 logged rows each stay under the limit, and the page says what was thinned."""
    pattern = copied(runs["cpt-0"], tmp_path / "pattern")
    table = pattern / "csv" / "metrics.csv"
    header, *rows = table.read_text().splitlines()
    number = header.split(",").index("step")
    cells = [row.split(",") for row in rows]
    lines = [",".join([*c[:number], str(i + 1), *c[number + 1 :]]) for i, c in enumerate((cells * 2000)[:2000])]
    table.write_text("\n".join([header, *lines]) + "\n")
    folders = [
        copied(pattern, tmp_path / f"run-{i}", accuracy=0.5 + i / 1000, seed=i % 5, lr=0.01 * (1 + i // 5))
        for i in range(200)
    ]
    began = time.perf_counter()

    text = _written(folders, tmp_path / "report.html")
    print(f"{time.perf_counter() - began:.1f} s, {len(text.encode()) / 1e6:.1f} MB")
    (task,) = _data(text)["tasks"]

    assert len(text.encode()) <= LIMIT
    assert len(task["runs"]) == 200
    assert len(task["labels"]) == 40
    assert "is the mean of neighbouring rows" in text


def test_a_page_beyond_the_limit_is_refused(runs: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """Even the coarsest page must fit; the error gives both sizes."""
    views, _ = views_of([runs["cpt-0"]])
    monkeypatch.setattr(page_module, "LIMIT", 1000)

    with pytest.raises(RunError, match="1,000 is the limit"):
        page_of(views, {})
