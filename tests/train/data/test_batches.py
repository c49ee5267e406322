import itertools
from pathlib import Path

import pytest
import torch
from small_data import labels, same

from lowbit.errors import RunError
from lowbit.train import data


@pytest.mark.usefixtures("fashion")
def test_an_epoch_of_training_has_every_sample_of_its_whole_batches_once() -> None:
    """20 samples in batches of 4 are all seen, two of each of the ten labels."""
    loaded = data.load("fashion-mnist", batch_size=4, seed=0)

    seen = sorted(itertools.chain(*labels(loaded.train)))

    assert len(loaded.train) == 5
    assert seen == sorted([*range(10)] * 2)


@pytest.mark.usefixtures("fashion")
def test_epochs_have_different_orders() -> None:
    """The second epoch of a loader is another permutation than the first."""
    train = data.load("fashion-mnist", batch_size=4, seed=0).train

    assert labels(train) != labels(train)


@pytest.mark.usefixtures("fashion")
def test_seeds_have_different_orders() -> None:
    """Two seeds shuffle differently."""
    first, second = (data.load("fashion-mnist", batch_size=4, seed=seed).train for seed in (0, 1))

    assert labels(first) != labels(second)


@pytest.mark.parametrize("name", ["fashion-mnist", "imagefolder", "text"])
@pytest.mark.usefixtures("fashion")
def test_the_same_seed_gives_the_same_batches(name: str, folder: Path, text: Path) -> None:
    """Two loaders of one seed agree over two epochs, whatever was drawn from the global generator."""
    name = {"imagefolder": f"imagefolder:{folder}", "text": f"text:{text}"}.get(name, name)
    first, second = (data.load(name, batch_size=3, seed=5, context=16).train for _ in range(2))
    expected = [*first, *first]
    torch.rand(7)

    assert same([*second, *second], expected)


@pytest.mark.usefixtures("fashion")
def test_loading_and_iterating_leave_the_global_generator_alone() -> None:
    """An epoch with augmentation draws nothing from torch's global generator."""
    before = torch.get_rng_state()

    list(data.load("fashion-mnist", batch_size=4, seed=0).train)

    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("name", ["fashion-mnist", "text"])
@pytest.mark.parametrize("done", [0, 2, 5, 7])
@pytest.mark.usefixtures("fashion")
def test_a_resumed_loader_gives_the_remaining_batches(name: str, done: int, text: Path) -> None:
    """Saving after any batch and loading elsewhere continues this epoch and then the next one."""

    def loader() -> data.Batches:
        path = name if name == "fashion-mnist" else f"text:{text}"
        return data.load(path, batch_size=4, seed=3, subset=20, context=16).train

    whole, stopped, resumed = loader(), loader(), loader()
    expected = [*whole, *whole, *whole]
    epochs, rest = divmod(done, len(stopped))
    for count in [len(stopped)] * epochs + [rest] * (rest > 0):
        list(itertools.islice(stopped, count))

    resumed.load_state_dict(stopped.state_dict())
    actual = [batch for _ in range(3 - epochs) for batch in resumed]

    assert same(actual, expected[done:])


@pytest.mark.usefixtures("fashion")
def test_the_state_counts_batches_handed_out() -> None:
    """After two batches of the second epoch the state is epoch 1 and 2 batches."""
    train = data.load("fashion-mnist", batch_size=4, seed=0).train

    list(train)
    list(itertools.islice(train, 2))

    assert train.state_dict() == {"epoch": 1, "batches": 2}


@pytest.mark.usefixtures("fashion")
def test_an_epoch_that_is_never_exhausted_is_followed_by_the_next() -> None:
    """A caller that stops after len batches, without StopIteration, gets the next epoch's order."""
    first, second = (data.load("fashion-mnist", batch_size=4, seed=0).train for _ in range(2))
    expected = [*first, *first]

    actual = []
    for _ in range(2):
        iterator = iter(second)
        actual += [next(iterator) for _ in range(len(second))]

    assert same(actual, expected)


@pytest.mark.usefixtures("fashion")
def test_an_iterator_that_drew_nothing_does_not_use_up_its_epoch() -> None:
    """Making two iterators before the first batch still starts in the middle where the state says."""
    train = data.load("fashion-mnist", batch_size=4, seed=0).train
    train.load_state_dict({"epoch": 2, "batches": 3})

    iter(train)
    remaining = list(train)

    assert len(remaining) == 2
    assert train.state_dict() == {"epoch": 2, "batches": 5}


@pytest.mark.parametrize("state", [{"epoch": 0, "batches": 6}, {"epoch": -1, "batches": 0}, {}])
@pytest.mark.usefixtures("fashion")
def test_a_state_of_another_loader_is_refused(state: dict[str, int]) -> None:
    """A state that no loader of five batches can have is an error that says so."""
    train = data.load("fashion-mnist", batch_size=4, seed=0).train

    with pytest.raises(RunError, match="epoch of 5 batches"):
        train.load_state_dict(state)


@pytest.mark.usefixtures("fashion")
def test_the_test_set_is_whole_and_in_order() -> None:
    """Six test images in batches of 4 come in file order, the short batch last, each epoch the same."""
    test = data.load("fashion-mnist", batch_size=4, seed=0).test

    assert len(test) == 2
    assert labels(test) == labels(test) == [[0, 1, 2, 3], [4, 5]]


@pytest.mark.usefixtures("fashion")
def test_training_drops_the_short_last_batch() -> None:
    """20 samples in batches of 6 make three batches of 6."""
    train = data.load("fashion-mnist", batch_size=6, seed=0).train

    assert [len(y) for y in labels(train)] == [6, 6, 6]


def test_a_fingerprint_does_not_draw(text: Path) -> None:
    """Asking for it leaves the loader where it was."""
    loaded = data.load(f"text:{text}", batch_size=4, seed=0, context=16)
    first = [y for _, y in loaded.train]

    again = data.load(f"text:{text}", batch_size=4, seed=0, context=16)
    again.fingerprint()

    assert all(torch.equal(a, b) for a, (_, b) in zip(first, again.train, strict=True))
