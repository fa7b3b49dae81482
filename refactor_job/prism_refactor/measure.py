"""Measure an artifact on any text: what `prism eval` and the benchmarks do.

Knows artifacts and text. The decision worth arguing about: the whole text is used for measuring,
without a split; whoever names a file here answers for what the calibration has seen.
"""

from collections.abc import Sequence
from pathlib import Path

import torch
from prism.architectures import find_expert_modules
from prism.artifact import OperatingPoint, open_artifact
from prism.contract import MAX_LEVEL
from prism.experts import attach
from prism.loading import load_model

from prism_refactor import evaluate, text
from prism_refactor.layer_experts import weight
from prism_refactor.options import MIN_EVALUATION_TOKENS, WINDOW


def measure(
    directory: Path, data: Path, levels: Sequence[int], *, tokens: int, dtype: str
) -> list[OperatingPoint]:
    """One operating point per level, from high to low.

    Raises ArtifactError (not a whole artifact) and RefactorError (text).
    """
    artifact = open_artifact(directory)
    corpus = text.read_corpus(data, "evaluation")
    model, tokenizer = load_model(directory, getattr(torch, dtype))

    def encode(document: str) -> list[int]:
        ids: list[int] = tokenizer(document, add_special_tokens=False).input_ids
        return ids

    end = tokenizer.eos_token_id
    windows = text.windows(corpus.documents, encode, end, tokens, MIN_EVALUATION_TOKENS)
    _, hidden, width = weight(find_expert_modules(model)[0][1], "down_proj").shape
    attach(model, artifact)
    vocabulary = int(model.get_output_embeddings().weight.shape[0])
    size = evaluate.batch_sequences(WINDOW, vocabulary)
    batches = [evaluate.evaluate_batch(model, ids, levels) for ids in windows.batches(size)]
    merged = {
        level: evaluate.joined([batch[level] for batch in batches])
        for level in {MAX_LEVEL, *levels}
    }
    sub_experts = artifact.manifest.sub_experts
    return [
        evaluate.operating_point(
            level, merged[level], merged[MAX_LEVEL], sub_experts, hidden, width
        )
        for level in sorted(levels, reverse=True)
    ]
