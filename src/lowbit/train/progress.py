"""How far a run is, for who waits: a bar on a terminal, a line every few seconds elsewhere, nothing in a program.

It goes to stderr, so that what a command prints stays as it is. No thread and no clock calls: whoever works says so.
"""

import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

Shown = Literal["auto", "bar", "lines", "none"]
State = Callable[[], Sequence[str]]

_LINES = 5.0  # seconds between two lines
_BAR = 0.2  # seconds between two pictures of the bar


class Progress:
    """Hears how far each part of a run is, and says nothing; a part may be within another."""

    def begin(self, what: str, total: int, done: int = 0) -> None:
        """A part begins, of which `done` is done already."""

    def move(self, done: int, state: State = tuple) -> None:
        """So much of the part that began last is done; `state` gives what else there is to say, if it is shown."""

    def say(self, text: str) -> None:
        """Show a line that stays."""

    def end(self) -> None:
        """The part that began last is over."""

    def close(self) -> None:
        """All parts are over."""


SILENT = Progress()


@dataclass
class _Part:
    """What is going on; `first` was done when it began."""

    what: str
    total: int
    first: int
    done: int
    began: float

    def left(self) -> list[str]:
        """The time that is left if it goes on as before."""
        ran = self.done - self.first
        if not ran or self.done >= self.total:
            return []
        return [f"{duration((time.monotonic() - self.began) / ran * (self.total - self.done))} left"]


class _Parts(Progress):
    """What lines and bar share: the parts that have begun, and when something was shown last."""

    def __init__(self, every: float) -> None:
        self.every = every
        self.parts: list[_Part] = []
        self._shown = time.monotonic()

    def begin(self, what: str, total: int, done: int = 0) -> None:
        """A part begins."""
        self.parts.append(_Part(what, max(total, done), done, done, time.monotonic()))

    def move(self, done: int, state: State = tuple) -> None:
        part = self.parts[-1]
        part.done, part.total = done, max(done, part.total)
        if time.monotonic() - self._shown >= self.every:
            self.show(part, state())
            self._shown = time.monotonic()

    def show(self, part: _Part, state: Sequence[str]) -> None:
        """Show how far a part is."""
        raise NotImplementedError

    def end(self) -> None:
        self.parts.pop()

    def close(self) -> None:
        while self.parts:
            self.end()


class Lines(_Parts):
    """A line every few seconds.

    Args:
        write: shows one.
        every: seconds between two.
    """

    def __init__(self, write: Callable[[str], None], every: float = _LINES) -> None:
        super().__init__(every)
        self._write = write

    def show(self, part: _Part, state: Sequence[str]) -> None:
        """Write a line."""
        self._write("  ".join([f"{part.what} {part.done:,}/{part.total:,}", *state, *part.left()]))

    def say(self, text: str) -> None:
        """Write it."""
        self._write(text)


class Bar(_Parts):
    """A bar for each part, and a line below with what else there is to say."""

    def __init__(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, TaskID, TextColumn
        from rich.progress import Progress as Tasks
        from rich.text import Text

        super().__init__(_BAR)
        bar = self

        class Picture(Tasks):
            def get_renderables(self) -> Any:
                yield self.make_tasks_table(self.tasks)
                yield Text(bar.below)

        self.below = ""
        self._tasks: list[TaskID] = []
        self._picture = Picture(
            TextColumn("{task.description}"),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TextColumn("{task.fields[left]}"),
            console=Console(stderr=True, highlight=False),
            auto_refresh=False,
            redirect_stdout=sys.stdout.isatty(),
            transient=True,
            expand=True,
        )

    def begin(self, what: str, total: int, done: int = 0) -> None:
        """Show another bar."""
        super().begin(what, total, done)
        if not self._tasks:
            self._picture.start()
        self._tasks.append(self._picture.add_task(what, total=self.parts[-1].total, completed=done, left=""))
        self._picture.refresh()

    def show(self, part: _Part, state: Sequence[str]) -> None:
        """Draw it."""
        self.below = "  ".join(state)
        self._picture.update(
            self._tasks[-1], completed=part.done, total=part.total, left="".join(part.left()), refresh=True
        )

    def say(self, text: str) -> None:
        """Print it above the bars."""
        self._picture.console.print(text)

    def end(self) -> None:
        """Take the bar away."""
        super().end()
        self._picture.remove_task(self._tasks.pop())
        self.below = ""
        if not self._tasks:
            self._picture.stop()


def progress_of(shown: Shown) -> Progress:
    """What shows the progress of a command; ``"auto"`` is a bar on a terminal and lines elsewhere."""
    if shown == "auto":
        smart = sys.stderr.isatty() and os.environ.get("TERM") not in (None, "", "dumb")
        shown = "bar" if smart else "lines"
    match shown:
        case "bar":
            return Bar()
        case "lines":
            return Lines(lambda line: print(line, file=sys.stderr, flush=True))
        case "none":
            return SILENT


def duration(seconds: float) -> str:
    """A duration as ``4 s``, ``1:32`` or ``2:05:09``."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    minutes, rest = divmod(whole, 60)
    return f"{minutes}:{rest:02}" if minutes < 60 else f"{minutes // 60}:{minutes % 60:02}:{rest:02}"
