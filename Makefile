# Two commands set everything up on a fresh machine: `make serve` and `make test`.
PYTHON ?= python3.11
VENV   := .venv
BIN    := $(VENV)/bin

# Ray's HTTP proxy drops the headers by which a client could give it orders (docs/security.md).
export RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH ?= serve_app.proxy:middlewares

.PHONY: serve test lint bench clean

# The environment is rebuilt when a requirements file is newer than the last install.
$(VENV)/.installed: requirements.txt requirements-dev.txt pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .
	touch $@

# Ray Serve on http://127.0.0.1:8000 with the bundled checkpoint; Ctrl-C stops it and its local Ray cluster.
serve: $(VENV)/.installed
	$(BIN)/python -m serve_app.cli check-config serve_config.yaml --port-free
	exec $(BIN)/serve run serve_config.yaml

test: $(VENV)/.installed
	$(BIN)/python -m pytest -m "not slow" $(ARGS)

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(VENV)/.installed
	$(BIN)/python benchmarks/engine.py $(ARGS)

clean:
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis
