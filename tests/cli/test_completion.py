"""Completion by the shell: the script that is printed, in a real bash."""

import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

from lowbit.cli import extras
from lowbit.cli import main as cli
from lowbit.cli.parser import COMMANDS

SHTAB = "shtab"


@pytest.fixture(scope="module")
def script(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The script for bash as a file."""
    pytest.importorskip(SHTAB, reason="shtab is not installed")
    if shutil.which("bash") is None:
        pytest.skip("there is no bash")
    from lowbit.cli.completion import script as written

    path = tmp_path_factory.mktemp("completion") / "lowbit.bash"
    path.write_text(written(["bash"]))
    return path


def completed(script: Path, *words: str, at: Path | None = None) -> list[str]:
    """What bash offers for the last of the words."""
    typed = " ".join(map(shlex.quote, ("lowbit", *words)))
    function = "$(complete -p lowbit | sed 's/.*-F //; s/ .*//')"
    lines = [f"source {shlex.quote(str(script))}", f"COMP_WORDS=({typed})", f"COMP_CWORD={len(words)}", function]
    code = "\n".join([*lines, 'printf "%s\\n" "${COMPREPLY[@]}"'])
    done = subprocess.run(["bash", "-c", code], capture_output=True, text=True, check=True, cwd=at)
    assert done.stderr == ""
    return done.stdout.split()


def test_commands_are_completed(script: Path) -> None:
    """All commands, and those that begin so."""
    assert set(COMMANDS) <= set(completed(script, ""))
    assert completed(script, "re") == ["resume", "report", "recipes"]


def test_flags_of_a_command_are_completed(script: Path) -> None:
    """The rarer ones too, and none that is only there to refuse an old name."""
    assert completed(script, "train", "--opt") == ["--optimizer", "--optimizer-states"]
    assert completed(script, "cost", "--sch") == []


@pytest.mark.parametrize(
    ("words", "offered"),
    [
        (["train", "--recipe", "sbm8"], ["sbm8", "sbm8-attention", "sbm8-cpt", "sbm8-hoffer"]),
        (["train", "--model", "resnet1"], ["resnet110", "resnet18"]),
        (["train", "--optimizer", "a"], ["adamw"]),
        (["train", "--proof", ""], ["true", "false"]),
        (["export", "--to", "o"], ["onnx"]),
        (["cost", "--format", "z"], ["zigzag"]),
    ],
)
def test_values_are_completed(script: Path, words: list[str], offered: list[str]) -> None:
    """Names of recipes and models, and the words that a flag takes."""
    assert sorted(completed(script, *words)) == sorted(offered)


def test_folders_are_completed(script: Path, tmp_path: Path) -> None:
    """Run folders are paths."""
    (tmp_path / "first-run").mkdir()

    assert completed(script, "resume", "fir", at=tmp_path) == ["first-run"]


@pytest.mark.parametrize("shell", ["bash", "zsh", "tcsh"])
def test_every_shell_has_a_script(shell: str, capsys: pytest.CaptureFixture[str]) -> None:
    """It is printed, and names every command."""
    pytest.importorskip(SHTAB, reason="shtab is not installed")

    assert cli.main(["--print-completion", shell]) == 0

    printed = capsys.readouterr().out
    assert all(name in printed for name in COMMANDS)


@pytest.mark.parametrize(("argv", "part"), [([], "bash, zsh, tcsh"), (["bsh"], "'bash'?"), (["a", "b"], "name of a")])
def test_another_shell_is_refused(argv: list[str], part: str, capsys: pytest.CaptureFixture[str]) -> None:
    """One line says which shells there are."""
    assert cli.main(["--print-completion", *argv]) == 2

    assert part in capsys.readouterr().err


@pytest.mark.parametrize(
    ("module", "command"),
    [
        ("lightning.pytorch", "`pip install 'lowbit[train]'`"),
        ("sklearn", "`pip install 'lowbit[train]'`"),
        ("scipy.stats", "`pip install 'lowbit[report]'`"),
        ("optuna", "`pip install 'lowbit[sweep]'`"),
        ("yaml", "`pip install 'lowbit[train]'` or `pip install 'lowbit[report]'`"),
        ("pandas", "`pip install pandas`"),
    ],
)
def test_a_missing_library_has_its_extra(module: str, command: str) -> None:
    """The extra is read off the package, and a library that no extra has is named alone."""
    assert extras.how_to_install(module) == command
