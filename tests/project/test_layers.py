import ast
import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest

import lowbit

PACKAGE = Path(inspect.getfile(lowbit)).parent
FILES = sorted(PACKAGE.rglob("*.py"))

DESIGN = Path(__file__).parents[2] / "docs" / "design.md"


def _layers() -> dict[str, int]:
    """The layer of each file and folder of the package, from the table of docs/design.md."""
    rows = re.findall(r"^\| (\d+) \| (`.*?`) \|", DESIGN.read_text(encoding="utf-8"), re.MULTILINE)
    layers = {name.removesuffix(".py"): int(layer) for layer, names in rows for name in re.findall(r"`([\w.]+)", names)}
    return {"" if name == "__init__" else name: layer for name, layer in layers.items()}


# A file imports only from its own layer or a lower one.
LAYERS = _layers()


def _part(path: Path) -> str:
    """The first name below the package that a file belongs to; "" for the package's own `__init__`."""
    name = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    return "" if name == "__init__" else name


# Files that may need more than torch.
_OPTIONAL_NAMES = ("energy.py", "frames.py", "page.py", "plot.py", "reading.py")
OPTIONAL = [
    p
    for p in FILES
    if _part(p) in ("train", "cli", "integrations") or p.name in _OPTIONAL_NAMES or p.parent.name == "triton"
]


def _imports(path: Path) -> list[str]:
    """Absolute dotted names of all that a file imports, at any level of nesting."""
    names: list[str] = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names += [f"{node.module}.{alias.name}" for alias in node.names]
    return names


def _own(name: str) -> str | None:
    """The part of the package that an import is of, None for other packages."""
    top, *rest = name.split(".")
    if top != "lowbit":
        return None
    return rest[0] if rest and rest[0] in LAYERS else ""


def _identify(path: Path) -> str:
    return str(path.relative_to(PACKAGE))


@pytest.mark.parametrize("path", FILES, ids=_identify)
def test_every_file_has_a_layer(path: Path) -> None:
    """A new file or folder is entered in the table before anything imports it."""
    assert _part(path) in LAYERS


@pytest.mark.parametrize("path", FILES, ids=_identify)
def test_imports_point_down(path: Path) -> None:
    """A file imports only from its own layer or a lower one."""
    above = [name for name in _imports(path) if (part := _own(name)) is not None and LAYERS[part] > LAYERS[_part(path)]]

    assert above == []


def test_the_check_of_imports_sees_imports() -> None:
    """The test above looks at real imports: the quantizer's import of its kernels is among them."""
    parts = [_own(name) for name in _imports(PACKAGE / "numerics" / "quantizer.py")]

    assert {"numerics", "kernels"} <= set(parts)


def _module(path: Path) -> str:
    """The dotted name of a file of the package."""
    return ".".join(("lowbit", *path.relative_to(PACKAGE).with_suffix("").parts)).removesuffix(".__init__")


def _files_imported(path: Path, modules: dict[str, Path]) -> set[Path]:
    """The files of the package that a file imports, or imports something of."""
    found = {modules.get(name) or modules.get(name.rpartition(".")[0]) for name in _imports(path)}
    return {other for other in found if other is not None} - {path}


def test_no_file_imports_itself_through_others() -> None:
    """Each file's imports lead nowhere back to it, within a layer and within a folder too."""
    modules = {_module(path): path for path in FILES}
    left = {path: _files_imported(path, modules) for path in FILES}

    # What imports none of the rest, or is imported by none of it, is in no circle.
    while free := {p for p in left if not left[p] & left.keys()} | left.keys() - set().union(*left.values()):
        for path in free:
            del left[path]

    assert list(map(_identify, left)) == []


def _layer_types_asked_for(path: Path) -> list[str]:
    """Checks of a file whether something is of one of torch's own types of layers, as text."""
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        asked: ast.expr | None = None
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") in ("isinstance", "issubclass"):
            asked = node.args[1]
        elif isinstance(node, ast.Compare) and isinstance(node.left, ast.Call) and "type(" in ast.unparse(node.left):
            asked = node.comparators[0]
        text = "" if asked is None else ast.unparse(asked)
        if re.search(r"\bnn\.(?!Module\b|Parameter\b|parameter\b)\w+", text):
            found.append(ast.unparse(node))
    return found


# Models initialise the layers that they are made of.
@pytest.mark.parametrize("path", [p for p in FILES if _part(p) != "nn" and p.parent.name != "models"], ids=_identify)
def test_layers_answer_for_themselves(path: Path) -> None:
    """Outside `nn/` nothing asks for the type of a plain layer: its twin answers."""
    assert _layer_types_asked_for(path) == []


def test_the_check_of_layer_types_sees_them() -> None:
    """The test above finds what it looks for where it may be."""
    assert _layer_types_asked_for(PACKAGE / "nn" / "kinds.py") != []


@pytest.mark.parametrize("path", [p for p in FILES if p not in OPTIONAL or p.name in _OPTIONAL_NAMES], ids=_identify)
def test_libraries_of_the_trainer_stay_in_the_trainer(path: Path) -> None:
    """Lightning, numpy and rich are imported only by the trainer and the command line."""
    used = {name.split(".")[0] for name in _imports(path)}

    assert used & {"lightning", "numpy", "rich"} == set()


@pytest.mark.parametrize("path", [p for p in FILES if p not in OPTIONAL], ids=_identify)
def test_the_core_needs_torch_only(path: Path) -> None:
    """Outside the optional parts every import is of torch, Python's own library or this package."""
    used = {name.split(".")[0] for name in _imports(path)}

    assert used <= {"torch", "lowbit"} | sys.stdlib_module_names


def test_importing_the_package_loads_no_optional_part() -> None:
    """The names of `lowbit` load torch, but neither the trainer nor its libraries."""
    code = "import sys, lowbit; lowbit.convert_; print(*sys.modules)"

    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=True)
    loaded = set(done.stdout.split())

    assert {"torch", "lowbit.conversion.convert"} <= loaded
    optional = {"lightning", "pytorch_lightning", "rich", "lowbit.train", "lowbit.cli", "lowbit.kernels.triton"}
    assert loaded & optional == set()


def test_importing_the_package_alone_is_quick() -> None:
    """`import lowbit` imports no torch before a name is asked for, and the command line does not in order to help."""
    code = "import sys, lowbit, lowbit.cli.main as cli; cli.main(['--help']); print('torch' in sys.modules)"

    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)

    assert done.stdout.splitlines()[-1] == "False"


def test_importing_the_package_leaves_the_global_generator_alone() -> None:
    """Nothing is drawn from torch's generator and no thread count changes at import."""
    code = (
        "import torch; s, n = torch.get_rng_state(), torch.get_num_threads()\n"
        "import lowbit; lowbit.convert_; print(torch.equal(s, torch.get_rng_state()), n == torch.get_num_threads())"
    )

    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)

    assert done.stdout.split() == ["True", "True"]
