"""The benchmark's baselines: the original where they keep all, and what was asked where not."""

import json
import random
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from prism_refactor.progress import Standing

from bench.baselines import chosen, moe_prism
from bench.baselines.compared import of_method
from bench.baselines.oracle import OracleNeurons, OracleSlices
from bench.baselines.original import Method, Original, PackedLayers, Routed
from bench.baselines.partitions import IndexCutter, OurSelection, Partition, RandomCutter
from bench.baselines.rounding import round_groups
from bench.baselines.skipping import AdaptiveSkipping, LowerTopK
from bench.baselines.timing import StageClock

GROUPS = 4


@pytest.fixture(scope="module")
def original(checkpoint: Path) -> Original:
    return Original(checkpoint)


@pytest.fixture(scope="module")
def ids() -> torch.Tensor:
    return torch.randint(0, 256, (8, 256), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def methods(original: Original, ids: torch.Tensor) -> dict[str, Callable[[float], Method]]:
    """Every kind of baseline, by the share it is to keep."""
    whole = PackedLayers(original.weights, 1)
    partitions = {
        name: Partition(original, cutter(GROUPS, 0, 1), ids)
        for name, cutter in (("random", RandomCutter), ("index", IndexCutter))
    }
    published = moe_prism.refactored(original, ids, 0, 50)

    def skipping(share: float, norm: bool, means: bool) -> Method:
        return AdaptiveSkipping(whole, share, by_norm=norm, compensated=means)

    return {
        "top-k": lambda share: LowerTopK(whole, round(2 * share), 2, False),
        "gate": lambda share: skipping(share, False, False),
        "norm": lambda share: skipping(share, True, False),
        "means": lambda share: skipping(share, True, True),
        "random": lambda share: OurSelection("random", partitions["random"], share),
        "index": lambda share: OurSelection("index", partitions["index"], share),
        "published": lambda share: moe_prism.Pattern(published, (round(4 * share),) * 2),
        "oracle": lambda share: OracleSlices(original, GROUPS, share, compensated=False),
        "stand-ins": lambda share: OracleSlices(original, GROUPS, share, compensated=True),
        "neurons": lambda share: OracleNeurons(share),
    }


KINDS = ("top-k", "gate", "norm", "means", "random", "index", "published")
BOUNDS = ("oracle", "stand-ins", "neurons")


@pytest.mark.parametrize("kind", [*KINDS, *BOUNDS])
def test_keeping_all_is_the_original(
    kind: str, original: Original, ids: torch.Tensor, methods: dict[str, Any]
) -> None:
    method = methods[kind](1.0)
    original.fit(method, ids)
    found = original.hidden(ids, method.answer)
    assert method.tally.share == 1
    assert (found - original.hidden(ids)).abs().max() < 1e-3


@pytest.mark.parametrize("kind", [*KINDS, *BOUNDS])
def test_half_is_half_and_not_the_original(
    kind: str, original: Original, ids: torch.Tensor, methods: dict[str, Any]
) -> None:
    method = methods[kind](0.5)
    original.fit(method, ids)
    found = original.hidden(ids, method.answer)
    assert method.tally.share == pytest.approx(0.5, abs=0.01)
    assert (found - original.hidden(ids)).abs().mean() > 1e-3


def test_bounds_are_nearer_than_what_can_be_run(
    original: Original, ids: torch.Tensor, methods: dict[str, Any]
) -> None:
    full, distance = original.hidden(ids), {}
    for kind in ("gate", "index", "oracle", "neurons"):
        method = methods[kind](0.5)
        original.fit(method, ids)
        distance[kind] = float((original.hidden(ids, method.answer) - full).square().mean())
    assert distance["neurons"] < distance["oracle"] < distance["index"] < distance["gate"]


def test_a_skipped_expert_is_replaced_by_its_mean(original: Original) -> None:
    """Nothing kept: what comes out is the mean of each expert, times the gate."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(64, 32, generator=generator)
    index = torch.zeros(64, 2, dtype=torch.int64)
    index[:, 1] = 3
    weights = torch.rand(64, 2, generator=generator)
    routed = Routed(0, original.weights[0], x, index, weights)
    method = AdaptiveSkipping(
        PackedLayers(original.weights, 1), 0.0, by_norm=False, compensated=True
    )
    method.fit(routed)
    found = method.answer(routed)
    held = original.weights[0]
    means = [(held.inner(e, x) @ held.down[e].t()).sum(0) / (64 + 8) for e in (0, 3)]
    expected = weights[:, :1] * means[0] + weights[:, 1:] * means[1]
    assert torch.allclose(found, expected, atol=1e-4)


def test_annealing_keeps_more_than_it_began_with() -> None:
    generator = torch.Generator().manual_seed(0)
    mass = torch.rand(3, 32, 64, generator=generator) ** 8
    start = moe_prism.greedy(mass)
    found = moe_prism.anneal(mass, start, 0, 2000)
    kept = [moe_prism.group_mass(mass, order).amax(1).sum() for order in (start, found)]
    assert kept[1] > kept[0]
    for order in found:
        assert torch.equal(order.sort().values, torch.arange(32))
    assert torch.equal(found, moe_prism.anneal(mass, start, 0, 2000))


def test_patterns_are_all_falling_ones_of_a_budget() -> None:
    found = list(moe_prism.patterns(8, 4))
    assert (4, 3, 1, 0) in found
    assert (2, 2, 2, 2) in found
    assert len(found) == len(set(found)) == 8
    assert all(sum(p) == 8 and list(p) == sorted(p, reverse=True) for p in found)


def test_gate_neurons_lie_in_their_group_and_fire_most_together() -> None:
    active = torch.zeros(32, 60)
    active[[1, 3, 5, 7]] = 1.0
    active += torch.rand(32, 60, generator=torch.Generator().manual_seed(0)) * 0.01
    found = moe_prism.gate_neurons(active, torch.arange(32))
    assert set(found[0].tolist()) == {1, 3, 5, 7}
    assert torch.equal(found // 8, torch.arange(4).unsqueeze(1).expand(4, 4))


def test_rounding_errs_by_half_a_step_at_most() -> None:
    weight = torch.randn(2, 3, 128, generator=torch.Generator().manual_seed(0))
    errors = {}
    for bits in (8, 4):
        off = (round_groups(weight, bits) - weight).view(2, 3, 2, 64).abs()
        step = weight.view(2, 3, 2, 64).abs().amax(3) / (2 ** (bits - 1) - 1)
        assert (off.amax(3) <= 0.52 * step).all()  # the scale is rounded to bf16 as well
        errors[bits] = float(off.mean())
    assert errors[4] > 10 * errors[8]


def test_seconds_of_a_refactoring_go_to_its_stages(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr("bench.baselines.timing.time.monotonic", lambda: now[0])
    clock = StageClock()
    view = clock.refactoring("refactor")
    for at, stage in ((2.0, "partition"), (5.0, "partition"), (6.0, "write")):
        now[0] = at
        view(Standing(stage, 1, 1, 0.5, None))
    clock.begin("measure")
    now[0] = 10.0
    assert clock.seconds() == {
        "refactor: partition": 5.0,
        "refactor: write": 1.0,
        "measure": 4.0,
    }


def test_the_whole_benchmark_on_a_small_model(
    checkpoint: Path, artifact: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from bench import refactor as bench

    rng = random.Random(3)
    texts = {"calibration": 40, "validation": 80}
    for name, count in texts.items():
        rows = [{"text": " ".join(rng.choices(["ab", "cde", "fghi"], k=120))} for _ in range(count)]
        file = tmp_path / f"{name}.jsonl"
        file.write_text("".join(json.dumps(line) + "\n" for line in rows))
    monkeypatch.setattr(moe_prism, "ITERATIONS", 20)
    monkeypatch.setattr(bench, "LEVELS", (100, 97, 75, 50, 25))
    out, plot = tmp_path / "out" / "refactor.json", tmp_path / "plot.png"
    families = [name for name in chosen.FAMILIES if name != "rounding"]  # 32 features are no 64
    given = {
        "model": checkpoint,
        "artifact": artifact.path,
        "auto-artifact": artifact.path,
        "calibration": tmp_path / "calibration.jsonl",
        "validation": tmp_path / "validation.jsonl",
        "tokens": 8192,
        "fit-tokens": 2048,
        "families": ",".join(families),
        "out": out,
        "plot": plot,
    }
    arguments = [part for name, value in given.items() for part in (f"--{name}", str(value))]
    monkeypatch.setattr(sys, "argv", ["refactor", *arguments])
    assert bench.main() == 1  # a random model misses marks
    found = json.loads(out.read_text())
    assert plot.read_bytes()[:4] == b"\x89PNG"
    assert {row["method"] for row in found["rows"]} >= {
        "ours, N = 4",
        "ours, N auto (4)",
        "lower top-k",
        "MoE-Prism",
    }
    assert {point["batch"] for point in found["served"]} == {8, 32}
    assert all("holds" in mark for mark in found["marks"])
    full = next(row for row in found["rows"] if row["asked"] == 1.0)
    assert full["loss"] == pytest.approx(0, abs=1e-3)


def test_every_family_names_itself_once(original: Original) -> None:
    assert of_method(original, OracleNeurons(0.5)).method == "oracle neurons"
    with pytest.raises(KeyError):
        chosen.entries(None, ["no such family"], lambda _: None)  # type: ignore[arg-type]
