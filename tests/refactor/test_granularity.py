"""Choosing N: a finer cut must win more than its sub-router costs."""

import torch
from prism.streaming import StreamedModel
from prism_refactor.granularity import Trial, best, candidates, choose, lost_energy
from prism_refactor.layer_experts import Expert, expert_of

IDS = torch.randint(0, 256, (8, 64), generator=torch.Generator().manual_seed(0))


def test_candidates_divide_the_neurons_and_leave_no_tiny_slice() -> None:
    assert candidates(256) == (8, 16, 32)
    assert candidates(64) == (8,)
    assert candidates(1408) == (8, 16, 32)
    assert candidates(176) == (8, 16)
    assert candidates(48) == ()


def test_the_finer_cut_must_lose_clearly_less() -> None:
    def losses(**by_n: float) -> dict[int, dict[float, float]]:
        return {int(n[1:]): dict.fromkeys((0.75, 0.5, 0.25), loss) for n, loss in by_n.items()}

    assert best([losses(n8=0.10, n16=0.05, n32=0.02)]) == 32
    assert best([losses(n8=0.10, n16=0.05, n32=0.06)]) == 16
    assert best([losses(n8=0.10, n16=0.099, n32=0.2)]) == 8


def test_lost_energy_falls_with_the_share(checkpoint) -> None:  # type: ignore[no-untyped-def]
    model = StreamedModel(checkpoint, torch.float32)
    with model.loaded(0):
        expert: Expert = expert_of(model.experts(0), 0)
        x = torch.randn(400, 32, generator=torch.Generator().manual_seed(1))
        found = lost_energy(Trial(expert, x, torch.ones(400)), 8, seed=0)
    assert 0 < found[0.75] < found[0.5] < found[0.25] < 1


def test_where_nothing_can_be_chosen_the_default_stays(checkpoint) -> None:  # type: ignore[no-untyped-def]
    model = StreamedModel(checkpoint, torch.float32)
    assert choose(model, IDS, width=64, seed=0) == 8
    assert choose(model, IDS, width=48, seed=0) == 8
