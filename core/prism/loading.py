"""Load a model and its tokenizer from a local directory.

Decision: local files only and never remote code; whoever wants a hub model downloads it first, so
what runs is what was checked.
"""

from pathlib import Path
from typing import Any

import torch

from prism.architectures import require_supported


def load_config(path: str | Path) -> Any:
    """The model's config; raises OSError or ValueError as transformers does."""
    from transformers import AutoConfig

    return AutoConfig.from_pretrained(path, local_files_only=True, trust_remote_code=False)


def load_model(
    path: str | Path, dtype: torch.dtype, *, implementation: str = "grouped_mm"
) -> tuple[Any, Any]:
    """(model in eval mode on the CPU, tokenizer). `implementation` of the experts: a name known to
    transformers, or "prism" (then call prism.experts.attach before the first forward).

    Raises UnsupportedModel before weights are read.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    config = load_config(path)
    require_supported(config)
    if implementation == "prism":
        from prism.experts import register

        register()
    model = AutoModelForCausalLM.from_pretrained(
        path,
        config=config,
        dtype=dtype,
        experts_implementation=implementation,
        local_files_only=True,
        trust_remote_code=False,
    )
    tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True, trust_remote_code=False)
    return model.eval().requires_grad_(False), tokenizer
