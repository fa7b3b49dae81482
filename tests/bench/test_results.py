"""One benchmark's findings as a table, as JSON and as an exit code, from figures given here."""

import json
import math
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from prism_refactor.evaluate import Sample

from bench import refactor
from bench.baselines import compared
from bench.baselines.compared import Entry, Row, Shares, Step, loss_percent, steps
from bench.baselines.cutting import Cutting
from bench.baselines.results import AUTO, Record


def row(method: str, share: float, loss: float, read: float | None = None) -> Row:
    return Row(method, share, share, share + 0.01, loss, 0.01, 0.0, 1.0, read)


def ours(method: str, factor: float) -> list[Row]:
    shares = [*(s / 100 for s in range(100, 24, -3)), 0.75, 0.5, 0.15, 0.1]
    return [row(method, share, factor * (1 - share) ** 2 / share) for share in shares]


RIVALS = [
    row("lower top-k", 0.75, 0.5),
    row("lower top-k", 0.5, 4.0),
    row("lower top-k", 0.25, 20.0),
    row("4 bits", 1.0, 2.0, read=0.27),
    row("random partition", 0.5, 0.001),  # a bound's partition is no rival
]
RECORD = Record(
    command="bench",
    texts={"model": "m"},
    tokens=1000,
    perplexity=12.5,
    sub_experts=[8, 16],
    rows=[
        *ours("ours, N = 8", 0.8),
        *(row(f"{AUTO} (16)", share, 0.05) for share in (0.75, 0.5, 0.25)),
        *RIVALS,
    ],
    scan=tuple(s / 100 for s in range(100, 24, -3)),
    steps=[Step(1.0, 0.97, 0.01, 0.01)],
    served=[],
    cut=Cutting(4, 0.95, 0.84, {256: 0.1, 1024: 1.0}, True),
    seconds={"measure": 3.0},
)


def test_marks_of_a_whole_run() -> None:
    found = RECORD.marks()
    judged = [mark for mark in found if mark.figure is not None]
    assert [str(mark) for mark in judged if not mark.holds] == []
    assert {mark.note for mark in found if mark.figure is None} == {
        "decode batches were not measured",
        "no level of ours was measured there",
    }
    assert not RECORD.holds  # what was not judged does not hold


def test_what_is_left_out_of_a_run_stays_among_its_marks() -> None:
    full = [mark.limit for mark in RECORD.marks()]
    alone = replace(RECORD, rows=ours("ours, N = 8", 0.8), steps=[])
    assert [mark.limit for mark in alone.marks()] == full
    missing = [mark.what for mark in alone.marks() if mark.figure is None]
    assert sum("best of lower top-k" in what for what in missing) == 3
    assert sum("ours, auto" in what for what in missing) == 4
    assert "not judged: ours, auto at 50 %" in alone.as_text()


def test_json_is_json_and_says_what_was_judged() -> None:
    found = json.loads(json.dumps(RECORD.as_json(), allow_nan=False))
    assert found["operating_points"] == {"ours": 26, "lower top-k": 4}
    judged = {mark["judged"] for mark in found["marks"]}
    assert judged == {True, False}
    assert all(not mark["holds"] for mark in found["marks"] if not mark["judged"])


def test_a_bound_that_nothing_reaches_is_judged_and_has_no_figure() -> None:
    from bench.baselines.marks import Mark
    from bench.baselines.results import _plain

    found = _plain(Mark("x", math.inf, 1.0))
    assert (found["figure"], found["judged"], found["holds"]) == (None, True, False)


def test_the_table_has_a_line_for_each_method_and_equal_bytes_side_by_side() -> None:
    lines = RECORD.as_text().splitlines()
    (top_k,) = [line for line in lines if line.startswith("lower top-k")]
    assert top_k.split()[2:5] == ["+0.50", "±", "0.01"]
    at_bytes = lines.index("at equal bytes, one token at a time")
    assert lines[at_bytes + 3].split() == ["4", "bits", "27.0", "+2.00", "±", "0.01"]
    assert lines[at_bytes + 4].startswith("  level 28, ours, N = 8")
    assert "of 26 levels: 26; lower top-k: 4" in RECORD.as_text()


def test_loss_is_the_ratio_of_perplexities() -> None:
    mean, se = loss_percent(torch.tensor([0.0, 0.02], dtype=torch.float64))
    assert mean == pytest.approx(100 * (math.exp(0.01) - 1))
    assert se == pytest.approx(100 * math.exp(0.01) * math.sqrt(0.0002) / math.sqrt(2))


def entry(level: int, losses: list[float]) -> Entry:
    count = len(losses)
    sample = Sample(torch.tensor(losses), torch.zeros(count), torch.ones(count), 0, 1)
    return Entry("ours", level / 100, lambda ids: ids, lambda: Shares(0.5, 0.6), found=[sample])


def test_steps_are_paired_token_by_token() -> None:
    """The lower level loses 1 % more on every token, however much tokens differ."""
    (step,) = steps([entry(75, [0.0, 5.0, -3.0]), entry(50, [0.01, 5.01, -2.99])])
    assert (step.high, step.low) == (0.75, 0.5)
    assert step.difference == pytest.approx(100 * math.expm1(0.01), rel=1e-3)
    assert step.se == pytest.approx(0, abs=1e-3)
    assert steps([entry(75, [0.0])]) == []


def test_a_row_joins_all_batches() -> None:
    found = entry(50, [0.0, 0.0])
    found.found.append(replace(found.found[0], loss=torch.tensor([0.04, 0.0])))
    made = compared._row(found)
    assert made.loss == pytest.approx(100 * math.expm1(0.01))
    assert (made.own_share, made.active_share, made.bytes_share) == (0.5, 0.6, None)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (["--families", "top-k,magic"], "--families: magic: of top-k"),
        (["--calibration", "x.txt"], "--calibration needs --validation"),
        (["--tokens", "1"], "--tokens: 1 is fewer than the 512 it takes"),
        (["--fit-tokens", "9"], "--fit-tokens: 9 is fewer than the 2048 it takes"),
    ],
)
def test_wrong_use_is_named(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    given: list[str],
    words: str,
) -> None:
    monkeypatch.setattr(sys, "argv", ["refactor", *given])
    with pytest.raises(SystemExit) as caught:
        refactor._arguments()
    assert caught.value.code == 2
    assert words in capsys.readouterr().err


@pytest.mark.parametrize("holds", [True, False])
def test_exit_code_says_whether_every_mark_holds(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, holds: bool
) -> None:
    out, plot = tmp_path / "new" / "refactor.json", tmp_path / "plot.png"
    record = RECORD
    monkeypatch.setattr(refactor, "_measured", lambda *_: record)
    monkeypatch.setattr(Record, "holds", property(lambda _: holds))
    monkeypatch.setattr(sys, "argv", ["refactor", "--out", str(out), "--plot", str(plot)])
    assert refactor.main() == (0 if holds else 1)
    assert json.loads(out.read_text())["tokens"] == 1000
    assert plot.read_bytes()[:4] == b"\x89PNG"
