"""The quality-cost plot: what each share of the experts costs in quality, alone and as served.

Knows a Record and matplotlib. The decision worth arguing about: loss on a logarithmic axis, because
a tenth of a percent and a tenth of the model are both on the picture; losses below its lower end
are drawn at the end, where nobody can tell them from none.
"""

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.ticker import FuncFormatter

from bench.baselines.results import OURS, Record
from bench.baselines.serving import SHARED

LEAST, MOST = 0.01, 60  # percent of perplexity
BLUE, PALE_BLUE, RED, PALE_RED = "#1f5fbf", "#7aa6e8", "#b3261e", "#e38f88"
OURS_STYLES = (
    {"color": BLUE, "marker": "o", "ms": 3.5, "lw": 2.0, "zorder": 5},
    {"color": PALE_BLUE, "marker": "o", "ms": 5, "lw": 0, "zorder": 6},
)
STYLES = {
    "lower top-k": (RED, "s"),
    "skip experts by gate": ("#e08a1e", "v"),
    "skip experts by gate, with means": ("#c9a227", "^"),
    "MoE-Prism": ("#7b4fa3", "D"),
    "random partition, our selection": ("#8a8f98", "x"),
    "oracle slices, with stand-ins": ("#2a9d8f", "+"),
}
BATCH_COLOURS = {8: (BLUE, RED), 32: (PALE_BLUE, PALE_RED)}


def draw(record: Record, file: Path) -> None:
    """Write a PNG."""
    with plt.rc_context({"font.size": 10, "axes.spines.top": False, "axes.spines.right": False}):
        figure, (alone, served) = plt.subplots(1, 2, figsize=(11.5, 5), sharey=True)
        _alone(alone, record)
        _served(served, record)
        for axes in (alone, served):
            _dress(axes)
        alone.set_ylabel("quality loss (% of perplexity)")
        figure.text(
            0.995,
            0.005,
            f"{record.texts['model']}, {record.tokens} tokens; "
            f"losses below {LEAST} % are drawn at {LEAST} %",
            ha="right",
            fontsize=7.5,
            color="#6b7280",
        )
        figure.tight_layout(rect=(0, 0.02, 1, 1), w_pad=2.5)
        figure.savefig(file, dpi=150)
        plt.close(figure)


def _dress(axes: Any) -> None:
    axes.set_yscale("log")
    axes.set_ylim(LEAST * 0.8, MOST)
    axes.set_xlim(5, 102)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}"))
    axes.tick_params(labelleft=True)
    axes.grid(True, which="major", color="#e6e8eb", linewidth=0.8)
    axes.set_axisbelow(True)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(frameon=False, fontsize=8.5, loc="lower left")
    else:
        axes.text(0.5, 0.5, "not measured", transform=axes.transAxes, ha="center")


def _alone(axes: Any, record: Record) -> None:
    axes.set_title("One token at a time", loc="left", fontweight="bold")
    axes.set_xlabel("parameters of the routed experts computed, sub-router included (%)")
    ours = [method for method in record.methods if method.startswith(OURS)]
    for method, style in zip(ours, OURS_STYLES, strict=False):
        points = [(row.active_share, row.loss) for row in record.of(method)]
        axes.plot(*_line(points), label=method, **style)
    for method, (colour, marker) in STYLES.items():
        points = [(row.active_share, row.loss) for row in record.of(method)]
        if points:
            axes.plot(*_line(points), marker + "--", color=colour, lw=1, ms=5, label=method)


def _served(axes: Any, record: Record) -> None:
    axes.set_title("As a decode batch is served", loc="left", fontweight="bold")
    axes.set_xlabel("bytes read, of the experts that the batch hits (%)")
    for batch in sorted({point.batch for point in record.served}):
        here = [point for point in record.served if point.batch == batch]
        ours, theirs = BATCH_COLOURS.get(batch, (BLUE, RED))
        for label, points, style in (
            ("ours with ride-along", [p for p in here if p.level], {"color": ours, "marker": "o"}),
            (
                f"{SHARED}, re-routed",
                [p for p in here if p.method == f"{SHARED}, re-routed"],
                {"color": theirs, "marker": "s", "ls": "--"},
            ),
        ):
            pairs = [(p.bytes_share, p.point.quality_loss_percent) for p in points]
            if pairs:
                axes.plot(*_line(pairs), lw=1.5, ms=4.5, label=f"{label}, batch {batch}", **style)


def _line(points: list[tuple[float, float]]) -> tuple[list[float], list[float]]:
    """x in percent, y clipped to the picture, by x."""
    ordered = sorted(points)
    return [100 * x for x, _ in ordered], [max(y, LEAST) for _, y in ordered]
