# `make demo` and `make test` work from a fresh clone: the first run sets up .venv, later runs start in seconds.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.ready
export HF_HUB_OFFLINE = 1
export TOKENIZERS_PARALLELISM = false
# OpenMP threads that wait must not spin: on a shared machine spinning made a training step three times slower
export GOMP_SPINCOUNT = 0

.PHONY: demo test test-all test-fast lint docs pictures clean

demo: $(STAMP)
	$(BIN)/weft demo --out demo-out

test: lint
	$(BIN)/python -m coverage erase
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal --cov --cov-report=
	$(BIN)/python -m coverage report --skip-covered | tail -n 40
	$(BIN)/python -m coverage report --fail-under=95 --include='src/weft/ops/*,src/weft/delta.py,src/weft/file.py,src/weft/base.py,src/weft/attaching/*,src/weft/folding.py'

# as `make test`, with every combination of space, optimizer, schedule and guard instead of a pairwise cover of them
test-all: export WEFT_TEST_ALL = 1
test-all: test

test-fast: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal -m "not slow"

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: $(STAMP)
	$(BIN)/weft methods --format markdown > docs/methods.md

# screenshots of a check's page for docs/checking.md; chromium must be on the PATH: make pictures REPORT=check.html
pictures: $(STAMP)
	$(BIN)/python -m tests.browser $(REPORT) docs/images/check

$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[test,demo]'
	touch $@

clean:
	rm -rf $(VENV) demo-out build
