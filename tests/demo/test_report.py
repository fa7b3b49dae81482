"""The report says what the record holds, and the page needs nothing but itself."""

import re
from dataclasses import replace
from pathlib import Path

import pytest

from hack.demo import record as records
from hack.demo import report

from .synthetic import BEFORE, STEP, record


def test_record_survives_a_round_trip(tmp_path: Path) -> None:
    before = record()
    before.save(tmp_path / "record.json")
    assert records.load(tmp_path / "record.json") == before


def test_page_stands_alone_and_escapes_what_it_is_given(tmp_path: Path) -> None:
    page = report.write(record(), tmp_path).read_text()
    assert not re.search(r'(src|href)="(?!data:)', page)
    assert "images &lt;fast&gt;" in page and "p95 &lt;900&gt; ms" in page
    png = (tmp_path / "report.png").read_bytes()
    assert png.startswith(b"\x89PNG") and len(png) > 20_000


def test_sentence_compares_the_runs() -> None:
    elastic, off = re.findall(r": ([\d.]+) % of the step", report.sentence(record()))
    assert float(elastic) > float(off)


def test_summary_has_a_line_for_each_part_of_each_run() -> None:
    lines = report.summary(record()).splitlines()
    assert len(lines) == 1 + 2 * 3
    assert lines[1].startswith("Elastic") and "before the step" in lines[1]


def test_ceiling_times_come_from_the_samples() -> None:
    elastic, off = record().runs
    assert elastic.lowered_after_s == pytest.approx(8)
    assert elastic.restored_after_s == pytest.approx(39)
    assert elastic.lowest_ceiling == 25
    assert off.lowered_after_s is None
    assert off.restored_after_s == 0


def test_a_ceiling_that_stays_down_is_not_restored() -> None:
    elastic = record().runs[0]
    down = replace(elastic, samples=tuple(s for s in elastic.samples if s.at < BEFORE + STEP + 10))
    assert down.restored_after_s is None


def test_new_pods_are_counted_by_uid() -> None:
    run = record().runs[0]
    assert run.new_pods == 0
    more = replace(run.samples[-1], pods=("a", "b"))
    assert replace(run, samples=(*run.samples, more)).new_pods == 1


def test_quality_loss_is_linear_between_measured_levels() -> None:
    quality = {50: 1.0, 25: 5.0}
    assert records.quality_loss(quality, [100, 100]) == 0
    assert records.quality_loss(quality, [75]) == pytest.approx(0.5)
    assert records.quality_loss(quality, [25, 50]) == pytest.approx(3.0)
    assert records.quality_loss(quality, [10]) == pytest.approx(5.0), "nothing below is measured"
    assert records.quality_loss(quality, []) is None
