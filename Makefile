# Two commands do everything on a fresh machine with Python 3.11 or later and a package index:
#   make demo     the main job, end to end on the embedded corpus, on a CPU, in five to six minutes
#   make test     the tests
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test unit slow check clean

demo: .venv/installed
	$(BIN)/bytejepa demo --out demo --force

# all that the README promises, on two cores
test: .venv/installed
	$(BIN)/pytest -n 2 --dist loadfile --no-loadscope-reorder

# the same without whole programs (README commands, ranks, kills, browsers): under three minutes, for between two changes
unit: .venv/installed
	$(BIN)/pytest -n 2 --dist loadfile --no-loadscope-reorder -m "not integration and not slow and not gpu and not compiled"

# minutes, not seconds: the demo, 50 kills, 4 ranks; and compiled code, in a process without the runtime shape checks
slow: .venv/installed
	$(BIN)/pytest -m compiled
	$(BIN)/pytest -m "slow and not gpu"

# what continuous integration runs beside the tests
check: .venv/installed
	$(BIN)/ruff format --check src tests benchmarks
	$(BIN)/ruff check src tests benchmarks
	$(BIN)/mypy
	$(BIN)/lint-imports

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

clean:
	rm -rf .venv demo runs
