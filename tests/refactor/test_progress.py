"""Progress: shares, ETA from this run's speed, and what each view shows."""

import logging

import pytest
from prism_refactor.progress import Progress, Stage, Standing, log_view, terminal_view

STAGES = [Stage("a", 2, 3.0), Stage("b", 4, 1.0)]


def test_share_is_weighted_and_eta_follows_the_clock() -> None:
    now = 100.0
    seen: list[Standing] = []
    progress = Progress(STAGES, [seen.append], clock=lambda: now)
    now = 106.0
    progress.advance("a")
    assert seen[-1].share == pytest.approx(0.3)
    assert seen[-1].remaining_s == pytest.approx(14.0)


def test_found_work_does_not_flatter_the_eta() -> None:
    now = 0.0
    seen: list[Standing] = []
    progress = Progress(STAGES, [seen.append], clock=lambda: now)
    progress.advance("a", found=True)
    assert seen[-1].remaining_s is None
    progress.advance("a", found=True)
    now = 5.0
    progress.advance("b")
    assert seen[-1].share == pytest.approx(0.7)
    assert seen[-1].remaining_s == pytest.approx(15.0)


def test_one_log_line_per_step(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        log_view(Standing("partition", 3, 6, 0.5, 41.6))
        log_view(Standing("partition", 4, 6, 0.6, None))
    assert caplog.messages == ["partition 3/6 total=50% left=42s", "partition 4/6 total=60%"]


def test_terminal_shows_a_bar(capsys: pytest.CaptureFixture[str]) -> None:
    with terminal_view() as show:
        show(Standing("partition", 3, 6, 0.5, 101.0))
    shown = capsys.readouterr().err
    assert "partition 3/6" in shown
    assert "50 %" in shown
