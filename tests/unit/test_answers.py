"""The numbers that an answer states, against their definitions."""

import json
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from serve_app.answers import repair_candles, summary
from serve_app.forecasting import encode


def test_summary_by_hand():
    closes = np.array([[110.0, 99.0], [100.0, 100.0], [90.0, 120.0]])
    said = summary(closes, np.array([50.0, 100.0, 100.0]))
    assert said["last_close"] == 100.0
    assert said["expected_return"] == pytest.approx((-0.01 + 0.0 + 0.2) / 3)
    assert said["upside_probability"] == pytest.approx(1 / 3)
    deviations = [np.std(np.diff(np.log([100.0, *path]))) for path in closes]
    assert said["volatility"] == pytest.approx(np.mean(deviations))
    # The history's last two log returns are ln 2 and 0, whose std is ln 2 / 2.
    assert max(deviations) < math.log(2) / 2
    assert said["volatility_amplification_probability"] == 0.0
    assert said["expected_max_drawdown"] == pytest.approx((0.1 + 0.0 + 0.1) / 3)


def test_summary_of_a_constant_history():
    flat = summary(np.full((4, 3), 5.0), np.full(10, 5.0))
    assert flat == {
        "last_close": 5.0,
        "expected_return": 0.0,
        "upside_probability": 0.0,
        "volatility": 0.0,
        "volatility_amplification_probability": 0.0,
        "expected_max_drawdown": 0.0,
    }


def test_the_history_is_taken_over_an_equal_span():
    # Wild long ago, flat lately: over two bars any movement is an amplification.
    history = np.array([1.0, 50.0, 1.0, 50.0, 50.0, 50.0])
    assert summary(np.array([[50.0, 50.5]]), history)["volatility_amplification_probability"] == 1.0
    assert summary(np.array([[50.0, 50.5, 50.0, 50.5, 50.0]]), history)["volatility_amplification_probability"] == 0.0


def test_paths_that_leave_the_positive_prices():
    said = summary(np.array([[1.0, -1.0], [1.0, 1.1]]), np.array([1.0, 1.01, 1.0]))
    assert said["volatility"] == pytest.approx(np.std(np.diff(np.log([1.0, 1.0, 1.1]))))
    assert said["volatility_amplification_probability"] == 1.0
    said = summary(np.array([[-1.0]]), np.array([1.0, 1.0]))
    assert said["volatility"] is None
    assert said["expected_max_drawdown"] == 2.0


def test_one_bar_of_history_has_no_volatility_to_compare_with():
    said = summary(np.array([[1.0, 2.0]]), np.array([1.0]))
    assert said["volatility_amplification_probability"] is None


@given(arrays(np.float64, (2, 3, 6), elements=st.floats(-1e6, 1e6)))
def test_repaired_candles_are_valid(values):
    fixed, touched = repair_candles(values)
    opens, highs, lows, closes, volumes, amounts = np.moveaxis(fixed, 2, 0)
    assert (highs >= np.maximum(opens, closes)).all()
    assert (lows <= np.minimum(opens, closes)).all()
    assert (volumes >= 0).all()
    assert (amounts >= 0).all()
    assert (fixed[:, :, [0, 3]] == values[:, :, [0, 3]]).all()
    assert touched == np.any(fixed != values, axis=2).sum()
    assert repair_candles(fixed)[1] == 0


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
        lambda inner: st.lists(inner) | st.dictionaries(st.text() | st.just("NaN"), inner),
        max_leaves=20,
    )
)
def test_what_is_written_reads_back_to_the_last_bit(answer):
    assert json.loads(encode(answer)) == answer


def test_an_answer_is_one_line_to_every_reader():
    """httpx, for one, ends a line of a stream at each of these."""
    written = encode({"id": "a\u2028b\u2029c\x85d\n"})
    assert len(written.decode().splitlines()) == 1
    assert json.loads(written) == {"id": "a\u2028b\u2029c\x85d\n"}


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_json_cannot_say_is_never_sent(bad):
    with pytest.raises(ValueError, match="not JSON compliant"):
        encode({"NaN": [1.0, bad]})
