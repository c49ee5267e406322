"""The file of a sweep: what it may say, and what it is told where it says something else."""

from pathlib import Path

import pytest

from lowbit.errors import UsageError
from lowbit.train.sweep.settings import SETTINGS, Range, folder_name, load_yaml, read_sweep

GRID = "train: {model: mlp, data: digits}\ngrid: {recipe: [fp32, int8], seed: [0, 1]}\n"
SEARCH = "train: {model: mlp, data: digits}\nsearch: {trials: 3, settings: {lr: {low: 0.1, high: 1.0}}}\n"


def written(folder: Path, text: str) -> Path:
    """A file with this text."""
    path = folder / "study.yaml"
    path.write_text(text)
    return path


def test_a_grid_is_every_combination(tmp_path: Path) -> None:
    """Each run has its own folder and settings, and those that all have."""
    plan = read_sweep(written(tmp_path, f"out: {tmp_path}\n{GRID}")).plan()

    assert [folder.name for folder in plan] == ["fp32-seed0", "fp32-seed1", "int8-seed0", "int8-seed1"]
    assert [(config.recipe, config.seed) for config in plan.values()] == [
        ("fp32", 0),
        ("fp32", 1),
        ("int8", 0),
        ("int8", 1),
    ]
    assert {(config.model, config.data) for config in plan.values()} == {("mlp", "digits")}
    assert all(config.out == folder for folder, config in plan.items())


def test_what_the_command_says_goes_before_the_file(tmp_path: Path) -> None:
    """The folder is named after the file unless it is given; a flag replaces what the file says."""
    path = written(tmp_path, f"{GRID}jobs: 3\n")

    plain, changed = read_sweep(path), read_sweep(path, out=tmp_path / "x", jobs=2)

    assert (plain.out, plain.jobs) == (Path("runs", "study"), 3)
    assert (changed.out, changed.jobs) == (tmp_path / "x", 2)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (GRID.replace("grid", "gird"), r"unknown key of a sweep 'gird'. Did you mean 'grid'.*jobs, out, search, train"),
        (GRID.replace("recipe", "recipes"), r"unknown setting of a run 'recipes'.*'recipe'.*batch_size"),
        (GRID.replace("model", "modle"), r"unknown setting of a run 'modle'. Did you mean 'model'.*batch_size"),
        (SEARCH.replace("trials", "trails"), r"unknown key of search 'trails'.*cost, pruning, seed, settings, trials"),
        (SEARCH.replace("low:", "min:"), r"unknown key of search.settings.lr 'min'.*high, log, low"),
        (SEARCH.replace("lr:", "rl:"), r"unknown setting of a run 'rl'"),
        (GRID + "out: x\nlearning: 1\n", r"unknown key of a sweep 'learning'"),
        ("grid: {seed: [0]}\n", r"a sweep lacks train; its keys are out, train, grid, search, jobs"),
        (SEARCH.replace("trials: 3, ", ""), r"search lacks trials; its keys are trials, settings, cost"),
        (SEARCH.replace(", high: 1.0", ""), r"search.settings.lr lacks high; its keys are low, high, log"),
        (GRID + SEARCH.split("\n", 1)[1], r"either a grid or a search, and this one has both"),
        ("train: {model: mlp, data: digits}\n", r"either a grid or a search, and this one has neither"),
        (GRID.replace("digits", "digits, seed: 1"), r"seed: given under train and again below"),
        (GRID.replace("[0, 1]", "0"), r"seed: 0: give the list of its values"),
        (GRID.replace("[0, 1]", "[]"), r"seed: \[\]: give the list of its values"),
        (GRID.replace("[0, 1]", "[1, 1]"), r"a value is there twice"),
        (GRID.replace("[0, 1]", "[0, -1]"), r"seed must be a whole number"),
        (GRID.replace("int8]", "int9]"), r"unknown recipe 'int9'.*'int8'"),
        (GRID + "jobs: 0\n", r"jobs=0"),
        (GRID + "jobs: two\n", r"jobs='two': give a whole number"),
        (GRID + "grid: {seed: [3]}\n", r"'grid' is there twice"),
        (GRID.replace("train: {", "train: [").replace("digits}", "digits]"), r"train: .*must be keys with values"),
        (SEARCH.replace("0.1, high: 1.0", "1.0, high: 0.1"), r"search.settings.lr: low=1.0, high=0.1"),
        (SEARCH.replace("high: 1.0", "high: 1.0, log: yes").replace("0.1", "0"), r"with log it must be above 0"),
        (SEARCH.replace("trials: 3", "trials: 3, cost: joules"), r"unknown cost of a search 'joules'.*GBitOPs"),
        (SEARCH.replace("{lr: {low: 0.1, high: 1.0}}", "{}"), r"search.settings is empty"),
        (SEARCH.replace("{lr: {low: 0.1, high: 1.0}}", "{data: [digits]}"), r"data cannot be searched"),
        (SEARCH.replace("low: 0.1, high: 1.0", "low: -1, high: 1"), r"lr must be a finite number of at least 0"),
        ("- 1\n", r"must be settings with the keys out, train"),
        ("a: [", r"study.yaml: while parsing"),
    ],
)
def test_what_is_wrong_is_named_with_what_is_allowed(text: str, said: str, tmp_path: Path) -> None:
    """One line names the file, what is wrong in it, and what would be right."""
    with pytest.raises(UsageError, match=said) as caught:
        read_sweep(written(tmp_path, text))

    assert str(caught.value).startswith(str(tmp_path / "study.yaml"))
    assert "\n" not in str(caught.value)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    """The message says which file."""
    with pytest.raises(UsageError, match=r"there is no file .*none\.yaml"):
        read_sweep(tmp_path / "none.yaml")


@pytest.mark.parametrize(("text", "value"), [("1e-3", 1e-3), ("5e2", 500.0), ("-1.5E+2", -150.0), ("'1e-3'", "1e-3")])
def test_a_number_with_an_exponent_is_a_number(text: str, value: object) -> None:
    """YAML 1.1 reads 1e-3 as a text, which nobody means."""
    assert load_yaml(f"lr: {text}") == {"lr": value}


def test_a_range_is_whole_if_its_ends_are() -> None:
    """Whole ends give whole numbers, and True is no end."""
    assert Range(low=1, high=4).whole
    assert not Range(low=1, high=4.0).whole
    with pytest.raises(UsageError, match="low"):
        Range(low=True, high=4)


def test_names_of_folders_are_plain_and_their_own() -> None:
    """Values with a path or a long text give names that stay in the folder and differ; plain ones say what they are."""
    values = ["../x", "a/x", "a-x", "x" * 300, ".", ""]

    names = [folder_name({"recipe": value}) for value in values]

    assert folder_name({"recipe": "int8", "lr": 0.1}) == "int8-lr0.1"
    assert len(set(names)) == len(values)
    assert all("/" not in name and not name.startswith(".") and len(name) < 120 for name in names)


def test_the_folder_is_not_a_setting_of_a_run() -> None:
    """A sweep chooses where its runs are."""
    assert "out" not in SETTINGS
    assert "lr" in SETTINGS
