"""What notebooks show of reports, proofs, probes, range tests and costs, and the example notebook itself."""

import builtins
import json
import re
from collections.abc import Callable, Mapping
from html.parser import HTMLParser
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import lowbit
from lowbit.tables import Table, html_of, text_table

NOTEBOOK = Path(__file__).resolve().parents[2] / "examples" / "first_look.ipynb"


def _model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 4))


def _loss(model: nn.Module, batch: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(model(batch), torch.zeros(len(batch), dtype=torch.int64))


def _report() -> lowbit.Report:
    return lowbit.convert_(_model(), "sbm8", rules=[("2", None)])


def _proof() -> lowbit.Proof:
    model = _model()
    lowbit.convert_(model, "sbm8")
    with lowbit.verify(model) as proof:
        _loss(model, torch.randn(8, 16)).backward()
    return proof


def _probe() -> lowbit.Probe:
    model = _model()
    lowbit.convert_(model, "sbm8")
    return lowbit.probe(model, [torch.randn(8, 16)], _loss, bits=(4,))


def _range_test() -> lowbit.RangeTestResult:
    model, measures = _model(), iter(range(100))
    lowbit.convert_(model, "sbm8")
    return lowbit.range_test(model, lambda: float(next(measures)), low=2, high=4, steps_per_bit=8)


def _cost() -> lowbit.Cost:
    model = _model()
    lowbit.convert_(model, "sbm8")
    return lowbit.Cost(lowbit.plan(model, torch.zeros(8, 16), steps=3), lowbit.hardware.BitFusion())


MADE: Mapping[str, Callable[[], Any]] = {
    "report": _report,
    "proof": _proof,
    "probe": _probe,
    "range test": _range_test,
    "cost": _cost,
}


class _Cells(HTMLParser):
    """The texts of the cells of HTML tables."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.cells: list[str] = []
        self.within = False
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:  # noqa: ARG002 - the parser's
        self.within = tag in ("td", "th")
        if self.within:
            self.cells.append("")

    def handle_data(self, data: str) -> None:
        if self.within:
            self.cells[-1] += data

    def handle_endtag(self, tag: str) -> None:
        self.within = self.within and tag not in ("td", "th")


@pytest.mark.parametrize("name", MADE)
def test_a_notebook_shows_what_print_shows(name: str) -> None:
    """Every cell of the HTML tables stands in the printed text, and there are as many words in the tables."""
    made = MADE[name]()
    cells = [cell for cell in _Cells(made._repr_html_()).cells if cell]
    lines = [re.split(r"\s{2,}", line.strip()) for line in str(made).splitlines() if "  " in line.strip()]

    assert len(cells) > 10
    assert [cell for cell in cells if cell not in str(made)] == []
    assert {cell for line in lines for cell in line if not set(cell) <= set("-▁▂▃▄▅▆▇█ ")} - set(cells) <= _axis(made)


def _axis(made: Any) -> set[str]:
    """What the plot of a range test has beside its bars."""
    plot = str(made).split("\n\n")[-1] if isinstance(made, lowbit.RangeTestResult) else ""
    return {cell for line in plot.splitlines() for cell in re.split(r"\s{2,}", line.strip())}


@pytest.mark.parametrize("name", MADE)
def test_plain_values_are_json(name: str) -> None:
    """`to_dict` holds what JSON can hold, and `to_json` is it but for figures that are not finite."""
    made = MADE[name]()
    data = made.to_dict()

    assert json.loads(json.dumps(data)).keys() == data.keys()
    assert json.loads(made.to_json()).keys() == data.keys()


@pytest.mark.parametrize("name", MADE)
def test_frames_have_a_line_for_each_row(name: str) -> None:
    """`to_dataframe` has as many lines as the object has rows."""
    made = MADE[name]()
    frame = made.to_dataframe()

    assert len(frame) == len(made.operands if name == "probe" else made.rows)
    assert len(frame.columns) >= 5


def test_missing_pandas_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without pandas one line says what to install."""
    real = builtins.__import__

    def importing(name: str, *rest: Any, **named: Any) -> ModuleType:
        if name == "pandas":
            raise ModuleNotFoundError(name=name)
        return real(name, *rest, **named)

    report = _report()
    monkeypatch.setattr(builtins, "__import__", importing)
    with pytest.raises(lowbit.RunError, match="needs pandas: pip install pandas"):
        report.to_dataframe()


def test_html_is_escaped_and_aligned() -> None:
    """Texts are escaped, columns of numbers stand to the right, and a drawing keeps its lines."""
    made = html_of(["<a> & b", Table(["name", "n"], [["<i>", "1"], ["x", "-"]]), "#\n##"])

    assert "<p>&lt;a&gt; &amp; b</p>" in made
    assert '<td style="text-align:left">&lt;i&gt;</td><td style="text-align:right">1</td>' in made
    assert "<pre>#\n##</pre>" in made
    assert str(Table(["n"], [["1"]])) == text_table(["n"], [["1"]])


def test_the_example_notebook_runs(tmp_path: Path) -> None:
    """Every cell of the notebook runs without an error, and what it shows is HTML or a figure."""
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    stored = [cell.get("outputs") for cell in notebook.cells if cell.cell_type == "code"]

    nbclient.NotebookClient(notebook, timeout=60, resources={"metadata": {"path": str(tmp_path)}}).execute()
    kinds = {kind for cell in notebook.cells for output in cell.get("outputs", []) for kind in output.get("data", {})}

    assert all(outputs == [] for outputs in stored)  # outputs are not kept in the repository
    assert {"text/html", "application/vnd.plotly.v1+json"} <= kinds
