"""Forecasts of a whole table, from its files to the parts of the output; `cluster.batch` is the command."""
