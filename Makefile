# `make report` and `make test` set everything up by themselves; all they need is Python >= 3.11 and make.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
LOCK_TOOLS := _build/lock-tools
PYTEST_ARGS ?=
FUZZ_INPUTS ?= 20000

# Where the traces are. Without them the book shows recorded results and says so.
ifeq ($(strip $(STEPCAL_DATA)),)
  ifneq ($(wildcard ../shared/data/README.md),)
    STEPCAL_DATA := $(abspath ../shared/data)
  endif
endif
ifneq ($(strip $(STEPCAL_DATA)),)
  override STEPCAL_DATA := $(abspath $(STEPCAL_DATA))
  export STEPCAL_DATA
endif

# One thread for linear algebra: sums come in the same order each time, and small systems are faster.
export OPENBLAS_NUM_THREADS := 1
export OMP_NUM_THREADS := 1

.DEFAULT_GOAL := help
.PHONY: help setup report test fuzz lab hooks data record kernels lock clean

help: ## show this list
	@echo "stepcal: how long does one step of an LLM server take?"
	@echo
	@sed -n 's/^\([a-z]*\):[^#]*## \(.*\)/  make \1	\2/p' Makefile | expand -t 16
	@echo
	@echo "Traces: $(if $(STEPCAL_DATA),$(STEPCAL_DATA),none (set STEPCAL_DATA to their folder))"

setup: $(INSTALLED) ## install the locked environment into .venv

$(INSTALLED): requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "stepcal needs Python >= 3.11 and $(PYTHON) is older; name another: make PYTHON=python3.12 ..." >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	@# The lock is complete. Without --no-deps pip asks for extras anew and stops at the first new release.
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --require-hashes --no-deps -r requirements.lock
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .
	@touch $@

report: $(INSTALLED) ## run the notebooks and build the book: _build/html/index.html
	$(BIN)/stepcal report

test: $(INSTALLED) ## lint, formatting, types, import order, then the tests (more options: PYTEST_ARGS="--cov=stepcal")
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python -m pytest $(PYTEST_ARGS)

fuzz: $(INSTALLED) ## damage files and read them with every reader (FUZZ_INPUTS=100000 for a campaign)
	cd tests && ../$(BIN)/python -m fuzz.campaign --inputs $(FUZZ_INPUTS) --seed 2026 --keep ../_build/fuzz
	@cd tests && if ../$(BIN)/python -c "import atheris" 2>/dev/null; then \
		../$(BIN)/python -m fuzz.coverage_guided -max_total_time=60; else echo "atheris is not installed: skipped"; fi

lab: $(INSTALLED) ## open the book's notebooks in JupyterLab
	$(BIN)/jupyter lab book

hooks: $(INSTALLED) ## check each commit with the tools of make test (pre-commit)
	$(BIN)/pre-commit install

data: $(INSTALLED) ## rewrite the tables in data/ from the public files in STEPCAL_DATA
	@test -n "$(STEPCAL_DATA)" || { echo "make data reads the public files: set STEPCAL_DATA to their folder." >&2; exit 2; }
	$(BIN)/python -m stepcal.datasets.build --public "$(STEPCAL_DATA)" --out data

kernels: $(INSTALLED) ## fit data/hardware/kernels.csv anew to the pinned wheel of kernel tables (82 MB, fetched)
	$(BIN)/python -m stepcal.kernels.build

record: $(INSTALLED) ## recompute data/recorded/, the results that need the traces
	$(BIN)/stepcal record

lock: ## solve pyproject.toml anew: requirements.lock and environment.yml
	test -x $(LOCK_TOOLS)/bin/uv || { $(PYTHON) -m venv $(LOCK_TOOLS) && $(LOCK_TOOLS)/bin/python -m pip install --quiet uv; }
	$(LOCK_TOOLS)/bin/uv pip compile pyproject.toml --all-extras --universal --python-version 3.11 --generate-hashes \
		--no-emit-index-url --no-header --quiet --output-file requirements.lock
	$(PYTHON) tools/environment_from_lock.py

clean: ## remove what was built, but not .venv
	rm -rf _build build *.egg-info .hypothesis .pytest_cache .mypy_cache .ruff_cache .coverage
	find . -path ./$(VENV) -prune -o \( -name __pycache__ -o -name .ipynb_checkpoints \) -exec rm -rf {} +
