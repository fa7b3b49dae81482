"""Prompts of one length: passages of the texts every Python carries, cut to a number of tokens.

Equal lengths make capacity a figure and not a distribution; different passages keep any prefix
cache out of it. The tokenizer is the example model's own.
"""

import pydoc_data.topics
import random
from pathlib import Path

from tokenizers import Tokenizer

TOKENIZER = Path(__file__).parents[2] / "examples" / "tiny-moe" / "tokenizer.json"
DEFAULT_TOKENS = 420


def passages(count: int, tokens: int = DEFAULT_TOKENS, seed: int = 0) -> list[str]:
    """``count`` different passages of about ``tokens`` tokens (re-tokenizing may shift a few)."""
    tokenizer = Tokenizer.from_file(str(TOKENIZER))
    ids = tokenizer.encode("\n\n".join(pydoc_data.topics.topics.values())).ids
    chance = random.Random(seed)
    starts = [chance.randrange(len(ids) - tokens) for _ in range(count)]
    return [str(tokenizer.decode(ids[start : start + tokens])) for start in starts]
