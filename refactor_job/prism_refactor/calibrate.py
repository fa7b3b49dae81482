"""Run a model once over all calibration tokens, layer by layer, and let a visitor answer for the
experts.

Knows transformers' experts interface and decoder layers. Must not know what a visitor fits. The
decision worth arguing about: all tokens go through one forward, so the model's own loop *is* the
layer-by-layer order, one layer's activations live at a time, and after each layer its hidden state
is kept; a killed run resumes by letting the finished layers hand that state through, for every
architecture alike.
"""

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from prism.experts import find_expert_modules
from torch import Tensor, nn
from transformers.integrations.moe import ExpertsInterface

from prism_refactor.errors import Reason, RefactorError

IMPLEMENTATION = "prism_calibration"
_DECODER_LAYER = re.compile(r"^(.*\blayers)\.(\d+)\.")


class Visitor(Protocol):
    """Answers for the experts of a MoE layer; x [T, H], index and weights [T, K] -> [T, H]."""

    def __call__(
        self, layer: int, module: nn.Module, x: Tensor, index: Tensor, weights: Tensor
    ) -> Tensor: ...


class HiddenStates(Protocol):
    """Where the stream's state is kept between layers."""

    def load(self) -> tuple[int, Tensor] | None:
        """(MoE layers done, hidden state after the last of them), or None at the start."""

    def save(self, done: int, hidden: Tensor) -> None:
        """Keep the state after ``done`` MoE layers, in place of the one before."""


_visitors: dict[int, Callable[[Tensor, Tensor, Tensor], Tensor]] = {}


def _dispatch(module: nn.Module, x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
    """The registered experts function: transformers hands over the module, we find its visitor."""
    return _visitors[id(module)](x, index, weights).to(x.dtype)


ExpertsInterface.register(IMPLEMENTATION, _dispatch)


def run_layers(
    model: Any, ids: Tensor, visitor: Visitor, states: HiddenStates
) -> None:  # Any: transformers' models are untyped
    """One pass of ids [S, W] through the decoder with ``visitor`` in place of the experts.

    Raises RefactorError (UnsupportedArchitecture) where the decoder's layers cannot be told apart.
    """
    modules = find_expert_modules(model)
    decoder, places = _decoder_layers(model, [name for name, _ in modules])
    resumed = states.load()
    done = resumed[0] if resumed else 0
    if done == len(modules):
        return
    with torch.inference_mode(), _visiting(model, modules, visitor):
        handles = [
            decoder[place].register_forward_hook(_saver(states, layer + 1))
            for layer, place in enumerate(places)
            if layer >= done
        ]
        try:
            with _skipping(decoder, places[done - 1] if resumed else -1, resumed):
                model.base_model(input_ids=ids, use_cache=False)
        finally:
            for handle in handles:
                handle.remove()


def _saver(states: HiddenStates, done: int) -> Callable[[nn.Module, Any, Any], None]:
    def save(_module: nn.Module, _args: Any, output: Any) -> None:
        if not isinstance(output, Tensor):
            raise RefactorError(
                Reason.UNSUPPORTED_ARCHITECTURE,
                "The decoder layers of this architecture return more than a hidden state; "
                "Prism cannot calibrate it.",
            )
        states.save(done, output)

    return save


def _decoder_layers(model: Any, names: list[str]) -> tuple[nn.ModuleList, list[int]]:
    """The decoder's layer list and the position in it of each experts module."""
    found = [_DECODER_LAYER.match(name) for name in names]
    paths = {match.group(1) if match else None for match in found}
    if len(paths) != 1 or None in paths:
        raise RefactorError(
            Reason.UNSUPPORTED_ARCHITECTURE,
            f"The experts of this model do not lie in one list of layers: {', '.join(names[:4])}.",
        )
    layers = model.get_submodule(paths.pop())
    return layers, [int(match.group(2)) for match in found if match]


@contextmanager
def _visiting(model: Any, modules: list[tuple[str, Any]], visitor: Visitor) -> Iterator[None]:
    """``visitor`` answers for all experts while this is open."""
    before = model.get_experts_implementation()
    model.set_experts_implementation(IMPLEMENTATION)
    for layer, (_, module) in enumerate(modules):

        def answer(
            x: Tensor, index: Tensor, weights: Tensor, layer: int = layer, module: Any = module
        ) -> Tensor:
            return visitor(layer, module, x, index, weights)

        _visitors[id(module)] = answer
    try:
        yield
    finally:
        model.set_experts_implementation(before)
        for _, module in modules:
            del _visitors[id(module)]


@contextmanager
def _skipping(
    decoder: nn.ModuleList, last: int, resumed: tuple[int, Tensor] | None
) -> Iterator[None]:
    """Decoder layers up to ``last`` hand through; the last of them gives the kept hidden state."""
    skipped = [decoder[place] for place in range(last + 1)]
    for place, layer in enumerate(skipped):

        def hand_through(hidden: Tensor, *_: Any, place: int = place, **__: Any) -> Tensor:
            return resumed[1] if resumed and place == last else hidden

        layer.forward = hand_through  # the instance's attribute hides the class's method
    try:
        yield
    finally:
        for layer in skipped:
            del layer.forward
