"""Which models can be refactored and which of those served, decided before any weight is read.

Knows transformers' experts interface and its flags; builds the model on the meta device (no memory)
and runs its code there. Decision: rules on what the experts modules declare and on what the
model's code does, not a list of model names, so new architectures of the plain kind work at once
and all others are refused by name with the reason.
"""

import logging
import re
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from prism.architectures.attention import serving_obstacle
from prism.architectures.flow import trace_layers
from prism.architectures.tracing import NOTED, TOKENS, Trace
from prism.expert_weights import layout_obstacles

__all__ = [
    "Examined",
    "UnsupportedModel",
    "examine",
    "find_expert_modules",
    "require_servable",
    "require_supported",
]

_log = logging.getLogger(__name__)
_DECODER_LAYER = re.compile(r"^(.*\blayers)\.(\d+)\.")
_MODEL_CODE_ERRORS = (TypeError, AttributeError, ValueError, RuntimeError, IndexError, KeyError)


class UnsupportedModel(ValueError):
    """A model we cannot refactor or serve: its architecture and why."""

    def __init__(self, architecture: str, reason: str) -> None:
        super().__init__(f"{architecture}: {reason}")
        self.architecture = architecture
        self.reason = reason


@dataclass(frozen=True, slots=True)
class Examined:
    """What we can do with the models of one config, and what was seen on the way."""

    architecture: str
    layers: tuple[str, ...] = ()  # names of the experts modules, in model order
    experts_per_token: int = 0
    refactor_obstacle: str | None = None  # None: refactorable
    serve_obstacle: str | None = None  # None: servable; what cannot be refactored cannot be served


def find_expert_modules(model: nn.Module) -> list[tuple[str, Any]]:
    """(module name, experts module) of every layer that uses transformers' experts interface."""
    return [
        (name, module)
        for name, module in model.named_modules()
        if hasattr(module, "has_gate") and hasattr(module, "down_proj")
    ]


def require_supported(config: Any) -> Examined:
    """What was seen of the model that `config` describes, if it is refactorable.

    Raises UnsupportedModel. Reads no weight.
    """
    found = examine(config)
    if found.refactor_obstacle is not None:
        raise UnsupportedModel(found.architecture, found.refactor_obstacle)
    return found


def require_servable(config: Any) -> None:
    """Raise UnsupportedModel when the engine cannot serve the model that `config` describes."""
    found = examine(config)
    if found.serve_obstacle is not None:
        raise UnsupportedModel(found.architecture, found.serve_obstacle)


def examine(config: Any) -> Examined:
    """Build the model that `config` describes without weights, and look."""
    architecture = (getattr(config, "architectures", None) or [type(config).__name__])[0]
    model, obstacle = _built(config)
    if model is None:
        return Examined(architecture, refactor_obstacle=obstacle, serve_obstacle=obstacle)
    modules = find_expert_modules(model)
    noted, obstacle = _refactoring_obstacle(model, modules)
    if noted is None or obstacle is not None:
        return Examined(architecture, refactor_obstacle=obstacle, serve_obstacle=obstacle)
    return Examined(
        architecture,
        tuple(name for name, _ in modules),
        noted.experts[0].slots,
        serve_obstacle=noted.failure or serving_obstacle(model, config, noted.attention),
    )


def _built(config: Any) -> tuple[Any | None, str | None]:
    """(model on the meta device, or None and why there is none)."""
    from transformers import AutoModelForCausalLM

    parts = (config, config.get_text_config())  # a multimodal config may quantise its text alone
    if any(getattr(part, "quantization_config", None) is not None for part in parts):
        return None, "the checkpoint is already quantised; use the original weights"
    if getattr(config, "is_encoder_decoder", False):
        return None, "encoder-decoder models are not served"
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    except (ValueError, KeyError, ImportError) as error:
        reason = str(error).split(" for this kind of AutoModel")[0]
        return None, f"transformers builds no causal language model from its config ({reason})"
    return model.eval(), None


def _refactoring_obstacle(
    model: Any, modules: list[tuple[str, Any]]
) -> tuple[Trace | None, str | None]:
    """(trace, why the model cannot be refactored)."""
    if not modules:
        return None, "it has no experts behind transformers' experts interface"
    for name, module in modules:
        for obstacle in layout_obstacles(module):
            return None, f"{name}: {obstacle}"
    found = [_DECODER_LAYER.match(name) for name, _ in modules]
    lists = {match.group(1) for match in found if match}
    if len(lists) != 1 or None in found:
        names = ", ".join(name for name, _ in modules[:3])
        return None, f"its experts do not lie in one list of decoder layers ({names} …)"
    layers = model.get_submodule(lists.pop())
    try:
        noted, why = _traced(model, layers)
    except _MODEL_CODE_ERRORS as error:
        what = f"{type(error).__name__}: {error}"
        return None, f"its code asks for values and cannot be followed without weights ({what})"
    return noted, why or _calls_obstacle(noted, [module for _, module in modules])


def _traced(model: Any, layers: Any) -> tuple[Trace, str | None]:
    """As an engine would run the model; if it cannot run so, with its own attention and masks."""
    try:
        return trace_layers(model, layers, NOTED)
    except _MODEL_CODE_ERRORS as error:
        noted, obstacle = trace_layers(model, layers, "eager")
        noted.failure = "its attention needs a mask of its own, which the engine does not make"
        _log.info("%s runs with its own masks only: %r", type(model).__name__, error)
        return noted, obstacle


def _calls_obstacle(noted: Trace, modules: list[Any]) -> str | None:
    if [id(call.module) for call in noted.experts] != [id(module) for module in modules]:
        return "its experts do not run once each, in the order of its layers"
    if any(call.tokens != TOKENS for call in noted.experts):
        return "its experts are not given one row for each token"
    if len({call.slots for call in noted.experts}) > 1:
        return "its layers route tokens to different numbers of experts"
    return None
