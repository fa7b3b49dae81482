"""Losses of several runs over the same tokens, token by token: what standard errors are made of.

Knows logits. The decision worth arguing about: runs hand over hidden states, not logits, and the
model's own head is applied to a few sequences at a time; a decode batch of 32 sequences would
otherwise need gigabytes of logits for each run with the vocabularies of today.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from prism_refactor.evaluate import Sample, batch_sequences


def last_hidden(model: Any, ids: Tensor) -> Tensor:
    """What the model's head reads, [S, W, H], of ids [S, W]."""
    with torch.inference_mode():
        hidden: Tensor = model.base_model(input_ids=ids, use_cache=False).last_hidden_state
    return hidden


def compare(model: Any, ids: Tensor, full: Tensor, runs: Sequence[Tensor]) -> list[Sample]:
    """Samples of ``full`` and then of each run, on targets ids[:, 1:] of ids [S, W + 1].

    full and runs: hidden states [S, W, H] of ids[:, :-1]. Counts in the samples are zero.
    """
    size = batch_sequences(ids.shape[1] - 1, int(model.get_output_embeddings().weight.shape[0]))
    parts: list[list[Sample]] = [[] for _ in range(1 + len(runs))]
    for start in range(0, len(ids), size):
        here = slice(start, start + size)
        base = _Base.of(_log_probabilities(model, ids[here, :-1], full[here]), ids[here, 1:])
        loss = base.loss(base.logs)
        parts[0].append(Sample(loss, torch.zeros_like(loss), torch.ones_like(loss), 0, 0))
        for part, run in zip(parts[1:], runs, strict=True):
            part.append(base.sample(_log_probabilities(model, ids[here, :-1], run[here])))
    return [_joined(part) for part in parts]


@dataclass(frozen=True, slots=True)
class _Base:
    """What every run is compared with, computed once: the vocabulary is passed over as seldom as
    can be, for it costs more than a small model's layers."""

    logs: Tensor  # [t, V] log-probabilities
    probabilities: Tensor  # [t, V]
    negative_entropy: Tensor  # [t]
    best: Tensor  # [t]
    target: Tensor  # [t, 1]

    @classmethod
    def of(cls, logs: Tensor, targets: Tensor) -> "_Base":
        probabilities = logs.exp()
        entropy = torch.linalg.vecdot(probabilities, logs)
        return cls(logs, probabilities, entropy, logs.argmax(-1), targets.reshape(-1, 1))

    def loss(self, logs: Tensor) -> Tensor:
        return -logs.gather(1, self.target).squeeze(1)

    def sample(self, logs: Tensor) -> Sample:
        """KL(full || run) as the difference of two sums, and rounding can make it -1e-6."""
        kl = self.negative_entropy - torch.linalg.vecdot(self.probabilities, logs)
        agrees = (logs.argmax(-1) == self.best).float()
        return Sample(self.loss(logs), kl, agrees, 0, 0)


def _joined(parts: list[Sample]) -> Sample:
    columns = zip(*((part.loss, part.kl, part.agrees) for part in parts), strict=True)
    loss, kl, agrees = (torch.cat(column) for column in columns)
    return Sample(loss, kl, agrees, 0, 0)


def _log_probabilities(model: Any, ids: Tensor, hidden: Tensor) -> Tensor:
    """[s W, V] fp32 that the model makes of hidden states [s, W, H], with all it does to logits."""
    with torch.inference_mode(), _decoder_answers(model, hidden):
        logits = model(input_ids=ids, use_cache=False).logits
        return functional.log_softmax(logits.float().flatten(0, 1), dim=-1)


@contextmanager
def _decoder_answers(model: Any, hidden: Tensor) -> Iterator[None]:
    """The decoder computes nothing and hands over ``hidden``."""
    from transformers.modeling_outputs import MoeModelOutputWithPast

    def answer(*_: Any, **__: Any) -> MoeModelOutputWithPast:
        return MoeModelOutputWithPast(last_hidden_state=hidden)

    model.base_model.forward = answer  # the instance's attribute hides the class's method
    try:
        yield
    finally:
        del model.base_model.forward
