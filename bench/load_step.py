"""Keep what a load step showed: the figures of a demo's record, small enough for the repository.

    make demo && python bench/load_step.py out/demo/record.json

Writes bench/results/load_step.json (windows before, in and after the step, elastic and Off; the
marks; the operator's decisions) and docs/load-step.png. Measures nothing itself. `make test` leaves
a record of the same path in out/cluster-test.
"""

import json
import math
import platform
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from hack.demo import marks  # noqa: E402
from hack.demo.figure import draw  # noqa: E402
from hack.demo.record import Record, load, quality_loss  # noqa: E402

PARTS = ("before", "step", "after")


def figures(record: Record) -> dict[str, Any]:
    """Everything but the single requests and samples."""
    runs: dict[str, dict[str, Any]] = {}
    for run in record.runs:
        parts = {}
        for name in PARTS:
            window = run.part(name, record.targets)
            inside = [s.level for s in run.sent if window.begin <= s.due < window.end and s.level]
            parts[name] = asdict(window) | {"loss_percent": quality_loss(record.quality, inside)}
        runs[run.mode] = parts
    return {
        "command": "make demo && python bench/load_step.py out/demo/record.json",
        "date": record.date,
        "machine": record.machine,
        "cluster": record.cluster,
        "versions": {"python": platform.python_version()},
        "targets": asdict(record.targets),
        "capacities": [asdict(c) for c in record.capacities],
        "runs": runs,
        "marks": marks.verdicts(record),
        "figures": record.figures,
        "seconds": record.steps,
        "decisions": record.decisions,
    }


def finite(value: Any) -> Any:
    """JSON has no infinity: a percentile among requests without an answer becomes null."""
    if isinstance(value, float):
        return round(value, 4) if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    return [finite(item) for item in value] if isinstance(value, list | tuple) else value


def main() -> int:
    record = load(Path(sys.argv[1] if len(sys.argv) > 1 else ROOT / "out/demo/record.json"))
    target = ROOT / "bench/results/load_step.json"
    target.write_text(json.dumps(finite(figures(record)), indent=1) + "\n")
    (ROOT / "docs/load-step.png").write_bytes(draw(record))
    print("\n".join(marks.verdicts(record)))
    return 1 if marks.missed(record) else 0


if __name__ == "__main__":
    sys.exit(main())
