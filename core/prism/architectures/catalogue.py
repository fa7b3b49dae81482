"""Every MoE architecture of the installed transformers, and what we can do with it.

Knows where transformers lists its models; judges nothing itself. Decision: the list is read from
transformers' own sources and each entry is answered by `examine` on a small config, so it cannot
differ from what a real checkpoint of that class is told.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from prism.architectures import Examined, examine
from prism.architectures.small import small_config

_DECORATED: Final = re.compile(r"^@use_experts_implementation.*\nclass (\w+)\(", re.MULTILINE)


@dataclass(frozen=True, slots=True)
class Architecture:
    """One experts class and the causal language model around it."""

    experts: str  # name of the experts class
    model_type: str  # of the text config; the package's name where there is no causal model
    examined: Examined

    @property
    def name(self) -> str:
        return self.examined.architecture

    @property
    def refactorable(self) -> bool:
        return self.examined.refactor_obstacle is None

    @property
    def servable(self) -> bool:
        return self.examined.serve_obstacle is None


def experts_classes() -> dict[str, list[str]]:
    """transformers' model packages -> names of their classes behind the experts interface."""
    import transformers

    root = Path(transformers.__file__).parent / "models"
    found = {
        file.parent.name: _DECORATED.findall(file.read_text(encoding="utf-8"))
        for file in sorted(root.glob("*/modeling_*.py"))
    }
    return {package: names for package, names in found.items() if names}


def causal_models() -> dict[str, dict[str, str]]:
    """package -> {text model type: causal language model class} of those with experts classes."""
    from transformers.models.auto.configuration_auto import model_type_to_module_name
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    packages = experts_classes()
    found: dict[str, dict[str, str]] = {package: {} for package in packages}
    for model_type, name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.items():
        package = model_type_to_module_name(model_type)
        if package in packages:
            found[package][model_type] = name
    return {package: _text_only(models) for package, models in found.items()}


def _text_only(models: dict[str, str]) -> dict[str, str]:
    """Without the types of multimodal checkpoints whose text model is there under its own."""
    return {t: name for t, name in models.items() if f"{t}_text" not in models}


def catalogue() -> list[Architecture]:
    """All experts classes in the order of their packages; takes about a quarter of a minute."""
    return list(_entries())


def _entries() -> Iterator[Architecture]:
    models = causal_models()
    for package, classes in experts_classes().items():
        for experts in classes:
            if not models[package]:
                reason = "AutoModelForCausalLM builds none of its models"
                found = Examined(experts, refactor_obstacle=reason, serve_obstacle=reason)
                yield Architecture(experts, package, found)
            for model_type, name in models[package].items():
                config = small_config(model_type)
                config.architectures = [name]
                yield Architecture(experts, model_type, examine(config))
