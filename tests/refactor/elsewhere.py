"""A device that is not there: tensors that say they lie there and are computed on the CPU.

Mixing them with plain CPU tensors raises where CUDA would, so device mistakes show on any machine.
Allowed as on CUDA: CPU scalars, and CPU tensors as indices. What it cannot show: numerics, speed,
and kernels, which get plain tensors from nobody and refuse these.
"""

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

DEVICE = torch.device("meta")  # the one device that torch needs no driver for
_MOVES = {"aten._to_copy.default"}
_INDEXED = {"aten.index.Tensor", "aten.index_put_.default", "aten._index_put_impl_.default"}


class Elsewhere(Tensor):
    """A tensor with its values in ``here``."""

    here: Tensor

    @staticmethod
    def __new__(cls, here: Tensor) -> "Elsewhere":
        made: Elsewhere = torch.Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls,
            here.size(),
            strides=here.stride(),
            storage_offset=here.storage_offset(),
            dtype=here.dtype,
            device=DEVICE,
        )
        made.here = here
        return made

    def tolist(self) -> Any:
        """As of any tensor; torch refuses it for subclasses."""
        return self.here.tolist()

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


class Pretended(TorchDispatchMode):
    """Inside, tensors can be made on and moved to the device that is not there."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


def _run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    name = str(func)
    given: list[Tensor] = []
    tree_map(lambda x: given.append(x) if isinstance(x, Tensor) else None, (args, kwargs))
    away = [x for x in given if isinstance(x, Elsewhere)]
    wanted = kwargs.get("device")
    to = bool(away) if wanted is None else torch.device(wanted).type == DEVICE.type
    if away and name not in _MOVES and "copy_" not in name:
        checked = args[:1] if name in _INDEXED else (args, kwargs)
        _require_together(name, checked)
    if name.startswith("prism.") and away:
        raise RuntimeError(f"{name}: no kernel for another device")
    if wanted is not None:
        kwargs = {**kwargs, "device": torch.device("cpu")}
    out = func(*_home(args), **_home(kwargs))
    if name == "aten._local_scalar_dense.default" or not to:
        return out
    if name.endswith("_.default") and isinstance(args[0], Elsewhere):
        return args[0]  # in place
    return tree_map(lambda x: Elsewhere(x) if isinstance(x, Tensor) else x, out)


def _require_together(name: str, values: Any) -> None:
    plain: list[Tensor] = []

    def look(x: Any) -> None:
        if isinstance(x, Tensor) and not isinstance(x, Elsewhere) and x.dim() > 0:
            plain.append(x)

    tree_map(look, values)
    if plain:
        shape = tuple(plain[0].shape)
        raise RuntimeError(f"{name}: a tensor {shape} on the CPU beside tensors on another device")


def _home(values: Any) -> Any:
    return tree_map(lambda x: x.here if isinstance(x, Elsewhere) else x, values)


def away(values: Any) -> Any:
    """The same values, tensors moved to the device that is not there."""
    return tree_map(lambda x: Elsewhere(x.detach()) if isinstance(x, Tensor) else x, values)


def back(values: Any) -> Any:
    """The same values as plain tensors."""
    return _home(values)


def move_module(module: Any) -> None:
    """Put a module's parameters there, in place."""
    for one in module.modules():
        for name, parameter in list(one._parameters.items()):
            if parameter is not None:
                del one._parameters[name]
                setattr(one, name, Elsewhere(parameter.detach()))
