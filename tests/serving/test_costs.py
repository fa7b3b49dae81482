"""The cost model predicts what it was told and follows what it sees."""

import pytest
from prism_serving.engine.costs import CostModel, Curve, StepShape, flat_model, pairs_of


def model() -> CostModel:
    return CostModel(
        {
            100: Curve((1, 100, 500), (0.010, 0.050, 0.200)),
            50: Curve((1, 100, 500), (0.010, 0.040, 0.120)),
        },
        per_sequence_s=0.001,
        per_pair_s=1e-7,
        per_key_s=1e-6,
    )


def test_curve_goes_through_its_points_and_extends_the_last_piece():
    curve = Curve((1, 100, 500), (0.010, 0.050, 0.200))
    assert [curve.at(n) for n in (1, 100, 500)] == pytest.approx([0.010, 0.050, 0.200])
    assert curve.at(300) == pytest.approx(0.125)
    assert curve.at(900) == pytest.approx(0.350)


@pytest.mark.parametrize("rows, seconds", [((), ()), ((1,), (1.0, 2.0)), ((2, 1), (1.0, 2.0))])
def test_a_curve_that_makes_no_sense_is_refused(rows, seconds):
    with pytest.raises(ValueError):
        Curve(rows, seconds)


def test_mixed_levels_cost_their_shares():
    m = model()
    assert m.step_s(StepShape({100: 50, 50: 50})) == pytest.approx((0.050 + 0.040) / 2)


def test_levels_between_measured_ones_are_interpolated():
    assert model().rows_s(75, 500) == pytest.approx(0.160)
    assert model().rows_s(10, 500) == pytest.approx(0.120)  # nothing is known below: the lowest


def test_attention_and_sequences_add_to_the_rows():
    shape = StepShape({100: 100}, sequences=3, pairs=10_000, keys=1000)
    assert model().step_s(shape) == pytest.approx(0.050 + 0.003 + 0.001 + 0.001)


def test_pairs_of_a_chunk_after_cached_keys():
    assert pairs_of(3, 0) == 6
    assert pairs_of(3, 10) == 36


def test_an_empty_step_costs_nothing_and_teaches_nothing():
    m = model()
    assert m.step_s(StepShape({})) == 0
    m.observe(StepShape({}), 1.0)
    assert m.pace == 1


def test_a_machine_that_slows_down_is_followed_at_every_level():
    m = model()
    before = m.rows_s(50, 500)
    for _ in range(200):
        m.observe(StepShape({100: 500}), 0.400)
    assert m.rows_s(100, 500) == pytest.approx(0.400, rel=0.1)
    assert m.rows_s(50, 500) == pytest.approx(2 * before, rel=0.35)
    assert m.is_useful(50, 500)
    assert m.error_ratio < 0.1


def test_one_wild_step_moves_the_prediction_little():
    m = model()
    m.observe(StepShape({100: 500}), 10.0)
    assert m.rows_s(100, 500) < 0.200 * 1.3


def test_a_level_that_saves_nothing_is_not_useful():
    m = CostModel({100: Curve((1, 500), (0.01, 0.2)), 50: Curve((1, 500), (0.01, 0.199))})
    assert not m.is_useful(50, 500)
    assert m.is_useful(100, 500)


def test_level_100_must_be_there():
    with pytest.raises(ValueError, match="100"):
        CostModel({50: Curve((1,), (0.1,))})


def test_profile_numbers_are_positive_and_fall_with_the_level():
    m = flat_model(1e-4, 0.005, (75, 50, 25))
    per_token = [m.prefill_s(level, 512) for level in (100, 75, 50, 25)]
    assert per_token == sorted(per_token, reverse=True)
    assert m.overhead_s() == pytest.approx(0.005)
    assert m.decode_s_per_token(25, 8, 100) > 0
