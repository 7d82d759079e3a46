"""V16: the ledger against sums made by hand, and what must hold for any signal."""

import json
from itertools import pairwise

import numpy as np
import pandas as pd
import pytest

from cluster import backtest
from cluster.evaluation.backtesting import run
from cluster.evaluation.ledger import Prices, Rules, SymbolPrices, run_ledger
from cluster.evaluation.trading_data import read_prices, read_signals
from model.errors import InputError

DAYS = pd.date_range("2024-07-01", periods=5, freq="D")


def prices_of(table, days=DAYS):
    """symbol → [(open, close) or None per day]."""
    series = []
    for symbol, rows in table.items():
        known = [i for i, row in enumerate(rows) if row is not None]
        opens, closes = np.array([rows[i] for i in known], dtype=float).T
        series.append(SymbolPrices(symbol, days[known].to_numpy().astype("datetime64[ns]"), opens, closes))
    return series


def signals_of(table):
    """day number → {symbol: signal}."""
    rows = [(s, DAYS[day], value) for day, signals in table.items() for s, value in signals.items()]
    return pd.DataFrame(rows, columns=["symbol", "timestamps", "signal"])


FIVE_DAYS = {
    "A": [(10, 10), (10, 11), (11, 12), (12, 12), (13, 14)],
    "B": [(20, 20), (21, 20), (19, 20), (20, 22), (22, 22)],
    "C": [(5, 5), (5, 5), (5, 6), (6, 6), (6, 3)],
}


@pytest.mark.verify("V16")
def test_long_only_ledger_by_hand(figure):
    """Day 0 says A: bought at day 1's open. Day 2 says B: swapped at day 3's open. 100 bps to open, 50 to close."""
    signals = signals_of({0: {"A": 3, "B": 2, "C": 1}, 2: {"A": 1, "B": 2, "C": 0}})
    rules = Rules(top_k=1, drop_n=1, open_cost_bps=100, close_cost_bps=50)
    found = run(prices_of(FIVE_DAYS), signals, rules)
    a = 1 / 1.01 / 10  # shares of A: capital 1 pays for them and for their cost
    cash = a * 12 * (1 - 0.005)
    b = cash / 1.01 / 20
    expected = [a * 11, a * 12, b * 22, b * 22]
    value = found.equity["value"].to_numpy()
    error = np.abs(value - expected).max()
    figure(f"long-only ledger: largest difference from the hand's {error:.1e}", "≤ 1e-9")
    assert error <= 1e-9
    costs = [a * 10 * 0.01, 0, a * 12 * 0.005 + b * 20 * 0.01, 0]
    np.testing.assert_allclose(found.equity["cost"], costs, atol=1e-12)
    np.testing.assert_allclose(found.equity["turnover"], [a * 10, 0, (a * 12 + b * 20) / (a * 12), 0], atol=1e-12)
    # The universe: mean of the three, open to close on the first bar, then close to close.
    universe = [(0.1 + 20 / 21 - 1 + 0) / 3, (1 / 11 + 0 + 0.2) / 3, (0 + 0.1 + 0) / 3, (2 / 12 + 0 - 0.5) / 3]
    np.testing.assert_allclose(found.equity["benchmark_return"], universe, atol=1e-12)
    assert found.summary["total_return"] == pytest.approx(b * 22 - 1, abs=1e-12)
    assert found.summary["max_drawdown"] == pytest.approx(1 - min(b * 22 / (a * 12), 1), abs=1e-12)
    returns = value / np.array([1, *value[:-1]]) - 1
    excess = returns - universe
    per_year = found.summary["bars_per_year"]
    assert per_year == pytest.approx(365.25, rel=0.01)
    assert found.summary["annualised_excess_return"] == pytest.approx(excess.mean() * per_year, rel=1e-12)
    ratio = excess.mean() / excess.std(ddof=1) * np.sqrt(per_year)
    assert found.summary["information_ratio"] == pytest.approx(ratio, rel=1e-12)
    assert found.trades["side"].tolist() == ["buy", "sell", "buy"]
    assert found.trades["timestamps"].tolist() == [DAYS[1], DAYS[3], DAYS[3]]


@pytest.mark.verify("V16")
def test_long_short_ledger_by_hand(figure):
    """Long A and short C, each with the account's value; covered and turned round on day 3."""
    signals = signals_of({0: {"A": 3, "B": 2, "C": 1}, 2: {"A": 1, "B": 2, "C": 3}})
    rules = Rules(top_k=1, drop_n=1, long_short=True, open_cost_bps=10, close_cost_bps=20)
    found = run(prices_of(FIVE_DAYS), signals, rules)
    a, c = 1 / 10, -1 / 5
    cash = 1 - 2 * 0.001
    first = [cash - 1 + 1 + a * 11 + c * 5, cash - 1 + 1 + a * 12 + c * 6]
    opening = cash + a * 12 + c * 6
    cash = cash + a * 12 * (1 - 0.002) + c * 6 - 6 * 0.2 * 0.002
    long_c, short_a = opening / 6, -opening / 12
    cash -= 2 * opening * 0.001
    then = [cash + long_c * 6 + short_a * 12, cash + long_c * 3 + short_a * 14]
    error = np.abs(found.equity["value"].to_numpy() - [*first, *then]).max()
    figure(f"long-short ledger: largest difference from the hand's {error:.1e}", "≤ 1e-9")
    assert error <= 1e-9
    assert found.trades["side"].tolist() == ["buy", "short", "sell", "cover", "buy", "short"]


def walk(seed, symbols=8, bars=60):
    rng = np.random.default_rng(seed)
    days = pd.date_range("2024-07-01", periods=bars, freq="D")
    table = {}
    for i in range(symbols):
        close = 50 * np.exp(np.cumsum(rng.normal(size=bars) * 0.02))
        opens = close * np.exp(rng.normal(size=bars) * 0.005)
        table[f"S{i}"] = list(zip(opens, close, strict=True))
    signals = pd.DataFrame(
        [(f"S{i}", day, rng.normal()) for day in days[:-1:3] for i in range(symbols)],
        columns=["symbol", "timestamps", "signal"],
    )
    return prices_of(table, days), signals


@pytest.mark.verify("V16")
@pytest.mark.parametrize("long_short", [False, True])
def test_prices_that_stand_still_earn_minus_turnover_times_cost(figure, long_short):
    _, signals = walk(0)
    days = pd.date_range("2024-07-01", periods=60, freq="D")
    still = prices_of({f"S{i}": [(50.0, 50.0)] * 60 for i in range(8)}, days)
    found = run(still, signals, Rules(top_k=3, drop_n=2, long_short=long_short, open_cost_bps=7, close_cost_bps=7))
    expected = -found.equity["turnover"] * 7e-4
    error = np.abs(found.equity["return"] - expected).max()
    assert found.summary["rebalances"] >= 15
    figure(f"zero signal, {'long-short' if long_short else 'long only'}: return + turnover·cost {error:.1e}", "≤ 1e-9")
    assert error <= 1e-9


@pytest.mark.verify("V16")
@pytest.mark.parametrize("long_short", [False, True])
def test_a_higher_cost_never_pays(figure, long_short):
    prices, signals = walk(1)
    ends = []
    for bps in (0, 1, 5, 20, 100):
        rules = Rules(top_k=3, drop_n=3, long_short=long_short, open_cost_bps=bps, close_cost_bps=bps)
        ends.append(run(prices, signals, rules).equity["value"].to_numpy())
    steps = [(after - before).max() for before, after in pairwise(ends)]
    figure(f"value at five rising costs: largest step {max(steps):+.1e}", "< 0")
    assert max(steps) < 0


@pytest.mark.verify("V16")
@pytest.mark.parametrize("long_short", [False, True])
def test_the_future_never_changes_past_profit(figure, long_short):
    rules = Rules(top_k=2, drop_n=1, long_short=long_short, open_cost_bps=5, close_cost_bps=5)
    columns = ["value", "cost", "turnover", "benchmark_return"]
    bars, changed_later, largest = 0, 0, 0.0
    for seed, cut in enumerate(range(5, 56, 5)):
        prices, signals = walk(seed)
        moment = prices[0].times[cut]
        before = run(prices, signals, rules).equity
        after = run(*with_another_future(prices, signals, moment, seed), rules).equity
        past = before["timestamps"] < moment
        change = (before.loc[past, columns] - after.loc[past, columns]).abs().to_numpy().max(initial=0.0)
        largest = max(largest, change)
        bars += int(past.sum())
        changed_later += not before.loc[~past, columns].equals(after.loc[~past, columns])
    figure(f"{bars} bars before a permuted future: largest change {largest}", "must be 0")
    assert largest == 0
    assert changed_later == 11


def with_another_future(prices, signals, moment, seed):
    """Prices and signals whose bars from the moment on are shuffled."""
    rng = np.random.default_rng(seed)
    changed = []
    for own in prices:
        order = np.arange(len(own.times))
        cut = np.searchsorted(own.times, moment)
        order[cut:] = rng.permutation(order[cut:])
        changed.append(SymbolPrices(own.symbol, own.times, own.opens[order], own.closes[order]))
    other = signals.copy()
    late = other["timestamps"] >= moment
    other.loc[late, "signal"] = rng.permutation(other.loc[late, "signal"].to_numpy())
    return changed, other


def test_dropping_is_bounded_and_only_for_something_better():
    prices, signals = walk(2)
    trades = run(prices, signals, Rules(top_k=4, drop_n=1)).trades
    sold = trades[trades["side"] == "sell"].groupby("timestamps").size()
    assert sold.max() == 1
    small = {"A": FIVE_DAYS["A"], "B": FIVE_DAYS["B"]}
    steady = run(prices_of(small), signals_of({d: {"A": d, "B": -d} for d in range(4)}), Rules(top_k=2, drop_n=2))
    assert steady.trades["side"].tolist() == ["buy", "buy"]


def test_what_is_suspended_is_kept_not_bought_and_said():
    table = {"A": [(10, 10), (10, 10), (10, 10), None, (12, 12)], "B": FIVE_DAYS["B"], "C": FIVE_DAYS["C"]}
    # Day 2 wants to sell A on day 3, where it has no bar; B waits for its place.
    found = run(prices_of(table), signals_of({0: {"A": 3, "B": 2}, 2: {"A": 1, "B": 2}}), Rules(top_k=1, drop_n=1))
    assert found.trades[["symbol", "side"]].to_numpy().tolist() == [["A", "buy"]]
    np.testing.assert_allclose(found.equity["value"], [1, 1, 1, 1.2])
    assert "sell: no bar at the time of trading: 1" in found.summary["warnings"]
    # A buy that cannot be done leaves its money in cash.
    table["A"] = [(10, 10), None, (10, 10), (10, 10), (12, 12)]
    idle = run(prices_of(table), signals_of({0: {"A": 3, "B": 2}}), Rules(top_k=2, drop_n=2))
    assert idle.trades["symbol"].tolist() == ["B"]
    assert idle.equity["value"].iloc[-1] == pytest.approx(0.5 + 0.5 / 21 * 22)
    assert any("buy: no bar" in text for text in idle.summary["warnings"])
    # A symbol that disappears counts at its last close.
    table["A"] = [(10, 10), (10, 13), None, None, None]
    gone = run(prices_of(table), signals_of({0: {"A": 3, "B": 2}}), Rules(top_k=1, drop_n=1))
    assert gone.equity["value"].iloc[-1] == pytest.approx(1.3)
    assert any("'A' is held at the end" in text for text in gone.summary["warnings"])


def test_least_cost_of_a_trade():
    rules = Rules(top_k=1, drop_n=1, open_cost_bps=1, min_cost=5, capital=1000)
    found = run(prices_of(FIVE_DAYS), signals_of({0: {"A": 3, "B": 2}}), rules)
    assert found.trades["cost"].tolist() == [5]
    assert found.equity["value"].iloc[0] == pytest.approx(995 / 10 * 11)


def test_benchmarks():
    signals = signals_of({0: {"A": 3, "B": 2}, 2: {"C": 5, "A": 1}})
    own = run(prices_of(FIVE_DAYS), signals, Rules(top_k=1, drop_n=1), benchmark="C")
    np.testing.assert_allclose(own.equity["benchmark_return"], [0, 0.2, 0, -0.5])
    assert "C" not in own.trades["symbol"].tolist()
    levels = pd.Series([100.0, 101, 102, 51, 51], index=DAYS)
    given_levels = run(prices_of(FIVE_DAYS), signals, Rules(top_k=1, drop_n=1), benchmark=("index", levels))
    np.testing.assert_allclose(given_levels.equity["benchmark_return"], [0.01, 1 / 101, -0.5, 0])
    with pytest.raises(InputError, match="neither a symbol"):
        run(prices_of(FIVE_DAYS), signals, Rules(top_k=1, drop_n=1), benchmark="X")
    with pytest.raises(InputError, match="bars_per_year must be positive"):
        run(prices_of(FIVE_DAYS), signals, Rules(top_k=1, drop_n=1), bars_per_year=0)


@pytest.mark.parametrize(
    ("table", "match"),
    [
        ({4: {"A": 1.0}}, "no signal has a bar after it"),
        ({0: {"Z": 1.0}}, "no signal is of a symbol"),
        ({0: {"A": float("nan")}}, "no signal is of a symbol"),
    ],
)
def test_signals_that_cannot_be_traded_are_refused(table, match):
    with pytest.raises(InputError, match=match):
        run(prices_of(FIVE_DAYS), signals_of(table), Rules(top_k=1, drop_n=1))


@pytest.mark.parametrize("rules", [{"top_k": 0, "drop_n": 1}, {"top_k": 2, "drop_n": 3}, {"top_k": 1, "drop_n": 0}])
def test_rules_are_checked(rules):
    with pytest.raises(InputError, match="drop-n"):
        Rules(**rules)
    with pytest.raises(InputError, match="negative"):
        Rules(top_k=1, drop_n=1, min_cost=-1)


def test_prices_must_be_positive():
    with pytest.raises(InputError, match="nobody trades at an open or close of 0"):
        Prices.of(prices_of({"A": [(1, 1), (0, 1), (1, 1), (1, 1), (1, 1)]}))
    with pytest.raises(InputError, match="no prices"):
        Prices.of([])


def test_ties_go_by_name_and_an_empty_account_stops():
    prices = Prices.of(prices_of(FIVE_DAYS))
    equal = run_ledger(prices, {DAYS[0].to_datetime64(): {"C": 0.0, "B": 0.0, "A": 0.0}}, Rules(top_k=2, drop_n=2))
    assert [trade.symbol for trade in equal.trades] == ["A", "B"]
    table = {"A": [(10, 10), (10, 10), (10, 45), (45, 45), (45, 45)], "B": [(20, 20)] * 5}
    signals = signals_of({0: {"B": 2, "A": 1}, 2: {"B": 1, "A": 2}})
    broke = run(prices_of(table), signals, Rules(top_k=1, drop_n=1, long_short=True))
    assert "decision: the account is empty: 1" in broke.summary["warnings"]


def test_the_command_writes_and_refuses(tmp_path, capsys):
    rows = [
        (symbol, day, o, max(o, c), min(o, c), c, index)
        for symbol, table in FIVE_DAYS.items()
        for day, (o, c), index in zip(DAYS, table, (100, 101, 102, 103, 104), strict=True)
    ]
    columns = ["symbol", "timestamps", "open", "high", "low", "close", "index_level"]
    pd.DataFrame(rows, columns=columns).to_csv(tmp_path / "prices.csv", index=False)
    signals_of({0: {"A": 3, "B": 2, "C": 1}}).to_csv(tmp_path / "signals.csv", index=False)
    command = ["--signals", str(tmp_path / "signals.csv"), "--prices", str(tmp_path / "*.csv")[:-5] + "prices.csv"]
    command += ["--out", str(tmp_path / "out"), "--top-k", "1", "--cost-bps", "10"]
    assert backtest.main([*command, "--benchmark", "index_level"]) == 0
    assert "total_return" in capsys.readouterr().out
    summary = json.loads((tmp_path / "out/backtest.json").read_text())
    assert summary["total_return"] == pytest.approx(1 / 1.001 * 1.4 - 1, abs=1e-12)
    assert summary["benchmark_return"] == pytest.approx(0.04)
    page = (tmp_path / "out/backtest.html").read_text()
    assert "<svg" in page
    assert "http" not in page
    assert len(pd.read_csv(tmp_path / "out/equity.csv")) == 4
    assert pd.read_csv(tmp_path / "out/trades.csv")["side"].tolist() == ["buy"]
    assert backtest.main(command) == 2
    assert "holds an earlier report (backtest.json)" in capsys.readouterr().err
    assert json.loads((tmp_path / "out/backtest.json").read_text()) == summary
    command.append("--overwrite")
    assert backtest.main(command) == 0
    assert json.loads((tmp_path / "out/backtest.json").read_text())["benchmark"] == "equal-weight universe"
    pd.DataFrame({"symbol": ["A"], "when": [DAYS[0]], "signal": [1.0]}).to_csv(tmp_path / "signals.csv", index=False)
    assert backtest.main(command) == 2
    assert "column 'timestamps' is missing" in capsys.readouterr().err


def test_signals_of_an_evaluation_meet_prices_with_other_column_names(tmp_path, capsys):
    """000001 is a name in both, whatever its column is called, and no bar is called crooked for what it lacks."""
    rows = [(s, day, *pair) for s in ("000001", "600000") for day, pair in zip(DAYS, FIVE_DAYS["A"], strict=True)]
    pd.DataFrame(rows, columns=["ticker", "time", "open", "close"]).to_csv(tmp_path / "prices.csv", index=False)
    table = signals_of({0: {"000001": 3, "600000": 2}})
    table.to_csv(tmp_path / "signals.csv", index=False)
    names = {"time_column": "time", "symbol_column": "ticker"}
    assert [own.symbol for own in read_prices([tmp_path / "prices.csv"], **names)] == ["000001", "600000"]
    assert read_signals(tmp_path / "signals.csv", **names)["symbol"].tolist() == ["000001", "600000"]
    command = ["--signals", str(tmp_path / "signals.csv"), "--prices", str(tmp_path / "prices.csv"), "--top-k", "1"]
    command += ["--time-column", "time", "--symbol-column", "ticker", "--out", str(tmp_path / "out")]
    assert backtest.main(command) == 0
    assert "without prices" not in capsys.readouterr().err
    table.rename(columns={"symbol": "ticker", "timestamps": "time"}).to_csv(tmp_path / "signals.csv", index=False)
    assert read_signals(tmp_path / "signals.csv", **names)["symbol"].tolist() == ["000001", "600000"]


def test_names_of_columns_may_be_in_any_case_in_prices_and_signals(tmp_path):
    rows = [(s, day, *pair) for s in ("000001", "600000") for day, pair in zip(DAYS, FIVE_DAYS["A"], strict=True)]
    prices = pd.DataFrame(rows, columns=["symbol", "timestamps", "open", "close"])
    signals = signals_of({0: {"000001": 3, "600000": 2}})
    equity = []
    for write in (str, str.title):
        for name, table in (("prices", prices), ("signals", signals)):
            table.rename(columns=write).to_csv(tmp_path / f"{name}.csv", index=False)
        found = read_prices([tmp_path / "prices.csv"]), read_signals(tmp_path / "signals.csv")
        assert {own.symbol for own in found[0]} == set(found[1]["symbol"]) == {"000001", "600000"}
        equity.append(run(*found, Rules(top_k=1, drop_n=1)).equity)
    pd.testing.assert_frame_equal(*equity)
    signals.assign(Signal=1.0).to_csv(tmp_path / "signals.csv", index=False)
    with pytest.raises(InputError, match=r"signals\.csv: column 'signal' is there twice"):
        read_signals(tmp_path / "signals.csv")


def test_a_price_that_nobody_trades_at_may_be_anything(tmp_path, capsys):
    """The reader leaves the prices to the ledger, which names an open or close that is not positive."""
    frame = pd.DataFrame([("A", day, 10.0, 11.0, 9.0, 10.0) for day in DAYS])
    frame.columns = ["symbol", "timestamps", "open", "high", "low", "close"]
    frame.assign(low=0.0).to_csv(tmp_path / "prices.csv", index=False)
    signals_of({0: {"A": 1}}).to_csv(tmp_path / "signals.csv", index=False)
    command = ["--signals", str(tmp_path / "signals.csv"), "--prices", str(tmp_path / "prices.csv")]
    command += ["--out", str(tmp_path / "out"), "--top-k", "1"]
    assert backtest.main(command) == 0
    frame.assign(close=-1.0).to_csv(tmp_path / "prices.csv", index=False)
    assert backtest.main([*command, "--overwrite"]) == 2
    assert "nobody trades at an open or close of -1" in capsys.readouterr().err


def test_prices_of_open_and_close_alone_are_not_called_crooked(tmp_path, caplog):
    rows = [("A", day, *pair) for day, pair in zip(DAYS, FIVE_DAYS["A"], strict=True)]
    pd.DataFrame(rows, columns=["symbol", "timestamps", "open", "close"]).to_csv(tmp_path / "prices.csv", index=False)
    assert len(read_prices([tmp_path / "prices.csv"])) == 1
    assert caplog.text == ""
    rows[2] = ("A", DAYS[2], "n.a.", 12)
    pd.DataFrame(rows, columns=["symbol", "timestamps", "open", "close"]).to_csv(tmp_path / "prices.csv", index=False)
    with pytest.raises(InputError, match="column 'open' holds"):
        read_prices([tmp_path / "prices.csv"])


def test_signals_with_a_time_zone_do_not_meet_prices_without_one(tmp_path):
    """A close at 15:00 in Shanghai is 07:00 in UTC: it would trade before it is known."""
    rows = [("A", day, *pair) for day, pair in zip(DAYS, FIVE_DAYS["A"], strict=True)]
    frame = pd.DataFrame(rows, columns=["symbol", "timestamps", "open", "close"])
    zoned = frame.assign(timestamps=frame["timestamps"].dt.tz_localize("Asia/Shanghai"))
    frame.to_csv(tmp_path / "A.csv", index=False)
    zoned.assign(symbol="B").to_csv(tmp_path / "B.csv", index=False)
    signals = signals_of({0: {"A": 1.0, "B": 1.0}})
    aware = signals.assign(timestamps=signals["timestamps"].dt.tz_localize("Asia/Shanghai"))
    rules = Rules(top_k=1, drop_n=1)
    for given in (aware, aware.assign(timestamps=aware["timestamps"].map(str))):
        with pytest.raises(InputError, match="give both one, or neither"):
            run(read_prices([tmp_path / "A.csv"]), given, rules)
        assert run(read_prices([tmp_path / "B.csv"]), given, rules).summary["trades"] == 1
    with pytest.raises(InputError, match="give all of them one"):
        read_prices([tmp_path / "A.csv", tmp_path / "B.csv"])
    in_utc = signals.assign(timestamps=signals["timestamps"] - pd.Timedelta("8h"))  # as an evaluation writes them
    found = [run(read_prices([tmp_path / "B.csv"]), given, rules).equity for given in (aware, in_utc)]
    pd.testing.assert_frame_equal(*found)
