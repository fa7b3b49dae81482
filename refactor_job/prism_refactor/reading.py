"""From documents to the windows that are fitted on and those that are measured on.

Knows corpora, tokenizers and what is odd about a text (calibration_check). The decision worth
arguing about: warnings go into the manifest beside the text they are about, so whoever opens the
artifact later reads them too; they follow from the inputs, so its digest stays reproducible.
"""

import logging
from dataclasses import dataclass
from typing import Any

import torch
from prism.artifact import Calibration
from torch import Tensor

from prism_refactor import calibration_check, text
from prism_refactor.errors import Reason, RefactorError
from prism_refactor.options import (
    EVALUATION_TOKENS,
    MIN_CALIBRATION_TOKENS,
    MIN_EVALUATION_TOKENS,
    Options,
)

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Text:
    """Windows to fit on and to measure on, what identifies them, and facts for the report."""

    calibration: text.Windows
    evaluation: text.Windows
    record: Calibration
    documents: int
    distance_bits: float | None  # of the calibration text from the default; None: it is that
    unseen_share: float  # of the tokens measured on: not once in the calibration text


@dataclass(frozen=True, slots=True)
class Reader:
    """What of the model decides how its text is read: ``vocabulary`` rows of embeddings, and of its
    ``experts`` each token uses ``slots``."""

    tokenizer: Any
    vocabulary: int
    slots: int
    experts: int


def read(corpus: text.Corpus, reader: Reader, options: Options) -> Text:
    """Split, tokenise and check.

    Raises RefactorError (TooLittleCalibrationText, BadInput when tokenizer and model do not fit).
    """
    tokenizer = reader.tokenizer

    def encode(document: str) -> list[int]:
        ids: list[int] = tokenizer(document, add_special_tokens=False).input_ids
        return ids

    calibration, evaluation = text.split(corpus)
    end = tokenizer.eos_token_id
    fit = text.windows(calibration, encode, end, options.tokens, MIN_CALIBRATION_TOKENS)
    held = text.windows(evaluation, encode, end, EVALUATION_TOKENS, MIN_EVALUATION_TOKENS)
    _require_embedded(torch.cat([fit.ids.flatten(), held.ids.flatten()]), reader)
    _log.info(
        "text: %s, split by document: %d tokens to calibrate on, %d others to measure on",
        *(corpus.name, fit.tokens, held.tokens),
    )
    distance = None
    if options.calibration is not None:
        default = [token for topic in text.pydoc_topics().documents for token in encode(topic)]
        distance = calibration_check.distance_bits(fit.ids.flatten(), torch.tensor(default))
    found = calibration_check.warnings(fit.tokens, reader.slots, reader.experts, distance)
    for warning in found:
        _log.warning("%s", warning)
    record = Calibration(corpus.name, corpus.digest, fit.tokens, found)
    return Text(fit, held, record, len(corpus.documents), distance, _unseen(fit.ids, held.ids))


def _require_embedded(ids: Tensor, reader: Reader) -> None:
    highest = int(ids.max())
    if highest >= reader.vocabulary:
        token = reader.tokenizer.convert_ids_to_tokens(highest)
        raise RefactorError(
            Reason.BAD_INPUT,
            f"The tokenizer makes token {highest} ({token!r}) and knows {len(reader.tokenizer)}, "
            f"the model has embeddings for {reader.vocabulary}; this is another model's tokenizer.",
        )


def _unseen(seen: Tensor, ids: Tensor) -> float:
    return 1 - float(torch.isin(ids, seen).double().mean())
