# Two commands set everything up on a fresh machine: `make serve` and `make test`.
PYTHON ?= python3.11
VENV   := .venv
BIN    := $(VENV)/bin

.PHONY: serve test verify lint bench batch-bench train-bench load chaos overhead soak clean

# The environment is rebuilt when a requirements file is newer than the last install.
$(VENV)/.installed: requirements.txt requirements-dev.txt pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .
	touch $@

# Ray Serve on http://127.0.0.1:8000 with the bundled checkpoint. Ctrl-C: requests in flight finish, then it stops with its
# local Ray cluster; a second Ctrl-C does not wait for them.
serve: $(VENV)/.installed
	exec $(BIN)/python -m serve_app.run serve_config.yaml $(ARGS)

# Two processes: one for what starts Ray, one for all else. In one: ARGS="-n 0". The slow tests: $(BIN)/python -m pytest -m slow.
test: $(VENV)/.installed
	$(BIN)/python -m pytest -m "not slow" -n 2 $(ARGS)

# The claims about training and evaluation, the long ones included (about 20 minutes), and a table of their figures.
verify: $(VENV)/.installed
	$(BIN)/python -m pytest -m verify $(ARGS)

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(VENV)/.installed
	$(BIN)/python benchmarks/engine.py $(ARGS)

# Batch forecasts against the engine alone, and docs/capacity.md worked out from the result; the trainer against the
# public loop: ARGS="--reference PATH". ARGS=--quick shows in a minute that they run.
batch-bench: $(VENV)/.installed
	$(BIN)/python benchmarks/batch.py $(ARGS)
	$(BIN)/python benchmarks/capacity.py

train-bench: $(VENV)/.installed
	$(BIN)/python benchmarks/training.py $(ARGS)

# Each prints one table; ARGS=--quick takes about a minute per command. They want the machine for themselves.
load: $(VENV)/.installed
	$(BIN)/python benchmarks/load.py $(ARGS)

chaos: $(VENV)/.installed
	$(BIN)/python benchmarks/chaos.py $(ARGS)

overhead: $(VENV)/.installed
	$(BIN)/python benchmarks/overhead.py $(ARGS)

soak: $(VENV)/.installed
	$(BIN)/python benchmarks/soak.py $(ARGS)

clean:
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis
