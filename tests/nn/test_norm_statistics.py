"""The statistics of Range BN against a plain loop."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers import range_by_loop
from lowbit.nn.norm import KAPPA, range_statistics


class TestStatistics:
    """Mean and sigma of each channel."""

    @settings(max_examples=40, deadline=None)
    @given(
        batch=st.integers(1, 9),
        channels=st.integers(1, 3),
        size=st.sampled_from([(), (1,), (5,), (3, 2), (2, 1, 3)]),
        chunks=st.integers(1, 20),
        fewest=st.integers(2, 20),
        constant=st.sampled_from(["paper", "authors"]),
        seed=st.integers(0, 99),
    )
    def test_statistics_equal_a_plainrange_by_loop(
        self, batch: int, channels: int, size: tuple[int, ...], chunks: int, fewest: int, constant: str, seed: int
    ) -> None:
        """For any batch, size and number of chunks, ragged ones included, mean and sigma are the definition's."""
        if batch * math.prod(size) < 2:
            batch = 2
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(batch, channels, *size, dtype=torch.float64, generator=generator)

        stats = range_statistics(x, constant=constant, chunks=chunks, fewest=fewest)

        means, sigmas = range_by_loop(x, KAPPA[constant], chunks, fewest)
        assert stats.mean.tolist() == pytest.approx(means, rel=1e-12, abs=1e-15)
        assert stats.sigma.tolist() == pytest.approx(sigmas, rel=1e-12)

    def test_the_constants_are_those_of_the_paper_and_of_the_authors(self) -> None:
        """The paper's factor is 1, the authors' (1/2)(0.35)(1 + sqrt(pi ln 4)) = 0.5402."""
        assert KAPPA["paper"] == 1
        assert KAPPA["authors"] == pytest.approx(0.540208, abs=1e-6)

    def test_sigma_of_normal_values_is_near_their_deviation(self) -> None:
        """With the authors' constant, sigma of 2**16 normal values is 0.96 to 1.0 of the deviation."""
        x = torch.randn(2**16, 1, generator=torch.Generator().manual_seed(0))

        sigma = range_statistics(x, constant="authors", chunks=16).sigma.item()

        assert 0.94 < sigma < 1.0
