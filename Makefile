# Each goal first makes .venv; a second call finds its stamp and installs nothing.
# PYTHON chooses the interpreter (3.10 or later), PROCESSES the number of test processes: make test PYTHON=python3.12 PROCESSES=4

PYTHON ?= python3
VENV ?= .venv
PROCESSES ?= 2
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

.PHONY: help venv test test-slow test-ocr test-quantization test-versions losses lint format demo docs wheel clean

help:
	@echo "make venv               .venv with leapalign (editable), the exact versions of constraints.txt, and the tools"
	@echo "make demo               align the embedded pipeline with the embedded reward: minutes on two CPU cores"
	@echo "make test               tests; make test-slow: also those that take minutes each"
	@echo "make test-ocr           install leapalign[ocr] (120 MB); test the OCR reward with its published weights"
	@echo "make test-quantization  install leapalign[quantization] (46 MB); test bases in 8 and 4 bits"
	@echo "make test-versions      test with the lowest versions of pyproject.toml, then with the newest, in new environments"
	@echo "make losses             compare short runs of the embedded recipes with their stored losses: 2 minutes"
	@echo "make lint               ruff, pyright and the import contracts; make format: let ruff rewrite"
	@echo "make docs               install leapalign[docs] (60 MB); build the documentation site, in site/"
	@echo "make wheel              build the wheel, in dist/"

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

test-versions:
	PYTHON=$(PYTHON) .ci/versions lowest
	PYTHON=$(PYTHON) .ci/versions newest

losses: venv
	OMP_NUM_THREADS=1 $(BIN)/python benches/losses.py

lint: venv
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python
	$(BIN)/lint-imports --no-logo

format: venv
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

demo: venv
	$(BIN)/leapalign demo

docs: venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[docs]"
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet

wheel: venv
	rm -rf build dist
	$(BIN)/python -m pip wheel --quiet --disable-pip-version-check --no-deps --wheel-dir dist .

clean:
	rm -rf build dist site src/*.egg-info .pytest_cache .ruff_cache .hypothesis
