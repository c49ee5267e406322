import json
from pathlib import Path

import pytest
from report_runs import copied
from tests.helpers import threads

from lowbit import RunError, UsageError, machine
from lowbit.report.reading import view_of, views_of


def test_a_view_has_what_the_result_says(runs: dict[str, Path]) -> None:
    """Score, loss, seed and steps of a view are those of the run's own files."""
    view = view_of(runs["int8-1"])
    result = json.loads((runs["int8-1"] / "result.json").read_text())

    assert view.score == 100 * result["test_accuracy"]
    assert view.loss == result["test_loss"]
    assert (view.task, view.recipe, view.seed, view.steps) == ("mlp on digits", "int8", 1, result["steps"])
    assert view.complete
    assert not view.problems


def test_a_view_says_what_the_run_ran_on(runs: dict[str, Path]) -> None:
    """Versions and processor are those of this process, and the run had one thread."""
    with threads(1):
        assert view_of(runs["int8-0"]).machines == [str(machine.here())]


def test_a_run_without_a_result_is_unfinished(runs: dict[str, Path]) -> None:
    """It has the score of its last evaluation, and counts as unfinished."""
    view = view_of(runs["stopped"])

    assert not view.complete
    assert view.score == view_of(runs["int8-0"]).score


def test_the_command_trains_the_run_again(runs: dict[str, Path], tmp_path: Path) -> None:
    """The command of a view repeats the run to the same loss."""
    import shlex

    from lowbit.cli import main as cli

    view = view_of(runs["cpt-0"])
    words = shlex.split(view.command)
    assert words[0] == "lowbit"
    assert cli.main([*words[1:], "--out", str(tmp_path / "again")]) == 0

    assert view_of(tmp_path / "again").loss == view.loss


def test_runs_with_one_label_differ_in_seed_only(runs: dict[str, Path], tmp_path: Path) -> None:
    """A setting that differs among runs of a recipe is in their labels."""
    other = copied(runs["int8-0"], tmp_path / "other", lr=0.2)

    views, skipped = views_of([runs["int8-0"], runs["int8-1"], other])

    assert [view.label for view in views] == ["int8 (lr 0.05)", "int8 (lr 0.05)", "int8 (lr 0.2)"]
    assert skipped == {}


def test_names_are_told_apart(runs: dict[str, Path], tmp_path: Path) -> None:
    """Folders of one name get as much of their paths as tells them apart."""
    (tmp_path / "b").mkdir()
    other = copied(runs["int8-0"], tmp_path / "b" / "int8-0")

    views, _ = views_of([runs["int8-0"], other])

    assert [view.name for view in views] == [f"{runs['int8-0'].parent.name}/int8-0", "b/int8-0"]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("proof.json", "{"),
        ("proof.json", '{"rows": [{"layer": 3}]}'),
        ("proof.json", "[" * 100_000),
        ("conversion.json", '{"rows": 7}'),
        ("measured.jsonl", "7\n"),
        ("result.json", "[]"),
        ("csv/metrics.csv", "a,b\n1,2\n"),
        ("csv/metrics.csv", "\udcff"),
    ],
)
def test_a_damaged_lesser_file_is_named(runs: dict[str, Path], tmp_path: Path, name: str, content: str) -> None:
    """The run is shown without it, and its problems name the file."""
    run = copied(runs["int8-0"], tmp_path / "run")
    (run / name).write_bytes(content.encode("utf-8", "surrogateescape"))

    view = view_of(run)

    assert any(problem.startswith(name) for problem in view.problems)
    assert view.steps == 20


def test_columns_without_a_value_are_left_out(runs: dict[str, Path], tmp_path: Path) -> None:
    """A run that was stopped before its first row of figures has none, also where the columns are there."""
    run = copied(runs["dfq-0"], tmp_path / "run")
    table = run / "csv" / "metrics.csv"
    table.write_text(table.read_text().splitlines()[0] + "\n")

    assert view_of(run).columns == {}


def test_numbers_of_the_wrong_type_are_not_known(runs: dict[str, Path], tmp_path: Path) -> None:
    """A text, a truth value or an infinite number in place of a figure becomes None."""
    run = copied(runs["int8-0"], tmp_path / "run")
    result = json.loads((run / "result.json").read_text())
    (run / "result.json").write_text(json.dumps(result | {"test_accuracy": "<b>", "test_loss": float("inf")}))

    view = view_of(run)

    assert (view.score, view.loss) == (None, None)


def test_what_is_not_a_run_is_refused(runs: dict[str, Path], tmp_path: Path) -> None:
    """A foreign folder, damaged settings and a missing ledger are told apart in the messages."""
    (tmp_path / "foreign").mkdir()
    damaged, headless = copied(runs["int8-0"], tmp_path / "damaged"), copied(runs["int8-0"], tmp_path / "headless")
    (damaged / "config.yaml").write_text("model: [")
    (headless / "ledger.jsonl").unlink()

    with pytest.raises(UsageError, match="not a run folder"):
        view_of(tmp_path / "foreign")
    with pytest.raises(RunError, match=r"config\.yaml is damaged"):
        view_of(damaged)
    with pytest.raises((RunError, UsageError), match=r"ledger\.jsonl"):
        view_of(headless)


def test_a_model_from_a_file_is_named_without_folders(runs: dict[str, Path], tmp_path: Path) -> None:
    """A page says ``net.py:Net``, wherever the file lay."""
    run = copied(runs["int8-0"], tmp_path / "run", model="/elsewhere/net.py:Net")

    assert view_of(run).task == "net.py:Net on digits"
