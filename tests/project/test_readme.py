"""What the README and the examples show, run as a reader would."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))


def _run(*arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, "-W", "error", *arguments], capture_output=True, text=True, check=False, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_first_example_of_the_readme_runs() -> None:
    """The first code block of the README runs as it stands and prints a proof of three products per layer."""
    code = re.search(r"```python\n(.*?)```", README, re.DOTALL)
    assert code is not None

    output = _run("-c", code[1])

    assert len(code[1].strip().splitlines()) <= 15
    assert "2 of 2 layers converted" in output
    assert output.count("grad_weight") == 1 + 2


def test_recipes_of_the_readme_are_all_recipes() -> None:
    """The README's table of recipes names every recipe there is."""
    import lowbit

    table = README.split("## Recipes")[1].split("##")[0]

    assert [name for name in lowbit.recipes() if f"`{name}`" not in table] == []


def test_the_page_of_the_command_line_names_all_models_and_data() -> None:
    """The lists of models and data are those of the code."""
    from lowbit.train import data, models

    page = (ROOT / "docs" / "command-line.md").read_text(encoding="utf-8")

    assert [name for name in models.names() if f"`{name}`" not in page.split("## Models")[1].split("##")[0]] == []
    assert [name for name in data.names() if f"`{name}`" not in page.split("## Data")[1].split("##")[0]] == []


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)
def test_example_runs(example: Path) -> None:
    """Each example runs without a warning."""
    assert _run(str(example))


def test_resumed_example_is_bit_identical() -> None:
    """The example of mixed recipes resumes to the same gradient."""
    assert "bit-identical: True" in _run(str(ROOT / "examples" / "mixed_recipes.py"))


def test_rule_of_the_imagenet_form_of_cpt_leaves_what_it_says() -> None:
    """The snippet of the page of `cpt` leaves stem, 1 by 1 shortcuts and the last layer of a ResNet-18, and no more."""
    from lowbit.train import data, models

    page = (ROOT / "docs" / "methods" / "cpt.md").read_text(encoding="utf-8")
    code = re.search(r"```python\n(.*?)```", page.split("## ImageNet networks")[1], re.DOTALL)
    assert code is not None
    task = data.Task(kind="image", shape=(3, 32, 32), classes=10)
    names = {"model": models.build("resnet18", task)}

    exec(code[1], names)

    rows = [row for row in names["report"].rows if row.type in ("Conv2d", "Linear")]
    left = [row.name for row in rows if row.recipe is None]
    assert left == ["stem.0", *(f"groups.{i}.0.shortcut.0" for i in (1, 2, 3)), "head"]
    assert len(rows) == 21
