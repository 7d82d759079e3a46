"""Calibration: what is fitted covers what it says, what is loaded is checked, what is applied keeps order."""

import hashlib
import json

import numpy as np
import pytest

from cluster import calibration as fitting
from cluster.bundles.training_record import training_period
from cluster.candles.bars import SymbolBars
from cluster.evaluation.forecasting import ModelChoice
from cluster.evaluation.scores import covered
from cluster.evaluation.walk_forward import WalkForward
from model.calibration import CALIBRATION_FILE, load_calibration, parse_calibration, typical_move, usual_bar_seconds
from model.errors import CheckpointMismatchError, InputError
from model.registry import BUNDLED_FOLDER

SHA = "a" * 64


def too_narrow(n, samples=20, horizon=8, seed=0, width=0.4, bias=0.3):
    """Forecasts whose spread is 0.4 of the truth's, and whose centre is off: closes [n, S, H], actual [n, H]."""
    rng = np.random.default_rng(seed)
    steps = np.sqrt(np.arange(1, horizon + 1))
    actual = 100 + rng.normal(size=(n, horizon)) * steps
    closes = 100 + bias * steps + width * rng.normal(size=(n, samples, horizon)) * steps
    return closes, actual, np.ones(n)


def document(method="scale", **changes):
    closes, actual, units = too_narrow(60)
    entry = fitting._entry((None, None), closes, actual, units, method)
    return {
        "version": 1,
        "method": method,
        "model_sha256": SHA,
        "fitted_on": {
            "from": "2024-07-01",
            "to": "2024-08-01",
            "horizon": 8,
            "sampling": {"temperature": 1.0, "top_k": 0, "top_p": 1.0},
        },
        "entries": [entry, {**entry, "bar_seconds": 300}, {**entry, "symbol": "A", "bar_seconds": 300}],
    } | changes


@pytest.mark.parametrize("method", ["scale", "conformal"])
def test_calibrated_intervals_cover_new_forecasts(method):
    fitted = parse_calibration(document(method) | {"entries": [fitting._entry((None, None), *too_narrow(400), method)]})
    entry = fitted.entry(None, None)
    closes, actual, units = too_narrow(1500, seed=1, samples=50)
    moved = np.array([entry.closes(c, unit=u, first=0) for c, u in zip(closes, units, strict=True)])
    raw, found = (covered(np.moveaxis(values, 1, 0), actual, 0.8).mean() for values in (closes, moved))
    assert raw < 0.5
    assert found == pytest.approx(0.8, abs=0.03)
    assert entry.raw_coverage["0.8"] == pytest.approx(raw, abs=0.05)
    assert entry.calibrated_coverage["0.8"] == pytest.approx(0.8, abs=0.05)  # judged out of fold
    if method == "conformal":  # which also knows the centre, and the other levels
        assert abs(np.median(moved, axis=1).mean() - 100) < 0.1
        for level in (0.5, 0.9):
            assert covered(np.moveaxis(moved, 1, 0), actual, level).mean() == pytest.approx(level, abs=0.04)


@pytest.mark.parametrize("method", ["scale", "conformal"])
def test_paths_keep_their_order_and_candles_their_shape(method):
    entry = parse_calibration(document(method)).entry(None, None)
    rng = np.random.default_rng(2)
    values = 100 + rng.normal(size=(25, 12, 6)).cumsum(axis=1)
    values[:, :, 1] = values[:, :, :4].max(axis=2)
    moved = entry.candles(values, unit=1.3)
    assert (np.argsort(moved[:, :, 3], axis=0) == np.argsort(values[:, :, 3], axis=0)).all()
    np.testing.assert_array_equal(moved[:, :, 4:], values[:, :, 4:])
    np.testing.assert_allclose(moved[:, :, 1] - moved[:, :, 3], values[:, :, 1] - values[:, :, 3], atol=1e-12)
    # Bar by bar it is the same: a stream must show what the answer will.
    pieces = [entry.candles(values[:, i : i + 3], unit=1.3, first=i) for i in range(0, 12, 3)]
    np.testing.assert_array_equal(np.concatenate(pieces, axis=1), moved)


def test_entries_fall_back_and_say_so():
    fitted = parse_calibration(document())
    assert fitted.entry("A", 300).name == "symbol"
    assert fitted.entry("B", 300).name == "bar_size"
    assert fitted.entry("A", 60).name == "pooled"
    assert fitted.entry(None, None).name == "pooled"
    assert fitted.fits(1.0, 0, 1.0)
    assert not fitted.fits(0.6, 0, 1.0)
    assert not fitted.fits(1.0, 0, 0.9)
    assert not fitted.fits(1.0, 5, 1.0)


def broken(path, value):
    raw = json.loads(json.dumps(document("conformal")))
    place = raw
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    return raw


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("version",), 2),
        (("method",), "magic"),
        (("extra",), 1),
        (("entries",), []),
        (("entries", 0, "n"), 0),
        (("entries", 0, "bar_seconds"), 60),  # then there is no pooled entry
        (("entries", 1, "symbol"), "A"),  # then two are for the same
        (("entries", 0, "first_bars"), [1, 1, 2, 4]),
        (("entries", 0, "shifts"), [[0.0]]),
        (("entries", 0, "shifts", 0, 3), float("nan")),
        (("entries", 0, "levels", 0), 0.0),
        (("entries", 0, "raw_coverage", "0.8"), 1.2),
        (("fitted_on", "sampling"), {}),
    ],
)
def test_files_that_are_not_a_calibration_are_refused(tmp_path, path, value):
    (tmp_path / CALIBRATION_FILE).write_text(json.dumps(broken(path, value)))
    with pytest.raises(CheckpointMismatchError, match="fit it again"):
        load_calibration(tmp_path, SHA)


def test_loading(tmp_path):
    assert load_calibration(tmp_path, SHA) is None
    fitting.save(tmp_path / CALIBRATION_FILE, document())
    assert len(load_calibration(tmp_path, SHA).entries) == 3
    with pytest.raises(CheckpointMismatchError, match="other weights"):
        load_calibration(tmp_path, "b" * 64)
    (tmp_path / CALIBRATION_FILE).write_text("{")
    with pytest.raises(CheckpointMismatchError, match="not a calibration"):
        load_calibration(tmp_path, SHA)


def test_saving_keeps_the_manifest_true(tmp_path):
    manifest = tmp_path / "SHA256SUMS"
    manifest.write_text(f"{'0' * 64}  model/config.json\n{'1' * 64}  {CALIBRATION_FILE}\n")
    fitting.save(tmp_path / CALIBRATION_FILE, document())
    digest = hashlib.sha256((tmp_path / CALIBRATION_FILE).read_bytes()).hexdigest()
    assert manifest.read_text() == f"{'0' * 64}  model/config.json\n{digest}  {CALIBRATION_FILE}\n"
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_a_spread_of_nothing_cannot_be_scaled():
    closes, actual, units = too_narrow(30)
    with pytest.raises(InputError, match="no spread"):
        fitting._entry((None, None), np.full_like(closes, 100.0), actual, units, "scale")


def test_units():
    assert typical_move(np.array([1.0])) == 0
    assert typical_move(np.array([1.0, 4, 0])) == pytest.approx(np.sqrt((9 + 16) / 2))
    times = np.array(["2024-07-01T10:00", "2024-07-01T10:05", "2024-07-02T09:00", "2024-07-02T09:05"], "datetime64[ns]")
    assert usual_bar_seconds(times) == 300
    assert usual_bar_seconds(times[:1]) is None


# --- the period -------------------------------------------------------------------------------------------------------


@pytest.fixture
def trained(tmp_path):
    source = {"kind": "file", "path": "x.csv", "validation_from": "2024-07-01T00:00:00"}
    source["test_from"] = "2024-08-01T00:00:00"
    (tmp_path / "training.json").write_text(json.dumps({"config": {"data": {"source": source}}}))
    return tmp_path


def day(text):
    return np.datetime64(text, "ns")


def test_the_validation_period_is_the_default(trained):
    found = fitting.validation_setting(trained, WalkForward())
    assert (found.begins, found.ends) == (day("2024-07-01"), day("2024-08-01"))
    inside = WalkForward(begins=day("2024-07-05"), ends=day("2024-07-20"))
    assert fitting.validation_setting(trained, inside) == inside


def test_the_moments_of_a_bundle_stand_in_its_record_of_the_data(tmp_path):
    """export writes them there, where the splits were configured as shares of files that may be gone."""
    source = {"kind": "file", "path": "gone.csv", "validation_share": 0.15, "test_share": 0.15}
    record = {"config": {"data": {"source": source}}, "data": {"sha256": "0", "validation_from": "2024-07-01T00:00:00"}}
    record["data"]["test_from"] = "2024-07-20T00:00:00"
    (tmp_path / "training.json").write_text(json.dumps(record))
    assert training_period(tmp_path) == (day("2024-07-01"), day("2024-07-20"), None)
    (tmp_path / "training.json").write_text(json.dumps({"config": record["config"]}))
    assert training_period(tmp_path) == (None, None, None)
    (tmp_path / "training.json").write_text("[]")
    with pytest.raises(InputError, match=r"not a record of cluster\.train"):
        training_period(tmp_path)


@pytest.mark.parametrize(
    ("begins", "ends", "match"),
    [
        ("2024-06-30", "2024-07-20", "was trained on bars up to 2024-07-01"),
        ("2024-07-10", "2024-08-02", "inside the test period"),
    ],
)
def test_training_and_test_bars_are_refused(trained, begins, ends, match):
    with pytest.raises(InputError, match=match):
        fitting.validation_setting(trained, WalkForward(begins=day(begins), ends=day(ends)))


@pytest.mark.parametrize(
    ("given", "match", "code"),
    [
        ({"begins": "2024-08-01"}, "--from 2024-08-01.* in or after the test period.* give an earlier --from", "test"),
        ({"begins": "2024-08-10"}, "give an earlier --from, from 2024-07-01.* on and before 2024-08-01", "test"),
        ({"begins": "2024-08-10", "ends": "2024-08-20"}, "give an earlier --from", "test"),
        ({"ends": "2024-07-01"}, "--to 2024-07-01.* lies in the training period.* give a later --to", "trained"),
        ({"begins": "2024-06-01", "ends": "2024-06-20"}, "give a later --to", "trained"),
    ],
)
def test_the_end_that_was_given_is_blamed_for_an_empty_period(trained, given, match, code):
    """Not the other one, which comes from training.json."""
    with pytest.raises(InputError, match=match) as caught:
        fitting.validation_setting(trained, WalkForward(**{name: day(text) for name, text in given.items()}))
    assert caught.value.code.startswith(code)


def test_too_few_forecasts_are_refused():
    bars = SymbolBars(
        "A", np.arange(3).astype("datetime64[ns]"), np.ones((3, 6), np.float32), np.zeros((3, 5), np.int64)
    )
    with pytest.raises(InputError, match="0 forecasts are too few"):
        fitting.fit(ModelChoice("bundled"), [], WalkForward(), "scale")
    with pytest.raises(InputError, match="not known"):
        fitting.fit(ModelChoice("bundled"), [bars], WalkForward(), "magic")


@pytest.mark.parametrize("named", [[], ["--model", "bundled"], ["--model", str(BUNDLED_FOLDER)]])
def test_the_installed_package_gets_no_calibration(named, capsys):
    """Said before the data is looked at: fitting takes long."""
    assert fitting.main(["fit", "--data", "nowhere.csv", *named]) == 2
    assert "name a bundle with --model" in capsys.readouterr().err
    assert not (BUNDLED_FOLDER / CALIBRATION_FILE).exists()


def test_a_file_that_cannot_be_written_is_said_before_the_forecasts(tmp_path, capsys):
    for out in (tmp_path, tmp_path / "absent" / "calibration.json"):
        assert fitting.main(["fit", "--data", "nowhere.csv", "--out", str(out)]) == 2
        assert f"error: {out} cannot be written" in capsys.readouterr().err
    assert fitting.main(["fit", "--data", "nowhere.csv", "--out", str(tmp_path / "calibration.json")]) == 2
    assert "nowhere.csv" in capsys.readouterr().err
