"""Calibration and evaluation text: read it, split it by document, cut it into windows of tokens.

Knows files and tokenizers. Must not know the model. Two decisions worth arguing about: the split
goes by document and by digest of its text, so that no document is on both sides and the order of a
file does not matter; and text that is given but malformed is an error with its line number, never
skipped.
"""

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from prism_refactor.errors import Reason, RefactorError
from prism_refactor.options import MIN_CALIBRATION_TOKENS, MIN_EVALUATION_TOKENS, WINDOW

Encode = Callable[[str], list[int]]
EVALUATION_SHARE = 4  # one token in four is held out


@dataclass(frozen=True, slots=True)
class Corpus:
    """Documents with a name for the record."""

    name: str
    documents: tuple[str, ...]

    @property
    def digest(self) -> str:
        """sha256 over the documents in order; identifies the text, not the file it came from."""
        total = hashlib.sha256()
        for document in self.documents:
            total.update(hashlib.sha256(document.encode()).digest())
        return f"sha256:{total.hexdigest()}"


@dataclass(frozen=True, slots=True)
class Windows:
    """Token windows; ids [S, W + 1] int64, the last column is only ever a target."""

    ids: Tensor

    @property
    def tokens(self) -> int:
        """Number of predicted tokens."""
        return self.ids.shape[0] * (self.ids.shape[1] - 1)

    def batches(self, sequences: int) -> list[Tensor]:
        """The windows in batches of at most ``sequences``: [<= sequences, W + 1] each."""
        starts = range(0, len(self.ids), sequences)
        return [self.ids[start : start + sequences] for start in starts]


def pydoc_topics() -> Corpus:
    """The help topics that every CPython carries: about 465 kB of English and code."""
    import sys
    from pydoc_data.topics import topics

    name = f"pydoc_data.topics of Python {sys.version_info.major}.{sys.version_info.minor}"
    return Corpus(name, tuple(topics[key] for key in sorted(topics)))


def read_corpus(path: Path | None, purpose: str = "calibration") -> Corpus:
    """Documents of a ``.jsonl`` file ({"text": ...} per line) or a plain text file; None: pydoc.

    ``purpose`` is what a person would call this text where it is missing.

    Raises RefactorError (SourceNotFound, BadInput, TooLittleCalibrationText) naming file and line.
    """
    if path is None:
        return pydoc_topics()
    if not path.is_file():
        raise RefactorError(Reason.SOURCE_NOT_FOUND, f"No {purpose} text at {path}.")
    try:
        content = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise RefactorError(
            Reason.BAD_INPUT, f"{path} is not UTF-8 text (byte {error.start}); convert it first."
        ) from error
    documents = _json_lines(path, content) if path.suffix == ".jsonl" else [content]
    documents = [document for document in documents if document.strip()]
    if not documents:
        raise RefactorError(Reason.TOO_LITTLE_TEXT, f"{path} holds no text.")
    return Corpus(path.name, tuple(documents))


def _json_lines(path: Path, content: str) -> list[str]:
    documents: list[str] = []
    problems: list[str] = []
    for number, line in enumerate(content.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            problems.append(f"line {number}: not JSON ({error.msg} at column {error.colno})")
            continue
        text = row.get("text") if isinstance(row, dict) else None
        if isinstance(text, str):
            documents.append(text)
        else:
            problems.append(f'line {number}: no string under "text"')
    if problems:
        more = f"; and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise RefactorError(
            Reason.BAD_INPUT,
            f'{path}: every line must be a JSON object {{"text": "..."}}; '
            f"{'; '.join(problems[:5])}{more}.",
        )
    return documents


def split(corpus: Corpus) -> tuple[list[str], list[str]]:
    """Calibration and evaluation documents: about a quarter of the characters is held out.

    Equal documents are kept once. With fewer than four documents the last quarter of each is held
    out.
    """
    unique = sorted(set(corpus.documents), key=lambda text: hashlib.sha256(text.encode()).digest())
    if len(unique) < EVALUATION_SHARE:
        cuts = [len(text) - len(text) // EVALUATION_SHARE for text in unique]
        pairs = list(zip(unique, cuts, strict=True))
        return [text[:cut] for text, cut in pairs], [text[cut:] for text, cut in pairs]
    wanted = sum(map(len, unique)) / EVALUATION_SHARE
    calibration: list[str] = []
    evaluation: list[str] = []
    held_out = 0
    for text in unique:
        if held_out + len(text) / 2 <= wanted:
            evaluation.append(text)
            held_out += len(text)
        else:
            calibration.append(text)
    return calibration, evaluation


def windows(
    documents: Sequence[str], encode: Encode, separator: int | None, tokens: int, minimum: int
) -> Windows:
    """At most ``tokens`` predicted tokens as windows spread evenly over the documents.

    Raises RefactorError (TooLittleCalibrationText) below ``minimum`` tokens.
    """
    stream: list[int] = []
    for document in documents:
        stream.extend(encode(document))
        if separator is not None:
            stream.append(separator)
    available = (len(stream) - 1) // WINDOW
    if available * WINDOW < minimum:
        raise RefactorError(
            Reason.TOO_LITTLE_TEXT,
            f"The text gives {max(len(stream) - 1, 0)} tokens where at least {minimum} are needed "
            f"(calibration {MIN_CALIBRATION_TOKENS}, evaluation {MIN_EVALUATION_TOKENS}); "
            "give more text.",
        )
    count = min(available, max(1, tokens // WINDOW))
    last = len(stream) - 1 - WINDOW
    starts = [round(i * last / max(1, count - 1)) for i in range(count)]
    rows = [stream[start : start + WINDOW + 1] for start in starts]
    return Windows(torch.tensor(rows, dtype=torch.int64))
