import itertools

import pytest
from small_data import labels, same

from lowbit.errors import UsageError
from lowbit.train import data


@pytest.mark.usefixtures("fashion")
def test_fewer_samples_than_a_batch_is_an_error() -> None:
    """A batch of 21 out of 20 samples is refused, with the largest size that works."""
    with pytest.raises(UsageError, match="20 samples, fewer than one batch of 21: use a batch_size of at most 20"):
        data.load("fashion-mnist", batch_size=21, seed=0)


@pytest.mark.parametrize("wrong", [{"batch_size": 0}, {"subset": 0}, {"subset": 21}, {"context": 0}])
@pytest.mark.usefixtures("fashion")
def test_a_number_out_of_range_is_an_error(wrong: dict[str, int]) -> None:
    """Sizes that no data set can have are refused by name."""
    with pytest.raises(UsageError, match=next(iter(wrong))):
        data.load("fashion-mnist", **{"batch_size": 4, "seed": 0, **wrong})


@pytest.mark.usefixtures("fashion")
def test_a_subset_is_the_same_for_every_seed() -> None:
    """Ten of twenty samples are picked once and for all, and their order alone depends on the seed."""
    first, second = (labels(data.load("fashion-mnist", batch_size=2, seed=seed, subset=10).train) for seed in (0, 1))

    assert first != second
    assert sorted(itertools.chain(*first)) == sorted(itertools.chain(*second))
    assert len(first) == 5


@pytest.mark.usefixtures("fashion")
def test_a_subset_leaves_the_test_set_whole() -> None:
    """Training on four samples still tests on all six, normalised in the same way."""
    whole, part = (data.load("fashion-mnist", batch_size=4, seed=0, subset=n).test for n in (None, 4))

    assert same(list(part), list(whole))


def test_an_unknown_name_lists_the_known_ones() -> None:
    """A misspelt data set is answered with the nearest name and all of them."""
    with pytest.raises(UsageError, match=r"Did you mean 'fashion-mnist'\?.*text:PATH"):
        data.load("fashion-mnits", batch_size=4, seed=0)


@pytest.mark.parametrize("name", ["text:", "imagefolder:"])
def test_a_name_without_its_path_is_an_error(name: str) -> None:
    """A colon with nothing after it asks for the path."""
    with pytest.raises(UsageError, match=f"write {name}PATH"):
        data.load(name, batch_size=4, seed=0)


def test_names_are_those_that_load_knows() -> None:
    """The names for help texts are the six of the documentation."""
    expected = ("fashion-mnist", "digits", "cifar10", "cifar100", "imagefolder:PATH", "text:PATH")

    assert data.names() == expected
