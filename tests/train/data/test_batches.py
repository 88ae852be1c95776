from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lora_adapters.train.data.batches import Group, batch_count, plan_epoch, share

GROUPS = [Group(3, range(10)), Group(2, range(10, 15)), Group(3, [20])]


def test_an_epoch_uses_each_entry_once_within_its_group_and_size():
    plan = plan_epoch(GROUPS, 1, 0, 1, shuffle=True)
    assert Counter(entry for batch in plan for entry in batch) == Counter([*range(15), 20])
    for batch in plan:
        (group,) = (group for group in GROUPS if batch[0] in group.entries)
        assert set(batch) <= set(group.entries)
        assert len(batch) <= group.batch_size
    assert len(plan) == batch_count(GROUPS, 1) == 4 + 3 + 1


def test_order_depends_on_seed_and_epoch_alone():
    plans = [plan_epoch(GROUPS, seed, epoch, 1, shuffle=True) for seed, epoch in ((1, 0), (1, 0), (1, 1), (2, 0))]
    assert plans[0] == plans[1]
    assert len({str(plan) for plan in plans}) == 3
    steady = plan_epoch(GROUPS, 1, 5, 1, shuffle=False)
    assert steady[0] == [0, 1, 2]
    assert steady == plan_epoch(GROUPS, 2, 0, 1, shuffle=False)


def test_two_processes_see_the_batches_of_one_with_twice_the_size():
    doubled = [Group(group.batch_size * 2, group.entries) for group in GROUPS]
    one = plan_epoch(doubled, 1, 3, 1, shuffle=True)
    two = plan_epoch(GROUPS, 1, 3, 2, shuffle=True)
    assert one == two
    assert batch_count(GROUPS, 2) == batch_count(doubled, 1) == len(one)


@given(st.integers(1, 20), st.integers(1, 6))
def test_shares_hold_every_entry_once_and_their_means_make_the_mean(total, world_size):
    losses = [float(entry * entry) for entry in range(total)]
    shares = [share(range(total), rank, world_size) for rank in range(world_size)]
    counted = [entry for part in shares for entry, weight in zip(part.entries, part.weights, strict=True) if weight]
    assert counted == list(range(total))
    means = []
    for part in shares:
        weighted = [losses[entry] * weight for entry, weight in zip(part.entries, part.weights, strict=True)]
        means.append(sum(weighted) / len(weighted))
    assert sum(means) / world_size == pytest.approx(sum(losses) / total)
