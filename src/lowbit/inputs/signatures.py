"""Settings read off a class: the names, types and defaults of its arguments, and what its docstring says of each."""

import inspect
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from inspect import Parameter
from typing import Any, get_type_hints


@dataclass(frozen=True, kw_only=True)
class Setting:
    """One argument of a class.

    Args:
        name: of the argument.
        hint: its annotation.
        default: its value if it is left out; `inspect.Parameter.empty` if it must be given.
        text: what the docstring says of it, in one line, or "".
    """

    name: str
    hint: Any
    default: Any
    text: str

    def merged(self, other: "Setting") -> "Setting":
        """One setting for the same name in two classes: it allows what either does, with the first one's default."""
        if other.hint == self.hint:
            return self
        return replace(self, hint=self.hint | other.hint, text=f"{self.text} {other.text}".strip())

    @property
    def is_needed(self) -> bool:
        """Whether it cannot be left out."""
        return self.default is Parameter.empty


@cache
def settings_of(make: Callable[..., Any]) -> dict[str, Setting]:
    """The settings of a class or function by name, in the order of its arguments; ``**rest`` is not one."""
    called: Any = make.__init__ if isinstance(make, type) else make  # type: ignore[misc]  # of this very class
    hints = get_type_hints(called)
    texts = _texts(inspect.getdoc(make) or "")
    return {
        name: Setting(name=name, hint=hints.get(name, Any), default=parameter.default, text=texts.get(name, ""))
        for name, parameter in inspect.signature(make).parameters.items()
        if parameter.kind in (Parameter.KEYWORD_ONLY, Parameter.POSITIONAL_OR_KEYWORD)
    }


def _texts(doc: str) -> dict[str, str]:
    """What the ``Args:`` section of a docstring says of each argument, each in one line."""
    section = re.search(r"^Args:\n((?: .*\n?|\n)*)", doc, re.MULTILINE)
    entries = re.findall(r"^ {4}(\w+): (.*(?:\n {8,}.*)*)", section[1] if section else "", re.MULTILINE)
    return {name: " ".join(text.split()) for name, text in entries}
