"""Words of the command line, and what a YAML file says, as values of the annotation that documents a setting."""

import re
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

_LONGEST = 80  # characters of a word in a message
_WORDS = {"true": True, "false": False}


def reader(hint: Any) -> Callable[[str], Any]:
    """A function that turns a word into a value of an annotation, and raises a ValueError that says what is allowed."""

    def read(text: str) -> Any:
        for option in _options(hint):
            try:
                return _read(text, option)
            except ValueError:
                continue
        expected = " or ".join(dict.fromkeys(filter(None, map(_in_words, _options(hint)))))
        raise ValueError(f"expected {expected}, got {text if len(text) <= _LONGEST else text[:_LONGEST] + ' ...'}")

    return read


def from_yaml(value: Any, hint: Any) -> Any:
    """A value of a YAML file: YAML takes ``1e-3`` for a text, and has no paths. What fits nothing is checked later.

    Raises:
        ValueError: a text that is no value of the annotation.
    """
    return reader(hint)(value) if isinstance(value, str) else value


def choices(hint: Any) -> tuple[str, ...]:
    """The words that an annotation names, of a Literal or of one beside None; none where others are allowed too."""
    options = [option for option in _options(hint) if option is not types.NoneType]
    return get_args(options[0]) if len(options) == 1 and get_origin(options[0]) is Literal else ()


def is_switch(hint: Any) -> bool:
    """Whether a flag may stand alone: true or false, or left open."""
    return [option for option in _options(hint) if option is not types.NoneType] == [bool]


def _options(hint: Any) -> list[Any]:
    """What a union allows, text last, since every word is one; another annotation alone."""
    options: tuple[Any, ...] = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
    return sorted(options, key=lambda option: (option in (Path, str), _is_list(option)))


def _read(text: str, hint: Any) -> Any:
    if hint is types.NoneType and text.lower() in ("null", "none"):
        return None
    if hint is bool and text.lower() in _WORDS:
        return _WORDS[text.lower()]
    if hint is int and re.fullmatch(r"[+-]?[0-9]{1,40}", text):
        return int(text)
    if hint is float and "_" not in text:
        return float(text)
    if get_origin(hint) is Literal and text in get_args(hint):
        return text
    if _is_list(hint):
        return [reader(get_args(hint)[0])(_unquoted(each)) for each in _elements(text)]
    if hint in (str, Path):
        return hint(text)
    raise ValueError


def _is_list(hint: Any) -> bool:
    return get_origin(hint) is list


def _elements(text: str) -> Iterator[str]:
    """What stands between the commas of ``[a,b]`` or ``a,b``, but for those within brackets."""
    inner = text.strip()
    if inner.startswith("[") and inner.endswith("]") and "[" not in re.sub(r"\[[^][]*\]", "", inner[1:-1]):
        inner = inner[1:-1]
    for each in re.split(r",(?![^[]*\])", inner) if inner.strip() else ():
        yield each.strip()


def _unquoted(text: str) -> str:
    return text[1:-1] if len(text) > 1 and text[0] == text[-1] and text[0] in "'\"" else text


def _in_words(hint: Any) -> str:
    """What an annotation allows, as the end of "expected"; nothing for None."""
    if hint is types.NoneType:
        return ""
    if get_origin(hint) is Literal:
        return f"one of {', '.join(map(repr, get_args(hint)))}"
    if _is_list(hint):
        return f"a list such as {'[[3,6],[8,8]]' if _is_list(get_args(hint)[0]) else '[4,8]'}"
    return "true or false" if hint is bool else str(getattr(hint, "__name__", hint))
