"""python -m cluster.evaluate and python -m cluster.calibration: their files, and what they refuse."""

import json
import re

import pandas as pd
import pytest

from cluster import calibration
from cluster import evaluate as command
from cluster.candles.bars import frame_from_bars, read_bars
from cluster.evaluation import card_scores, report
from cluster.evaluation.comparison import evaluate
from model.calibration import load_calibration
from model.errors import InputError
from model.registry import CheckpointSource, load_checkpoint
from tests.random_walks import random_walks


def arguments(bundle, data, out, *more):
    given = ["--model", bundle, "--data", data, "--out", out, "--history", 40, "--horizon", 6, "--samples", 4]
    return [str(part) for part in [*given, "--device", "cpu", *more]]


def test_the_command_writes_a_report_that_needs_nothing_else(tmp_path, golden_bundle, capsys):
    for bars in random_walks(3, 120):
        frame_from_bars([bars]).to_csv(tmp_path / f"{bars.symbol}.csv", index=False)
    out = tmp_path / "report"
    more = ["--from", "2024-07-03", "--to", "2024-07-05T12:00", "--top-k", "1", "--cost-bps", "10"]
    assert command.main(arguments(golden_bundle, tmp_path / "S*.csv", out, *more)) == 0
    shown = capsys.readouterr()
    assert "verdict: " in shown.out
    assert "54/" not in shown.err
    report = json.loads((out / "report.json").read_text())
    assert report["period"]["from"] == "2024-07-03T00:00:00"
    assert report["data"]["symbols"] == ["S0", "S1", "S2"]
    assert report["backtest"]["rules"]["open_cost_bps"] == 10
    page = (out / "report.html").read_text()
    # A phone shows it at its own width: charts fit, tables scroll in themselves.
    assert '<meta name="viewport" content="width=device-width' in page
    colours = re.findall(r'fill="(#\w+)"/><text [^>]*>historical volatility<', page)
    assert len(colours) == 3
    assert len(set(colours)) == 1
    assert all(int(width) <= 358 for width in re.findall(r'<svg [^>]*width="(\d+)"', page))
    assert page.count("<svg") >= 5
    assert not re.search(r"https?://|src=|href=|@import|url\(", page)
    assert report["verdict_line"].split("|")[0].strip() in page
    rows = pd.read_csv(out / "forecasts.csv")
    assert len(rows) == 5 * report["data"]["forecasts"]
    mine = rows[rows["forecaster"] == "model"]
    assert mine["crps"].mean() == pytest.approx(report["metrics"]["model"]["crps"])
    signals = pd.read_csv(out / "signals.csv")
    assert list(signals.columns) == ["symbol", "timestamps", "signal"]
    assert len(signals) == report["data"]["forecasts"]
    assert (out / "backtest/equity.csv").is_file()


@pytest.mark.parametrize(
    ("frame", "more", "message"),
    [
        (lambda f: f.rename(columns={"timestamps": "when"}), [], "'timestamps' is missing.*--time-column"),
        (lambda f: f.drop(columns="close"), [], "'close' is missing"),
        (lambda f: f.rename(columns={"close": " Close"}), [], "'close' is missing.*; rename ' Close'"),
        (lambda f: f.assign(Close=f["close"]), [], "'close' is there twice .'close' and 'Close'.: keep one"),
        (lambda f: f, ["--from", "2031-01-01"], "no window in the period"),
        (lambda f: f, ["--from", "soon"], "--from 'soon' is not a date"),
        (lambda f: f, ["--from", "07/01/2024"], "--from '07/01/2024' is not a date"),
        (lambda f: f, ["--from", "2024-07-05", "--to", "2024-07-04"], "is empty"),
        (lambda f: f.head(30), [], "no window"),
        (lambda f: f, ["--top-k", "0"], "top-k must be at least 1"),
        (lambda f: f, ["--cost-bps", "10"], "options of the backtest are given without --top-k"),
        (lambda f: f, ["--season", "0"], "season must be at least 1"),
        (lambda f: f, ["--workers", "-1"], "--workers must be at least 0"),
        (lambda f: f, ["--threads", "0"], "--threads must be at least 1"),
        (lambda f: f, ["--top-p", "1.5"], "top_p=1.5 must lie between 0 and 1"),
        (lambda f: f, ["--parent-tokenizer", "x"], "without --parent"),
        (lambda f: f, ["--card", "x"], "leave --data out"),
    ],
)
def test_the_command_names_what_is_wrong(tmp_path, golden_bundle, capsys, frame, more, message):
    frame(frame_from_bars(random_walks(1, 120))).to_csv(tmp_path / "bars.csv", index=False)
    assert command.main(arguments(golden_bundle, tmp_path / "bars.csv", tmp_path / "out", *more)) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ")
    assert re.search(message, said)
    assert not (tmp_path / "out").exists()


def test_what_cannot_be_traded_or_written_is_said_before_the_forecasts(tmp_path, golden_bundle, capsys):
    """Which may take hours, and would be lost."""
    frame = frame_from_bars(random_walks(1, 120))
    frame.to_csv(tmp_path / "bars.csv", index=False)
    (tmp_path / "file").touch()
    assert command.main(arguments(golden_bundle, tmp_path / "bars.csv", tmp_path / "file/out")) == 2
    assert capsys.readouterr().err.startswith("error: --out")
    frame.loc[3, ["open", "low"]] = 0.0
    frame.to_csv(tmp_path / "bars.csv", index=False)
    assert command.main(arguments(golden_bundle, tmp_path / "bars.csv", tmp_path / "out", "--top-k", "1")) == 2
    assert capsys.readouterr().err.startswith(f"error: {tmp_path / 'bars.csv'}, symbol S0")  # no progress before it


def test_an_earlier_report_is_replaced_only_on_request_and_as_a_whole(tmp_path, golden_bundle, capsys, monkeypatch):
    frame_from_bars(random_walks(1, 120)).to_csv(tmp_path / "bars.csv", index=False)
    out = tmp_path / "out"
    given = arguments(golden_bundle, tmp_path / "bars.csv", out)
    out.mkdir()
    (out / "notes.txt").write_text("mine")
    assert command.main([*given, "--top-k", "1"]) == 0, "the folder holds no report"
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    capsys.readouterr()
    with monkeypatch.context() as patch:
        patch.setattr(command, "read_bars", None)  # it is said before the data is looked at
        assert command.main(given) == 2
    said = capsys.readouterr().err
    assert (
        said == f"error: --out {out} holds an earlier report (report.json): name another folder, or give --overwrite\n"
    )
    assert command.main([*given, "--overwrite", "--from", "2031-01-01"]) == 2
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before, "nothing came of it"
    assert command.main([*given, "--overwrite", "--seed", "1"]) == 0
    assert json.loads((out / "report.json").read_text())["setting"]["seed"] == 1
    assert {path.name for path in out.rglob("*")} == {*report.FILES, "notes.txt"}


def test_a_report_that_came_meanwhile_is_left_alone(tmp_path, golden_bundle, capsys, monkeypatch):
    frame_from_bars(random_walks(1, 120)).to_csv(tmp_path / "bars.csv", index=False)
    out = tmp_path / "out"

    def slowly(*given, **options):
        found = evaluate(*given, **options)
        (out / "report.json").parent.mkdir(exist_ok=True)
        (out / "report.json").write_text("somebody else's")
        return found

    monkeypatch.setattr(command, "evaluate", slowly)
    assert command.main(arguments(golden_bundle, tmp_path / "bars.csv", out)) == 0
    assert (out / "report.json").read_text() == "somebody else's"
    (own,) = out.glob("report-*")
    assert {path.name for path in own.iterdir()} == set(report.FILES)
    assert f"this one is in {own}" in capsys.readouterr().err


def test_a_bundle_is_calibrated_on_the_bars_that_are_named(tmp_path, golden, capsys):
    """fit → calibration.json in the bundle → an evaluation that reports both coverages."""
    for part in ("model", "tokenizer"):
        (tmp_path / "bundle" / part).parent.mkdir(exist_ok=True)
        (tmp_path / "bundle" / part).symlink_to(golden / part)
    frame_from_bars(random_walks(3, 190)).to_csv(tmp_path / "bars.csv", index=False)
    given = arguments(tmp_path / "bundle", tmp_path / "bars.csv", tmp_path / "out")
    fit = [part for part in given if part not in ("--out", str(tmp_path / "out"))]
    assert calibration.main(["fit", *fit, "--to", "2024-07-06", "--method", "conformal"]) == 0
    said = capsys.readouterr()
    assert "pooled: 39 forecasts, raw coverage 50%" in said.out
    sha256 = load_checkpoint(CheckpointSource("x", str(tmp_path / "bundle"))).sha256
    fitted = load_calibration(tmp_path / "bundle", sha256)
    assert {entry.name for entry in fitted.entries} == {"pooled", "bar_size"}  # too few for symbols of their own
    assert fitted.fitted_on["symbols"] == ["S0", "S1", "S2"]
    assert fitted.fitted_on["to"] < "2024-07-06"
    assert command.main([*given, "--from", "2024-07-06"]) == 0
    report = json.loads((tmp_path / "out/report.json").read_text())
    assert set(report["calibration"]) == {"raw_coverage", "calibrated_coverage"}
    assert "calibrated" in report["metrics"]
    assert calibration.main(["fit", *fit, "--from", "2024-07-08"]) == 2
    assert "are too few to calibrate on" in capsys.readouterr().err


def test_a_model_card_is_still_measured(tmp_path, golden_bundle, capsys):
    numbers = tmp_path / "numbers.json"
    small = ["--windows", "2", "--history", "40", "--horizon", "4", "--samples", "3", "--device", "cpu"]
    assert command.main(["--bundle", str(golden_bundle), "--scores", str(numbers), *small]) == 0
    found = json.loads(numbers.read_text())
    assert [one["name"] for one in found["sets"]] == ["simulated, held out"]
    assert found["sets"][0]["windows"] == 2


def test_a_model_card_that_cannot_be_written_is_refused_before_the_forecasts(
    tmp_path, golden_bundle, capsys, monkeypatch
):
    monkeypatch.setattr(card_scores, "score", None)
    for options, message in (
        (["--card", str(tmp_path)], "cannot be written"),
        (["--scores", str(tmp_path / "no" / "scores.json")], "cannot be written"),
        (["--card", str(tmp_path / "card.md")], "holds no training.json"),
        (["--candles", "gone.csv"], "gone.csv"),
    ):
        assert command.main(["--bundle", str(golden_bundle), *options]) == 2
        assert message in capsys.readouterr().err


def test_missing_files_are_named(tmp_path, capsys):
    assert command.main(["--data", str(tmp_path / "*.parquet"), "--out", str(tmp_path)]) == 2
    assert "matches no .csv or .parquet file" in capsys.readouterr().err
    assert command.main([]) == 2
    assert "--data is missing" in capsys.readouterr().err
    for name in ("a.csv", "b.csv"):
        frame_from_bars(random_walks(1, 9)).to_csv(tmp_path / name, index=False)
    with pytest.raises(InputError, match="in another file too"):
        read_bars([tmp_path])
