"""The swap search: objective, determinism, improvement, agreement of its two forms, time."""

import threading
import time

import pytest
import torch
from prism.kernels import build, swap_search
from prism.kernels.swap_search import importance_order
from torch import Tensor


@pytest.fixture(scope="module", autouse=True)
def extension() -> None:
    build.load()


def masses(neurons: int = 64, tokens: int = 100) -> Tensor:
    """Neurons that fire in hidden groups, with noise; columns sum to 1."""
    g = torch.Generator().manual_seed(0)
    causes = torch.randn(12, tokens, generator=g).relu()
    mass = causes[torch.randint(0, 12, (neurons,), generator=g)] * torch.rand(
        neurons, 1, generator=g
    )
    mass = (mass + 0.2 * torch.rand(neurons, tokens, generator=g)) ** 2
    return mass / mass.sum(dim=0)


def objective(mass: Tensor, order: Tensor, n: int) -> float:
    groups = mass[order.long()].view(n, -1, mass.shape[1]).sum(dim=1)
    return groups.topk(n // 2, dim=0).values.sum(dim=0).mean().item()


def search(mass: Tensor, n: int, proposals: int = 2000, seed: int = 1) -> tuple[Tensor, float]:
    return swap_search.swap_search(mass, n, importance_order(mass), proposals, seed)


@pytest.mark.parametrize("n", [4, 8, 16, 32])
def test_objective_is_what_it_says_and_rises(n: int) -> None:
    mass = masses()
    before = objective(mass, importance_order(mass), n)
    order, found = search(mass, n)
    assert sorted(order.tolist()) == list(range(64))
    assert found == pytest.approx(objective(mass, order, n), abs=1e-6)
    assert found > before + 0.01


def test_same_seed_same_order_other_seed_other_order() -> None:
    mass = masses()
    assert torch.equal(search(mass, 8)[0], search(mass, 8)[0])
    assert not torch.equal(search(mass, 8)[0], search(mass, 8, seed=2)[0])


def test_no_proposals_leave_the_start() -> None:
    mass = masses()
    assert torch.equal(search(mass, 8, proposals=0)[0], importance_order(mass))


@pytest.mark.parametrize("n", [4, 8, 32])
def test_numpy_form_gives_the_same_result(n: int, monkeypatch: pytest.MonkeyPatch) -> None:
    mass = masses()
    order, found = search(mass, n)

    def missing() -> str:
        raise build.BuildError("no compiler")

    monkeypatch.setattr(swap_search.build, "load", missing)
    other_order, other = search(mass, n)
    assert other == pytest.approx(found, abs=1e-4)
    assert (order == other_order).float().mean() > 0.9


def test_more_proposals_never_end_lower() -> None:
    values = [search(masses(), 8, proposals)[1] for proposals in (0, 100, 1000, 4000)]
    assert values == sorted(values)


@pytest.mark.parametrize(
    ("shape", "n", "start", "message"),
    [
        ((64, 10), 6, range(64), "cut into 6 groups"),
        ((60, 10), 8, range(60), "cut into 8 groups"),
        ((64, 0), 8, range(64), "cut into 8 groups"),
        ((64, 10), 8, range(1, 65), "no permutation of 64"),
        ((64, 10), 8, [0] * 64, "no permutation of 64"),
    ],
)
def test_bad_input_is_refused(
    shape: tuple[int, int], n: int, start: range | list[int], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        order = torch.tensor(list(start), dtype=torch.int32)
        swap_search.swap_search(torch.rand(shape), n, order, 10, 0)


def test_an_expert_of_256_neurons_takes_well_under_a_second() -> None:
    mass = masses(256, 1536)
    start = time.thread_time()
    search(mass, 8, 12_000)
    assert time.thread_time() - start < 0.5


def test_the_interpreter_runs_on_during_a_search() -> None:
    mass = masses(256, 1536)
    done = threading.Event()

    def work() -> None:
        search(mass, 8, 60_000)
        done.set()

    thread = threading.Thread(target=work)
    thread.start()
    ticks = 0
    while not done.wait(0.002):
        ticks += 1
    thread.join()
    assert ticks >= 5  # a held interpreter lock gives one at most
