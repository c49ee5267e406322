"""Text that a report prints, folded between words until it fits the terminal; in a pipe it stays as it is."""

import itertools
import os
import re
import shutil
import sys
import textwrap
from collections.abc import Iterator, Sequence

from lowbit.tables import text_table

_RULE = re.compile(r"-+(  -+)*")  # the line under the header of a table
_NARROWEST = 20  # columns that a cell of several words keeps if it can


def folded(text: str) -> str:
    """A report as text, no wider than the terminal, or than COLUMNS where that is set; as it is in a pipe."""
    if not sys.stdout.isatty() and not os.environ.get("COLUMNS"):
        return text
    width, lines, out = shutil.get_terminal_size().columns, text.split("\n"), list[str]()
    i = 0
    while i < len(lines):
        if i + 1 < len(lines) and _RULE.fullmatch(lines[i + 1]):
            spans = [match.span() for match in re.finditer("-+", lines[i + 1])]
            end = i + 2
            while end < len(lines) and lines[end] and _is_row(lines[end], spans):
                end += 1
            if max(map(len, lines[i:end])) > width:
                header, *rows = (_cells(line, spans) for line in (lines[i], *lines[i + 2 : end]))
                out += fold_table(header, rows, width).split("\n")
            else:
                out += lines[i:end]
            i = end
        else:
            out += _wrapped(lines[i], width) or [""]
            i += 1
    return "\n".join(out)


def fold_table(header: Sequence[str], rows: Sequence[Sequence[str]], width: int) -> str:
    """A table whose cells are wrapped between words, the widest first, until it fits.

    Where words are too long for that, each row becomes a line of its first cell, and indented ones of the others.
    """
    columns = list(zip(header, *rows, strict=True))
    widths = [max(map(len, column)) for column in columns]
    words = [max(1, *(len(word) for cell in column for word in cell.split())) for column in columns]
    room = width - 2 * (len(columns) - 1)
    for least in ([max(_NARROWEST, word) for word in words], words):
        while sum(widths) > room and any(has > low for has, low in zip(widths, least, strict=True)):
            widest = max(range(len(widths)), key=lambda i: (widths[i] > least[i], widths[i]))
            widths[widest] -= 1
    if sum(widths) > room and len(header) > 2:
        return "\n".join(line for row in rows for line in _record(header, row, width))
    if sum(widths) > room:  # of two, a long path stays beside its name, which is whole
        widths = [max(map(len, columns[0])), max(words[1], room - max(map(len, columns[0])))]
    # A cell that is wrapped goes on below: the other cells of these lines are empty.
    head, *body = ([_wrapped(cell, size) for cell, size in zip(row, widths, strict=True)] for row in (header, *rows))
    titles, lines = list(_lines(head)), [line for row in body for line in _lines(row)]
    if len(titles) == 1:
        return text_table(titles[0], lines)
    first, _, *rest = text_table(titles[0], [*titles[1:], ["-" * size for size in widths], *lines]).split("\n")
    return "\n".join([first, *rest])


def _lines(cells: Sequence[Sequence[str]]) -> Iterator[list[str]]:
    for i in range(max(1, *map(len, cells))):
        yield [cell[i] if i < len(cell) else "" for cell in cells]


def _record(header: Sequence[str], row: Sequence[str], width: int) -> list[str]:
    said = [f"{name} {cell}".strip() for name, cell in zip(header[1:], row[1:], strict=True) if cell not in ("", "-")]
    return [*_wrapped(row[0], width), *_wrapped("  " + ", ".join(said), width)]


def _is_row(line: str, spans: Sequence[tuple[int, int]]) -> bool:
    """Whether there is nothing between the columns, as there is in a sentence."""
    return all(not line[end:start].strip() for (_, end), (start, _) in itertools.pairwise(spans))


def _cells(line: str, spans: Sequence[tuple[int, int]]) -> list[str]:
    return [line[start : None if span == len(spans) - 1 else end].strip() for span, (start, end) in enumerate(spans)]


def _wrapped(text: str, width: int) -> list[str]:
    """Lines between words, those after the first indented as the first is."""
    if len(text) <= width:
        return [text]
    indent = " " * min(len(text) - len(text.lstrip()), width // 2)
    return textwrap.wrap(text, width, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)
