"""What is odd about a calibration text: too short, or far from what the method was tried on.

Knows token ids. Nothing here refuses a text: own-domain text is welcome, and a person who is told
decides. The decision worth arguing about: distance is the Jensen-Shannon divergence of token
frequencies, because it needs no model, takes a moment and is bounded (0 to 1 bit). It sees other
languages, numbers and noise; it does not see order. Measured against pydoc's topics, in bits, from
2048 tokens on, with vocabularies of 4096 and of 32 k tokens: the other half of pydoc's topics
.08-.13; English documentation and Python code .28-.66 (the more, the shorter the text and the
larger the vocabulary); German, Russian, digits, hexadecimal and random words .84-.96. The limit
lies between.
"""

import math
from typing import Final

import torch
from torch import Tensor

from prism_refactor.options import CALIBRATION_TOKENS

FAR_BITS: Final = 0.75
TOKENS_PER_EXPERT: Final = 512  # with fewer the cut borrows tokens of other experts


def distance_bits(ids: Tensor, others: Tensor) -> float:
    """Jensen-Shannon divergence of the token frequencies of two texts, in bits; ids int64 [t].

    Both are taken at the length of the shorter, spread evenly: a short sample of the same text
    looks farther than a long one.
    """
    count = min(len(ids), len(others))
    size = int(max(ids.max(), others.max())) + 1
    shares = [_frequencies(_spread(one, count), size) for one in (ids, others)]
    middle = (shares[0] + shares[1]) / 2
    return sum(float(torch.xlogy(p, p / middle).nan_to_num(0.0).sum()) for p in shares) / (
        2 * math.log(2)
    )


def _spread(ids: Tensor, count: int) -> Tensor:
    return ids[torch.linspace(0, len(ids) - 1, count).long()]


def _frequencies(ids: Tensor, size: int) -> Tensor:
    return torch.bincount(ids, minlength=size).double() / len(ids)


def warnings(tokens: int, slots: int, experts: int, distance: float | None) -> tuple[str, ...]:
    """Sentences for a person about ``tokens`` tokens of which each uses ``slots`` of ``experts``.

    ``distance`` in bits from the default text; None: it is the default text.
    """
    found = []
    each = tokens * slots // experts
    if each < TOKENS_PER_EXPERT:
        found.append(
            f"The calibration text is short: {tokens} tokens give an expert {each} on average, "
            f"fewer than {TOKENS_PER_EXPERT}; sub-routers of rarely used experts are guesses."
        )
    elif tokens < CALIBRATION_TOKENS:
        found.append(
            f"The calibration text is short: {tokens} tokens where the default is "
            f"{CALIBRATION_TOKENS}; expect more loss at low levels than this model could have."
        )
    if distance is not None and distance > FAR_BITS:
        found.append(
            f"The calibration text is far from the default's: its token frequencies differ by "
            f"{distance:.2f} bits (limit {FAR_BITS:.2f}). Right if it is your own domain; the "
            "losses measured here then hold for that domain alone."
        )
    return tuple(found)
