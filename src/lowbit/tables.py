"""Reports as text: plain tables, HTML for notebooks, and JSON."""

import html
import json
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple


def text_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns padded to their widest cell, numbers to the right, a line under the header.

    Args:
        header: column titles.
        rows: cells as text, each row as long as the header.
    """
    widths = [max(len(row[i]) for row in (header, *rows)) for i in range(len(header))]
    numeric = [all(_is_number(row[i]) for row in rows) for i in range(len(header))]

    def line(cells: Sequence[str]) -> str:
        padded = (c.rjust(w) if n else c.ljust(w) for c, w, n in zip(cells, widths, numeric, strict=True))
        return "  ".join(padded).rstrip()

    return "\n".join([line(header), "  ".join("-" * w for w in widths), *(line(row) for row in rows)])


class Table(NamedTuple):
    """A table as data; as text it is a `text_table`.

    Args:
        header: column titles.
        rows: cells as text, each row as long as the header.
    """

    header: Sequence[str]
    rows: Sequence[Sequence[str]]

    def __str__(self) -> str:
        return text_table(self.header, self.rows)


def html_of(parts: Sequence[str | Table]) -> str:
    """Sentences and tables as HTML for a notebook, everything escaped; a text of several lines keeps its columns."""
    return f'<div style="overflow-x:auto">{"".join(map(_html, parts))}</div>'


def _html(part: str | Table) -> str:
    if isinstance(part, str):
        tag = "pre" if "\n" in part else "p"
        return f"<{tag}>{html.escape(part)}</{tag}>" if part else ""
    numeric = [all(_is_number(row[i]) for row in part.rows) for i in range(len(part.header))]

    def line(tag: str, cells: Sequence[str]) -> str:
        sides = ("right" if number else "left" for number in numeric)
        made = (f'<{tag} style="text-align:{s}">{html.escape(c)}</{tag}>' for s, c in zip(sides, cells, strict=True))
        return f"<tr>{''.join(made)}</tr>"

    body = "".join(line("td", row) for row in part.rows)
    return f"<table><thead>{line('th', part.header)}</thead><tbody>{body}</tbody></table>"


_NUMBER = re.compile(r"[+-]?(inf|nan|∞|×?[\d,]+(\.\d+)?(e[+-]?\d+)?)?( ?%)?|-")


def _is_number(cell: str) -> bool:
    return bool(cell) and _NUMBER.fullmatch(cell) is not None


def json_text(data: Mapping[str, Any]) -> str:
    """Plain values as indented JSON that any reader takes: a number that is infinite or nan becomes null."""
    return json.dumps(_finite(data), indent=2, allow_nan=False)


def json_line(data: Mapping[str, Any]) -> str:
    """The same in one line without blanks, for files of one record a line."""
    return json.dumps(_finite(data), separators=(",", ":"), allow_nan=False)


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _finite(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
