"""The page in a real browser; skipped where Chromium or playwright is missing."""

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from report_runs import copied

from lowbit.report.page import write_report

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
EVIL = "<img src=x onerror=alert(1)></script><b>"


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Chromium without a window."""
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    if CHROMIUM is None:
        pytest.skip("there is no Chromium: apt-get install chromium")
    with playwright.sync_playwright() as started:
        opened = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield opened
        opened.close()


@pytest.fixture(scope="module")
def page_file(runs: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A page of all kinds of runs on two tasks, one of them with a hostile name."""
    base = tmp_path_factory.mktemp("page")
    evil = copied(runs["int8-1"], base / "evil <b>", recipe=EVIL, model="other")
    write_report([*runs.values(), evil, base / "nothing"], base / "report.html")
    return base / "report.html"


class Shown:
    """A page that is open, and what went wrong in it."""

    def __init__(self, browser: Any, file: Path, **settings: Any) -> None:
        self.faults: list[str] = []
        self.context = browser.new_context(viewport={"width": 1280, "height": 900}, **settings)
        self.page = self.context.new_page()
        self.page.on("console", lambda m: self.faults.append(m.text) if m.type in ("error", "warning") else None)
        self.page.on("pageerror", lambda error: self.faults.append(str(error)))
        self.page.on("dialog", lambda dialog: self.faults.append(f"dialog {dialog.message}"))
        self.page.on("request", lambda r: self.faults.append(r.url) if r.url.startswith(("http", "ws")) else None)
        self.page.goto(file.as_uri())
        self.page.wait_for_selector("body[data-ready]")

    def choose_run(self, name: str) -> None:
        """Select a run by the end of its name."""
        value = self.page.evaluate(
            "n => [...document.querySelectorAll('#run option')].find(o => o.text == n).value", name
        )
        self.page.select_option("#run", value)

    def count(self, selector: str) -> int:
        """How many elements match."""
        return int(self.page.locator(selector).count())


@pytest.fixture(scope="module")
def opened(browser: Any, page_file: Path) -> Iterator[Shown]:
    """The page, open once for all tests: to load it takes a second."""
    opened = Shown(browser, page_file, color_scheme="light")
    yield opened
    opened.context.close()


@pytest.fixture
def shown(opened: Shown) -> Shown:
    """The page as it is when it opens, in light colours at 1280 pixels."""
    opened.page.emulate_media(color_scheme="light")
    opened.page.set_viewport_size({"width": 1280, "height": 900})
    for choice, value in (("#task", "0"), ("#lines", "runs"), ("#metric", "GBitOPs"), ("#against", "step")):
        opened.page.select_option(choice, value)
    opened.faults.clear()
    return opened


def test_charts_are_drawn_without_errors(shown: Shown) -> None:
    """Every visible chart has a drawing, for each run, with nothing on the console and no request."""
    names = shown.page.locator("#run option").all_text_contents()
    for name in names:
        shown.choose_run(name)
        charts = shown.count("figure.chart:not([hidden])")
        assert shown.count("figure.chart:not([hidden]) .main-svg:first-child") == charts >= 6

    assert len(names) == 7
    assert shown.faults == []


def test_a_gated_run_shows_its_gates(shown: Shown) -> None:
    """The charts of gates are there for the gated run only."""
    shown.choose_run("dfq-0")
    gated = shown.page.locator("#gates").is_visible()
    shown.choose_run("cpt-0")

    assert gated
    assert not shown.page.locator("#gates").is_visible()


def test_an_unfinished_run_says_so(shown: Shown) -> None:
    """Its facts begin with its state."""
    shown.choose_run("stopped")

    assert "unfinished: 20 steps so far" in shown.page.locator("#facts").inner_text()


def test_settings_can_be_hidden(shown: Shown) -> None:
    """A click on a chip takes a setting out of charts and table, and the front is drawn anew."""
    before = shown.page.evaluate("document.querySelector('#curves .plot').data.length")
    shown.page.get_by_role("checkbox", name="int8").uncheck()
    after = shown.page.evaluate("document.querySelector('#curves .plot').data.length")
    bars = shown.page.evaluate("document.querySelector('#products .plot').data[0].y")

    assert (before, after) == (7, 4)
    assert bars == ["fp32", "cpt", "dfq"]
    assert not shown.page.locator("tr[data-label=int8]").first.is_visible()
    shown.page.get_by_role("button", name="Show all").click()
    assert shown.page.locator("tr[data-label=int8]").first.is_visible()


def test_the_metric_changes_the_costs(shown: Shown) -> None:
    """Another cost metric is on the axis and changes the values."""
    value = "document.querySelector('#accuracy .plot').data.find(t => t.meta.role == 'mean').x[0]"
    before = shown.page.evaluate(value)
    shown.page.select_option("#metric", "MACs")

    assert shown.page.evaluate(value) != before
    assert "MACs" in shown.page.locator("#accuracy .xtitle").text_content()


def test_the_front_is_of_what_is_shown(shown: Shown) -> None:
    """With only fp32 left the front is one point, that of fp32."""
    for name in ("int8", "cpt", "dfq"):
        shown.page.get_by_role("checkbox", name=name).uncheck()
    front, mean = shown.page.evaluate(
        "['front', 'mean'].map(role => document.querySelector('#accuracy .plot').data.find(t => t.meta.role == role).x)"
    )

    assert front == mean
    assert len(front) == 1


def test_curves_can_be_against_cost(shown: Shown) -> None:
    """The axis changes from steps to bit operations."""
    shown.page.select_option("#against", "cost")

    assert "bit operations" in shown.page.locator("#curves .xtitle").text_content()


def test_lines_can_be_means(shown: Shown) -> None:
    """The mean of two seeds lies between them at each step, and there is a line for each setting."""
    lines = "document.querySelector('#curves .plot').data.filter(t => t.meta.label == 'fp32').map(t => t.y)"
    first, second = shown.page.evaluate(lines)
    shown.page.select_option("#lines", "means")
    (mean,) = shown.page.evaluate(lines)
    count = shown.page.evaluate("document.querySelector('#curves .plot').data.length")
    shown.page.select_option("#against", "cost")
    ends = "document.querySelector('#curves .plot').data.find(t => t.meta.label == 'cpt').x.at(-1)"
    costs = [shown.page.evaluate(ends)]
    shown.page.select_option("#lines", "runs")
    costs.append(shown.page.evaluate(ends))

    assert costs[0] == costs[1]
    assert mean == pytest.approx([(a + b) / 2 for a, b in zip(first, second, strict=True)])
    assert count == 4


def test_each_chart_has_its_data_as_a_table(shown: Shown) -> None:
    """Opened by the keyboard, each visible chart's table has as many rows as its data need."""
    shown.choose_run("dfq-0")
    for details in shown.page.locator("figure.chart:not([hidden]) details.data").all():
        details.locator("summary").focus()
        shown.page.keyboard.press("Enter")
        details.locator("tbody tr").first.wait_for()

        assert details.locator("thead th").count() >= 2
    assert shown.count("#bits details.data tbody tr") == 3
    assert shown.faults == []


@pytest.mark.parametrize("width", [360, 390, 768, 1280])
def test_nothing_is_wider_than_the_screen(shown: Shown, width: int) -> None:
    """From phones on there is no horizontal scrolling of the page."""
    shown.page.set_viewport_size({"width": width, "height": 800})

    # Charts are drawn anew a moment later: it fails by running out of time.
    shown.page.wait_for_function("width => document.documentElement.scrollWidth <= width", arg=width)


def _contrast(first: list[float], second: list[float]) -> float:
    """The contrast of two colours by WCAG."""

    def luminance(colour: list[float]) -> float:
        parts = [c / 255 / 12.92 if c / 255 <= 0.04045 else ((c / 255 + 0.055) / 1.055) ** 2.4 for c in colour]
        return 0.2126 * parts[0] + 0.7152 * parts[1] + 0.0722 * parts[2]

    light, dark = sorted((luminance(first), luminance(second)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_colours_follow_the_system_and_can_be_read(browser: Any, page_file: Path, scheme: str) -> None:
    """In both schemes text, quiet text and the texts of charts have a contrast of at least 4.5 to 1 on a card."""
    shown = Shown(browser, page_file, color_scheme=scheme)
    colours = shown.page.evaluate(
        """() => {
          const style = (element) => getComputedStyle(document.querySelector(element));
          const rgb = (colour) => colour.match(/[\\d.]+/g).slice(0, 3).map(Number);
          return [rgb(style('.card').backgroundColor), rgb(style('#accuracy .xtick text').fill),
                  ...['h3', 'p.quiet', 'summary', '.tag'].map((element) => rgb(style(element).color))];
        }"""
    )
    ground, *inks = colours
    shown.context.close()

    assert (sum(ground) > 600) == (scheme == "light")
    assert [ink for ink in inks if _contrast(ground, ink) < 4.5] == []


def test_a_change_of_colours_redraws_the_charts(shown: Shown) -> None:
    """When the system turns dark, so do the texts of the charts."""
    fill = "getComputedStyle(document.querySelector('#accuracy .xtick text')).fill"
    before = shown.page.evaluate(fill)
    shown.page.emulate_media(color_scheme="dark")
    shown.page.wait_for_timeout(100)

    assert shown.page.evaluate(fill) != before


def test_hostile_names_are_text(shown: Shown) -> None:
    """The other task's label is shown as it is, and nothing of it became an element or ran."""
    shown.page.select_option("#task", label="other on digits")

    assert EVIL in shown.page.locator("#chips").inner_text()
    assert EVIL in shown.page.locator("#accuracy").inner_text() or EVIL in (
        shown.page.locator("#accuracy .plot").text_content() or ""
    )
    assert shown.count("img") == 0
    assert shown.faults == []


def test_one_run_makes_a_page(browser: Any, runs: dict[str, Path], tmp_path: Path) -> None:
    """A single run has all of its charts, and no choice of tasks."""
    write_report([runs["fp32-0"]], tmp_path / "one.html")
    shown = Shown(browser, tmp_path / "one.html")
    visible = shown.page.locator("#task").is_visible()
    drawn = shown.count("figure.chart:not([hidden]) .main-svg:first-child")
    shown.context.close()

    assert not visible
    assert drawn >= 7
    assert shown.faults == []
