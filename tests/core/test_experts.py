"""The experts function inside a real transformers model: levels, tables, stats, memory."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from prism import experts
from prism.artifact import ArtifactError, open_artifact
from prism.experts import BatchContext, SelectionStats, batch_context
from prism.levels import log_theta_at
from prism.loading import load_model
from prism.selection import select

IDS = torch.arange(24).view(1, 24) % 61


def attached(path: Path, kernel: str, dtype: torch.dtype = torch.float32) -> Any:
    model, _ = load_model(path, dtype)
    experts.attach(model, open_artifact(path), kernel=kernel)
    return model


@pytest.fixture(scope="module")
def stock(whole_artifact: Path) -> Any:
    return load_model(whole_artifact, torch.float32)[0]


@pytest.fixture(scope="module", params=["reference", "cpu"])
def model(whole_artifact: Path, request: pytest.FixtureRequest) -> Any:
    return attached(whole_artifact, request.param)


@pytest.fixture(autouse=True)
def inference() -> Iterator[None]:
    with torch.inference_mode():
        yield


def logits(model: Any, context: BatchContext | None = None) -> torch.Tensor:
    if context is None:
        return model(IDS, use_cache=False).logits[0]
    with batch_context(context):
        return model(IDS, use_cache=False).logits[0]


def test_no_context_is_the_stock_model(model: Any, stock: Any) -> None:
    assert (logits(model) - logits(stock)).abs().max() < 1e-4


def test_all_100_is_the_stock_model(model: Any, stock: Any) -> None:
    context = BatchContext.of([100] * IDS.numel())
    assert context.full
    assert (logits(model, context) - logits(stock)).abs().max() < 1e-4


def test_one_layer_follows_the_formula(model: Any, stock: Any, whole_artifact: Path) -> None:
    """scalar · kept + means of dropped, at four levels in one batch, against plain torch."""
    artifact = open_artifact(whole_artifact)
    tensors, knots = artifact.layer(0), artifact.manifest.knots
    ours = model.model.layers[0].mlp.experts
    plain = stock.model.layers[0].mlp.experts
    x = torch.randn(4, 32, generator=torch.Generator().manual_seed(3))
    index, weights = torch.tensor([[0, 5], [5, 1], [2, 3], [4, 0]]), torch.rand(4, 2) + 0.1
    levels = [100, 75, 50, 60]
    with batch_context(BatchContext.of(levels)):
        found = ours(x, index, weights)
    theta = torch.tensor([log_theta_at(knots, level)[0] for level in levels])
    state = select(x, index, weights, tensors.router_weight, tensors.router_bias, theta)
    assert 0 < state[1:].sum() < state[1:].numel()
    for t, level in enumerate(levels):
        expected, knot = torch.zeros(32), 0 if level >= 63 else 1
        for k, e in enumerate(index[t].tolist()):
            gate, up = (plain.gate_up_proj[e] @ x[t]).chunk(2)
            inner = (torch.nn.functional.silu(gate) * up).view(4, 12)
            down = plain.down_proj[e].view(32, 4, 12)
            kept = int(state[t, k].sum())
            scalar = 1.0 if level == 100 else tensors.scalars[knot, e, kept]
            for n in range(4):
                part = (
                    scalar * (down[:, n] @ inner[n])
                    if state[t, k, n]
                    else tensors.means[knot, e, n]
                )
                expected += weights[t, k] * part
        assert torch.allclose(found[t], expected, atol=1e-4), f"level {level}"


def test_a_token_at_100_is_full_beside_lower_ones(model: Any, stock: Any) -> None:
    context = BatchContext.of([100] * 12 + [50] * 12)
    difference = (logits(model, context) - logits(stock)).abs()
    assert difference[:12].max() < 1e-4
    assert difference[12:].max() > 1e-2


def test_stats_count_own_and_candidates(model: Any) -> None:
    stats = SelectionStats(per_layer=True)
    logits(model, BatchContext.of([50] * 24, stats=stats))
    assert stats.candidates == 24 * 2 * 4 * 2
    assert 0 < stats.own < stats.candidates
    assert sorted(stats.by_layer) == [0, 1]
    assert sum(own for own, _ in stats.by_layer.values()) == stats.own
    full = SelectionStats()
    logits(model, BatchContext.of([100] * 24, stats=full))
    assert full.own == full.candidates == stats.candidates


def test_lower_level_selects_less(model: Any) -> None:
    shares = []
    for level in (100, 90, 75, 60, 50):
        stats = SelectionStats()
        logits(model, BatchContext.of([level] * 24, stats=stats))
        shares.append(stats.own / stats.candidates)
    assert shares == sorted(shares, reverse=True)
    assert shares[-1] < shares[0]


def test_context_ends_with_its_block_even_on_error(model: Any, stock: Any) -> None:
    with pytest.raises(RuntimeError, match="boom"), batch_context(BatchContext.of([50] * 24)):
        raise RuntimeError("boom")
    assert (logits(model) - logits(stock)).abs().max() < 1e-4


def test_levels_must_match_the_batch(model: Any) -> None:
    with pytest.raises(ValueError, match="7 levels for a batch of 24 tokens"):
        logits(model, BatchContext.of([50] * 7))


def test_one_level_for_all_is_that_level_for_each(model: Any) -> None:
    assert torch.equal(logits(model, BatchContext(50)), logits(model, BatchContext.of([50] * 24)))
    assert BatchContext(100).full


@pytest.mark.parametrize("level", [9, 101])
def test_levels_out_of_range_are_refused(level: int) -> None:
    with pytest.raises(ValueError, match="outside 10-100"):
        BatchContext.of([50, level])
    with pytest.raises(ValueError, match="outside 10-100"):
        BatchContext(level)


def test_bf16_stays_within_bf16_noise(whole_artifact: Path, stock: Any) -> None:
    half, _ = load_model(whole_artifact, torch.bfloat16)
    noise = (logits(half).float() - logits(stock)).abs().mean()
    ours = attached(whole_artifact, "cpu", torch.bfloat16)
    assert (logits(ours).float() - logits(stock)).abs().mean() < 1.5 * noise


@pytest.mark.parametrize(
    ("kernel", "dtype", "tables"),
    [
        ("cpu", torch.float32, torch.float32),
        ("cpu", torch.bfloat16, torch.bfloat16),
        ("reference", torch.bfloat16, torch.float32),
    ],
)
def test_tables_have_the_dtype_that_the_kernel_reads(
    whole_artifact: Path, kernel: str, dtype: torch.dtype, tables: torch.dtype
) -> None:
    model = attached(whole_artifact, kernel, dtype)
    data = model.model.layers[0].mlp.experts._prism
    assert (data.router_weight.dtype, data.means.dtype) == (tables, tables)
    stats = SelectionStats()
    groups = torch.arange(IDS.numel()) % 4
    with batch_context(BatchContext(50, stats, groups)):
        model(IDS)
    ratio = tables.itemsize / dtype.itemsize
    plain = SelectionStats()
    plain._groups = stats._groups
    extra = stats.bytes_share(12) - plain.bytes_share(12)
    assert extra == pytest.approx(0) if ratio == 1 else extra > 0


def test_packed_kernel_frees_the_original_weights(whole_artifact: Path) -> None:
    packed = attached(whole_artifact, "cpu").model.layers[0].mlp.experts
    kept = attached(whole_artifact, "reference").model.layers[0].mlp.experts
    assert packed.gate_up_proj.numel() == 0
    assert kept.gate_up_proj.numel() > 0


def test_artifact_of_another_model_is_refused(whole_artifact: Path) -> None:
    model, _ = load_model(whole_artifact, torch.float32)
    del model.model.layers[1]
    with pytest.raises(ArtifactError, match="made from another model: 2 experts modules"):
        experts.attach(model, open_artifact(whole_artifact))
