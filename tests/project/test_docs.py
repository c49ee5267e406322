"""What the pages of documentation promise: links lead somewhere, and tutorials run as a reader would run them."""

import importlib.util
import itertools
import re
import shlex
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import lowbit
from lowbit.cli import completion
from lowbit.cli.main import main
from lowbit.cli.parser import COMMANDS
from lowbit.methods.names import stored
from lowbit.train import models
from lowbit.train.data import Task

ROOT = Path(__file__).resolve().parents[2]
REFERENCE = sorted((ROOT / "docs" / "reference").glob("*.md"))
TUTORIALS = sorted((ROOT / "docs" / "tutorials").glob("*.md"))
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "benchmarks").glob("*.md")])

_spec = importlib.util.spec_from_file_location("hooks", ROOT / "docs" / "hooks.py")
assert _spec is not None
assert _spec.loader is not None
hooks = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(hooks)


def _python(page: Path) -> list[str]:
    """The Python blocks of a page."""
    return re.findall(r"^```python\n(.*?)^```", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


def _commands(page: Path) -> list[str]:
    """The commands of a page: lines of blocks, and what stands between backquotes with an option."""
    text = page.read_text(encoding="utf-8")
    blocks = re.findall(r"^```\w*\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    lines = [line for block in blocks for line in block.split("\n") if re.match(r"(?:[A-Z_]+=\S+ )?lowbit ", line)]
    return [*lines, *re.findall(r"`(lowbit [a-z][^`\n]* --[^`\n]*)`", _prose(text))]


# test_extending.py runs the blocks of docs/extending.md, which need the diffs between them; those of docs/stack.md need
# other libraries.
WITH_CODE = [
    page
    for page in sorted([*(ROOT / "docs").glob("*.md"), *(ROOT / "docs" / "methods").glob("*.md")])
    if _python(page) and page.stem not in ("extending", "stack")
]
# What `model` is on pages that do not speak of a small ResNet; the range test takes hundreds of steps.
MODELS = {"sparse": "gpt", "range-test": "mlp"}


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
def test_the_blocks_of_a_tutorial_run_in_order(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """All Python blocks of a tutorial run one after the other in one namespace, without a warning."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))  # no measured times
    names: dict[str, object] = {"__name__": page.stem}

    for block in _python(page):
        exec(compile(block, page.name, "exec"), names)

    assert capsys.readouterr().out


@pytest.mark.parametrize("page", WITH_CODE, ids=lambda p: p.stem)
def test_the_blocks_of_a_page_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Python blocks of other pages run too, each with a plain `model` and data as a reader has them."""
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {"__name__": page.stem, "re": re, "torch": torch, "F": torch.nn.functional}

    for block in _python(page):
        x, y = torch.randn(4, 1, 8, 8), torch.randint(10, (4,))
        task = Task(kind="image", shape=(1, 8, 8), classes=10)
        model = MODELS.get(page.stem, "resnet20")
        if model == "gpt":
            task = Task(kind="text", shape=(16,), classes=32)
        names |= {"model": models.build(model, task), "x": x, "y": y, "lowbit": lowbit}
        names |= {"loader": [(x, y)], "epochs": 32, "n": 32, "loss": torch.tensor(1.0)}
        exec(compile(block, page.name, "exec"), names)


# The changelog names what is gone, too.
@pytest.mark.parametrize("page", [p for p in PAGES if p.name != "CHANGELOG.md"], ids=lambda p: str(p.relative_to(ROOT)))
def test_commands_of_a_page_are_understood(
    page: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The parser takes every `lowbit ...` line of a page; a command within a sentence may leave out arguments."""
    for command in COMMANDS.values():
        monkeypatch.setattr(command, "run", lambda **_: None)
    monkeypatch.setattr(completion, "script", lambda _: "")

    refused = []
    for line in _commands(page):
        words = list(itertools.takewhile(lambda word: word != ">", shlex.split(line, comments=True)))
        code, error = main(words[words.index("lowbit") + 1 :]), capsys.readouterr().err
        if code and not re.search("missing: |expected one argument", error):
            refused.append(line)

    assert refused == []


@pytest.mark.parametrize("name", stored())
def test_every_recipe_has_a_page(name: str) -> None:
    """A page of docs/methods/ says in its first paragraph: "Recipe: `NAME`."; the site's index follows these."""
    assert name in hooks.pages_by_recipe()


def test_a_page_names_its_recipes_and_others() -> None:
    """One recipe is the first name of its sentence, several are all names of theirs; other sentences do not count."""
    assert hooks.recipes_of("`a`. Recipe: `b`, which is `c` with `d`. `e`.") == ["b"]
    assert hooks.recipes_of("Recipes: `b`, and `c-int8`.\n\n`d`") == ["b", "c-int8"]
    assert hooks.recipes_of("Recipes are data, e.g. `b`.") == []


def test_every_page_has_a_place_in_the_navigation() -> None:
    """The pages of docs/ and those that `nav` of mkdocs.yml names are the same; those of methods may be left out."""
    nav = (ROOT / "mkdocs.yml").read_text(encoding="utf-8").split("\nnav:")[1]
    named = re.findall(r"([\w/-]+\.md)$", nav, re.MULTILINE)
    written = {str(path.relative_to(ROOT / "docs")) for path in (ROOT / "docs").rglob("*.md")}

    assert len(set(named)) == len(named)
    assert set(named) - written == set(hooks.OUTSIDE.values())
    assert {page for page in written - set(named) if not page.startswith("methods/")} == set()


def test_the_index_of_methods_is_made_of_the_recipes() -> None:
    """The index has a row for each recipe, with its page and its own summary."""
    index = hooks.methods_index()

    assert index.count("\n| [`") == len(stored())
    assert f"| [`cpt-int8`](cpt.md) | {lowbit.Recipe.from_name('cpt-int8').summary} |" in index


def test_every_exported_name_is_in_the_reference_once() -> None:
    """What `lowbit` exports has one place in docs/reference/."""
    text = "\n".join(path.read_text(encoding="utf-8") for path in REFERENCE)
    entries = re.findall(r"^::: (\S+)$", text, re.MULTILINE)

    assert len(set(entries)) == len(entries)
    assert [name for name in lowbit.__all__ if f"lowbit.{name}" not in entries] == []


def test_links_become_those_of_the_site() -> None:
    """Pages of other folders move, anchors stay, and code and links to the web are left alone."""
    text = "[a](../../benchmarks/RESULTS.md#on-a-gpu) [b](cost.md) [c](../../README.md) `[d](../../README.md)` [e](https://f.g)"
    readme = "[a](docs/methods/cpt.md) [b](benchmarks/RESULTS.md) [c](examples/own_loop.py)"

    assert hooks.moved(text, "docs/methods/cpt.md", "methods/cpt.md") == (
        "[a](../results.md#on-a-gpu) [b](cost.md) [c](../index.md) `[d](../../README.md)` [e](https://f.g)"
    )
    assert hooks.moved(readme, "README.md", "index.md") == (
        "[a](methods/cpt.md) [b](results.md) [c](examples/own_loop.md)"
    )


def test_a_page_that_loads_from_a_network_is_refused() -> None:
    """A build fails at a script, style or picture of another host, and not at a link."""
    page = SimpleNamespace(file=SimpleNamespace(src_uri="page.md"))
    plain = '<script src="a.js"></script><a href="https://b.c">link</a>'

    assert hooks.on_post_page(plain, page) == plain
    with pytest.raises(ValueError, match=r"page.md loads https://b.c/d.css"):
        hooks.on_post_page('<link rel="stylesheet" href="https://b.c/d.css">', page)
