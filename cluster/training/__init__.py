"""The training loop and what it stands on; `cluster.train` is the command."""
