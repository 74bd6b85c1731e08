# Two commands from a fresh clone: `make check` and `make test`; `make demo` quantizes a model. Needs Python 3.11 or newer with its venv module, and make.

PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed
# files in their order: the longest, those of the flows, come first
PYTEST := HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n auto --dist loadfile --no-loadscope-reorder

.PHONY: help demo check types fast test slow test-services reference install clean

help:
	@echo "make demo      install, then quantize the embedded model, evaluate and track it"
	@echo "make check     install, then style, types, import contracts and the fast tests: a minute"
	@echo "make test      install, then run all tests but those of services; make fast and make slow: its two parts"
	@echo "make test-services   the tests with real servers, workers and a Ray cluster"
	@echo "make reference rewrite what is made from the config schemas: comments of configs/, docs/reference.md"
	@echo "make install   make .venv and install the project into it"
	@echo "make clean     remove .venv and caches; runs and mlflow.db stay"
	@echo "PYTHON=python3.12 make ...   choose the interpreter"

demo: install
	HF_HUB_OFFLINE=1 $(BIN)/python -m flows demo

# ruff and the contracts take a second; types and tests share the cores
check: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports --no-cache
	@$(MAKE) --no-print-directory -j 2 types fast

types: install
	$(BIN)/mypy

fast: install
	$(PYTEST) -m "not slow and not services and not kills and not consumers"

test: install
	$(PYTEST)

slow: install
	$(PYTEST) -m "slow and not services and not kills and not consumers"

test-services: install
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -m "services and not kills"

reference: install
	$(BIN)/python -m tasks.config.reference

install: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	@command -v $(PYTHON) >/dev/null || { echo "$(PYTHON) not found: install Python 3.11 or newer, or say PYTHON=/path/to/python" >&2; exit 2; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "$(PYTHON) is too old: install Python 3.11 or newer, or say PYTHON=/path/to/python" >&2; exit 2; }
	@$(PYTHON) -c 'import venv, ensurepip' 2>/dev/null || \
		{ echo "$(PYTHON) lacks venv or ensurepip: install it (on Debian and Ubuntu: apt install python3-venv)" >&2; exit 2; }
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet torch==2.13.0 -c constraints.txt
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[pipeline,ray,dev]'
	@touch $(STAMP)

clean:
	rm -rf .venv .pytest_cache .ruff_cache .mypy_cache .hypothesis build dist *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
