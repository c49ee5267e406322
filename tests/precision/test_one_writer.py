"""Bits have one writer: nothing but the controller, and what loads a saved state, writes the bits of a site."""

import ast
import inspect
from pathlib import Path

import pytest

import lowbit

PACKAGE = Path(inspect.getfile(lowbit)).parent
BITS = ("bits", "evaluation_bits")
# Where a site is defined, the controller's layers, and the state of a model.
WRITERS = {"nn/site.py", "precision/layers.py", "conversion/state.py"}


def _is_bits(node: ast.AST) -> bool:
    """Whether an expression is the bits of some object."""
    return isinstance(node, ast.Attribute) and node.attr in BITS


def _written(node: ast.AST) -> list[ast.AST]:
    """What a statement assigns to or deletes."""
    if isinstance(node, ast.Assign | ast.Delete):
        return list(node.targets)
    return [node.target] if isinstance(node, ast.AugAssign | ast.AnnAssign) else []


def direct_writes(source: str) -> list[int]:
    """The lines that write the bits of another object than `self`, or in place into a tensor of bits."""
    lines = []
    for node in ast.walk(ast.parse(source)):
        targets = [each for target in _written(node) for each in ast.walk(target)]
        elements = [t for t in targets if isinstance(t, ast.Subscript) and _is_bits(t.value)]
        fields = [t for t in targets if isinstance(t, ast.Attribute) and _is_bits(t)]
        others = [t for t in fields if not (isinstance(t.value, ast.Name) and t.value.id == "self")]
        method = node.func if isinstance(node, ast.Call) else None
        in_place = isinstance(method, ast.Attribute) and method.attr.endswith("_") and _is_bits(method.value)
        if elements or others or in_place:
            lines.append(node.lineno)
    return lines


def calls_of(source: str, name: str) -> list[int]:
    """The lines that call a method of this name."""
    return [
        node.lineno
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == name
    ]


@pytest.mark.parametrize(
    "line", ["site.bits[i] = 3", "site.bits = x", "a.site.evaluation_bits += 1", "s.bits.fill_(4)", "self.bits[:] = 3"]
)
def test_the_check_sees_a_write(line: str) -> None:
    """Each way to write the bits of a site is found."""
    assert direct_writes(line) == [1]


@pytest.mark.parametrize("line", ["bits[i] = 3", "self.bits = bits", "x = site.bits[0]", "y = site.bits.clone()"])
def test_the_check_lets_reads_pass(line: str) -> None:
    """Reading bits, a local tensor of bits, and a field of one's own are no writes."""
    assert direct_writes(line) == []


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_nothing_else_writes_bits(path: Path) -> None:
    """A file writes no bits itself, and only the controller and the state of a model call what writes them."""
    name, source = path.relative_to(PACKAGE).as_posix(), path.read_text(encoding="utf-8")

    assert name == "nn/site.py" or direct_writes(source) == []
    assert name in WRITERS or calls_of(source, "set_bits") == []


def test_the_writers_write() -> None:
    """Each file of the list still calls or defines what writes bits, so that the list stays short."""
    texts = {name: (PACKAGE / name).read_text(encoding="utf-8") for name in WRITERS}

    assert {name for name, text in texts.items() if calls_of(text, "set_bits")} == WRITERS
