"""Marks tell a run that shows elasticity from one that does not."""

from dataclasses import replace

from hack.demo import marks

from .synthetic import record


def test_each_mark_says_so_when_nothing_moved() -> None:
    made = record()
    off = marks.off(made)
    still = replace(made, runs=(replace(off, title="Elastic", mode="Auto"), off))
    texts = " / ".join(marks.missed(still))
    assert "the ceiling did not move" in texts
    assert len(marks.verdicts(still)) == len(marks.MARKS)


def test_a_floor_that_saves_nothing_is_a_missed_mark() -> None:
    made = record()
    full, floor = made.capacities
    slow = replace(floor, requests_per_s=full.requests_per_s)
    assert any(
        "1.00 times" in text for text in marks.missed(replace(made, capacities=(full, slow)))
    )
