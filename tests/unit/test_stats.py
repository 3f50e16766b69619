"""Sums over tokens, against one product over all of them."""

import pytest
import torch

from lwquant.capture.stats import StatsAccumulator


@pytest.mark.parametrize("in_features", [1, 63, 64, 150, 300])  # one strip, and several
def test_sums_of_several_calls_are_those_of_all_tokens(in_features):
    generator = torch.Generator().manual_seed(0)
    inputs, drift = torch.randn(2, 3, 21, in_features, generator=generator)
    owed = torch.randn(3, 21, 5, generator=generator)
    accumulator = StatsAccumulator()
    for part in (slice(0, 2), slice(2, 3)):
        accumulator.add(inputs[part], drift[part], owed[part])
    got = accumulator.result()
    flat, drifts, lacks = (t.flatten(0, 1).double() for t in (inputs, drift, owed))
    first = torch.cat([torch.arange(21), torch.arange(42, 53)])  # half of each call, rounded up
    for stats, rows in ((got, slice(None)), (got.half, first)):
        for found, left in ((stats.hessian, flat), (stats.drift, drifts), (stats.owed, lacks)):
            torch.testing.assert_close(
                found.double(), left[rows].T @ flat[rows], rtol=1e-5, atol=1e-4
            )
        assert torch.equal(stats.hessian, stats.hessian.T)
    assert (got.n_tokens, got.half.n_tokens) == (63, 32)


def test_what_was_not_given_is_not_there():
    alone = StatsAccumulator()
    alone.add(torch.randn(4, 7))
    assert alone.result().drift is None and alone.result().half is None
    without = StatsAccumulator()
    without.add(torch.randn(4, 7), owed=torch.randn(4, 2))
    assert without.result().drift is None and without.result().half.owed.shape == (2, 7)
    with pytest.raises(ValueError, match="no input"):
        StatsAccumulator().result()
