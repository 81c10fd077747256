# Every target makes .venv and installs what it needs. PYTHON picks the interpreter (3.10 to 3.12).
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

.PHONY: demo test lint reference clean

demo: $(INSTALLED)
	$(BIN)/noisec demo

test: $(INSTALLED)
	$(BIN)/python -m pytest

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Rebuild the guard in model_repository/ from the official Fashion-MNIST files.
reference: $(INSTALLED)
	$(BIN)/noisec build builders/guards/fashion_mnist.toml --repository model_repository

$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade-strategy only-if-needed \
		--constraint constraints.txt --editable '.[build,serve,precision,bench,dev]' --config-settings editable_mode=strict
	touch $@

clean:
	rm -rf $(VENV) build demo workbench *.egg-info .mypy_cache .pytest_cache .ruff_cache
