# Everything starts from nothing: each goal makes .venv first; a second call finds the stamp and installs nothing.
# PYTHON chooses the interpreter (3.10 or later), PROCESSES how many test at a time: make test PYTHON=python3.12 PROCESSES=4

PYTHON ?= python3
VENV ?= .venv
PROCESSES ?= 2
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

.PHONY: help venv test test-slow test-ocr test-quantization losses lint format demo wheel clean

help:
	@echo "make venv       .venv with leapalign (editable), exact versions from constraints.txt, and the tools for tests"
	@echo "make demo       align the embedded pipeline with the embedded reward: minutes on two CPU cores"
	@echo "make test       the tests; make test-slow: those that take minutes as well"
	@echo "make test-ocr   installs leapalign[ocr] (120 MB) and tests the OCR reward with its published weights"
	@echo "make test-quantization   installs leapalign[quantization] (46 MB) and tests bases in 8 and 4 bits"
	@echo "make losses     short runs of the embedded recipes against their stored losses (a refactor changes none): 2 minutes"
	@echo "make lint       ruff and pyright; make format: let ruff rewrite"
	@echo "make wheel      the wheel, in dist/"

venv: $(INSTALLED)

$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev]"
	@touch $@

test: venv
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(PROCESSES) --dist loadfile

test-slow: venv
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not gpu" -n $(PROCESSES) --dist loadfile

test-ocr: venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[ocr]"
	$(BIN)/python -m pytest tests/rewards/test_ocr.py tests/evaluation/test_text_accuracy.py tests/contracts/test_rewards.py

test-quantization: venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[quantization]"
	$(BIN)/python -m pytest tests/tuning/test_quantization.py tests/recipes/test_small_gpu.py

losses: venv
	OMP_NUM_THREADS=1 $(BIN)/python benches/losses.py

lint: venv
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python

format: venv
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

demo: venv
	$(BIN)/leapalign demo

wheel: venv
	rm -rf build dist
	$(BIN)/python -m pip wheel --quiet --disable-pip-version-check --no-deps --wheel-dir dist .

clean:
	rm -rf build dist src/*.egg-info .pytest_cache .ruff_cache .hypothesis
