"""Whether a model's decoder layers can be run one at a time, each on the hidden state alone.

Knows modules and tensors, no architecture. The refactoring holds one layer in memory and keeps one
hidden state between layers; a model that hands its layers anything else which an earlier layer made
(router states, shared keys, residual streams) would be run wrongly. Decision: lineage is followed
tensor by tensor through the model's own code, since a signature does not tell what an argument was
made of.
"""

from typing import Any

from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from prism.architectures.tracing import Trace, trace

_LAYER_STATE = "its decoder layers hand more than one hidden state to each other"
_RETURNS_MORE = "its decoder layers return more than a hidden state"
_BETWEEN = "it computes on the hidden state between its decoder layers"
_LATE = "it reads the output of earlier decoder layers after the last"
_NOT_FIRST = "its decoder layers do not take the hidden state as first argument"
_ORDER = "its decoder layers do not run once each, in order"


def trace_layers(model: Any, layers: nn.ModuleList, attention: str) -> tuple[Trace, str | None]:
    """(tracing.trace of the model, why its layers cannot run one at a time; None: they can)."""
    lineage = _Lineage()
    handles = []
    for number, layer in enumerate(layers):
        enter, leave = lineage.enter(number), lineage.leave(number)
        handles.append(layer.register_forward_pre_hook(enter, with_kwargs=True))
        handles.append(layer.register_forward_hook(leave))
    try:
        with lineage:
            noted = trace(model, attention)
    finally:
        for handle in handles:
            handle.remove()
    if lineage.done != len(layers):
        lineage.note(_ORDER)
    return noted, lineage.obstacle


class _Lineage(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch leaves it untyped
    """Follows which tensors were made inside decoder layers, or of such."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.done = 0  # layers that have run
        self.obstacle: str | None = None  # the first that was found
        self._inside = False
        self._hidden: Tensor | None = None  # what the last layer gave
        self._last = False  # after the last layer
        self._made: dict[int, Tensor] = {}  # by id; kept alive, so that no id comes twice
        self._final: set[int] = set()  # those of them that follow from the last layer's output
        self._layers = 0

    def note(self, obstacle: str) -> None:
        """Keep the first obstacle: what follows may be its consequence."""
        self.obstacle = self.obstacle or obstacle

    def enter(self, number: int) -> Any:
        """Hook before a layer's forward."""
        self._layers = max(self._layers, number + 1)

        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if number != self.done:
                self.note(_ORDER)
            if not args or not isinstance(args[0], Tensor):
                self.note(_NOT_FIRST)
            elif self._hidden is not None and args[0] is not self._hidden:
                self.note(_BETWEEN)
            if any(id(leaf) in self._made for leaf in tree_leaves((args[1:], kwargs))):
                self.note(_LAYER_STATE)
            self._inside = True

        return hook

    def leave(self, number: int) -> Any:
        """Hook after a layer's forward."""

        def hook(_: nn.Module, __: Any, output: Any) -> None:
            self._inside = False
            self.done = number + 1
            if not isinstance(output, Tensor):
                self.note(_RETURNS_MORE)
                return
            self._hidden = output
            self._made[id(output)] = output
            if self.done == self._layers:
                self._final.add(id(output))

        return hook

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        given = {id(leaf) for leaf in tree_leaves((args, kwargs))}
        sources = given & self._made.keys()
        late = self.done == self._layers and not self._inside
        if late and sources - self._final:
            self.note(_LATE)
        if self._inside or sources:
            known = set() if func._schema.is_mutable else given  # an operation may hand one through
            new = [x for x in tree_leaves(out) if isinstance(x, Tensor) and id(x) not in known]
            self._made |= {id(leaf): leaf for leaf in new}
            if late:
                self._final |= {id(leaf) for leaf in new}
        return out
