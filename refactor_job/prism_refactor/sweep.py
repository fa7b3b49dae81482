"""Streams of hidden states through a model, one decoder layer after the other.

Knows decoder layers and who answers for their experts; must not know what an answer fits. The
decision worth arguing about: several streams (one per knot, one per measured level) pass a layer
before the next one is loaded, so each layer comes from disk once and memory holds one layer and
the streams, however large the model; what a kill -9 leaves is the state between two layers.
"""

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Final, Protocol

import torch
from prism.streaming import Batch, StreamedModel
from torch import Tensor
from transformers.integrations.moe import ExpertsInterface

from prism_refactor.store import PartialFolder

IMPLEMENTATION: Final = "prism_refactor"
_SAVE_EVERY_S: Final = 5.0  # a layer of a small model takes less than writing its streams

Answer = Callable[[Tensor, Tensor, Tensor], Tensor]  # x [T, H], index, weights [T, K] -> [T, H]
# What answers for the experts of MoE layer ``number`` in each stream; the layer is loaded.
Answers = Callable[[int, Any], Mapping[str, Answer]]

_answers: dict[int, Answer] = {}


def _dispatch(module: Any, x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
    """The registered experts function: transformers hands over the module, we find its answer."""
    return _answers[id(module)](x, index, weights).to(x.dtype)


ExpertsInterface.register(IMPLEMENTATION, _dispatch)


class Kept(Protocol):
    """Where the streams are kept between layers."""

    def load(self) -> tuple[int, dict[str, Tensor]] | None:
        """(decoder layers done, hidden state of each stream), or None at the start."""

    def save(self, done: int, hidden: dict[str, Tensor]) -> None:
        """Keep the streams after ``done`` decoder layers, in place of what was kept before."""


class KeptStreams:
    """The streams of one sweep in a partial folder, written at most every few seconds.

    ``until``: a state beyond this decoder layer is of no use, since work before it is still to do.
    """

    def __init__(self, folder: PartialFolder, name: str, until: int | None = None) -> None:
        self._folder = folder
        self._name = name
        self._until = until
        self._last = time.monotonic()

    def load(self) -> tuple[int, dict[str, Tensor]] | None:
        """What the last save kept."""
        kept = self._folder.load(self._name)
        if kept is None:
            return None
        done = int(kept.pop("done"))
        return None if self._until is not None and done > self._until else (done, kept)

    def save(self, done: int, hidden: dict[str, Tensor]) -> None:
        """Keep, unless that was done a moment ago."""
        if time.monotonic() - self._last < _SAVE_EVERY_S:
            return
        self._folder.save(self._name, {"done": torch.tensor(done), **hidden})
        self._last = time.monotonic()


def sweep(
    model: StreamedModel,
    batches: Mapping[str, Batch],
    answers: Answers,
    kept: Kept,
    *,
    start: tuple[int, dict[str, Tensor]] | None = None,
    end: int | None = None,
    passed: Callable[[int], None] = lambda number: None,
) -> dict[str, Tensor]:
    """Hidden state [S, W, H] of every stream after decoder layer ``end`` - 1 (default: the last).

    Begins where ``kept`` ended, or else at ``start``: (decoder layer, hidden states), by default
    the embeddings. ``passed`` hears the number of each MoE layer that the streams have passed.
    """
    done, hidden = kept.load() or start or (0, {n: b.embedded for n, b in batches.items()})
    # A copy: whoever gave the start may begin there again. What was kept comes from a file.
    hidden = {name: state.to(model.device) for name, state in hidden.items()}
    last = len(model.layers) if end is None else end
    model.model.set_experts_implementation(IMPLEMENTATION)
    for place in range(last):
        number = model.moe.get(place)
        if place >= done:
            with model.loaded(place):
                module = model.experts(place)
                by_stream = {} if number is None else answers(number, module)
                for name, batch in batches.items():
                    with _answering(module, by_stream.get(name)):
                        hidden[name] = model.run(place, hidden[name], batch)
                by_stream = {}  # their weights go before the next layer's come
            kept.save(place + 1, hidden)
        if number is not None:
            passed(number)
    return hidden


@contextmanager
def _answering(module: Any, answer: Answer | None) -> Iterator[None]:
    """``answer`` for the experts of ``module`` while this is open."""
    if answer is None:
        yield
        return
    _answers[id(module)] = answer
    try:
        yield
    finally:
        del _answers[id(module)]


def plain(module: Any) -> Answer:
    """The experts as transformers computes them."""
    compute = ExpertsInterface()["grouped_mm"]

    def answer(x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        out: Tensor = compute(module, x, index, weights)
        return out

    return answer
