"""One layer's experts in one normal form, whatever layout the model's code keeps them in.

Knows the flags of transformers' experts interface (`has_gate`, `is_transposed`, `is_concatenated`,
`has_bias`); knows no level and no kernel. All tensors here are views of the module's parameters, so
the normal form costs no memory and writing into it writes the model. Decision: a neuron is index i
of `gate`, `up` and `down` alike, in every layout; whoever permutes or slices neurons works on these
views and never asks about rows, columns or interleaving.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import silu

Activation = Callable[[Tensor | None, Tensor], Tensor]

SWIGLU = "silu(gate) · up"
_ACTIVATION_FIELDS = ("hidden_activation", "mlp_hidden_act", "hidden_act")  # of configs
_PROBE = 9.0  # gates are compared on values from minus to plus this


@dataclass(frozen=True, slots=True)
class ExpertWeights:
    """E experts of I neurons over H features; `gate` is None for experts without one.

    `activate`: (gate, up) [..., I] -> [..., I], neuron by neuron, in the dtype it is given.
    """

    gate: Tensor | None  # [E, I, H]
    up: Tensor  # [E, I, H]
    down: Tensor  # [E, H, I]
    activate: Activation
    activation: str  # what `activate` computes, for messages; SWIGLU: silu(gate) · up exactly
    gate_bias: Tensor | None = None  # [E, I]
    up_bias: Tensor | None = None  # [E, I]
    down_bias: Tensor | None = None  # [E, H]; belongs to the whole expert and to no neuron

    @property
    def experts(self) -> int:
        return self.down.shape[0]

    @property
    def hidden(self) -> int:
        return self.down.shape[1]

    @property
    def intermediate(self) -> int:
        return self.down.shape[2]

    @property
    def is_plain(self) -> bool:
        """silu(gate) · up without biases on the neurons: what the fast kernels compute."""
        return self.activation == SWIGLU and self.up_bias is None

    def inner(self, expert: int, x: Tensor) -> Tensor:
        """Activations [t, I] of inputs x [t, H] in x's dtype; weights are cast to it."""
        gate = None
        if self.gate is not None:
            gate = _linear(x, self.gate[expert], _at(self.gate_bias, expert))
        return self.activate(gate, _linear(x, self.up[expert], _at(self.up_bias, expert)))

    def one(self, expert: int) -> "ExpertWeights":
        """A copy in fp32 of one expert alone."""

        def lifted(part: Tensor | None) -> Tensor | None:
            return None if part is None else part[expert : expert + 1].float()

        up, down = self.up[expert : expert + 1].float(), self.down[expert : expert + 1].float()
        biases = lifted(self.gate_bias), lifted(self.up_bias), lifted(self.down_bias)
        return ExpertWeights(lifted(self.gate), up, down, self.activate, self.activation, *biases)

    def permute(self, expert: int, order: Tensor) -> None:
        """Reorder an expert's neurons in the model: new neuron i was neuron order[i]."""
        for part, axis in (
            *((self.gate, 0), (self.up, 0), (self.down, 1)),
            *((self.gate_bias, 0), (self.up_bias, 0)),
        ):
            if part is not None:
                part[expert].copy_(part[expert].index_select(axis, order))

    @classmethod
    def swiglu(cls, gate_up: Tensor, down: Tensor) -> "ExpertWeights":
        """Plain experts from gate_up [E, 2I, H] (gate rows, then up rows) and down [E, H, I]."""
        experts, hidden, intermediate = down.shape
        if gate_up.shape != (experts, 2 * intermediate, hidden):
            shapes = f"gate_up {tuple(gate_up.shape)} does not fit down {tuple(down.shape)}"
            raise ValueError(f"{shapes}: expected {(experts, 2 * intermediate, hidden)}")
        gate, up = gate_up.chunk(2, dim=1)
        return cls(gate, up, down, _swiglu, SWIGLU)


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    out = x @ weight.to(x.dtype).t()
    return out if bias is None else out + bias.to(x.dtype)


def _at(part: Tensor | None, expert: int) -> Tensor | None:
    return None if part is None else part[expert]


def _swiglu(gate: Tensor | None, up: Tensor) -> Tensor:
    assert gate is not None
    return silu(gate) * up


def expert_weights(module: Any) -> ExpertWeights:
    """The normal form of an experts module; see `layout_obstacles` for those that have none."""
    flip = module.is_transposed
    down = _rows(module.down_proj, flip)
    down_bias = module.down_proj_bias.detach() if module.has_bias else None
    activate, activation = _activation(module)
    if not module.has_gate:
        up = _rows(module.up_proj, flip)
        bias = module.up_proj_bias.detach() if module.has_bias else None
        return ExpertWeights(None, up, down, activate, activation, None, bias, down_bias)
    gate, up = _halves(_rows(module.gate_up_proj, flip), module.is_concatenated)
    biases: tuple[Tensor | None, Tensor | None] = (None, None)
    if module.has_bias:
        biases = _halves(module.gate_up_proj_bias.detach(), module.is_concatenated)
    return ExpertWeights(gate, up, down, activate, activation, *biases, down_bias)


def _rows(parameter: Tensor, transposed: bool) -> Tensor:
    weight = parameter.detach()
    return weight.transpose(1, 2) if transposed else weight


def _halves(both: Tensor, concatenated: bool) -> tuple[Tensor, Tensor]:
    """Gate and up of a tensor that has both along axis 1."""
    if concatenated:
        gate, up = both.chunk(2, dim=1)
        return gate, up
    return both[:, 0::2], both[:, 1::2]


def _activation(module: Any) -> tuple[Activation, str]:
    if not module.has_gate:
        return (lambda _, up: module.act_fn(up)), f"{_name(module)}(up), no gate"

    def gated(gate: Tensor | None, up: Tensor) -> Tensor:
        assert gate is not None
        if module.is_concatenated:
            both = torch.cat([gate, up], dim=-1)
        else:
            both = torch.stack([gate, up], dim=-1).flatten(-2)
        out: Tensor = module._apply_gate(both)
        return out

    if _agree(gated, _swiglu):
        return _swiglu, SWIGLU
    return gated, _gate_name(module)


def _gate_name(module: Any) -> str:
    """For people: the activation's name where the gate is the interface's own."""
    if type(module)._apply_gate.__module__ == "transformers.integrations.moe":
        return f"{_name(module)}(gate) · up"
    return f"the gate of {type(module).__name__}"


def _name(module: Any) -> str:
    names = (getattr(module.config, name, None) for name in _ACTIVATION_FIELDS)
    return next(filter(None, names), type(module.act_fn).__name__)


def _probe(width: int) -> tuple[Tensor, Tensor]:
    """A gate and an up [4, width] with values all over the range, in no common order."""
    gate = torch.linspace(-_PROBE, _PROBE, 4 * width, device="cpu")
    return gate.view(4, width), gate.roll(7 * width // 5).flip(0).view(4, width)


def _agree(one: Activation, other: Activation) -> bool:
    gate, up = _probe(16)
    return torch.allclose(one(gate, up), other(gate, up), atol=1e-6)


def add_down_bias(out: Tensor, index: Tensor, gates: Tensor, bias: Tensor) -> None:
    """Add Σ_k gates[t, k] · bias[index[t, k]] to out [T, H] fp32 in place; bias [E, H].

    At every level: the bias is no neuron's. An index >= E is skipped.
    """
    experts = len(bias)
    table = torch.zeros(len(out), experts + 1, device=out.device)
    table.scatter_add_(1, index.clamp(max=experts), gates.float())
    out.addmm_(table[:, :experts], bias.float())


def layout_obstacles(module: Any) -> list[str]:
    """Why the experts of this module cannot be cut into groups of neurons; [] when they can."""
    if module.has_post_expert_norm:
        return ["a norm after each expert, which its neurons share"]
    name = "gate_up_proj" if module.has_gate else "up_proj"
    first, down = getattr(module, name, None), module.down_proj
    if first is None or first.dim() != 3 or down.dim() != 3:
        return [f"experts not stored as {name} and down_proj with three axes each"]
    try:
        weights = expert_weights(module)
    except (RuntimeError, AttributeError, TypeError, ValueError) as error:
        return [f"experts whose gate cannot be asked ({error})"]
    shape = (weights.experts, weights.intermediate, weights.hidden)
    if weights.up.shape != shape or (weights.gate is not None and weights.gate.shape != shape):
        return [f"expert shapes {tuple(first.shape)} and {tuple(down.shape)} do not fit"]
    if not _is_neuron_wise(weights):
        return ["a gate that mixes neurons"]
    return []


def _is_neuron_wise(weights: ExpertWeights) -> bool:
    """Some neurons alone, in another order, must give what they give among all."""
    gate, up = _probe(16)
    some = torch.tensor([11, 2, 7, 14, 0, 5], device="cpu")
    alone = weights.activate(gate[:, some], up[:, some])
    return torch.allclose(alone, weights.activate(gate, up)[:, some], atol=1e-6)
