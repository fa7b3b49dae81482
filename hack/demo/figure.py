"""The picture of the report: both runs side by side, one row per question, time downwards shared.

It draws and computes nothing but windows; figures and words are the report's. A latency that never
ended (a failed request) is drawn at the top of the axis, not left out.
"""

import math
from collections.abc import Sequence
from io import BytesIO

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, MaxNLocator

from hack.demo.record import Record, Run
from hack.demo.stats import Window, windows

WIDTH_S = 5.0
INK, SOFT, GRID = "#1f2933", "#7b8794", "#e4e7eb"
BLUE, TEAL, AMBER, RED, PURPLE = "#2563eb", "#0d9488", "#d97706", "#dc2626", "#7c3aed"
ROWS = ("Offered load, requests/s", "Time to first token", "Gap between tokens", "Level, %", "Pods")
HEIGHTS = (1.5, 2.0, 1.4, 1.7, 0.8)

STYLE = {
    "font.size": 10,
    "axes.edgecolor": GRID,
    "axes.labelcolor": INK,
    "axes.titlesize": 11,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "xtick.color": SOFT,
    "ytick.color": SOFT,
    "text.color": INK,
    "legend.frameon": False,
    "legend.fontsize": 8.5,
}


def draw(record: Record) -> bytes:
    """PNG of offered load, TTFT, ITL, level and replicas over time, a column for each run."""
    with plt.rc_context(STYLE):
        columns = len(record.runs)
        figure, grid = plt.subplots(
            len(HEIGHTS),
            columns,
            figsize=(7.2 * columns, 11),
            sharex="col",
            sharey="row",
            squeeze=False,
            height_ratios=HEIGHTS,
            width_ratios=[run.seconds for run in record.runs],
        )
        for column, run in enumerate(record.runs):
            _column([grid[row][column] for row in range(len(HEIGHTS))], record, run)
        for axis, label in zip(
            grid.flat, [row for row in ROWS for _ in range(columns)], strict=True
        ):
            axis.set_title(label, loc="left", color=SOFT, fontsize=10, pad=7)
        for row in range(len(HEIGHTS)):
            _legend(grid[row])
        figure.tight_layout(h_pad=1.0, w_pad=1.8)
        out = BytesIO()
        figure.savefig(out, format="png", dpi=130)
        plt.close(figure)
    return out.getvalue()


def _column(axes: Sequence[Axes], record: Record, run: Run) -> None:
    load, ttft, itl, level, pods = axes
    figures = windows(run.sent, run.seconds, WIDTH_S, record.targets.ttft_ms, record.targets.itl_ms)
    load.text(0, 1.24, run.title, transform=load.transAxes, fontsize=14, fontweight="bold")
    for axis in axes:
        axis.axvspan(run.step_begin, run.step_end, color="#fef3c7", alpha=0.55, lw=0)
        axis.set_xlim(0, run.seconds)
    _load(load, record, figures)
    _ttft(ttft, record, run, figures)
    _itl(itl, record, figures)
    _level(level, run, figures)
    _pods(pods, run)
    pods.set_xlabel("seconds", color=SOFT)


def _load(axis: Axes, record: Record, figures: Sequence[Window]) -> None:
    axis.stairs([w.rate for w in figures], _edges(figures), fill=True, color="#bfdbfe")
    axis.stairs([w.rate for w in figures], _edges(figures), color=BLUE, lw=1.2, label="offered")
    colours = (INK, TEAL)
    for capacity, colour in zip(record.capacities, colours, strict=False):
        label = f"capacity at level {capacity.level}"
        axis.axhline(capacity.requests_per_s, color=colour, lw=1.2, ls=(0, (4, 3)), label=label)
    axis.set_ylim(bottom=0)


def _ttft(axis: Axes, record: Record, run: Run, figures: Sequence[Window]) -> None:
    target = record.targets.ttft_ms
    done = [(s.due, 1000 * s.ttft) for s in run.sent if s.ok and s.ttft is not None]
    axis.plot(*_columns(done), ".", ms=2.5, color="#93c5fd", label="requests", rasterized=True)
    label = f"p{record.targets.percentile} over {WIDTH_S:.0f} s"
    axis.plot(_middles(figures), [_shown(w.ttft_p95) for w in figures], color=BLUE, label=label)
    axis.axhline(target, color=RED, lw=1.2, ls=(0, (4, 3)), label=f"target {target} ms")
    lost = [s.due for s in run.sent if not s.ok]
    if lost:
        top = 0.98
        axis.plot(
            lost, [top] * len(lost), "x", ms=4, color=RED, label="failed",
            transform=axis.get_xaxis_transform(),
        )  # fmt: skip
    axis.set_yscale("log")
    axis.yaxis.set_major_formatter(FuncFormatter(_duration))
    axis.yaxis.set_minor_formatter(FuncFormatter(lambda *_: ""))


def _itl(axis: Axes, record: Record, figures: Sequence[Window]) -> None:
    label = f"p{record.targets.percentile} over {WIDTH_S:.0f} s"
    axis.plot(_middles(figures), [_shown(w.itl_p95) for w in figures], color=PURPLE, label=label)
    if (target := record.targets.itl_ms) is not None:
        axis.axhline(target, color=RED, lw=1.2, ls=(0, (4, 3)), label=f"target {target} ms")
    axis.yaxis.set_major_formatter(FuncFormatter(_duration))
    axis.set_ylim(bottom=0)


def _level(axis: Axes, run: Run, figures: Sequence[Window]) -> None:
    times = [s.at for s in run.samples]
    floors, ceilings = [s.floor for s in run.samples], [s.ceiling for s in run.samples]
    axis.fill_between(times, floors, ceilings, step="post", color="#ccfbf1", lw=0)
    axis.step(times, ceilings, where="post", color=TEAL, lw=1.8, label="ceiling (operator)")
    axis.step(times, floors, where="post", color=TEAL, lw=1, ls=":", label="floor")
    served = [_shown(w.level) for w in figures]
    axis.plot(_middles(figures), served, "o-", ms=3, lw=1, color=AMBER, label="served (engine)")
    axis.set_ylim(0, 108)
    axis.set_yticks([0, 25, 50, 75, 100])


def _pods(axis: Axes, run: Run) -> None:
    times = [s.at for s in run.samples]
    axis.step(times, [s.ready for s in run.samples], where="post", color=INK, label="ready")
    axis.set_ylim(0, max([s.replicas for s in run.samples], default=1) + 0.9)
    axis.yaxis.set_major_locator(MaxNLocator(integer=True))


def _legend(row: Sequence[Axes]) -> None:
    """Of all columns, above the first, where no line can run through it."""
    entries = {
        label: handle
        for axis in row
        for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)
    }
    row[0].legend(
        entries.values(),
        entries.keys(),
        loc="lower right",
        bbox_to_anchor=(1.01, 0.985),
        ncols=4,
        handlelength=1.6,
        columnspacing=1.2,
        borderaxespad=0,
    )


def _edges(figures: Sequence[Window]) -> list[float]:
    return [w.begin for w in figures] + [figures[-1].end]


def _middles(figures: Sequence[Window]) -> list[float]:
    return [(w.begin + w.end) / 2 for w in figures]


def _columns(points: Sequence[tuple[float, float]]) -> tuple[list[float], list[float]]:
    return [x for x, _ in points], [y for _, y in points]


def _shown(value: float | None) -> float:
    """Gaps in a line where there is nothing to draw."""
    return value if value is not None and math.isfinite(value) else math.nan


def _duration(milliseconds: float, _: object = None) -> str:
    if milliseconds >= 1000:
        return f"{milliseconds / 1000:g} s"
    return f"{milliseconds:g} ms"
