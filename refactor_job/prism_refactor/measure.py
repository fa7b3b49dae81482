"""Measure an artifact on any text: what `prism eval` and the benchmarks do.

Knows artifacts and text. The decision worth arguing about: the whole text is used for measuring,
without a split; whoever names a file here answers for what the calibration has seen.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from prism.architectures import find_expert_modules
from prism.artifact import Artifact, OperatingPoint, open_artifact
from prism.contract import MAX_LEVEL
from prism.experts import attach
from prism.loading import load_model

from prism_refactor import evaluate, text
from prism_refactor.layer_experts import expert_shape
from prism_refactor.options import MIN_EVALUATION_TOKENS, WINDOW


@dataclass(frozen=True, slots=True)
class Subject:
    """An artifact that runs, the text it is measured on, and the shape of its experts."""

    artifact: Artifact
    model: Any  # transformers' models are untyped; its experts are attached
    windows: text.Windows
    hidden: int
    width: int  # neurons of an expert


def open_subject(directory: Path, data: Path, *, tokens: int, dtype: str) -> Subject:
    """Load and attach. Raises ArtifactError (not a whole artifact) and RefactorError (text)."""
    artifact = open_artifact(directory)
    corpus = text.read_corpus(data, "evaluation")
    model, tokenizer = load_model(directory, getattr(torch, dtype))

    def encode(document: str) -> list[int]:
        ids: list[int] = tokenizer(document, add_special_tokens=False).input_ids
        return ids

    end = tokenizer.eos_token_id
    windows = text.windows(corpus.documents, encode, end, tokens, MIN_EVALUATION_TOKENS)
    _, hidden, width = expert_shape(find_expert_modules(model)[0][1])
    attach(model, artifact)
    return Subject(artifact, model, windows, hidden, width)


def measure(
    directory: Path, data: Path, levels: Sequence[int], *, tokens: int, dtype: str
) -> list[OperatingPoint]:
    """One operating point per level, from high to low; raises as ``open_subject``."""
    subject = open_subject(directory, data, tokens=tokens, dtype=dtype)
    model = subject.model
    vocabulary = int(model.get_output_embeddings().weight.shape[0])
    size = evaluate.batch_sequences(WINDOW, vocabulary)
    batches = [evaluate.evaluate_batch(model, ids, levels) for ids in subject.windows.batches(size)]
    merged = {
        level: evaluate.joined([batch[level] for batch in batches])
        for level in {MAX_LEVEL, *levels}
    }
    shape = subject.artifact.manifest.sub_experts, subject.hidden, subject.width
    return [
        evaluate.operating_point(level, merged[level], merged[MAX_LEVEL], *shape)
        for level in sorted(levels, reverse=True)
    ]
