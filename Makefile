# Each target installs what it needs into .venv first; PYTHON names another interpreter.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
OUT ?= out
PORT ?= 8000
# A process a core and one more (tests/conftest.py). Neighbouring tests share what is costly to set
# up, so each process takes a run of them, and helps out with the others' at the end.
PYTEST_FLAGS ?= --numprocesses logical --maxprocesses 8 --dist worksteal

.PHONY: help label serve demo screenshot test soak sdk-page check bench lint types house install wheel clean

help:
	@echo "make label   label demo/images with the demo checkpoint, into $(OUT)/"
	@echo "make demo    open a page to play with the demo checkpoint, offline; PORT=$(PORT)"
	@echo "make serve   serve the demo checkpoint on http://127.0.0.1:$(PORT), with the same page"
	@echo "make test    run the tests"
	@echo "make soak    faults and load, for minutes: kills, lost connections, many clients"
	@echo "make sdk-page   fetch what tests of the SDK's page need, from npm; without it soak skips them"
	@echo "make check   formatting, lint, types, the house, generated docs, tests (what CI runs)"
	@echo "make house   how large the code is, how many files a request passes, and what of it is held"
	@echo "make wheel   the package with the demo checkpoint, to install elsewhere, into dist/"
	@echo "make bench   speed and memory against the reference implementation"
	@echo "make screenshot   the picture of the page in the README, with Chromium"

$(VENV)/.runtime: requirements.txt pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --requirement requirements.txt
	$(BIN)/pip install --quiet --no-deps --no-build-isolation --editable .
	touch $@

$(VENV)/.dev: $(VENV)/.runtime
	$(BIN)/pip install --quiet --editable ".[dev]" --no-build-isolation
	touch $@

install: $(VENV)/.runtime

label: $(VENV)/.runtime
	$(BIN)/florence2 label demo/images --model demo --task "<OD>" --threshold 0.5 --out $(OUT)/labeled --draw
	@echo "Project: $(OUT)/labeled/project   Previews to look at: $(OUT)/labeled/previews"

demo: $(VENV)/.runtime
	HF_HUB_OFFLINE=1 $(BIN)/florence2 serve --model demo --port $(PORT) --open

serve: $(VENV)/.runtime
	$(BIN)/florence2 serve --model demo --port $(PORT)

test: $(VENV)/.dev
	$(BIN)/python -m pytest $(PYTEST_FLAGS)

# What the SDK's page is made of, for its tests in a browser; needs npm and its registry.
$(VENV)/sdk-page/.installed: Makefile
	npm install --silent --no-audit --no-fund --ignore-scripts --prefix $(@D) \
		vue@2.7.16 element-ui@1.4.13 lodash@4.17.21 fast-json-patch@3.1.1
	touch $@

sdk-page: $(VENV)/sdk-page/.installed

$(VENV)/.soak: $(VENV)/.dev
	$(BIN)/pip install --quiet --editable ".[soak]" --no-build-isolation
	touch $@

# One after the other: each takes the machine for itself.
soak: $(VENV)/.soak
	$(BIN)/python -m pytest -m soak

lint: $(VENV)/.dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/lint-imports --no-logo

types: $(VENV)/.dev
	$(BIN)/mypy

house: $(VENV)/.runtime
	$(BIN)/python bench/house.py --check

# The first three side by side, as each is one process.
check: $(VENV)/.dev
	$(MAKE) --jobs 2 --output-sync=target lint types house
	$(MAKE) test

bench: $(VENV)/.runtime
	$(BIN)/florence2 benchmark --json docs/benchmark.json --plot docs/benchmark.svg

# The picture of the page in the README; needs Chromium.
screenshot: $(VENV)/.dev
	$(BIN)/python bench/screenshot.py docs/images/page.png

# Afresh, because setuptools would pack what an earlier build left behind.
wheel: $(VENV)/.dev
	rm -rf build dist
	$(BIN)/pip wheel --quiet --no-deps --no-build-isolation --wheel-dir dist .

clean:
	rm -rf $(OUT) build dist
