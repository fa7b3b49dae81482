"""Our norm and rotary embedding in the place of the model's own, after a check.

Knows: what transformers' model code calls these parts. Must not know: sequences, attention.

One decision worth arguing about: a part is recognised by name and shape, but swapped only when ours
gives what its own forward gives on random input (fp32 to 1e-5, bf16 to one unit in the last place);
a Gemma norm (1 + weight) or interleaved rotary embedding fails that and stays the model's own. The
rotary embedding is a function of the modelling module, shared by all its models of this process, so
what stands in for it computes the engine's own steps only and hands everything else on.
"""

import functools
import logging
import sys
from collections.abc import Callable
from typing import Any

import torch
from prism.kernels.layers import Layers
from torch import Tensor, nn

from prism_serving import logs
from prism_serving.engine.attention import ProbeResult, is_stepping

_log = logging.getLogger(__name__)
_ROPE = "apply_rotary_pos_emb"
_TOLERANCE = {torch.float32: (1e-5, 1e-5), torch.bfloat16: (1e-2, 2**-7)}  # absolute, relative

Rope = Callable[..., tuple[Tensor, Tensor]]


@torch.inference_mode()
def swap(model: Any, layers: Layers, kv: ProbeResult) -> None:
    """Swap what can be swapped in `model`; each part that stays is logged with the reason."""
    norms = swap_norms(model, layers)
    rope = swap_rope(sys.modules[type(model).__module__], layers, kv)
    _log.info(logs.fields("swapped", norms=norms, rotary_embedding=rope, by=layers.name))


def swap_norms(model: nn.Module, layers: Layers) -> int:
    """Give RMSNorms our forward; returns how many."""
    swapped, kept = 0, {}
    for module in model.modules():
        if not type(module).__name__.endswith("RMSNorm"):
            continue
        weight, eps = getattr(module, "weight", None), _eps(module)
        if not isinstance(weight, Tensor) or weight.dim() != 1 or eps is None:
            kept[type(module).__name__] = "no weight vector or no eps"
            continue
        why = _keep_norm(module, layers, weight, eps)
        if why is not None:
            kept[type(module).__name__] = why
            continue
        module.forward = functools.partial(_norm, layers=layers, weight=weight, eps=eps)
        swapped += 1
    for kind, why in kept.items():
        _log.info(logs.fields("kept the model's own norm", kind=kind, reason=why))
    return swapped


def _norm(x: Tensor, *, layers: Layers, weight: Tensor, eps: float) -> Tensor:
    return layers.rms_norm(x, weight, eps)


def _eps(module: Any) -> float | None:
    for name in ("variance_epsilon", "eps"):
        if isinstance(value := getattr(module, name, None), float):
            return value
    return None


def _keep_norm(module: nn.Module, layers: Layers, weight: Tensor, eps: float) -> str | None:
    """Why this norm stays as it is; None: it can be swapped."""
    if weight.dtype not in _TOLERANCE:
        return f"weight in {weight.dtype}"
    x = _random(1, 3, weight.shape[0], like=weight)
    return _difference(module(x), layers.rms_norm(x, weight, eps))


def swap_rope(modelling: Any, layers: Layers, kv: ProbeResult) -> bool:
    """Stand in for the modelling module's rotary embedding; returns whether we do."""
    own: Rope | None = getattr(modelling, _ROPE, None)
    own = getattr(own, "prism_own", own)  # loaded before in this process
    if own is None:
        _log.info(logs.fields("kept the model's own rotary embedding", reason=f"no {_ROPE}"))
        return False
    why = _keep_rope(own, layers, kv)
    if why is not None:
        _log.info(logs.fields("kept the model's own rotary embedding", reason=why))
        return False

    @functools.wraps(own)
    def rope(
        q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        if args or kwargs or not is_stepping() or not _fits(q, k, cos, sin):
            return own(q, k, cos, sin, *args, **kwargs)
        return _rotate(layers, q, k, cos, sin)

    rope.prism_own = own  # type: ignore[attr-defined]
    setattr(modelling, _ROPE, rope)
    return True


def _fits(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> bool:
    """q, k [1, heads, T, D] and cos, sin [1, T, D] of one dtype."""
    shape = (1, q.shape[2], q.shape[3])
    return (
        q.shape[0] == k.shape[0] == 1
        and cos.shape == sin.shape == shape
        and k.shape[2:] == q.shape[2:]
        and q.dtype == k.dtype == cos.dtype == sin.dtype
        and q.stride(3) == k.stride(3) == 1
    )


def _rotate(
    layers: Layers, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor
) -> tuple[Tensor, Tensor]:
    first, second = (
        layers.rotate(x[0].transpose(0, 1), cos[0], sin[0]).transpose(0, 1)[None] for x in (q, k)
    )
    return first, second


def _keep_rope(own: Rope, layers: Layers, kv: ProbeResult) -> str | None:
    heads, dim, dtype = kv.keys[0]
    if dtype not in _TOLERANCE or dim % 2:
        return f"heads of {dim} in {dtype}"
    like = torch.empty(0, dtype=dtype)
    q, k = (_random(1, heads, 3, dim, like=like) for _ in range(2))
    cos, sin = (_random(1, 3, dim, like=like) for _ in range(2))
    try:
        expected = own(q, k, cos, sin)
    except (TypeError, ValueError, RuntimeError) as error:  # another signature, another layout
        return f"it cannot be called with q, k, cos, sin: {error}"
    ours = _rotate(layers, q, k, cos, sin)
    return _difference(expected[0], ours[0]) or _difference(expected[1], ours[1])


def _random(*shape: int, like: Tensor) -> Tensor:
    draw = torch.Generator().manual_seed(0)
    return torch.randn(*shape, generator=draw).to(like.device, like.dtype)


def _difference(expected: Tensor, ours: Tensor) -> str | None:
    absolute, relative = _TOLERANCE[expected.dtype]
    if torch.allclose(ours, expected, rtol=relative, atol=absolute):
        return None
    return f"ours differs by up to {(ours - expected).abs().max().item():.3g} on random input"
