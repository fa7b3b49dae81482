"""From which tensors of a checkpoint's files the experts of a model are made, and how.

Knows transformers' conversion rules (renamed keys, experts stacked from one tensor each, halves
concatenated or interleaved) and follows them as its loader does, but on places instead of values:
an expert's parameter becomes views of ranges in files, and no byte is read. Decision: we ask the
model class for its rules instead of keeping a table of namings, so each architecture that
transformers loads is found in its files; a rule we cannot follow is refused by name.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Final

from prism.checkpoint import CheckpointError, TensorEntry

_FLOATS: Final = ("F64", "F32", "F16", "BF16")


@dataclass(frozen=True, slots=True)
class View:
    """A strided view of one tensor of the files; offset and strides in items, as torch has them."""

    name: str  # in the files
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    expert: int = -1  # its number where the tensor holds all experts of a layer

    @classmethod
    def whole(cls, name: str, entry: TensorEntry) -> "View":
        strides, size = [], 1
        for length in reversed(entry.shape):
            strides.append(size)
            size *= length
        return cls(name, 0, entry.shape, tuple(reversed(strides)))

    def cut(self, axis: int, start: int, length: int, step: int = 1) -> "View":
        """Indices start, start + step, … of one axis."""
        shape, strides = list(self.shape), list(self.strides)
        shape[axis], strides[axis] = length, self.strides[axis] * step
        offset = self.offset + start * self.strides[axis]
        return replace(self, offset=offset, shape=tuple(shape), strides=tuple(strides))

    def swapped(self, one: int, other: int) -> "View":
        """Two axes exchanged."""
        shape, strides = list(self.shape), list(self.strides)
        shape[one], shape[other] = shape[other], shape[one]
        strides[one], strides[other] = strides[other], strides[one]
        return replace(self, shape=tuple(shape), strides=tuple(strides))

    def stacked(self) -> "View":
        """With a new first axis of length 1."""
        return replace(self, shape=(1, *self.shape), strides=(0, *self.strides))


@dataclass(frozen=True, slots=True)
class Row:
    """One expert's part of a parameter, [1, …]: views side by side along an axis."""

    views: tuple[View, ...]
    axis: int = 1

    @property
    def shape(self) -> tuple[int, ...]:
        shape = list(self.views[0].shape)
        shape[self.axis] = sum(view.shape[self.axis] for view in self.views)
        return tuple(shape)

    def cut(self, axis: int, start: int, length: int, step: int = 1) -> View:
        """Indices start, start + step, … of one axis; UnknownRule when no one view holds them."""
        first = 0
        for view in self.views if axis == self.axis else self.views[:1]:
            here = view.shape[axis]
            if first <= start and start + (length - 1) * step < first + here:
                if len(self.views) == 1 or axis == self.axis:
                    return view.cut(axis, start - first, length, step)
                break
            first += here
        raise UnknownRule(f"{self.views[0].name}: its neurons lie in several tensors of the files")


class UnknownRule(CheckpointError):
    """Experts lie in the files in a form that cannot be permuted in place."""


def expert_rows(
    model: Any, parameters: Iterable[str], entries: Mapping[str, TensorEntry]
) -> dict[str, list[Row]]:
    """parameter [E, …] -> the row of each expert.

    `model` may lie on the meta device. Raises UnknownRule, and CheckpointError where the files lack
    a tensor.
    """
    wanted = set(parameters)
    found = _sources(model, wanted, entries)
    missing = sorted(wanted - found.keys())
    if missing:
        raise CheckpointError(f"no tensors in the files for {missing[0]}")
    return {
        name: _experts(name, model.get_parameter(name).shape, *found[name], entries)
        for name in sorted(wanted)
    }


def _sources(
    model: Any, wanted: set[str], entries: Mapping[str, TensorEntry]
) -> dict[str, tuple[Any | None, dict[str, list[str]]]]:
    """parameter -> (transformers' converter or None, its pattern -> names in the files)."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key

    rules = get_model_conversion_mapping(model)
    renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
    converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
    by_pattern = {p: rule for rule in converters for p in rule.source_patterns}
    held = model.state_dict()
    found: dict[str, tuple[Any | None, dict[str, list[str]]]] = {}
    for name in sorted(entries, key=dot_natural_key):
        target, pattern = _renamed(model, name, renamings, converters, held)
        if target in wanted:
            rule = None if pattern is None else by_pattern[pattern]
            sources = found.setdefault(target, (rule, {}))[1]
            sources.setdefault(pattern or "", []).append(name)
    return found


def _renamed(
    model: Any, name: str, renamings: list[Any], converters: list[Any], held: Mapping[str, Any]
) -> tuple[str, str | None]:
    """(parameter, the converter's pattern that matched or None), as the loader decides it."""
    from transformers.core_model_loading import rename_source_key

    prefix = model.base_model_prefix
    target, pattern = rename_source_key(name, renamings, converters, prefix, held)
    if target not in held and name in held:
        target, pattern = rename_source_key(name, [], [], prefix, held)
    return target, pattern


def _experts(
    parameter: str,
    shape: tuple[int, ...],
    rule: Any | None,
    sources: dict[str, list[str]],
    entries: Mapping[str, TensorEntry],
) -> list[Row]:
    """Each expert's row; shapes must come out as the model has them."""
    operations = [] if rule is None else list(rule.operations)
    order = list(sources) if rule is None else [p for p in rule.source_patterns if p in sources]
    rows = []
    for expert in range(shape[0]):
        views = [_of_expert(parameter, expert, sources[p], shape[0], entries) for p in order]
        row = _converted(parameter, views, operations, len(shape))
        if row.shape[1:] != tuple(shape[1:]):
            raise CheckpointError(
                f"{views[0].name}: expert {expert} is {row.shape[1:]} in the files, "
                f"{tuple(shape[1:])} in the model"
            )
        rows.append(row)
    return rows


def _of_expert(
    parameter: str, expert: int, names: list[str], experts: int, entries: Mapping[str, TensorEntry]
) -> View:
    """One pattern's tensor of an expert: its own, or its part of one that holds all experts."""
    if (dtype := entries[names[0]].dtype) not in _FLOATS:
        raise UnknownRule(f"{names[0]}: experts stored as {dtype}; use the original weights")
    if len(names) == experts > 1:
        return View.whole(names[expert], entries[names[expert]])
    whole = View.whole(names[0], entries[names[0]])
    if len(names) > 1 or whole.shape[:1] != (experts,):
        raise CheckpointError(
            f"{names[0]}: {len(names)} tensors of shape {whole.shape} for the {experts} experts of "
            f"{parameter}"
        )
    return replace(whole.cut(0, expert, 1), expert=expert)


def _converted(parameter: str, views: list[View], operations: list[Any], axes: int) -> Row:
    """Follow the converter's operations with the places of one expert."""
    row, joined = Row(tuple(views)), len(views) == 1
    for operation in operations:
        kind = type(operation).__name__
        axis = getattr(operation, "dim", 0) % axes  # 0 is the axis of experts
        if kind == "MergeModulelist" and axis == 0:
            row = Row(tuple(view.stacked() for view in row.views))
        elif kind == "Concatenate" and axis and not joined:
            row, joined = _joined(row.views, axis), True
        elif kind == "Interleave" and axis and not operation.inverse and len(row.views) == 1:
            row = Row(_evens_and_odds(row.views[0], axis), axis)
        elif kind == "Transpose" and not operation.check_dims and len(row.views) == 1:
            row = _transposed(parameter, row.views[0], operation, axes)
        else:
            raise _unknown(parameter, operation)
    if not joined:
        raise UnknownRule(f"{parameter}: made of {len(views)} tensors that are not concatenated")
    return row


def _joined(views: tuple[View, ...], axis: int) -> Row:
    others = [view.shape[:axis] + view.shape[axis + 1 :] for view in views]
    for view, shape in zip(views, others, strict=True):
        if shape != others[0]:
            raise CheckpointError(
                f"{view.name}: shape {view.shape[1:]} beside {views[0].shape[1:]} of "
                f"{views[0].name}"
            )
    return Row(views, axis)


def _evens_and_odds(view: View, axis: int) -> tuple[View, View]:
    half = view.shape[axis] // 2
    return view.cut(axis, 0, half, 2), view.cut(axis, 1, half, 2)


def _transposed(parameter: str, view: View, operation: Any, axes: int) -> Row:
    one, other = operation.dim0 % axes, operation.dim1 % axes
    if 0 in (one, other):
        raise _unknown(parameter, operation)
    return Row((view.swapped(one, other),))


def _unknown(parameter: str, operation: Any) -> UnknownRule:
    return UnknownRule(
        f"{parameter}: its files hold experts in a form that Prism cannot permute in place "
        f"(transformers converts them with {operation!r})"
    )
