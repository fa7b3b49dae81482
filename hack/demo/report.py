"""The report page: one HTML file that needs nothing else, and the same picture as a PNG.

It says first what happened in one sentence, then shows it, then the figures it rests on. Every
figure is computed here from the record; nothing is typed in.
"""

import base64
import math
from collections.abc import Sequence
from html import escape
from pathlib import Path

from hack.demo.figure import draw
from hack.demo.record import Record, Run, quality_loss
from hack.demo.stats import Window

NOTHING = "-"
PARTS = (("before", "before the step"), ("step", "the step"), ("after", "after it"))

STYLE = """
:root { color-scheme: light; }
body { font: 16px/1.55 system-ui, sans-serif; color: #1f2933; background: #f8fafc; margin: 0; }
main { max-width: 1180px; margin: 0 auto; padding: 2.5rem 1.5rem 4rem; }
h1 { font-size: 1.7rem; margin: 0 0 .3rem; } h2 { font-size: 1.15rem; margin: 2.2rem 0 .6rem; }
p.sub { color: #52606d; margin: 0 0 1.4rem; }
.facts { display: flex; flex-wrap: wrap; gap: .8rem; margin: 1.2rem 0; }
.facts div { background: #fff; border: 1px solid #e4e7eb; border-radius: 10px;
  padding: .8rem 1.1rem; flex: 1 1 9rem; }
.facts b { display: block; font-size: 1.45rem; } .facts span { color: #52606d; font-size: .85rem; }
img { width: 100%; background: #fff; border: 1px solid #e4e7eb; border-radius: 10px; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; background: #fff; font-size: .9rem;
  font-variant-numeric: tabular-nums; }
th, td { padding: .45rem .7rem; border-bottom: 1px solid #e4e7eb; text-align: right; }
th { color: #52606d; font-weight: 600; } th:first-child, td:first-child,
td.l, th.l { text-align: left; } tr.first td { border-top: 2px solid #9aa5b1; }
.good { color: #047857; font-weight: 600; } .bad { color: #b91c1c; font-weight: 600; }
footer { color: #7b8794; font-size: .85rem; margin-top: 2.5rem; }
"""


def write(record: Record, folder: Path) -> Path:
    """Writes report.html, report.png and record.json; returns the page's path."""
    folder.mkdir(parents=True, exist_ok=True)
    picture = draw(record)
    (folder / "report.png").write_bytes(picture)
    record.save(folder / "record.json")
    page = folder / "report.html"
    page.write_text(html(record, picture), encoding="utf-8")
    return page


def html(record: Record, picture: bytes) -> str:
    image = base64.b64encode(picture).decode()
    return f"""<!doctype html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>Prism: a load step, elastic and not</title><style>{STYLE}</style>
<main>
<h1>A load step, elastic and not</h1>
<p class="sub">{escape(sentence(record))}</p>
<div class="facts">{_facts(record)}</div>
<img alt="Load, latency, level and pods over time for both runs"
 src="data:image/png;base64,{image}">
<h2>The same load, part by part</h2>
<div class="wide"><table>{_parts(record)}</table></div>
<h2>What a level costs and gives</h2>
<div class="wide"><table>{_levels(record)}</table></div>
<h2>What the operator decided</h2>
<div class="wide"><table>{_decisions(record)}</table></div>
<h2>Steps of the demo</h2>
<div class="wide"><table>{_steps(record)}</table></div>
<footer>{escape(record.date)} · {escape(record.machine)} · cluster: {escape(record.cluster)} ·
made by <code>make demo</code>; the raw record lies beside this page.</footer>
</main></html>
"""


def sentence(record: Record) -> str:
    """What happened, in one sentence."""
    first = record.runs[0]
    text = (
        f"Load went from {first.low_rate:.1f} to {first.high_rate:.1f} requests per second for "
        f"{first.step_end - first.step_begin:.0f} s; the target is a first token within "
        f"{record.targets.ttft_ms} ms for {record.targets.percentile} % of the requests."
    )
    for run in record.runs:
        share = run.part("step", record.targets).ttft_attainment
        text += f" {run.title}: {_percent(share)} of the step's requests were in time."
    return text


def summary(record: Record) -> str:
    """The table of parts as text, for the terminal."""
    rows: list[tuple[str, ...]] = [
        ("", "", "req/s", "TTFT p95", "in time", "ITL p95", "level", "loss", "failed")
    ]
    for run in record.runs:
        for part, title in PARTS:
            figures = run.part(part, record.targets)
            rows.append(
                (run.title if part == "before" else "", title, *_cells(record, run, figures))
            )
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if i < 2 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    )


def _facts(record: Record) -> str:
    elastic = next((run for run in record.runs if run.mode == "Auto"), record.runs[0])
    facts = [
        (_seconds(elastic.lowered_after_s), "from the step to a lower ceiling"),
        (f"{elastic.lowest_ceiling} %", f"lowest ceiling (floor {record.targets.floor} %)"),
        (_seconds(elastic.restored_after_s), "from the step's end to full quality"),
        (str(elastic.new_pods), "new pods"),
    ]
    facts += [(f"{value:.1f} s", name) for name, value in record.figures.items()]
    return "".join(f"<div><b>{escape(v)}</b><span>{escape(n)}</span></div>" for v, n in facts)


def _parts(record: Record) -> str:
    head = ("run", "part", "offered req/s", "TTFT p95", "in time", "ITL p95", "mean level",
            "quality loss", "failed")  # fmt: skip
    rows = []
    goal = record.targets.percentile / 100
    for run in record.runs:
        for part, title in PARTS:
            figures = run.part(part, record.targets)
            cells = [escape(c) for c in _cells(record, run, figures)]
            share = figures.ttft_attainment
            if share is not None:
                cells[2] = f'<span class="{"good" if share >= goal else "bad"}">{cells[2]}</span>'
            first = part == "before"
            row, name = (' class="first"', escape(run.title)) if first else ("", "")
            rest = "".join(f"<td>{c}</td>" for c in cells)
            rows.append(f'<tr{row}><td>{name}</td><td class="l">{title}</td>{rest}</tr>')
    return _head(head, left=2) + "".join(rows)


def _cells(record: Record, run: Run, figures: Window) -> tuple[str, ...]:
    levels = [
        s.level for s in run.sent if figures.begin <= s.due < figures.end and s.level is not None
    ]
    loss = quality_loss(record.quality, levels)
    return (
        f"{figures.rate:.1f}",
        _milliseconds(figures.ttft_p95),
        _percent(figures.ttft_attainment),
        _milliseconds(figures.itl_p95),
        NOTHING if figures.level is None else f"{figures.level:.0f} %",
        NOTHING if loss is None else f"{loss:.2f} %",
        str(figures.failed),
    )


def _levels(record: Record) -> str:
    speed = {c.level: c for c in record.capacities}
    full = speed.get(100)
    rows = []
    for level in sorted({*record.quality, *speed, 100}, reverse=True):
        loss = 0.0 if level == 100 else record.quality.get(level)
        capacity = speed.get(level)
        gain = capacity.requests_per_s / full.requests_per_s if capacity and full else None
        cells = (
            NOTHING if loss is None else f"{loss:.2f} %",
            NOTHING if capacity is None else f"{capacity.requests_per_s:.1f}",
            NOTHING if gain is None else f"x {gain:.2f}",
        )
        rows.append(f"<tr><td>{level} %</td>" + "".join(f"<td>{c}</td>" for c in cells) + "</tr>")
    head = ("level", "quality loss (perplexity)", "capacity, req/s", "against level 100")
    return _head(head) + "".join(rows)


def _decisions(record: Record) -> str:
    keys = ("time", "kind", "from", "to", "reason", "observed")
    rows = "".join(
        "<tr>" + "".join(f'<td class="l">{escape(str(d.get(k, "")))}</td>' for k in keys) + "</tr>"
        for d in record.decisions
    )
    return _head(keys, left=len(keys)) + rows


def _steps(record: Record) -> str:
    rows = "".join(
        f"<tr><td>{escape(title)}</td><td>{seconds:.1f} s</td></tr>"
        for title, seconds in record.steps.items()
    )
    return _head(("step", "took")) + rows


def _head(names: Sequence[str], left: int = 1) -> str:
    cells = (f"<th{' class=l' if i < left else ''}>{n}</th>" for i, n in enumerate(names))
    return "<tr>" + "".join(cells) + "</tr>"


def _percent(share: float | None) -> str:
    return NOTHING if share is None else f"{100 * share:.1f} %"


def _seconds(value: float | None) -> str:
    return "not seen" if value is None else f"{value:.0f} s"


def _milliseconds(value: float | None) -> str:
    if value is None:
        return NOTHING
    return "none" if math.isinf(value) else f"{value:.0f} ms"
