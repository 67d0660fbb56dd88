# Tallygate. `make help` lists what there is; `make run` is all that is needed to try it.
# Needs: Python 3.11 or later with venv. Everything else is installed into .venv, versions and
# hashes locked in requirements/.

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
PIP    := $(BIN)/python -m pip install --quiet --quiet --disable-pip-version-check
LOCK   := uv pip compile --quiet --universal --python-version 3.11 --generate-hashes \
          --no-emit-index-url --no-emit-find-links --custom-compile-command 'make lock'

.DEFAULT_GOAL := help
.PHONY: compile help run test chaos bench load lint lua lock clean

help:  ## This list
	@sed -n 's/^\([a-z]*\):.*## \(.*\)/  make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 14

run: $(VENV)/run.stamp  ## Run everything in this terminal, stores included (ARGS="--gateway-port 9090")
	@exec $(BIN)/tallygate up $(ARGS)

# Whole processes under load are tested one at a time: beside other tests they would be measured
# with half a machine. Everything else has servers of its own for each of the two runners.
ALONE := $(wildcard tests/acceptance tests/faults tests/browser tests/integration/up)

test: $(VENV)/dev.stamp  ## Run all tests (ARGS="tests/unit -k period")
ifdef ARGS
	@$(BIN)/pytest $(ARGS)
else
	@failed=0; \
	$(BIN)/pytest --numprocesses 2 --dist loadfile $(addprefix --ignore=,$(ALONE)) tests || failed=$$?; \
	$(BIN)/pytest $(ALONE) || failed=$$?; \
	exit $$failed
endif

chaos: $(VENV)/dev.stamp  ## Kill and wipe parts under load, and count (ROUNDS=100 SEED=1 ARGS="--faults flushall")
	@$(BIN)/python -m tests.faults --rounds $(or $(ROUNDS),100) --seed $(or $(SEED),1) $(ARGS)

compile: $(VENV)/dev.stamp  ## Compile the gateway's hot modules: optional, needs gcc (make clean undoes it)
	@$(BIN)/python tools/compile.py

bench: $(VENV)/bench.stamp  ## Compare with Traefik, nginx + Lua and Envoy (ARGS="--quick", ARGS=--help)
	@$(BIN)/python -m benchmarks.compare $(ARGS)

load: $(VENV)/bench.stamp  ## Play scenarios with Locust and check every 429 (ARGS="--scenarios burst")
	@$(BIN)/python -m benchmarks.loadtest $(ARGS)

lint: $(VENV)/dev.stamp lua  ## Check style, types, imports and Lua
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@$(BIN)/lint-imports

lua: $(VENV)/dev.stamp
	@$(BIN)/python tools/lua_check.py

lock: $(VENV)/dev.stamp  ## Write requirements/*.txt anew (UPGRADE=1: with the newest versions)
	@$(BIN)/$(LOCK) $(if $(UPGRADE),--upgrade) pyproject.toml requirements/run.in \
	  --extra embedded --output-file requirements/run.txt
	@$(BIN)/$(LOCK) $(if $(UPGRADE),--upgrade) pyproject.toml requirements/dev.in \
	  --extra embedded --extra dev --output-file requirements/dev.txt
	@$(BIN)/$(LOCK) $(if $(UPGRADE),--upgrade) pyproject.toml requirements/image.in \
	  --output-file requirements/image.txt
	@$(BIN)/$(LOCK) $(if $(UPGRADE),--upgrade) requirements/bench.in --output-file requirements/bench.txt
	@! grep -n '://' requirements/*.txt

clean:  ## Remove .venv and caches; the data in .tallygate stay
	@find gateway \( -name '*.so' -o -name '*__mypyc*' \) -delete; rm -f *__mypyc*
	@rm -rf $(VENV) build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache

# A stamp is newer than what it was made from, so a second `make` has nothing to do.
$(VENV)/created.stamp:
	@command -v $(PYTHON) >/dev/null || { \
	  echo "make: no $(PYTHON): install Python 3.11 or later (Debian: apt install python3 python3-venv)" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "make: $$($(PYTHON) --version) is too old, 3.11 or later is needed: make PYTHON=/path/to/python3.11" >&2; exit 1; }
	@$(PYTHON) -c 'import venv, ensurepip' 2>/dev/null || { \
	  echo "make: $(PYTHON) comes without venv (Debian: apt install python3-venv)" >&2; exit 1; }
	@echo "making $(VENV)"
	@$(PYTHON) -m venv --clear $(VENV)
	@touch $@

# Two stamps: `make run` does not wait for the tools of `make test`.
$(VENV)/run.stamp: $(VENV)/created.stamp requirements/run.txt pyproject.toml
	@echo "installing into $(VENV), which takes a minute and is done once"
	@$(PIP) --require-hashes -r requirements/run.txt
	@$(PIP) --no-deps --no-build-isolation --editable .
	@touch $@

$(VENV)/dev.stamp: $(VENV)/run.stamp requirements/dev.txt
	@echo "installing the development tools into $(VENV)"
	@$(PIP) --require-hashes -r requirements/dev.txt
	@touch $@

# What cannot be installed is left out of the comparison: not every platform has wheels of it.
$(VENV)/bench.stamp: $(VENV)/dev.stamp requirements/bench.txt
	@echo "installing what is compared with into $(VENV)/bench"
	@$(PYTHON) -m venv --clear $(VENV)/bench
	@$(VENV)/bench/bin/python -m pip install --quiet --quiet --disable-pip-version-check \
	  --require-hashes -r requirements/bench.txt || echo "going on without"
	@touch $@
