"""``prism/report.html``: one self-contained page of what was measured, for a person.

Knows the manifest only; the page needs no network and no script. The decision worth arguing about:
the plot is drawn against the own share that was *realised*, with error bars of two standard errors,
not against the level that was asked for.
"""

from html import escape

from prism.artifact import Manifest, OperatingPoint

_WIDTH, _HEIGHT = 640, 360
_LEFT, _RIGHT, _TOP, _BOTTOM = 64, 16, 16, 48

_STYLE = """
:root { color-scheme: light dark; --ink: #1d2430; --soft: #66707f; --line: #d5dae2; --mark: #3157d5;
  --page: #ffffff; }
@media (prefers-color-scheme: dark) { :root { --ink: #e7eaf0; --soft: #9aa4b4; --line: #363d49;
  --mark: #8aa6ff; --page: #14181f; } }
body { font: 16px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--page);
  max-width: 46rem; margin: 2.5rem auto; padding: 0 1rem; }
h1 { font-size: 1.5rem; margin: 0 0 .25rem; } h2 { font-size: 1.1rem; margin: 2rem 0 .5rem; }
p.note { color: var(--soft); margin: .25rem 0 1rem; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { text-align: right; padding: .25rem .5rem; border-bottom: 1px solid var(--line); }
th { color: var(--soft); font-weight: 500; } table.facts td, table.facts th { text-align: left; }
td.value { overflow-wrap: anywhere; }
svg { width: 100%; height: auto; } svg text { fill: var(--soft); font-size: 12px; }
.grid { stroke: var(--line); } .curve { fill: none; stroke: var(--mark); stroke-width: 2; }
.dot { fill: var(--mark); } .error { stroke: var(--mark); stroke-width: 1.5; }
"""


def render(manifest: Manifest) -> str:
    """The page as HTML."""
    points = manifest.operating_points
    name = manifest.source.uri.rstrip("/").rsplit("/", 1)[-1]
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Prism report: {escape(name)}</title><style>{_STYLE}</style></head><body>
<h1>{escape(name)}</h1>
<p class="note">{escape(manifest.architecture)}, every expert cut into {manifest.sub_experts}
sub-experts. Loss is the increase of perplexity on text that the calibration never saw; ± is two
standard errors of the paired difference.</p>
<h2>Quality and cost</h2>
{_plot(points)}
<h2>Operating points</h2>
{_points_table(points)}
<h2>Where it comes from</h2>
{_facts(manifest)}
</body></html>
"""


def _plot(points: tuple[OperatingPoint, ...]) -> str:
    top = max((p.quality_loss_percent + 2 * p.quality_loss_se for p in points), default=1.0)
    step = _tick(max(top, 0.1))
    most = step * 5

    def x(share: float) -> float:
        return _LEFT + share * (_WIDTH - _LEFT - _RIGHT)

    def y(loss: float) -> float:
        return _TOP + (1 - max(loss, 0.0) / most) * (_HEIGHT - _TOP - _BOTTOM)

    parts = []
    for i in range(6):
        loss, share = i * step, i / 5
        parts.append(
            f'<line class="grid" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y(loss):.1f}" '
            f'y2="{y(loss):.1f}"/><text x="{_LEFT - 8}" y="{y(loss) + 4:.1f}" '
            f'text-anchor="end">{loss:g} %</text><text x="{x(share):.1f}" '
            f'y="{_HEIGHT - _BOTTOM + 20}" text-anchor="middle">{100 * share:.0f} %</text>'
        )
    line = " ".join(f"{x(p.own_share):.1f},{y(p.quality_loss_percent):.1f}" for p in points)
    parts.append(f'<polyline class="curve" points="{line}"/>')
    for p in points:
        low, high = (p.quality_loss_percent + sign * 2 * p.quality_loss_se for sign in (-1, 1))
        at = x(p.own_share)
        parts.append(
            f'<line class="error" x1="{at:.1f}" x2="{at:.1f}" y1="{y(low):.1f}" '
            f'y2="{y(high):.1f}"/>'
            f'<circle class="dot" cx="{at:.1f}" cy="{y(p.quality_loss_percent):.1f}" r="4">'
            f"<title>level {p.level}: {p.quality_loss_percent:.2f} %</title></circle>"
        )
    middle = (_LEFT + _WIDTH - _RIGHT) / 2
    parts.append(
        f'<text x="{middle}" y="{_HEIGHT - 8}" text-anchor="middle">share of its experts\' '
        "parameters that a token selects</text>"
    )
    return (
        f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" '
        f'aria-label="Quality loss against own share">{"".join(parts)}</svg>'
    )


def _tick(top: float) -> float:
    """A round step of which five cover ``top``."""
    scale = 0.01
    while True:
        for factor in (1, 2, 5):
            if 5 * scale * factor >= top:
                return scale * factor
        scale *= 10


def _points_table(points: tuple[OperatingPoint, ...]) -> str:
    rows = "".join(
        f"<tr><td>{p.level}</td><td>{100 * p.own_share:.1f}</td><td>{100 * p.active_share:.1f}</td>"
        f"<td>{p.perplexity:.3f}</td>"
        f"<td>{p.quality_loss_percent:+.2f} ± {2 * p.quality_loss_se:.2f}</td>"
        f"<td>{p.kl:.4f}</td><td>{100 * p.top1_agreement:.1f}</td></tr>"
        for p in points
    )
    return (
        "<table><tr><th>level</th><th>own %</th><th>active %</th><th>perplexity</th>"
        f"<th>loss %</th><th>KL</th><th>top-1 %</th></tr>{rows}</table>"
    )


def _facts(m: Manifest) -> str:
    facts = [
        ("source", m.source.uri),
        ("revision", m.source.revision or "none recorded"),
        ("source files", f"{len(m.source.files)}, sha256 of each in prism.json"),
        (
            "experts",
            f"{m.num_experts} per layer, top-{m.experts_per_token}, {len(m.layers)} layers",
        ),
        ("calibration text", f"{m.calibration.name}, {m.calibration.tokens} tokens"),
        ("calibration digest", m.calibration.digest),
        ("calibrated levels", ", ".join(str(knot.level) for knot in m.knots)),
        ("seed", str(m.seed)),
        *sorted(m.methods.items()),
    ]
    rows = "".join(
        f'<tr><th>{escape(name.replace("_", " "))}</th><td class="value">{escape(value)}</td></tr>'
        for name, value in facts
    )
    return f'<table class="facts">{rows}</table>'
