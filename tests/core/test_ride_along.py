"""Riding along: who computes what a decode batch reads, what that changes, how it is counted."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from prism import experts
from prism.artifact import open_artifact
from prism.batch_context import BatchContext, SelectionStats, batch_context, slice_overhead
from prism.loading import load_model
from prism.selection import OFF, OWN, RIDE, count_groups, faded, ride_along
from torch import Tensor

T, K, E, N = 12, 2, 4, 8
GROUPS = [0, 0, 0, 0, 4, 4, 4, 4, 8, 8, 8, 11]
SEQUENCES, LENGTH = 3, 8
IDS = (torch.arange(SEQUENCES * LENGTH).view(SEQUENCES, LENGTH) * 7) % 61


def routing(seed: int) -> tuple[Tensor, Tensor]:
    """(state [T, K, N], index [T, K]): distinct experts per token, about a third selected."""
    g = torch.Generator().manual_seed(seed)
    index = torch.stack([torch.randperm(E, generator=g)[:K] for _ in range(T)])
    return (torch.rand(T, K, N, generator=g) < 0.3).to(torch.uint8), index


def read_by(state: Tensor, index: Tensor, token: int, expert: int) -> Tensor:
    """Slices [N] of the expert that the token's group selects, by loops."""
    found = torch.zeros(N, dtype=torch.bool)
    for other in range(T):
        for slot in range(K):
            if GROUPS[other] == GROUPS[token] and int(index[other, slot]) == expert:
                found |= state[other, slot] == OWN
    return found


@pytest.mark.parametrize("seed", range(3))
def test_a_token_computes_its_own_and_what_its_group_reads(seed: int) -> None:
    own, index = routing(seed)
    state = ride_along(own, index, torch.tensor(GROUPS), E)
    assert state.dtype == torch.uint8
    assert torch.equal(state == OWN, own == OWN)
    assert (state == RIDE).any()
    for token in range(T):
        for slot in range(K):
            expected = read_by(own, index, token, int(index[token, slot]))
            assert torch.equal(state[token, slot] != OFF, expected)


def test_other_groups_change_nothing() -> None:
    own, index = routing(0)
    groups = torch.tensor(GROUPS)
    before = ride_along(own, index, groups, E)
    changed, moved = own.clone(), index.clone()
    changed[4:] = 1
    moved[4:] = (moved[4:] + 1) % E
    after = ride_along(changed, moved, groups, E)
    assert torch.equal(after[:4], before[:4])
    assert not torch.equal(after[4:], before[4:])


def test_a_token_alone_rides_nothing() -> None:
    own, index = routing(1)
    assert torch.equal(ride_along(own, index, torch.arange(T), E), own)
    assert not (ride_along(own, index, torch.tensor(GROUPS), E)[11] == RIDE).any()


def test_sentinel_experts_neither_give_nor_take() -> None:
    own, index = routing(2)
    index[0:3, 0] = E + 2
    own[0:3, 0] = OFF
    state = ride_along(own, index, torch.tensor(GROUPS), E)
    assert not state[0:3, 0].any()
    counts = count_groups(state, index, torch.tensor(GROUPS), (E, N))
    pairs = {(g, e) for g, row in zip(GROUPS, index.tolist(), strict=True) for e in row if e < E}
    assert int(counts.hit) == N * len(pairs)


def test_scalar_fades_with_what_rode_along() -> None:
    state = torch.tensor(
        [[[OWN, OFF, OFF, OFF]], [[OWN, RIDE, RIDE, OFF]], [[OWN, RIDE, RIDE, RIDE]]]
    )
    kept_all = torch.tensor([[[OWN, OWN, OWN, OWN]]])
    scalars = torch.tensor([[1.3], [1.3], [1.3], [0.7]])
    found = faded(scalars, torch.cat([state, kept_all]).to(torch.uint8))
    assert torch.allclose(found, torch.tensor([[1.3], [1.1], [1.0], [0.7]]))


def test_counts_follow_the_definition() -> None:
    own, index = routing(3)
    groups = torch.tensor(GROUPS)
    pairs = {(t, int(e)) for t, row in enumerate(index) for e in row}
    distinct = {(GROUPS[t], e): read_by(own, index, t, e) for t, e in pairs}
    alone = count_groups(own, index, groups, (E, N))
    riding = count_groups(ride_along(own, index, groups, E), index, groups, (E, N))
    read = sum(int(slices.sum()) for slices in distinct.values())
    assert int(alone.hit) == int(riding.hit) == N * len(distinct)
    assert int(alone.read) == int(riding.read) == read
    # riding, a mean is read only for what nobody computes; alone, for what anybody drops
    assert int(riding.means) == N * len(distinct) - read < int(alone.means)
    full = count_groups(None, index, groups, (E, N))
    assert (int(full.read), int(full.routers), int(full.means)) == (int(full.hit), 0, 0)


@pytest.mark.parametrize("table_bytes", [2, 4])
def test_bytes_share_adds_routers_and_means_to_bf16_weights(table_bytes: int) -> None:
    own, index = routing(3)
    stats = SelectionStats()
    counts = count_groups(own, index, torch.tensor(GROUPS), (E, N))
    ratio = table_bytes / 2
    stats.add_groups(0, replace(counts, table_ratio=ratio), 0)
    full = count_groups(None, index, torch.tensor(GROUPS), (E, N))
    stats.add_groups(1, replace(full, table_ratio=ratio), 0)
    hidden, width = 64, 32
    slice_bytes, vector_bytes = 3 * width * hidden * 2, hidden * table_bytes
    assert slice_overhead(width, ratio) == vector_bytes / slice_bytes
    vectors = int(counts.hit) + int(counts.means)
    whole = int(counts.hit) * slice_bytes
    first = (int(counts.read) * slice_bytes + vectors * vector_bytes) / whole
    assert stats.bytes_share(width) == pytest.approx((first + 1) / 2)
    with pytest.raises(ValueError, match="no groups"):
        SelectionStats().bytes_share(width)


@pytest.fixture(scope="module", params=["reference", "cpu"])
def model(whole_artifact: Path, request: pytest.FixtureRequest) -> Any:
    model, _ = load_model(whole_artifact, torch.float32)
    experts.attach(model, open_artifact(whole_artifact), kernel=request.param)
    return model


@pytest.fixture(autouse=True)
def inference() -> Iterator[None]:
    with torch.inference_mode():
        yield


def logits(model: Any, context: BatchContext, ids: Tensor = IDS) -> Tensor:
    with batch_context(context):
        found: Tensor = model(ids, use_cache=False).logits
    return found


BY_POSITION = list(range(LENGTH)) * SEQUENCES


def test_batches_of_one_are_no_ride_along(model: Any) -> None:
    levels = [50] * IDS.numel()
    alone = BatchContext.of(levels, groups=range(IDS.numel()))
    assert torch.equal(logits(model, alone), logits(model, BatchContext.of(levels)))


def test_riding_computes_more_and_is_nearer_to_the_full_model(model: Any) -> None:
    levels = [50] * IDS.numel()
    full = logits(model, BatchContext.of([100] * IDS.numel()))
    own, riding = SelectionStats(), SelectionStats()
    apart = logits(model, BatchContext.of(levels, "cpu", own, BY_POSITION, ride_along=False))
    together = logits(model, BatchContext.of(levels, "cpu", riding, BY_POSITION))
    assert torch.equal(apart, logits(model, BatchContext.of(levels)))
    assert own.computed == own.own < own.candidates
    assert riding.own < riding.computed <= riding.candidates
    assert (together - full).abs().mean() < (apart - full).abs().mean()


def test_level_100_is_untouched_by_its_neighbours(model: Any) -> None:
    levels = [100] * LENGTH + [50] * (2 * LENGTH)
    mixed = logits(model, BatchContext.of(levels, groups=BY_POSITION))
    full = logits(model, BatchContext.of([100] * IDS.numel()))
    assert (mixed[0] - full[0]).abs().max() < 1e-4
    alone = logits(model, BatchContext.of(levels))
    assert not torch.equal(mixed[1:], alone[1:])  # they ride on the slices of the first sequence


def test_other_batches_in_the_step_change_no_token(model: Any) -> None:
    """Two decode batches in one step: each token as if the other batch were not there."""
    pair = IDS[:2]
    alone = logits(model, BatchContext.of([50] * 16, groups=list(range(8)) * 2), pair)
    groups = list(range(LENGTH)) * 2 + list(range(16, 24))
    beside = logits(model, BatchContext.of([50] * 16 + [25] * 8, groups=groups))
    assert torch.allclose(beside[:2], alone, atol=1e-5)


def test_full_batches_count_bytes_too(model: Any) -> None:
    stats = SelectionStats()
    logits(model, BatchContext.of([100] * IDS.numel(), "cpu", stats, BY_POSITION))
    assert stats.bytes_share(12) == 1
    assert stats.own == stats.computed == stats.candidates


@pytest.mark.parametrize(
    ("groups", "message"),
    [([0, 0, 3], "from 0 to 2"), ([-1, 0, 1], "from 0 to 2"), ([0, 1], "2 groups for 3 levels")],
)
def test_groups_that_fit_no_batch_are_refused(groups: list[int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        BatchContext.of([50] * 3, groups=groups)
