"""The report's half about quality: what each level loses and what it saves, beside the baselines.

Knows operating points, batch curves and the layers' findings. Two decisions worth arguing about:
cost in the plot is the active share, our overheads included, for a comparison on the own share
would flatter us; and a level meets a bound only with two standard errors to spare, because a person
who decides by this page should not be let down by chance.
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import Final

from prism.artifact import OperatingPoint
from prism.contract import MAX_LEVEL

from prism_refactor.findings import ERROR_LEVELS, LayerFindings
from prism_refactor.report_charts import Chart, Line, Scale, decades, percent_ticks

BOUNDS: Final = (0.5, 1.0, 2.0, 5.0)  # percent
KINDS: Final = ("a", "b", "c")
_CARD_BATCH: Final = 8.0
HALF_WIDTH: Final = (400, 300)  # of two charts side by side
_UNIT: Final = "\u00a0%"  # stays on the line of its number
_SMALLEST: Final = 0.01  # percent; less than this is drawn on the floor of the plot

Curves = dict[str, dict[str, list[float]]]


def highest(point: OperatingPoint) -> float:
    """The loss in percent that is exceeded with two standard errors to spare only."""
    return point.quality_loss_percent + 2 * point.quality_loss_se


def lowest_within(points: Sequence[OperatingPoint], bound: float) -> OperatingPoint | None:
    """The lowest level that, like every measured level above it, surely loses <= ``bound`` %."""
    found = None
    for point in points:
        if highest(point) > bound:
            break
        found = point
    return found


def cards(points: Sequence[OperatingPoint], curves: Curves) -> str:
    """For each bound on the loss, the lowest level that meets it and what it saves."""
    parts = []
    for bound in BOUNDS:
        point = lowest_within(points, bound)
        if point is None or point.level == MAX_LEVEL:
            parts.append(f"<div>at most {bound:g} % loss<b>none</b>below 100 was measured</div>")
            continue
        saved = f"a token computes {100 * point.active_share:.0f}{_UNIT} of its experts"
        share = bytes_share(curves, point.level, _CARD_BATCH)
        if share is not None:
            saved += f", a batch of {_CARD_BATCH:g} reads {100 * share:.0f}{_UNIT} of their bytes"
        parts.append(f"<div>at most {bound:g} % loss<b>level {point.level}</b>{saved}</div>")
    return (
        f'<div class="cards">{"".join(parts)}</div><p class="note">The lowest measured level that, '
        "like all above it, stays below the bound with two standard errors to spare.</p>"
    )


def bytes_share(curves: Curves, level: int, batch: float) -> float | None:
    """What a batch that rides along reads at a level: linear between the levels of ``curves``."""
    known = [
        (int(name), curve["ride_along_bytes_share"][curve["batch"].index(batch)])
        for name, curve in curves.items()
        if batch in curve["batch"]
    ]
    return _between(sorted(known), level)


def _between(known: Sequence[tuple[float, float]], at: float) -> float | None:
    """Linear between neighbours of ``known``, by rising x; None outside."""
    for (low, first), (high, second) in pairwise(known):
        if low <= at <= high:
            return first + (second - first) * (at - low) / (high - low)
    return None


def comparison(points: Sequence[OperatingPoint], top_k: dict[int, OperatingPoint]) -> str:
    """A sentence for each baseline: what a level of the same cost loses; "" where none has it."""
    ours = sorted((p.active_share, p.quality_loss_percent) for p in points)
    parts = []
    for k in sorted(top_k, reverse=True):
        loss = top_k[k].quality_loss_percent
        same = _between(ours, top_k[k].active_share)
        if same is None or loss <= highest(top_k[k]) - loss:  # lost in its own noise
            continue
        # A ratio to next to nothing would be a number without meaning.
        times = f", {loss / same:.0f} times less" if same > loss / 100 else ""
        words = f"top-{k} loses {loss:.2f} %, a level of its cost {same:.2f} %{times}"
        parts.append(words.replace(" %", _UNIT))
    return f'<p class="note">At equal cost: {"; ".join(parts)}.</p>' if parts else ""


def plot(points: Sequence[OperatingPoint], top_k: dict[int, OperatingPoint]) -> str:
    """Loss against active share, ours and fewer experts; two standard errors each way."""
    below = [point for point in points if point.level != MAX_LEVEL]
    baseline = [top_k[k] for k in sorted(top_k, reverse=True)]
    everything = [*below, *baseline]
    if not everything:
        return '<p class="note">No level was measured.</p>'
    largest = max(max(highest(p) for p in everything), 10 * _SMALLEST)
    positive = [p.quality_loss_percent for p in everything if p.quality_loss_percent > 0]
    smallest = min(positive, default=0.0)
    floor = min(max(smallest / 2, _SMALLEST), largest / 10)
    ticks = _round_losses(floor, largest)
    y = Scale("quality loss, log scale", ticks, " %", log=True)
    shares = [100 * p.active_share for p in everything]
    x = Scale(
        "active share: parameters of its experts that a token computes, overheads included",
        percent_ticks(min(shares), max(100.0, *shares)),
        " %",
    )
    lines = [
        _series("levels of this artifact", "a", below, [str(p.level) for p in below], False),
    ]
    if baseline:
        names = [f"top-{k}" for k in sorted(top_k, reverse=True)]
        lines.append(_series("fewer whole experts per token", "base", baseline, names, True))
    chart = Chart("Quality loss against active share", x, y, lines).svg()
    return chart + comparison(points, top_k)


def _round_losses(low: float, high: float) -> tuple[float, ...]:
    """1, 2, 5 of each decade that cover ``low`` to ``high``."""
    every = [factor * power for power in decades(low, high) for factor in (1.0, 2.0, 5.0)]
    first = max(value for value in every if value <= low * (1 + 1e-9))
    last = min((value for value in every if value >= high), default=every[-1])
    return tuple(round(value, 10) for value in every if first <= value <= last)


def _series(
    label: str, kind: str, points: Sequence[OperatingPoint], names: Sequence[str], dashed: bool
) -> Line:
    return Line(
        label,
        kind,
        [(100 * p.active_share, p.quality_loss_percent) for p in points],
        [(p.quality_loss_percent - 2 * p.quality_loss_se, highest(p)) for p in points],
        names,
        below=not dashed,
        dashed=dashed,
    )


def loss_text(point: OperatingPoint) -> str:
    """The loss in percent, ± two standard errors."""
    return f"{point.quality_loss_percent:+.2f} ± {2 * point.quality_loss_se:.2f}"


def table(points: Sequence[OperatingPoint], top_k: dict[int, OperatingPoint]) -> str:
    """Everything measured, ours and the baselines, by falling cost."""
    rows = [(p, str(p.level), "") for p in points]
    rows += [(p, f"top-{k}", ' class="base"') for k, p in top_k.items()]
    rows.sort(key=lambda row: -row[0].active_share)
    body = "".join(
        f"<tr{kind}><td>{name}</td><td>{100 * p.own_share:.1f}</td>"
        f"<td>{100 * p.active_share:.1f}</td><td>{p.perplexity:.3f}</td>"
        f"<td>{loss_text(p)}</td>"
        f"<td>{p.kl:.4f} ± {2 * p.kl_se:.4f}</td>"
        f"<td>{100 * p.top1_agreement:.1f} ± {200 * p.top1_se:.1f}</td></tr>"
        for p, name, kind in rows
    )
    return (
        '<div class="wide"><table><thead><tr><th>level</th><th>own %</th><th>active %</th>'
        "<th>perplexity</th><th>loss %</th><th>KL, nats</th><th>same top token %</th></tr></thead>"
        f"<tbody>{body}</tbody></table></div>"
    )


def by_layer(layers: Sequence[LayerFindings], sub_experts: int) -> str:
    """Error of each layer's experts, and what the partition keeps."""
    numbers = range(len(layers))
    top = max(100 * error for layer in layers for error in layer.errors.values())
    x = Scale("MoE layer", _layer_ticks(len(layers)))
    errors = Chart(
        "Error per layer",
        x,
        Scale("squared error of the experts' output", percent_ticks(0, max(top, 0.1)), " %"),
        [
            Line(f"level {level}", kind, [(n, 100 * layers[n].errors[level]) for n in numbers])
            for level, kind in zip(ERROR_LEVELS, KINDS, strict=True)
        ],
        *HALF_WIDTH,
    )
    kept = [100 * layer.kept_mass for layer in layers]
    unsorted = [100 * layer.unsorted_mass for layer in layers]
    label = f"output mass in the better {sub_experts // 2} of {sub_experts}"
    masses = Chart(
        "Kept mass per layer",
        x,
        Scale(label, percent_ticks(min(*kept, *unsorted, 95.0), 100.0), " %"),
        [
            Line("sub-experts as cut", "a", list(zip(numbers, kept, strict=True))),
            Line(
                "as in the source",
                "base",
                list(zip(numbers, unsorted, strict=True)),
                dashed=True,
            ),
        ],
        *HALF_WIDTH,
    )
    return f'<div class="pair">{errors.svg()}{masses.svg()}</div>'


def _layer_ticks(count: int) -> tuple[float, ...]:
    step = max(1, -(-count // 12))
    ticks = [float(n) for n in range(0, count, step)]
    if ticks[-1] != count - 1:
        ticks[-1 if count - 1 - ticks[-1] < step / 2 else len(ticks) :] = [float(count - 1)]
    return tuple(ticks) if len(ticks) > 1 else (0.0, 1.0)
