# A few verbs, the same on a laptop and in CI. Everything they need is made on first use under .tools/ and .venv/.

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
MAKEFLAGS += --no-builtin-rules --no-print-directory

PYTHON ?= python3
PYTEST_ARGS ?=
BENCH ?=
UV_VERSION := 0.13.9

UV := .tools/bin/uv
VENV := .venv
RUN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

# Some machines trust a certificate authority of their own, which uv only sees in the system's store.
export UV_SYSTEM_CERTS ?= $(if $(wildcard /etc/ssl/certs/ca-certificates.crt),1,0)
export UV_PYTHON_DOWNLOADS := never
export UV_PROJECT_ENVIRONMENT := $(VENV)
# The interpreter itself, not a launcher of that name: uv remakes an environment whose interpreter seems to change.
BASE_PYTHON = $(PYTHON) -c 'import os, sys; print(os.path.realpath(sys._base_executable))'
# A shell with another environment active must not redirect ours.
unexport VIRTUAL_ENV PYTHONPATH PYTHONHOME

.PHONY: help
help: ## Say what can be done here
	@grep -hE '^[a-z-]+:.*## ' Makefile | sed -E 's/^([a-z-]+):.*## (.*)/  make \1\t\2/' | expand -t 20
	@printf '\nVariables:\n'
	@printf '  %s\n' 'PYTHON=python3.12     the interpreter to build the environment with (3.11 or newer)' \
	    'PYTEST_ARGS="-k name"  passed on to every pytest call' \
	    'BENCH=packing         one benchmark of tests/bench instead of all' \
	    'CI=true               a lane of tests that had to be skipped is a failure'

.PHONY: quickstart
quickstart: $(INSTALLED) ## Fine-tune a real 135M-parameter model here and talk to it
	@$(RUN)/python manifests/samples/quickstart/make_data.py
	@folder="runs/quickstart/$$(date +%Y%m%d-%H%M%S)"; \
	$(RUN)/finetune run manifests/samples/quickstart/job.yaml --workdir "$$folder"; \
	echo; $(RUN)/finetune chat "$$folder" "$$(cat manifests/samples/quickstart/data/question.txt)" --compare-base

.PHONY: install
install: $(INSTALLED) ## Make .venv with everything in uv.lock

.PHONY: lint
lint: $(INSTALLED) ## Check format, style and who imports whom
	$(RUN)/ruff format --check
	$(RUN)/ruff check
	$(RUN)/lint-imports --no-logo

.PHONY: type
type: $(INSTALLED) ## Check types, strictly
	$(RUN)/mypy

.PHONY: test
test: lint type verify ## Everything that must hold: lint, type, verify, then the tests in lanes
	$(RUN)/python -m tests.lanes $(PYTEST_ARGS)

.PHONY: test-long
test-long: $(INSTALLED) ## The tests that draw at random, with many more draws; the real model under 20 kills (hours)
	FINETUNE_LONG=1 $(RUN)/python -m pytest $$(grep -rl FINETUNE_LONG tests --include='test_*.py') $(PYTEST_ARGS)

.PHONY: generate
generate: $(INSTALLED) ## Write the CRDs, the chart's README and schema, and manifests/base from what they follow from
	$(RUN)/python -m finetune_api.schema manifests/crd
	$(RUN)/python -m helm.generator
	helm="$$($(RUN)/python -m tests.cluster.build helm)"; $(RUN)/python -m helm.generator --helm "$${helm#helm }"

.PHONY: verify
verify: $(INSTALLED) ## Check that uv.lock, the CRDs and the chart are what generation would write
	@$(UV) lock --check --quiet || { echo 'uv.lock does not follow from pyproject.toml: run "$(UV) lock" and commit it.' >&2; exit 1; }
	$(RUN)/python -m finetune_api.schema manifests/crd --check
	$(RUN)/python -m helm.generator --check

.PHONY: bench
bench: $(INSTALLED) ## Measure (tests/bench/README.md says what); BENCH=name for one
	$(UV) sync --locked --all-extras --quiet
	$(RUN)/python -m tests.bench $(BENCH)

.PHONY: cluster-up
cluster-up: $(INSTALLED) ## Start a Kubernetes cluster with two real nodes on this machine, with our images (as root)
	@$(RUN)/python -m tests.cluster up

.PHONY: cluster-down
cluster-down: $(INSTALLED) ## Take it down, with all that it made
	@$(RUN)/python -m tests.cluster down

.PHONY: clean
clean: ## Remove what these verbs made in this folder
	rm -rf .venv .tools dist build .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis
	find operator trainers tests -name __pycache__ -type d -prune -exec rm -rf {} +

# The environment is stamped: it is remade when the lock, the project file or uv changes, and is otherwise free.
$(INSTALLED): uv.lock pyproject.toml $(UV)
	@echo 'Installing the locked packages into $(VENV) (about 6 GB; PyTorch is most of it) ...'
	$(UV) sync --locked --all-extras --python "$$($(BASE_PYTHON))"
	@touch $@

$(UV):
	@$(PREFLIGHT)
	@echo 'Fetching uv $(UV_VERSION) into .tools/ ...'
	@$(PYTHON) -m venv .tools
	@.tools/bin/python -m pip install --quiet --disable-pip-version-check 'uv==$(UV_VERSION)'
	@touch $@

# Checked before anything is fetched, all of it at once: one message instead of one failure after another.
define PREFLIGHT
missing=(); \
if ! command -v $(PYTHON) >/dev/null; then missing+=("Python 3.11 or newer, as '$(PYTHON)' (install python3, or name one: make PYTHON=/path/to/python3.12)"); \
elif ! $(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then \
  missing+=("Python 3.11 or newer: '$(PYTHON)' is $$($(PYTHON) -V 2>&1) (install a newer one and name it: make PYTHON=/path/to/python3.12)"); \
elif ! $(PYTHON) -c 'import ensurepip, venv' 2>/dev/null; then missing+=("Python's venv module (Debian: apt-get install python3-venv)"); fi; \
command -v g++ >/dev/null || missing+=("a C++ compiler (Debian: apt-get install g++)"); \
[ "$$(uname -sm)" = 'Linux x86_64' ] || missing+=("Linux on x86_64: the lock has no packages for $$(uname -sm)"); \
free=$$(df -Pk . | awk 'NR == 2 {print int($$4 / 1048576)}'); \
[ "$$free" -ge 8 ] || missing+=("8 GB of free disk here: there are $$free"); \
if [ $${#missing[@]} -gt 0 ]; then echo 'This machine lacks:' >&2; printf '  - %s\n' "$${missing[@]}" >&2; exit 1; fi
endef
