"""The benchmark of one layer still runs what serves: an interface that moves must not leave it."""

import time

import pytest
import torch

from bench import level_speed


def test_one_small_layer_is_timed_at_the_levels_it_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(level_speed, "TOKENS", (1, 64))
    shape = level_speed.Shape("small", 32, 64, 4, 2, 1)
    with torch.inference_mode():
        rows = level_speed.measure(shape, torch.float32, 1, time.thread_time)
    assert [row.tokens for row in rows] == [1, 64]
    many = rows[-1]
    for level in level_speed.LEVELS:
        assert many.own_share[level] == pytest.approx(level / 100, abs=0.15)
        assert many.level_ms[level] > 0
