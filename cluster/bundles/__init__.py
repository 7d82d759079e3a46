"""The folder that a server serves; `cluster.export` and `cluster.promote` are the commands."""
