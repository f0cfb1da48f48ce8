# A newcomer needs Python 3.11 or newer, make and git. `make help` lists the targets.

BIN := .venv/bin
STAMP := .venv/requirements.lock
# What `make test` runs: no test that needs a program which pip does not install, or much time.
PLAIN := not tools and not slow
# Four processes: most of their time is waiting. Each has its own Redis and SMTP servers.
# `make test PYTEST_ARGS="-n 0 -x tests/unit"` runs less.
PYTEST_ARGS ?= -n 4 --dist worksteal
# The tests start hundreds of processes, each of which would compile the code again.
unexport PYTHONDONTWRITEBYTECODE

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-all faults crash-map soak upgrade containers picture bench lint docs lock audit

help: ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1|\2/p' Makefile | awk -F'|' '{ printf "%-18s %s\n", $$1, $$2 }'

setup: $(STAMP) ## create .venv from requirements.lock, or find it up to date
	@$(if $(filter setup,$(MAKECMDGOALS)),echo ".venv is up to date with requirements.lock ($$($(BIN)/python --version))")

# A checkout touches the lock without changing it, so its content decides.
$(STAMP): requirements.lock
	@if cmp -s requirements.lock $@; then touch $@; exit 0; fi; \
	for python in $(PYTHON) python3 python3.14 python3.13 python3.12 python3.11; do \
	  if $$python -c 'import sys, ensurepip, venv; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then \
	    found=$$python; break; \
	  fi; \
	done; \
	if [ -z "$$found" ]; then \
	  echo "No Python 3.11 or newer with venv and ensurepip was found (Debian: python3-venv)." >&2; \
	  echo "Name one: make setup PYTHON=/path/to/python3" >&2; exit 1; \
	fi; \
	echo "Creating .venv with $$($$found --version) from requirements.lock ..."; \
	$$found -m venv --clear .venv && \
	$(BIN)/python -m pip install -qq --disable-pip-version-check --require-hashes -r requirements.lock && \
	cp requirements.lock $@

demo: setup ## send one code from request to mailbox through real parts; ONCE=1 stops after it, else all stays up
	@$(BIN)/python -m demo $(if $(filter-out 0,$(ONCE)),--once)

# mypy runs beside the tests, and what it says comes after them.
define TEST
@status=0; lint=$$(mktemp); $(MAKE) --no-print-directory lint >$$lint 2>&1 & \
$(BIN)/python -m pytest -m '$(1)' $(PYTEST_ARGS) || status=$$?; \
wait $$! || status=$$?; cat $$lint; rm $$lint; exit $$status
endef

test: setup ## ruff, mypy and every test that needs only Python and what pip installs
	$(call TEST,$(PLAIN))

test-all: setup ## the same, and the tests that need other programs; installs these with apt-get if it can
	@sh tests/support/tools.sh
	$(call TEST,not slow)

faults: setup ## the whole fault suite: real processes are killed, frozen and cut off
	$(BIN)/python -m pytest tests/faults -m "slow or not slow"

crash-map: setup ## break a process at every step of a request, in every way, and draw docs/crash-map.svg; half an hour
	$(BIN)/python -m bench.crash_map run --picture docs/crash-map.svg $(ONLY)

MINUTES ?= 10
soak: setup ## random faults under steady load, then a report: make soak MINUTES=10 SEED=1
	$(BIN)/python -m bench.soak run --minutes $(MINUTES) $(if $(SEED),--seed $(SEED))

upgrade: setup ## two releases side by side under load, then a report: make upgrade OLD=v0.1.0
	@$(if $(OLD),,$(error Name a tag or commit: make upgrade OLD=v0.1.0))$(BIN)/python -m bench.upgrade $(OLD) \
	  $(if $(SEED),--seed $(SEED))

containers: setup ## build the image and try the Compose stack on this host's engine or, as root, on Debian's
	@$(BIN)/python -m bench.containers $(if $(FOLDER),--folder $(FOLDER))

picture: setup ## draw docs/dashboard.png from a soak of long faults; needs Debian's prometheus
	$(BIN)/python -m bench.soak picture docs/dashboard.png $(SECONDS)

bench: setup ## compare the speed with peers; 40 minutes, or 5 with QUICK=1; BARS="l m n" measures only these
	@$(BIN)/python -m bench $(if $(filter-out 0,$(QUICK)),--quick) $(if $(BARS),--bars $(BARS))

lint: setup ## ruff, mypy, and no marks of a merge conflict
	@! git grep -nE '^(<<<<<<<|>>>>>>>) '
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: setup ## write the docs' tables of error codes and settings, from producer/contract.py and .env.example
	$(BIN)/python docs/tables.py

# Only releases at least seven days old: younger ones may be withdrawn, or missing on a mirror. The build backend is in
# the group dev. No host name gets in. The second lock is the part of the first that runs in production.
PRODUCTION := --extra cli --extra worker --extra api --extra flower --extra traces
COMPILE := $(BIN)/uv pip compile pyproject.toml $(PRODUCTION) --universal --python-version 3.11 \
  --generate-hashes --no-header --exclude-newer '7 days' --quiet
lock: setup ## resolve the newest versions that pyproject.toml allows into requirements.lock and requirements.prod.lock
	$(COMPILE) --group dev --upgrade --output-file requirements.lock
	$(COMPILE) --upgrade --constraints requirements.lock --no-annotate --output-file requirements.prod.lock
	@! grep -n '://' requirements.lock requirements.prod.lock

# Run on demand: nobody needs them to work on the code. What bandit would look for, ruff's rules S do in `make lint`. Where
# the advisories cannot be read, pip-audit only skips packages; --strict makes that an error, and it is said plainly.
SBOM := build/sbom.cdx.json
TOOL := $(BIN)/uv tool run --quiet --exclude-newer '7 days'
audit: setup ## write a CycloneDX list of the production packages, and look for known vulnerabilities in them
	@mkdir -p $(dir $(SBOM))
	@PYTHONWARNINGS=ignore $(TOOL) --from 'cyclonedx-bom>=7,<8' cyclonedx-py requirements requirements.prod.lock --pyproject pyproject.toml \
	  --mc-type application --output-reproducible --of JSON -o $(SBOM)
	@echo "The packages of requirements.prod.lock are in $(SBOM)."
	@found=$$($(TOOL) 'pip-audit>=2.9,<3' --strict --disable-pip --require-hashes --progress-spinner off \
	  -r requirements.prod.lock 2>&1); status=$$?; \
	case "$$found" in \
	  *"could not be audited"*|*onnection*) \
	    echo "Not audited: the advisories of PyPI cannot be read from here." >&2; exit 1;; \
	esac; echo "$$found"; exit $$status
