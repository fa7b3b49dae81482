"""A causal language model whose decoder layers come from disk one at a time.

Knows transformers' model classes and its conversion of checkpoint names; knows nothing of levels.
Memory holds the embeddings, the head and one layer, whatever the size of the model. The decision
worth arguing about: the model is built on the meta device and every layer is filled by
transformers' own loader from the tensors that belong to it, so each architecture that loads whole
also loads in pieces, renamed and fused tensors included; and layers run as the model itself would
call them, because their arguments are taken from a pass in which every layer hands its input on.
"""

import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor, nn

from prism.architectures import UnsupportedModel, find_expert_modules, require_supported
from prism.checkpoint import CheckpointError, open_checkpoint
from prism.loading import load_config, load_tokenizer, require_complete

_DECODER_LAYER: Final = re.compile(r"^(.*\blayers)\.(\d+)\.")
_RESIDENT: Final = -1  # the tensors outside the decoder layers


@dataclass(frozen=True, slots=True)
class Call:
    """How the model calls one decoder layer, but for the hidden state that comes first."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Batch:
    """Token ids [S, W], their embeddings [S, W, H] and the call of every decoder layer."""

    ids: Tensor
    embedded: Tensor
    calls: tuple[Call, ...]


class StreamedModel:
    """The model in ``path``, in eval mode on ``device``, without its decoder layers' weights.

    Raises UnsupportedModel before weights are read and CheckpointError where they do not fit.
    """

    def __init__(
        self, path: str | Path, dtype: torch.dtype, device: torch.device | str = "cpu"
    ) -> None:
        from transformers import AutoModelForCausalLM

        self.path = Path(path)
        self.device = torch.device(device)
        self.dtype = dtype
        config = load_config(path)
        require_supported(config)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=False)
        self.model: Any = model.eval().requires_grad_(False)
        self.tokenizer = load_tokenizer(path)
        self._set_places([name for name, _ in find_expert_modules(model)])
        self._plan()
        self._fill_buffers()
        self._load(_RESIDENT)
        self.model.tie_weights()

    def _set_places(self, names: list[str]) -> None:
        found = [_DECODER_LAYER.match(name) for name in names]
        prefixes = {match.group(1) if match else None for match in found}
        if len(prefixes) != 1 or None in prefixes:
            raise UnsupportedModel(
                type(self.model).__name__,
                f"its experts do not lie in one list of layers: {', '.join(names[:4])}",
            )
        self._prefix = str(prefixes.pop())
        self.layers: nn.ModuleList = self.model.get_submodule(self._prefix)
        # decoder layer -> number of the experts module in it, in model order
        self.moe = {int(match.group(2)): i for i, match in enumerate(found) if match}
        self._experts = dict(zip(self.moe, names, strict=True))

    def _plan(self) -> None:
        """Which checkpoint tensors fill which decoder layer."""
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import (
            WeightConverter,
            WeightRenaming,
            rename_source_key,
        )

        self._mapping = get_model_conversion_mapping(self.model)
        renamings = [entry for entry in self._mapping if isinstance(entry, WeightRenaming)]
        converters = [entry for entry in self._mapping if isinstance(entry, WeightConverter)]
        expected = self.model.state_dict()
        self._files = {name: entry.file for name, entry in open_checkpoint(self.path).items()}
        self._tensors: dict[int, list[str]] = {}
        filled = set()
        for name in self._files:
            target, _ = rename_source_key(
                name, renamings, converters, self.model.base_model_prefix, expected
            )
            if target not in expected and name in expected:
                target = name  # it had its new name already, as the loader itself sees it
            self._tensors.setdefault(self._place_of(target), []).append(name)
            filled.add(target)
        # Told now: a missing tensor of the last layer would else be noticed after hours.
        require_complete(self.path, self._needed(expected) - filled, ())

    def _needed(self, expected: Iterable[str]) -> set[str]:
        """Names of the model that a file must fill: neither tied nor made by the model itself."""
        made = self.model._keys_to_ignore_on_load_missing or ()
        tied = self.model.all_tied_weights_keys
        return {
            name
            for name in expected
            if name not in tied and not any(re.search(pattern, name) for pattern in made)
        }

    def _place_of(self, name: str) -> int:
        match = _DECODER_LAYER.match(name)
        inside = match is not None and match.group(1) == self._prefix
        return int(match.group(2)) if match and inside else _RESIDENT

    def _fill_buffers(self) -> None:
        """Buffers that no checkpoint holds, such as rotary frequencies, as the model makes them."""
        self.model._move_missing_keys_from_meta_to_device(set(), {"": self.device}, None, None)
        self.model._initialize_missing_keys(False)

    def _load(self, place: int) -> None:
        from safetensors import SafetensorError, safe_open
        from transformers.core_model_loading import convert_and_load_state_dict_in_model
        from transformers.modeling_utils import LoadStateDictConfig

        names = self._tensors.get(place, [])
        config = LoadStateDictConfig(
            device_map={"": self.device},
            dtype=self.dtype,
            weight_mapping=self._mapping,
            ignore_mismatched_sizes=True,
        )
        try:
            files = {file: safe_open(file, framework="pt") for file in map(self._files.get, names)}
            slices = {name: files[self._files[name]].get_slice(name) for name in names}  # type: ignore[no-untyped-call]
            with _no_progress_bar():  # one per layer would bury everything else
                report, _ = convert_and_load_state_dict_in_model(self.model, slices, config)
        except SafetensorError as error:
            raise CheckpointError(f"{self.path}: the weights cannot be read ({error})") from error
        tied = self.model.all_tied_weights_keys
        missing = [n for n in report.missing_keys if self._place_of(n) == place and n not in tied]
        require_complete(self.path, missing, report.mismatched_keys)

    @contextmanager
    def loaded(self, place: int) -> Iterator[nn.Module]:
        """Decoder layer ``place`` with its weights, which go when the block ends."""
        layer = self.layers[place]
        empty = [
            (module, name, parameter)
            for module in layer.modules()
            for name, parameter in module._parameters.items()
        ]
        try:
            self._load(place)
            yield layer.requires_grad_(False)
        finally:
            for module, name, parameter in empty:
                module._parameters[name] = parameter
                module.__dict__.pop("_prism", None)

    @property
    def vocabulary(self) -> int:
        """How many tokens have an embedding."""
        return int(self.model.get_input_embeddings().weight.shape[0])

    def experts(self, place: int) -> Any | None:
        """The experts module of a decoder layer, or None where it has none."""
        name = self._experts.get(place)
        return None if name is None else self.model.get_submodule(name)

    def batch(self, ids: Tensor) -> Batch:
        """Embed ids [S, W] and learn how the model calls its layers for them."""
        calls: list[Call] = []

        def hand_on(hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            calls.append(Call(args, kwargs))
            seen.append(hidden)
            return hidden

        seen: list[Tensor] = []
        ids = ids.to(self.device)
        with self._each_layer(hand_on), torch.inference_mode():
            self.model.base_model(input_ids=ids, use_cache=False)
        return Batch(ids, seen[0], tuple(calls))

    def run(self, place: int, hidden: Tensor, batch: Batch) -> Tensor:
        """Decoder layer ``place``, loaded, on hidden [S, W, H]."""
        call = batch.calls[place]
        with torch.inference_mode():
            out = self.layers[place](hidden, *call.args, **call.kwargs)
        if not isinstance(out, Tensor):
            raise UnsupportedModel(
                type(self.model).__name__, "its decoder layers return more than a hidden state"
            )
        return out

    def logits(self, ids: Tensor, hidden: Tensor) -> Tensor:
        """Logits [S, W, V] fp32 of what the last decoder layer gave, hidden [S, W, H]."""

        def answer(*_: Any, **__: Any) -> Tensor:
            return hidden

        with self._each_layer(answer), torch.inference_mode():
            out: Tensor = self.model(input_ids=ids.to(self.device), use_cache=False).logits
        return out.float()

    @contextmanager
    def _each_layer(self, forward: Any) -> Iterator[None]:
        """``forward`` in the place of every decoder layer's own."""
        for layer in self.layers:
            layer.forward = forward  # the instance's attribute hides the class's method
        try:
            yield
        finally:
            for layer in self.layers:
                del layer.forward


@contextmanager
def _no_progress_bar() -> Iterator[None]:
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()
