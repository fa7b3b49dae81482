"""Which baselines run, fitted and ready to be measured.

Knows every method by its family, so that a person can leave the slow ones out. The decision worth
arguing about: what has free choices (MoE-Prism's patterns) is tuned on calibration text that the
evaluation does not see, as ours is.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from prism_refactor.paired import compare
from torch import Tensor

from bench.baselines import moe_prism
from bench.baselines.compared import Entry, of_method
from bench.baselines.oracle import OracleNeurons, OracleSlices
from bench.baselines.original import Method, Original, PackedLayers
from bench.baselines.partitions import IndexCutter, OurSelection, Partition, RandomCutter
from bench.baselines.rounding import Rounded
from bench.baselines.skipping import AdaptiveSkipping, LowerTopK

SHARES = (0.75, 0.50, 0.25)
MOE_PRISM_BUDGETS = (14, 12, 10, 8, 6, 4)  # sixteenths of the experts' parameters
TUNING_WINDOWS = 8
BOUND_EVERY = 4  # batches of text: twice the error for a quarter of a long time


@dataclass(frozen=True, slots=True)
class Setting:
    """What families are made from; ids [S, W] are calibration text."""

    original: Original
    artifact: Path
    sub_experts: int
    ids: Tensor
    seed: int
    workers: int


def entries(setting: Setting, families: Iterable[str], told: Callable[[str], None]) -> list[Entry]:
    """All operating points of the families, fitted; `told` hears what is being fitted."""
    found = []
    for family in families:
        told(family)
        found += list(FAMILIES[family](setting))
    return found


def _fitted(setting: Setting, methods: Iterable[Method]) -> Iterator[Entry]:
    for method in methods:
        setting.original.fit(method, setting.ids)
        yield of_method(setting.original, method)


def _top_k(setting: Setting) -> Iterator[Entry]:
    packed, most = PackedLayers(setting.original.weights, 1), setting.original.top_k
    config = setting.original.model.config.get_text_config()
    normalised = bool(getattr(config, "norm_topk_prob", False))
    return _fitted(
        setting, (LowerTopK(packed, k, most, normalised) for k in range(most - 1, 0, -1))
    )


def _skipping(setting: Setting) -> Iterator[Entry]:
    packed = PackedLayers(setting.original.weights, 1)
    forms = [(norm, means) for norm in (False, True) for means in (False, True)]
    return _fitted(
        setting,
        (
            AdaptiveSkipping(packed, share, by_norm=norm, compensated=means)
            for norm, means in forms
            for share in SHARES
        ),
    )


def _partitions(setting: Setting) -> Iterator[Entry]:
    given = setting.sub_experts, setting.seed, setting.workers
    for name, cutter in (("random", RandomCutter(*given)), ("index", IndexCutter(*given))):
        partition = Partition(setting.original, cutter, setting.ids)
        name = f"{name} partition, our selection"
        yield from _fitted(setting, (OurSelection(name, partition, share) for share in SHARES))


def _moe_prism(setting: Setting) -> Iterator[Entry]:
    original, ids = setting.original, setting.ids
    partition = moe_prism.refactored(original, ids, setting.seed, moe_prism.ITERATIONS)
    slots = original.top_k
    for budget in MOE_PRISM_BUDGETS:
        whole = budget * slots * moe_prism.GROUPS // 16
        patterns = list(moe_prism.patterns(whole, slots))
        best = _least_loss(
            original, ids[:: max(1, len(ids) // TUNING_WINDOWS)], partition, patterns
        )
        yield of_method(original, moe_prism.Pattern(partition, best))


def _least_loss(
    original: Original,
    ids: Tensor,
    partition: moe_prism.Refactored,
    patterns: Sequence[tuple[int, ...]],
) -> tuple[int, ...]:
    inputs = ids[:, :-1]
    full = original.hidden(inputs)
    runs = [
        original.hidden(inputs, moe_prism.Pattern(partition, pattern).answer)
        for pattern in patterns
    ]
    samples = compare(original.model, ids, full, runs)[1:]
    losses = [float(sample.loss.mean()) for sample in samples]
    return patterns[losses.index(min(losses))]


def _oracle(setting: Setting) -> Iterator[Entry]:
    """On the artifact as a stock model, so that slices are those of our partition."""
    ours = Original(setting.artifact)
    for compensated in (False, True):
        for share in SHARES:
            method = OracleSlices(ours, setting.sub_experts, share, compensated=compensated)
            ours.fit(method, setting.ids)
            yield replace(of_method(ours, method), every=BOUND_EVERY)
    for entry in _fitted(setting, (OracleNeurons(share) for share in SHARES)):
        yield replace(entry, every=BOUND_EVERY)


def _rounding(setting: Setting) -> Iterator[Entry]:
    for bits in (8, 4):
        method = Rounded(setting.original, bits)
        yield of_method(setting.original, method, method.bytes_share)


FAMILIES: dict[str, Callable[[Setting], Iterator[Entry]]] = {
    "top-k": _top_k,
    "skipping": _skipping,
    "partitions": _partitions,
    "moe-prism": _moe_prism,
    "oracle": _oracle,
    "rounding": _rounding,
}
