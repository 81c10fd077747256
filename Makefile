# Every target makes .venv and installs what it needs. PYTHON picks the interpreter (3.10 to 3.12).
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

.PHONY: demo test lint reference native clean

demo: $(INSTALLED)
	$(BIN)/noisec demo

# Two files at a time, each on one thread; files start in the order of their names, so that the longest does not start last.
test: $(INSTALLED)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Rebuild the guard in model_repository/ from the official Fashion-MNIST files.
reference: $(INSTALLED)
	$(BIN)/noisec build builders/guards/fashion_mnist.toml --repository model_repository

# Triton's own ONNX Runtime backend for the embedded server, compiled from its sources: NOISEC_BACKENDS=build/backends takes it.
native: $(INSTALLED)
	PYTHON=$(BIN)/python sh python_backend/native_backend.sh build/backends

$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --no-compile --upgrade-strategy only-if-needed \
		--constraint constraints.txt --editable '.[build,serve,precision,bench,dev]' --config-settings editable_mode=strict
	touch $@

clean:
	rm -rf $(VENV) build demo workbench *.egg-info .mypy_cache .pytest_cache .ruff_cache
