"""Walk-forward forecasts, scores, tests, the backtest's ledger, reports, cards; `cluster.evaluate` is the command."""
