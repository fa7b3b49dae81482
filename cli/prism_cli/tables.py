"""Operating points as a table for people."""

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Final

from prism.manifest import OperatingPoint

if TYPE_CHECKING:  # it loads torch, and `prism inspect` must not
    from prism_refactor.lm_harness import TaskResult
    from prism_refactor.served import ServedPoint

_QUALITY: Final = ("perplexity", "loss %", "± (2 SE)", "KL", "top-1 %")
_HEADER: Final = ("level", "own %", "active %", *_QUALITY)
_SERVED_HEADER: Final = ("batch", "method", "own %", "computed %", "bytes %", *_QUALITY)


def points_table(points: Iterable[OperatingPoint]) -> str:
    """One line per operating point under a header, columns aligned right."""
    rows = [
        (str(p.level), _percent(p.own_share), _percent(p.active_share), *_quality(p))
        for p in points
    ]
    return _aligned([_HEADER, *rows])


def served_table(points: "Iterable[ServedPoint]") -> str:
    """One line per way of serving a decode batch."""
    rows = [
        (
            str(p.batch),
            p.method + (" +ride" if p.ride_along else ""),
            _percent(p.point.own_share),
            _percent(p.computed_share),
            _percent(p.bytes_share),
            *_quality(p.point),
        )
        for p in points
    ]
    return _aligned([_SERVED_HEADER, *rows])


def tasks_table(results: "Iterable[TaskResult]") -> str:
    """One line per metric of a task at a level."""
    rows = [
        (
            r.task,
            r.metric,
            str(r.level),
            f"{r.value:.4f}",
            "" if r.se is None else f"{r.se:.4f}",
            str(r.samples),
        )
        for r in results
    ]
    return _aligned([("task", "metric", "level", "value", "± (1 SE)", "samples"), *rows])


def _percent(share: float) -> str:
    return f"{100 * share:.1f}"


def _quality(p: OperatingPoint) -> tuple[str, ...]:
    return (
        f"{p.perplexity:.3f}",
        f"{p.quality_loss_percent:+.2f}",
        f"{2 * p.quality_loss_se:.2f}",
        f"{p.kl:.4f}",
        _percent(p.top1_agreement),
    )


def _aligned(lines: Sequence[Sequence[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True))
        for line in lines
    )
