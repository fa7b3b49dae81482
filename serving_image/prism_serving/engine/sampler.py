"""From logits to tokens: greedy, temperature, top-k, top-p, each request with its own numbers.

Knows: the arithmetic. Must not know: sequences, scheduling, where logits come from.

A sampled request draws one uniform number per token from its own generator and inverts the
cumulative distribution in a fixed order. So a seeded request repeats whatever else is in the batch
(up to rounding of its own logits); nothing is shared between rows but the tensor operations.

One decision worth arguing about: order of operations as in transformers: temperature, then top-k,
then top-p, so that figures compare.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import torch

from prism_serving.protocol import Sampling, TokenLogprobs

# Below it a temperature means greedy: logits divided by it leave fp32 and become NaN.
_COLDEST: Final = 1e-5


@dataclass(frozen=True, slots=True)
class Draw:
    """How one row is sampled; `uniform` in [0, 1) is used when temperature > 0. `banned` tokens
    get no probability (end-of-sequence before `min_tokens`)."""

    sampling: Sampling
    uniform: float = 0.0
    banned: tuple[int, ...] = ()


def sample(logits: torch.Tensor, draws: Sequence[Draw]) -> list[int]:
    """One token per row of `logits` [rows, vocab]; computed in fp32."""
    logits = logits.float()
    if any(d.banned for d in draws):
        logits = logits.clone()
        for row, draw in enumerate(draws):
            logits[row, list(draw.banned)] = float("-inf")
    tokens: list[int] = logits.argmax(-1).tolist()
    sampled = [i for i, d in enumerate(draws) if d.sampling.temperature >= _COLDEST]
    plain = [i for i in sampled if not _is_truncated(draws[i].sampling, logits.shape[1])]
    truncated = [i for i in sampled if _is_truncated(draws[i].sampling, logits.shape[1])]
    for rows, pick in ((plain, _pick_plain), (truncated, _pick_truncated)):
        if rows:
            picked = pick(logits[rows], [draws[i] for i in rows])
            for row, token in zip(rows, picked.tolist(), strict=True):
                tokens[row] = token
    return tokens


def _is_truncated(sampling: Sampling, vocab: int) -> bool:
    return sampling.top_p < 1 or 0 < sampling.top_k < vocab


def _column(values: list[float], like: torch.Tensor) -> torch.Tensor:
    return torch.tensor(values, dtype=like.dtype, device=like.device)[:, None]


def _invert(probabilities: torch.Tensor, draws: Sequence[Draw]) -> torch.Tensor:
    """Index per row where the cumulative sum passes uniform x total; fp64, never a zero entry."""
    total = probabilities.double().cumsum(-1)
    target = _column([d.uniform for d in draws], total) * total[:, -1:]
    index = torch.searchsorted(total, target, right=True)[:, 0]
    last = (probabilities > 0).cumsum(-1).argmax(-1)  # last entry with any probability
    return torch.minimum(index, last)


def _pick_plain(logits: torch.Tensor, draws: Sequence[Draw]) -> torch.Tensor:
    temperature = _column([d.sampling.temperature for d in draws], logits)
    return _invert(torch.softmax(logits / temperature, -1), draws)


def _pick_truncated(logits: torch.Tensor, draws: Sequence[Draw]) -> torch.Tensor:
    vocab = logits.shape[1]
    temperature = _column([d.sampling.temperature for d in draws], logits)
    ordered, index = torch.sort(logits / temperature, dim=-1, descending=True, stable=True)
    top_k = _column([float(d.sampling.top_k or vocab) for d in draws], logits)
    ranks = torch.arange(vocab, device=logits.device)[None]
    ordered = ordered.masked_fill(ranks >= top_k, float("-inf"))
    probabilities = torch.softmax(ordered, -1)
    before = probabilities.cumsum(-1) - probabilities
    top_p = _column([d.sampling.top_p for d in draws], logits)
    beyond = (before >= top_p) & (ranks > 0)  # the best token always stays
    picked = _invert(probabilities.masked_fill(beyond, 0.0), draws)
    return index.gather(1, picked[:, None])[:, 0]


def logprobs(
    logits: torch.Tensor, tokens: Sequence[int], draws: Sequence[Draw]
) -> list[TokenLogprobs | None]:
    """Log-probabilities for the rows that asked, under the model's own distribution."""
    out: list[TokenLogprobs | None] = [None] * len(draws)
    rows = [i for i, d in enumerate(draws) if d.sampling.logprobs is not None]
    if not rows:
        return out
    log_p = torch.log_softmax(logits[rows].float(), -1)
    most = max(draws[i].sampling.logprobs or 0 for i in rows)
    best = torch.topk(log_p, most, dim=-1) if most else None
    for at, row in enumerate(rows):
        count = draws[row].sampling.logprobs or 0
        top: list[tuple[int, float]] = []
        if best is not None:
            ids, values = best.indices[at, :count].tolist(), best.values[at, :count].tolist()
            top = list(zip(ids, values, strict=True))
        out[row] = TokenLogprobs(chosen=log_p[at, tokens[row]].item(), top=top)
    return out
