# Two commands matter: `make demo` and `make test`. Every path is relative, so the checkout may lie anywhere.

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.NOTPARALLEL:
.PHONY: help demo test faults fuzz clean FORCE

SUITABLE := import ensurepip, sys; raise SystemExit(sys.version_info < (3, 11))
ifeq ($(origin PYTHON),undefined)
PYTHON := $(shell for python in python3.13 python3.12 python3.11 python3 python; do \
	"$$python" -c '$(SUITABLE)' >/dev/null 2>&1 && { echo "$$python"; exit; }; done)
endif
PYTEST_ARGS ?= -n 2
MINUTES ?= 60
TIMES ?= 40

# What the caller's environment says about other installations must not reach this one.
unexport PYTHONPATH PYTHONHOME PIP_USER PIP_TARGET PIP_PREFIX

# Without a home folder of one's own (HOME empty, a service account) the demo's data stay in the checkout.
ifneq ($(shell test -n "$$HOME" && test -w "$$HOME" && echo yes),yes)
export HOME := $(CURDIR)/.make/home
endif

help:  ## show this help
	@sed -n 's/^\([a-z]*\):.*## /\1\t/p' Makefile | while IFS="$$(printf '\t')" read -r name text; do \
		printf '  make %-6s %s\n' "$$name" "$$text"; done
	@echo '  Variables: PYTHON=python3.12 (3.11 or later), PYTEST_ARGS="-n 2 -k upsert"; of faults: MINUTES=60 SEED=any; of fuzz: TIMES=40'

demo: .venv/.demo  ## install into .venv and run the main job on real text, in embedded servers
	.venv/bin/vectorkeep demo

test: .venv/.dev  ## install into .venv and run the linters, the type checker and all tests
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy
	.venv/bin/pytest $(PYTEST_ARGS)

faults: .venv/.dev  ## kill, cut and starve all servers and workers for MINUTES=60, with SEED=…: nothing may be lost
	.venv/bin/python -m tests.faults.harness --minutes $(MINUTES) $(if $(SEED),--seed "$(SEED)") $(FAULTS_ARGS)

fuzz: .venv/.dev  ## try TIMES=40 times as many inputs of any kind as the tests do: each is refused or read back equal
	VECTORKEEP_TEST_FUZZ=$(TIMES) .venv/bin/pytest $(PYTEST_ARGS) tests/fuzz

clean:  ## remove .venv and what the tools left
	rm -rf .venv .make .mypy_cache .ruff_cache .pytest_cache .hypothesis build dist
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

.venv/.demo: .venv/.made pyproject.toml
	.venv/bin/python -m pip install --quiet --disable-pip-version-check -e '.[embedded,wordllama]'
	@touch $@

.venv/.dev: .venv/.made pyproject.toml
	.venv/bin/python -m pip install --quiet --disable-pip-version-check -e '.[dev]'
	@touch .venv/.demo $@

.venv/.made: .make/made-with
	@"$(PYTHON)" -c '$(SUITABLE)' || { \
		echo 'no suitable Python: found "$(PYTHON)", needed is 3.11 or later with venv;' \
			'install one, or name it: make PYTHON=/path/to/python3' >&2; exit 1; }
	rm -rf .venv
	"$(PYTHON)" -m venv .venv
	@touch $@

# A virtual environment works with one Python in one place: with another it is made again.
.make/made-with: FORCE
	@mkdir -p .make/home
	@echo "$(PYTHON) $$PWD" | cmp -s - $@ || echo "$(PYTHON) $$PWD" >$@
