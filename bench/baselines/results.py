"""Everything one benchmark found: as a table for people, as JSON for the record.

Knows rows, served points and marks; knows no model.
"""

import math
import platform
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field

import torch
import transformers
from prism_refactor.served import ServedPoint

from bench.baselines import marks
from bench.baselines.compared import Row, Step
from bench.baselines.cutting import Cutting
from bench.baselines.marks import Mark

OURS = "ours"
AUTO = f"{OURS}, N auto"
_RIVALS = ("lower top-k", "skip experts")


@dataclass(frozen=True, slots=True)
class Record:
    """One run. `rows`: ours first, from high to low level; `scan`: the asked shares counted as
    operating points; `steps`: between them."""

    command: str
    texts: dict[str, str]
    tokens: int
    perplexity: float
    sub_experts: list[int]  # of each artifact
    rows: list[Row]
    scan: tuple[float, ...]
    steps: list[Step]
    served: list[ServedPoint]
    cut: Cutting
    seconds: dict[str, float] = field(default_factory=dict)

    @property
    def methods(self) -> list[str]:
        """In the order of their rows."""
        return list(dict.fromkeys(row.method for row in self.rows))

    def of(self, method: str) -> list[Row]:
        """Rows of one method."""
        return [row for row in self.rows if row.method == method]

    @property
    def scanned(self) -> list[Row]:
        """Rows of the default artifact that count as operating points."""
        return [row for row in self.of(self.methods[0]) if row.asked in self.scan]

    def marks(self) -> list[Mark]:
        """All that was asked for; what this run cannot tell is among them, not judged."""
        rivals = [row for row in self.rows if row.method.startswith(_RIVALS)]
        ours = [row for row in self.rows if row.method.startswith(OURS)]
        found = []
        for kind in marks.LOSS:
            rows = [row for row in ours if row.method.startswith(AUTO) == (kind == "auto")]
            found += marks.quality(rows, rivals, kind)
        found += marks.range_of_levels(self.scanned, self.steps)
        return found + marks.served(self.served) + marks.cutting(self.cut)

    @property
    def holds(self) -> bool:
        """Whether every mark was judged and holds."""
        return all(mark.holds for mark in self.marks())

    def as_text(self) -> str:
        """The tables."""
        parts = [
            f"{self.tokens} tokens, full perplexity {self.perplexity:.3f}; loss in % ± SE, "
            "own and active share in %",
            _aligned(self._by_share()),
            "at equal bytes, one token at a time",
            _aligned(self._by_bytes()),
            self._points(),
            *(["as served in decode batches", _aligned(self._as_served())] if self.served else []),
            self._cutting(),
            "seconds: " + ", ".join(f"{name} {value}" for name, value in self.seconds.items()),
            "\n".join(map(str, self.marks())),
        ]
        return "\n\n".join(parts)

    def as_json(self) -> dict[str, object]:
        """What bench/results keeps."""
        return {
            "command": self.command,
            "date": time.strftime("%Y-%m-%d"),
            **self.texts,
            "tokens": self.tokens,
            "perplexity": self.perplexity,
            "sub_experts": self.sub_experts,
            "machine": f"{platform.machine()}, {torch.get_num_threads()} threads",
            "versions": {
                "python": platform.python_version(),
                "torch": torch.__version__,
                "transformers": transformers.__version__,
            },
            "seconds": self.seconds,
            "rows": [asdict(row) for row in self.rows],
            "operating_points": {
                "ours": marks.non_dominated(_plane(self.scanned)),
                "lower top-k": 1 + len(self.of("lower top-k")),
            },
            "steps": [asdict(step) for step in self.steps],
            "served": [asdict(point) for point in self.served],
            "partition": asdict(self.cut),
            "marks": [_plain(mark) for mark in self.marks()],
        }

    def _by_share(self) -> list[list[str]]:
        lines = [["method", *(f"{100 * share:.0f} %" for share in marks.SHARES)]]
        for method in self.methods:
            rows = self.of(method)
            cells = [_cell(rows, share) for share in marks.SHARES]
            if any(cells):
                lines.append([method, *cells])
        return lines

    def _by_bytes(self) -> list[list[str]]:
        lines = [["method", "bytes %", "loss"]]
        ours = self.of(self.methods[0])
        for row in self.rows:
            if row.method.startswith(OURS) or row.bytes_share is None:
                continue
            lines.append([row.method, _percent(row.bytes_share), _loss(row)])
            near = _nearest(ours, row.bytes_share)
            name = f"  level {100 * near.asked:.0f}, {near.method}"
            lines.append([name, _percent(near.bytes_share or near.own_share), _loss(near)])
        return lines

    def _points(self) -> str:
        count = marks.non_dominated(_plane(self.scanned))
        fewer = 1 + len(self.of("lower top-k"))
        return (
            f"operating points that no other dominates, of {len(self.scanned)} levels: {count}; "
            f"lower top-k: {fewer}"
        )

    def _as_served(self) -> list[list[str]]:
        lines = [["batch", "method", "bytes %", "computed %", "loss"]]
        for point in self.served:
            p = point.point
            lines.append(
                [
                    str(point.batch),
                    point.method + (", ride-along" if point.ride_along else ""),
                    _percent(point.bytes_share),
                    _percent(point.computed_share),
                    f"{p.quality_loss_percent:+.2f} ± {p.quality_loss_se:.2f}",
                ]
            )
        return lines

    def _cutting(self) -> str:
        seconds = ", ".join(f"{s:.2f} s for {w} neurons" for w, s in self.cut.seconds.items())
        return (
            f"partition: keeps {self.cut.kept_mass:.3f} of held-out mass in half of the slices "
            f"(random {self.cut.kept_mass_random:.3f}); one expert on one core: {seconds}"
        )


def _plain(mark: Mark) -> dict[str, object]:
    """JSON knows no infinity: a bound that no level reaches has no figure and is a miss."""
    judged = mark.figure is not None
    figure = mark.figure if mark.figure is not None and math.isfinite(mark.figure) else None
    return asdict(mark) | {"figure": figure, "judged": judged, "holds": mark.holds}


def _nearest(rows: Sequence[Row], share: float) -> Row:
    """The row that reads about this share of the bytes."""
    return min(rows, key=lambda row: abs((row.bytes_share or row.own_share) - share))


def _plane(rows: Iterable[Row]) -> list[tuple[float, float]]:
    return [(row.own_share, row.loss) for row in rows]


def _cell(rows: Sequence[Row], share: float) -> str:
    for row in rows:
        if abs(row.asked - share) < 1e-6:
            return f"{_loss(row)} ({_percent(row.own_share)}/{_percent(row.active_share)})"
    return ""


def _loss(row: Row) -> str:
    return f"{row.loss:+.2f} ± {row.se:.2f}"


def _percent(share: float) -> str:
    return f"{100 * share:.1f}"


def _aligned(lines: Sequence[Sequence[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    )
