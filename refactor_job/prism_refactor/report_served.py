"""The report's part about serving: what a level reads, computes and loses in decode batches.

Knows operating points and the manifest's batch curves. The decision worth arguing about: losses are
a table beside the curves, because they are measured at few batch sizes on held-out text while the
shares are counted at all of them on calibration text.
"""

from collections.abc import Sequence

from prism.artifact import OperatingPoint

from prism_refactor.options import SERVED_LEVELS
from prism_refactor.report_charts import Chart, Line, Scale
from prism_refactor.report_quality import HALF_WIDTH, KINDS, Curves, loss_text


def losses(points: Sequence[OperatingPoint], curves: Curves) -> str:
    """A table of what levels lose alone and in decode batches that ride along; "" where no batch
    was measured."""
    known = {str(point.level): point for point in points}
    rows = []
    for level in map(str, SERVED_LEVELS):
        curve = curves.get(level, {})
        if level not in known or "measured_batch" not in curve:
            continue
        alone = known[level]
        rows.append((level, "1", alone.active_share, alone.own_share, loss_text(alone)))
        columns = ("batch", "bytes_share", "computed_share", "loss_percent", "loss_se")
        for batch, read, computed, loss, se in zip(
            *(curve[f"measured_{name}"] for name in columns), strict=True
        ):
            rows.append((level, f"{batch:g}", read, computed, f"{loss:+.2f} ± {2 * se:.2f}"))
    if not rows:
        return ""
    body = "".join(
        f"<tr><td>{level}</td><td>{batch}</td><td>{100 * read:.1f}</td>"
        f"<td>{100 * computed:.1f}</td><td>{loss}</td></tr>"
        for level, batch, read, computed, loss in rows
    )
    return (
        '<div class="wide"><table><thead><tr><th>level</th><th>sequences</th>'
        "<th>bytes read %</th><th>computed %</th><th>loss %</th></tr></thead>"
        f"<tbody>{body}</tbody></table></div>"
    )


def shares(curves: Curves) -> str:
    """Bytes and compute of decode batches; bytes differ by overheads only without ride-along."""
    read: list[Line] = []
    computed: list[Line] = []
    for level, kind in zip(SERVED_LEVELS, KINDS, strict=True):
        curve = curves.get(str(level))
        if curve is None:
            continue
        sizes = curve["batch"]
        for lines, key, label, dashed in (
            (read, "ride_along_bytes_share", f"level {level}", False),
            (computed, "ride_along_computed_share", f"level {level}, riding along", False),
            (computed, "computed_share", "each token alone", True),
        ):
            values = list(zip(sizes, (100 * share for share in curve[key]), strict=True))
            lines.append(Line(label, kind, values, dashed=dashed, dots=not dashed))
    batch = Scale("sequences in a decode batch", (1, 2, 4, 8, 16, 32, 64), log=True)
    charts = (
        ("bytes read, of the experts hit", read),
        ("computed, of level 100's", computed),
    )
    parts = [
        Chart(
            f"Share {what}", batch, Scale(what, (0, 20, 40, 60, 80, 100), " %"), lines, *HALF_WIDTH
        )
        for what, lines in charts
    ]
    return f'<div class="pair">{"".join(chart.svg() for chart in parts)}</div>'
