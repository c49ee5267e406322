import ast
import inspect
from pathlib import Path
from types import ModuleType

import pytest

import lowbit
from lowbit import exports

PACKAGE = Path(inspect.getfile(lowbit)).parent
FILES = sorted(PACKAGE.rglob("*.py"))


def _public_definitions(tree: ast.AST) -> list[ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef]:
    """Public functions and classes of a module, with the public methods of its public classes."""
    found: list[ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef] = []
    for node in ast.iter_child_nodes(tree):
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) or node.name.startswith("_"):
            continue
        found.append(node)
        if isinstance(node, ast.ClassDef):
            found += _public_definitions(node)
    return found


def test_all_is_sorted_and_without_repetition() -> None:
    """`lowbit.__all__` lists each name once, in order."""
    assert lowbit.__all__ == sorted(set(lowbit.__all__))


def test_all_is_what_is_exported() -> None:
    """`lowbit.__all__` names every public object of the package and nothing else; submodules are not exports."""
    present = {n for n, v in vars(exports).items() if not n.startswith("_") and not isinstance(v, ModuleType)}

    assert present == set(lowbit.__all__)
    assert set(lowbit.__all__) <= set(dir(lowbit))


def test_the_fixed_interface_is_there() -> None:
    """The names that users are promised exist; extend this list, never shorten it."""
    promised = {"Recipe", "convert_", "load_state_dict", "recipes", "restore_", "state_dict", "verify"}

    assert promised <= set(lowbit.__all__)


@pytest.mark.parametrize("name", lowbit.__all__)
def test_every_exported_object_has_its_own_docstring(name: str) -> None:
    """`help` says something about every exported name that is not inherited from a base class."""
    assert getattr(lowbit, name).__doc__
    assert getattr(lowbit, name).__module__.startswith("lowbit.")


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_every_public_definition_has_a_docstring(path: Path) -> None:
    """Each file, and each public function, class and method in it, says what it is."""
    tree = ast.parse(path.read_text(encoding="utf-8"))

    missing = [n.name for n in _public_definitions(tree) if not ast.get_docstring(n) and not _is_property_setter(n)]

    assert ast.get_docstring(tree)
    assert missing == []


def _is_property_setter(node: ast.AST) -> bool:
    decorators = getattr(node, "decorator_list", [])
    return any(isinstance(d, ast.Attribute) and d.attr == "setter" for d in decorators)


def test_the_version_is_that_of_the_installed_package() -> None:
    """`lowbit.__version__` is a version number and not repeated in the source."""
    assert lowbit.__version__.split(".")[0].isdigit()
    assert lowbit.__version__ not in (PACKAGE / "__init__.py").read_text(encoding="utf-8")
