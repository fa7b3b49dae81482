"""Sampling: greedy, truncation, and independence of the neighbours."""

import math

import pytest
import torch
from prism_serving.engine.sampler import Draw, logprobs, sample
from prism_serving.protocol import Sampling


def draw(uniform=0.0, banned=(), **sampling) -> Draw:
    return Draw(Sampling(**sampling), uniform, banned)


def test_greedy_takes_the_best_and_bans_are_respected():
    logits = torch.tensor([[0.0, 3.0, 2.0], [0.0, 3.0, 2.0]])
    assert sample(logits, [draw(temperature=0), draw(temperature=0, banned=(1,))]) == [1, 2]
    assert logits[1, 1] == 3.0  # the caller's logits are not changed


@pytest.mark.parametrize("sampling", [{}, {"top_p": 0.999999}, {"top_k": 3}])
def test_shares_follow_the_distribution(sampling):
    p = torch.tensor([0.5, 0.3, 0.2])
    n = 2000
    rows = p.log().expand(n, 3)
    tokens = sample(rows, [draw((i + 0.5) / n, **sampling) for i in range(n)])
    shares = [tokens.count(t) / n for t in range(3)]
    assert shares == pytest.approx([0.5, 0.3, 0.2], abs=0.002)


def test_temperature_sharpens():
    rows = torch.tensor([[math.log(0.6), math.log(0.4)]]).expand(1000, 2)
    tokens = sample(rows, [draw((i + 0.5) / 1000, temperature=0.5) for i in range(1000)])
    assert tokens.count(0) / 1000 == pytest.approx(0.36 / 0.52, abs=0.002)


@pytest.mark.parametrize(
    "sampling, allowed",
    [
        ({"top_k": 1}, {0}),
        ({"top_k": 2}, {0, 1}),
        ({"top_p": 0.5}, {0}),
        ({"top_p": 0.51}, {0, 1}),
        ({"top_p": 0.01}, {0}),
        ({"top_k": 2, "top_p": 0.9}, {0, 1}),
    ],
)
def test_truncation_keeps_the_same_tokens_as_transformers(sampling, allowed):
    rows = torch.tensor([[0.5, 0.3, 0.2]]).log().expand(200, 3)
    tokens = sample(rows, [draw((i + 0.5) / 200, **sampling) for i in range(200)])
    assert set(tokens) == allowed


@pytest.mark.parametrize("temperature", [1e-4, 1e-6, 1e-40, 1e-300])
@pytest.mark.parametrize("truncation", [{}, {"top_p": 0.9}, {"top_k": 2}])
def test_next_to_no_temperature_is_greedy(temperature, truncation):
    logits = torch.tensor([[3.0, 40.0, -2.0, 7.0]])
    assert sample(logits, [draw(0.5, temperature=temperature, **truncation)]) == [1]


@pytest.mark.parametrize("uniform", [0.0, 0.999999999999])
@pytest.mark.parametrize("sampling", [{}, {"top_p": 0.9}])
def test_impossible_tokens_are_never_drawn(uniform, sampling):
    logits = torch.tensor([[float("-inf"), 1.0, 1.0, float("-inf")]])
    assert sample(logits, [draw(uniform, **sampling)])[0] in (1, 2)


def test_a_row_does_not_depend_on_its_neighbours():
    torch.manual_seed(0)
    logits = torch.randn(6, 50)
    draws = [
        draw(0.3),
        draw(0.7, top_p=0.8),
        draw(temperature=0),
        draw(0.5, top_k=5),
        draw(0.1, temperature=1.7, top_p=0.5),
        draw(0.9, top_p=0.99, top_k=20),
    ]
    together = sample(logits, draws)
    alone = [sample(logits[i : i + 1], [d])[0] for i, d in enumerate(draws)]
    assert together == alone


def test_logprobs_are_those_of_the_model_not_of_the_temperature():
    p = torch.tensor([[0.5, 0.3, 0.2]])
    values = logprobs(p.log(), [2], [draw(0.9, temperature=1.9, logprobs=2)])
    assert values[0] is not None
    assert values[0].chosen == pytest.approx(math.log(0.2))
    assert [t for t, _ in values[0].top] == [0, 1]
    assert logprobs(p.log(), [2], [draw()]) == [None]
