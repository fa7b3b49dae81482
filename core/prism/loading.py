"""Load a model and its tokenizer from a local directory.

Decision: local files only and never remote code; whoever wants a hub model downloads it first, so
what runs is what was checked. A tensor that is missing or has another shape than the config says is
an error: transformers would fill it with random numbers and warn.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from prism.architectures import require_supported
from prism.checkpoint import CheckpointError


def load_config(path: str | Path) -> Any:
    """The model's config; raises OSError or ValueError as transformers does."""
    from transformers import AutoConfig

    return AutoConfig.from_pretrained(path, local_files_only=True, trust_remote_code=False)


def load_model(
    path: str | Path, dtype: torch.dtype, *, implementation: str = "grouped_mm"
) -> tuple[Any, Any]:
    """(model in eval mode on the CPU, tokenizer). `implementation` of the experts: a name known to
    transformers, or "prism" (then call prism.experts.attach before the first forward).

    Raises UnsupportedModel before weights are read, CheckpointError when they do not fit.
    """
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM

    config = load_config(path)
    require_supported(config)
    if implementation == "prism":
        from prism.experts import register

        register()
    try:
        model, report = AutoModelForCausalLM.from_pretrained(
            path,
            config=config,
            dtype=dtype,
            experts_implementation=implementation,
            local_files_only=True,
            trust_remote_code=False,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # reported, and refused below with names
        )
    except SafetensorError as error:
        raise CheckpointError(f"{path}: the weights cannot be read ({error})") from error
    require_complete(path, report["missing_keys"], report["mismatched_keys"])
    return model.eval().requires_grad_(False), load_tokenizer(path)


def load_tokenizer(path: str | Path) -> Any:
    """The tokenizer beside the weights; raises CheckpointError."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(path, local_files_only=True, trust_remote_code=False)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"{path}: the tokenizer cannot be read ({type(error).__name__}: {error})"
        ) from error


def require_complete(
    path: str | Path, missing: Iterable[str], misfits: Iterable[tuple[str, Any, Any]]
) -> None:
    """Raise CheckpointError when tensors are missing or have another shape than config.json says.

    ``misfits`` are (name, found shape, expected shape).
    """
    absent = sorted(missing)
    if absent:
        raise CheckpointError(
            f"{path}: {len(absent)} tensors of the model are not in the files, first "
            f"{absent[0]}; copy the checkpoint again"
        )
    wrong = sorted(misfits)
    if wrong:
        name, found, expected = wrong[0]
        raise CheckpointError(
            f"{path}: {len(wrong)} tensors do not fit config.json, first {name}: "
            f"{tuple(found)}, expected {tuple(expected)}"
        )
