"""Quality as served: how batches are formed, what they read, and the baselines beside it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from prism.batch_context import SelectionStats
from prism.experts import BatchContext, batch_context
from prism.selection import count_groups
from prism_refactor import whole_experts
from prism_refactor.batches import BATCH_SIZES, batch_shares
from prism_refactor.errors import RefactorError
from prism_refactor.measure import Subject, measure, open_subject
from prism_refactor.paired import compare, last_hidden
from prism_refactor.served import (
    decode_batches,
    group_numbers,
    level_run,
    measure_served,
    run_batches,
)
from prism_refactor.whole_experts import Routing, Shared, TopK, deciding

WINDOW = 256


@pytest.fixture(scope="module")
def subject(artifact: Any, corpus_file: Path) -> Subject:
    return open_subject(artifact.path, corpus_file, tokens=2048, dtype="float32")


def test_sequences_of_a_batch_lie_far_apart() -> None:
    ids = torch.arange(11).unsqueeze(1)
    assert decode_batches(ids, 4).flatten().tolist() == [0, 2, 4, 6, 1, 3, 5, 7]
    assert decode_batches(ids, 1).flatten().tolist() == list(range(11))
    with pytest.raises(RefactorError, match=r"gives 11 sequences .* a batch of 16 needs 16"):
        decode_batches(ids, 16)


def test_a_group_is_one_position_of_one_batch() -> None:
    groups = group_numbers(4, 3, 2).view(4, 3)
    assert torch.equal(groups[0], groups[1])
    assert torch.equal(groups[2], groups[3])
    assert len(groups.unique()) == 6
    assert groups.max() < groups.numel()


def test_counted_on_masks_or_while_serving_the_shares_are_the_same() -> None:
    """The artifact's curves and SelectionStats are two ways to one number."""
    sequences, length, slots, experts, n = 8, 16, 2, 5, 4
    g = torch.Generator().manual_seed(0)
    index = torch.stack([torch.randperm(experts, generator=g)[:slots] for _ in range(128)])
    selected = torch.rand(128, slots, n, generator=g) < 0.3
    shares = batch_shares(selected, index, experts, length)
    at = BATCH_SIZES.index(sequences)  # all sequences: whoever is drawn, the batch is the same
    groups = group_numbers(sequences, length, sequences)
    counts = count_groups(selected.to(torch.uint8), index, groups, (experts, n))
    assert float(shares.read[at]) == pytest.approx(int(counts.read) / int(counts.hit))
    assert float(shares.dropped[at]) == pytest.approx(int(counts.means) / int(counts.hit))


def test_losses_by_parts_are_those_of_the_whole(
    subject: Subject, monkeypatch: pytest.MonkeyPatch
) -> None:
    from prism_refactor import paired

    model, ids = subject.model, subject.windows.ids[:3]
    monkeypatch.setattr(paired, "batch_sequences", lambda *_: 2)
    full = last_hidden(model, ids[:, :-1])
    samples = compare(model, ids, full, [full, 0.5 * full])
    with torch.inference_mode():
        logits = model(input_ids=ids[:, :-1], use_cache=False).logits.log_softmax(-1)
    expected = -logits.gather(2, ids[:, 1:, None]).flatten()
    assert torch.allclose(samples[0].loss, expected, atol=1e-5)
    assert torch.equal(samples[1].loss, samples[0].loss)
    assert samples[1].kl.abs().max() < 1e-6 < samples[2].kl.mean()


def test_batches_of_one_are_what_eval_measures(subject: Subject, corpus_file: Path) -> None:
    point = run_batches(subject, 1, [level_run(50, True)])[0]
    path = subject.artifact.path
    plain = measure(path, corpus_file, (50,), tokens=2048, dtype="float32")[0]
    assert point.point.quality_loss_percent == pytest.approx(plain.quality_loss_percent, abs=1e-3)
    assert point.point.own_share == pytest.approx(plain.own_share)
    assert point.computed_share == point.point.own_share


def test_riding_along_computes_more_and_reads_no_more(subject: Subject) -> None:
    alone, riding = run_batches(subject, 4, [level_run(50, False), level_run(50, True)])
    assert alone.computed_share == alone.point.own_share
    assert riding.computed_share > riding.point.own_share
    assert riding.point.kl < alone.point.kl
    assert riding.bytes_share < alone.bytes_share + 0.02  # fewer means; hidden states differ
    assert alone.bytes_share > alone.point.own_share


def test_larger_batches_read_more_and_give_more(subject: Subject) -> None:
    points = [run_batches(subject, size, [level_run(50, True)])[0] for size in (1, 2, 8)]
    read = [point.bytes_share for point in points]
    assert read == sorted(read)
    assert points[-1].point.kl < points[0].point.kl


def test_the_whole_table_with_baselines(subject: Subject, corpus_file: Path) -> None:
    points = measure_served(
        subject.artifact.path,
        corpus_file,
        (50, 100),
        (2, 4),
        ride_along=True,
        baselines=True,
        tokens=2048,
        dtype="float32",
    )
    by_name = {(point.batch, point.method): point for point in points}
    assert [p.level for p in points if p.batch == 2] == [100, 50, None, None, None]
    full = by_name[4, "level 100"]
    assert (full.point.quality_loss_percent, full.bytes_share, full.computed_share) == (0, 1, 1)
    ours = by_name[4, "level 50"]
    for form in ("re-routed", "dropped"):
        shared = by_name[4, f"experts shared, {100 * ours.bytes_share:.0f} %, {form}"]
        assert shared.bytes_share == pytest.approx(ours.bytes_share, abs=0.1)
    top = by_name[4, "top-1"]
    assert top.computed_share == 0.5
    assert top.bytes_share > top.computed_share  # the batch hits more experts than one token


# Rules on a routing of two tokens, which are one batch, over four experts.
ROUTING = Routing(
    torch.tensor([[0, 1], [2, 0]]),
    torch.tensor([[0.6, 0.3], [0.5, 0.4]]),
    torch.tensor([[0.6, 0.3, 0.1, 0.0], [0.4, 0.1, 0.5, 0.0]]),
    torch.zeros(2, dtype=torch.int64),
    4,
)


@pytest.mark.parametrize(
    ("rule", "index", "weights"),
    [
        (TopK(1, False), [[0, 1], [2, 0]], [[0.6, 0], [0.5, 0]]),
        (TopK(1, True), [[0, 1], [2, 0]], [[0.9, 0], [0.9, 0]]),
        # demand: expert 0 has 1.0, 2 has 0.5, 1 has 0.3; two thirds of three are two
        (Shared(2 / 3, "dropped"), [[0, 1], [2, 0]], [[0.6, 0], [0.5, 0.4]]),
        (Shared(2 / 3, "masked"), [[0, 2], [2, 0]], [[6 / 7, 1 / 7], [5 / 9, 4 / 9]]),
        (Shared(2 / 3, "re-routed"), [[0, 2], [2, 0]], [[0.9 * 6 / 7, 0.9 / 7], [0.5, 0.4]]),
        (Shared(0.01, "dropped"), [[0, 1], [2, 0]], [[0.6, 0], [0, 0.4]]),
    ],
)
def test_rules(
    rule: Callable[[Routing], tuple[torch.Tensor, torch.Tensor]],
    index: list[list[int]],
    weights: list[list[float]],
) -> None:
    found_index, found = rule(ROUTING)
    assert torch.allclose(found, torch.tensor(weights))
    kept = found > 0
    assert torch.equal(found_index[kept], torch.tensor(index)[kept])


def test_routers_that_are_no_softmax_are_not_guessed() -> None:
    logits = torch.randn(2, 4, generator=torch.Generator().manual_seed(1))
    weights, index = logits.softmax(-1).topk(2)
    known = whole_experts._probabilities(logits, index, weights / weights.sum(1, keepdim=True), 4)
    assert known is not None
    assert whole_experts._probabilities(logits, index, logits.sigmoid().gather(1, index), 4) is None
    assert whole_experts._probabilities(None, index, weights, 4) is None


def test_a_rule_that_keeps_all_is_the_full_model_and_ends_with_its_block(subject: Subject) -> None:
    model, ids = subject.model, subject.windows.ids[:2, :32]
    groups, stats = torch.arange(64), SelectionStats()
    before = last_hidden(model, ids)
    with deciding(model, TopK(2, False), groups, stats):
        inside = last_hidden(model, ids)
    assert (inside - before).abs().max() < 1e-4
    assert stats.bytes_share(12) == 1
    with batch_context(BatchContext.of([50] * 64)):
        assert not torch.equal(last_hidden(model, ids), before)
    assert torch.equal(last_hidden(model, ids), before)
