"""Which ranks are drawn."""

import pytest

from lora_adapters.types.dylora.rank_sampling import ranks_of_step

RANKS = (2, 4, 6, 8)


def drawn(sampling, steps, batch, seed=5):
    """The ranks of the steps' batches, one list a step."""
    return [ranks_of_step(RANKS, sampling, seed, step, range(batch), batch) for step in range(steps)]


@pytest.mark.parametrize("batch", [1, 3, 8])
@pytest.mark.parametrize(("sampling", "shares"), [("uniform", [1, 1, 1, 1]), ("spread", [0.42, 0.21, 0.14, 0.23])])
def test_how_often(sampling, shares, batch):
    """spread: 1/8 for the full rank, and 7/8 in proportion to 1/b: 1/2 : 1/4 : 1/6 : 1/8."""
    every = [rank for step in drawn(sampling, 8000, batch) for rank in step]
    found = [every.count(rank) / len(every) for rank in RANKS]
    assert found == pytest.approx([share / sum(shares) for share in shares], abs=0.02)


@pytest.mark.parametrize("batch", [1, 8])
def test_how_often_after_sorting(batch):
    """3/10 for the full rank, and 7/10 in proportion to b**-1.5."""
    every = [
        rank
        for step in range(8000)
        for rank in ranks_of_step(RANKS, "spread", 5, step, range(batch), batch, sorted_components=True)
    ]
    powers = [rank**-1.5 for rank in RANKS]
    shares = [0.7 * power / sum(powers) for power in powers]
    shares[-1] += 0.3
    assert [every.count(rank) / len(every) for rank in RANKS] == pytest.approx(shares, abs=0.02)


def test_uniform_is_one_for_all():
    steps = drawn("uniform", 60, 4)
    assert {len(set(step)) for step in steps} == {1}
    assert {step[0] for step in steps} == {*RANKS}


def test_spread_has_all_ranks_in_each_batch_that_is_large_enough():
    for step in drawn("spread", 50, 8):
        assert set(step) == {*RANKS}
        assert 3 <= step.count(2) <= 4  # 42 % of 8
    places = {step.index(8) for step in drawn("spread", 50, 8)}
    assert places == {*range(8)}  # not always the same sample


def test_spread_over_neighbouring_steps_of_one_sample():
    """Of any 8 steps in a row, none is far from the shares: random draws would miss the full rank in one of eight."""
    every = [step[0] for step in drawn("spread", 400, 1)]
    counts = [every[start : start + 8].count(8) for start in range(392)]
    assert min(counts) >= 1
    assert max(counts) <= 3


def test_a_function_of_seed_and_step_alone_wherever_the_samples_are():
    whole = drawn("spread", 5, 6)
    assert whole == drawn("spread", 5, 6)
    assert whole != drawn("spread", 5, 6, seed=6)
    parts = [ranks_of_step(RANKS, "spread", 5, 3, range(start, stop), 6) for start, stop in ((0, 2), (2, 6))]
    assert parts[0] + parts[1] == whole[3]
