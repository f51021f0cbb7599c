# Everything runs in .venv, which `make setup` builds; the other targets call it themselves.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# The tests of a file share what they train; whole campaigns begin first (tests/conftest.py).
SIDE_BY_SIDE := -n auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder
export OMP_WAIT_POLICY ?= PASSIVE

.PHONY: help setup demo test test-ray test-browser test-all lint format docs bench-overhead bench-materialize \
        bench-digits bench-evaluate bench-coverage bench-ledger bench-orderings bench-page bench-racing bench-scale \
        bench-search bench-surrogates clean

help:  ## Show the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 18

setup: $(VENV)/.ready  ## Make .venv with the command .venv/bin/evomerge

$(VENV)/.ready: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "evomerge needs Python 3.11 or newer; found $$($(PYTHON) --version). Name one: make $(MAKECMDGOALS) PYTHON=python3.12"; exit 1; }
	@echo "setting up $(VENV) (first time: one to three minutes)"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

demo: setup  ## Train experts, search, and export a merged model: about a minute
	$(BIN)/evomerge families make digits4 --out demo/digits4
	$(BIN)/evomerge check benchmarks/demo.yaml
	$(BIN)/evomerge search benchmarks/demo.yaml --run demo/run
	$(BIN)/evomerge report demo/run --out demo/report.html
	@rm -rf demo/merged
	$(BIN)/evomerge export demo/run --knee --out demo/merged --verify
	@echo
	@echo "Open demo/report.html for the front. The merged model is in demo/merged. Now try:"
	@echo "  $(BIN)/evomerge export demo/run --prefer rot90=3,parity=1 --out demo/mostly-rot90"
	@echo "  $(BIN)/evomerge search demo/digits4/campaign.yaml --run demo/run4      # all four experts"
	@echo "  raise budget.evaluations in benchmarks/demo.yaml and run make demo again: it goes on where it ended"

test: setup  ## The default tests: CPU, no network
	@$(BIN)/python -m pytest -q $(SIDE_BY_SIDE) -m "not slow and not ray and not browser"

test-ray: setup  ## Workers, nodes and drivers lost on a real Ray cluster of this machine (five minutes)
	@$(BIN)/python -m pytest -q -m ray

test-browser: setup  ## The page in a real Chromium (two minutes)
	@command -v chromium >/dev/null || test "$$(id -u)" != 0 || { apt-get -q update && apt-get -qy install chromium; }
	@command -v chromium >/dev/null || { echo "the tests of the page drive Chromium: install it, such as by apt-get install chromium"; exit 1; }
	@$(BIN)/python -m pytest -q -m browser

test-all: setup  ## Every test, slow ones included
	@$(BIN)/python -m pytest -q $(SIDE_BY_SIDE)

lint: setup  ## ruff and mypy --strict
	@$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy

format: setup  ## Format the code
	@$(BIN)/ruff format . && $(BIN)/ruff check --fix .

docs: setup  ## Build docs/ as pages in .cache/site; a broken link is an error
	@NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet
	@echo "open .cache/site/index.html"

bench-overhead: setup  ## Milliseconds a candidate beyond the forward: driver, ledger, materialization
	@$(BIN)/python benchmarks/overhead.py

bench-materialize: setup  ## Seconds a merge of 350 M parameters, beside memory, a naive loop and mergekit (an hour)
	@$(BIN)/python benchmarks/materialize.py

bench-digits: setup  ## Per-layer search against uniform average and best single coefficient, several seeds
	@$(BIN)/python benchmarks/digits_per_layer.py

bench-coverage: setup  ## How often 95 % intervals hold the score over all items of a family (ten minutes)
	@$(BIN)/python benchmarks/coverage.py

bench-evaluate: setup  ## Seconds a candidate beyond the forwards, beside lm-eval, and equality with its command line
	@$(BIN)/python benchmarks/evaluate.py

bench-orderings: setup  ## Orderings that papers report, and whether digits4 shows them, three seeds (ten minutes)
	@$(BIN)/python -m benchmarks.orderings

bench-ledger: setup  ## Size and speed of a ledger of 10,000 trials (ten minutes)
	@$(BIN)/python benchmarks/ledger.py

bench-page: setup  ## The page of 60, 1,000 and 10,000 trials: size, and time until it can be used (ten minutes)
	@$(BIN)/python -m benchmarks.page

bench-racing: setup  ## What a race saves in items for the same hypervolume, over ten seeds
	@$(BIN)/python benchmarks/racing.py

bench-scale: setup  ## How far one driver reaches: two Ray workers, 1,000 simulated ones, 100,000 trials (half an hour)
	@$(BIN)/python benchmarks/scale.py

bench-search: setup  ## Searchers at equal cost: hypervolume against cost, ten seeds (hours)
	@$(BIN)/python -m benchmarks.search

bench-surrogates: setup  ## What surrogates know of unseen candidates after few evaluations (ten minutes)
	@$(BIN)/python -m benchmarks.surrogates

clean:  ## Remove what make built
	@rm -rf $(VENV) demo .cache .mypy_cache .ruff_cache .pytest_cache
