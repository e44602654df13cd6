# Everything runs in a virtual environment made here; nothing outside this folder is touched.
#   make serve    install what the service needs and serve on http://127.0.0.1:8000
#   make test     install what the tests need; format, lint, types, imports, tests

VENV ?= .venv
HOST ?= 127.0.0.1
PORT ?= 8000
# A CPU build of torch is all that the service and the tests need. It is taken from this index where it can be reached, since the wheel on
# PyPI brings gigabytes of CUDA packages on Linux. `make TORCH_INDEX= …` takes the wheel on PyPI, for measuring on a GPU.
TORCH_INDEX ?= https://download.pytorch.org/whl/cpu
PYTEST_ARGS ?=

BIN := $(VENV)/bin
PY := $(BIN)/python
RUN_STAMP := $(VENV)/.installed-run
TEST_STAMP := $(VENV)/.installed-test
SOURCES := app calibration estimator tests

.DEFAULT_GOAL := help
.PHONY: help install install-test serve test lint format pytest slow fuzz bench load container accuracy agreement coverage catalogue clean

help:
	@grep -E '^#   ' Makefile | cut -c5-
	@echo "  also: install install-test lint format pytest slow fuzz bench load container accuracy agreement coverage catalogue clean"

$(PY):
	sh .ci/venv "$(VENV)"

$(VENV)/.torch: constraints.txt | $(PY)
	sh .ci/torch "$(PY)" "$(TORCH_INDEX)"
	@touch $@

$(RUN_STAMP): pyproject.toml constraints.txt $(VENV)/.torch
	$(PY) -m pip install --quiet -c constraints.txt -e .
	@touch $@

$(TEST_STAMP): $(RUN_STAMP)
	$(PY) -m pip install --quiet -c constraints.txt -e '.[test]'
	@touch $@

install: $(RUN_STAMP)

install-test: $(TEST_STAMP)

serve: $(RUN_STAMP)
	$(BIN)/vramplan serve --host $(HOST) --port $(PORT)

lint: $(TEST_STAMP)
	$(BIN)/ruff check $(SOURCES)
	$(BIN)/ruff format --check $(SOURCES)
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(TEST_STAMP)
	$(BIN)/ruff check --fix-only $(SOURCES)
	$(BIN)/ruff format $(SOURCES)

pytest: $(TEST_STAMP)
	$(PY) -m pytest -n 2 --timeout 300 $(PYTEST_ARGS)

test: lint pytest

slow: $(TEST_STAMP)
	$(PY) -m pytest -m slow $(PYTEST_ARGS)

# cases for each of fourteen operations, of traces, which take seconds, fewer; then requests, configs and trainers' files
fuzz: $(TEST_STAMP)
	VRAMPLAN_FUZZ_CASES=1800 VRAMPLAN_FUZZ_REQUESTS=20000 VRAMPLAN_FUZZ_CONFIGS=20000 VRAMPLAN_FUZZ_FILES=20000 \
		$(PY) -m pytest -m 'slow or not slow' tests/app/test_openapi.py tests/app/test_robustness.py $(PYTEST_ARGS)

bench: $(TEST_STAMP)
	$(PY) -m tests.benchmarks.speed

load: $(TEST_STAMP)
	$(PY) -m tests.benchmarks.load

container:
	.ci/container "$(TORCH_INDEX)"

agreement: $(TEST_STAMP)
	$(PY) -m calibration.agreement

coverage: $(TEST_STAMP)
	$(PY) -m tests.coverage

accuracy: $(TEST_STAMP)
	$(PY) -m calibration.accuracy

catalogue: $(TEST_STAMP)
	$(PY) -m estimator.introspect.catalogue

clean:
	rm -rf $(VENV) build *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
