"""What the documentation site adds to the pages of docs/: pages of other folders, an index of methods, recipes as data.

Pages are written for GitHub, where links follow the folders of the repository. On the site the README is the home page,
and the pages of `OUTSIDE` and the examples lie beside those of docs/, so links to them are rewritten.
"""

import ast
import posixpath
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lowbit import Recipe
from lowbit.methods.names import folder, stored

ROOT = Path(__file__).resolve().parents[1]
METHODS = ROOT / "docs" / "methods"
INDEX = "methods/index.md"

# A page of the repository outside docs/, and the page of the site that shows it.
OUTSIDE = {
    "README.md": "index.md",
    "CHANGELOG.md": "changes.md",
    "CONTRIBUTING.md": "contributing.md",
    "benchmarks/RESULTS.md": "results.md",
    "benchmarks/ZOO.md": "zoo.md",
}
EXAMPLES = {f"examples/{path.name}": f"examples/{path.stem}.md" for path in sorted((ROOT / "examples").glob("*.py"))}


def recipes_of(page: str) -> list[str]:
    """The recipes that a page of a method describes: the name after "Recipe:", or all names after "Recipes:"."""
    sentence = re.search(r"\bRecipe(s?): (.*?)\.(?:\s|$)", page)
    names = re.findall(r"`([\w-]+)`", sentence[2]) if sentence else []
    return names if sentence and sentence[1] else names[:1]


def pages_by_recipe() -> dict[str, Path]:
    """For each recipe that some page of docs/methods/ describes, that page."""
    return {
        name: path
        for path in sorted(METHODS.glob("*.md"))
        for name in recipes_of(path.read_text(encoding="utf-8"))
        if name in stored()
    }


def methods_index() -> str:
    """The page that lists all recipes, from their own data."""
    pages = pages_by_recipe()
    rows = [
        f"| [`{name}`]({pages[name].name}) | {recipe.summary} | {recipe.source} |"
        for name in stored()
        for recipe in [Recipe.from_name(name)]
    ]
    head = (
        "# Methods\n\nA recipe is a method as data: six number formats (for the two operands of three products), the"
        " normalisation, and policies for the first and the last layer. `lowbit recipes NAME` shows one.\n\n"
        "| recipe | what it does | source |\n|---|---|---|\n"
    )
    return head + "\n".join(rows) + "\n"


def as_data(page: str) -> str:
    """The TOML of the recipes that a page describes, folded; empty for a page of no recipe."""
    files = [name for name in recipes_of(page) if name in stored()]
    if not files:
        return ""
    parts = ["\n\n## As data\n"]
    for name in files:
        text = (folder() / f"{name}.toml").read_text(encoding="utf-8")
        block = "\n".join(f"    {line}".rstrip() for line in f"```toml\n{text.rstrip()}\n```".split("\n"))
        parts.append(f'??? note "{name}.toml"\n\n{block}\n')
    return "\n".join(parts)


def moved(markdown: str, source: str, site: str) -> str:
    """A page's text with its relative links made those of the site.

    Args:
        markdown: the text.
        source: path of the page in the repository.
        site: path of the page on the site, from the folder of pages.
    """

    def link(match: re.Match[str]) -> str:
        target, _, anchor = match[1].partition("#")
        if not target or ":" in target:
            return match[0]
        there = posixpath.normpath(posixpath.join(posixpath.dirname(source), target))
        page = OUTSIDE.get(there) or EXAMPLES.get(there) or there.removeprefix("docs/")
        return f"]({posixpath.relpath(page, posixpath.dirname(site) or '.')}{'#' + anchor if anchor else ''})"

    return _outside_code(markdown, lambda text: re.sub(r"\]\(([^)\s]+)\)", link, text))


def _outside_code(markdown: str, change: Callable[[str], str]) -> str:
    """A text with everything changed except what stands in fences and between backquotes."""
    pieces = re.split(r"(^```.*?^```|``[^\n]*?``|`[^`\n]*`)", markdown, flags=re.MULTILINE | re.DOTALL)
    joined = "\0".join(pieces[::2])
    return "".join(
        piece for pair in zip(change(joined).split("\0"), [*pieces[1::2], ""], strict=True) for piece in pair
    )


def _example(path: str) -> str:
    """A page that shows a script: its docstring in words, then the whole."""
    text = (ROOT / path).read_text(encoding="utf-8")
    title = (ast.get_docstring(ast.parse(text)) or path).split("\n")[0].rstrip(".")
    return f"# {title}\n\n`python {path}`\n\n```python\n{text}```\n"


def _title(markdown: str) -> str:
    """What navigation calls a page: its first heading, without what follows a colon."""
    heading = re.search(r"^# (.+)$", markdown, re.MULTILINE)
    return heading[1].split(": ")[0].replace("`", "") if heading else ""


def on_config(config: Any) -> None:
    """List the pages of methods and examples that `mkdocs.yml` does not place itself."""
    entries = [entry for section in config.nav for pages in section.values() for entry in pages]
    placed = [page for entry in entries for page in (entry.values() if isinstance(entry, dict) else [entry])]
    recipes = sorted(f"methods/{path.name}" for path in set(pages_by_recipe().values()))
    others = sorted(f"methods/{path.name}" for path in METHODS.glob("*.md"))
    lists: dict[str, list[str | dict[str, str]]] = {
        "Methods": [
            {"All recipes": INDEX},
            *(page for page in dict.fromkeys([*recipes, *others]) if page not in placed),
        ],
        "Examples": list(EXAMPLES.values()),
    }
    for section in config.nav:
        for title, pages in section.items():
            if title in lists:
                section[title] = [*lists[title], *pages]


def on_files(files: Any, config: Any) -> None:
    """Add the pages that are not files of docs/."""
    from mkdocs.structure.files import File

    for source, site in OUTSIDE.items():
        files.append(File.generated(config, site, content=(ROOT / source).read_text(encoding="utf-8")))
    for source, site in EXAMPLES.items():
        files.append(File.generated(config, site, content=_example(source)))
    files.append(File.generated(config, INDEX, content=methods_index()))


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Rewrite links, append a method's recipes, and give the navigation a short title."""
    site = page.file.src_uri
    source = {v: k for k, v in OUTSIDE.items()}.get(site, f"docs/{site}")
    if site == "index.md":
        page.meta |= {"title": "lowbit", "hide": ["navigation"]}
    else:
        page.meta["title"] = _title(markdown)
    if site in EXAMPLES.values():
        page.meta["search"] = {"exclude": True}  # whole scripts would hide everything else
    added = as_data(markdown) if site.startswith("methods/") and site != INDEX else ""
    return moved(markdown, source, site) + added


def on_post_page(output: str, page: Any, **_: Any) -> str:
    """Refuse a page that loads something from a network; links that a reader may follow are no such thing."""
    loaded = re.findall(r"<(?:script|img|iframe|link)\b[^>]*?\b(?:src|href)=[\"']?((?:https?:)?//[^\"' >]+)", output)
    if loaded:
        raise ValueError(f"{page.file.src_uri} loads {', '.join(loaded)}: the site loads nothing from a network")
    return output
