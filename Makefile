# make setup, make demo, make check, make test; `make` alone lists the targets.
#
#   PYTHON=python3.12              the interpreter to build .venv with (default: the first of 3.13, 3.12, 3.11, python3 that works)
#   TORCH_INDEX=URL                one more wheel index for torch, e.g. PyTorch's CPU index (the default Linux wheel carries CUDA)
#   PIP_ARGS="..."                 anything else for pip
#   CORPUS=PATH                    make demo: train on your own text instead of the text found on this machine

SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.PHONY: help setup check test deep suite compiled lint style types slurm browser demo docs scripts contract lock wheel clean

VENV := .venv
PY := $(VENV)/bin/python
PYTHON ?=
TORCH_INDEX ?=
PIP_ARGS ?=
export CORPUS

PIP_INSTALL = -m pip install --retries 10 $(if $(TORCH_INDEX),--extra-index-url "$(TORCH_INDEX)") $(PIP_ARGS)
PACKAGES := $(sort $(wildcard */__init__.py))
# pip's lines as one that is renewed on a terminal, and as few in a log: what it does takes minutes.
SHOW_PIP = n=0; while read -r what name rest; do case "$$what" in \
    Collecting) n=$$((n + 1)); line="package $$n: $${name%%;*}";; Downloading) line="downloading $${name\#\#*/} $$rest";; \
    Installing) line="unpacking $$n packages";; *) continue;; esac; \
    if [ -t 1 ]; then printf '\r\033[K%s' "$$line"; elif [[ "$$what$$((n % 25))$$rest" =~ ^Inst|^Coll.*ing1'('|[0-9]{3}.*MB|GB ]]; then echo "$$line"; fi; \
  done; if [ -t 1 ]; then printf '\r\033[K'; fi
# The stamp's name holds what the installation depends on, so an unchanged tree needs no look at pip.
STAMP = $(VENV)/.installed-$(shell { echo "$(CURDIR) $(PACKAGES)"; cat setup.py pyproject.toml constraints.txt; } | cksum | cut -d' ' -f1)

help:  ## list the targets
	@sed -n 's/^\([a-z]*\):.*## /\1\t/p' $(firstword $(MAKEFILE_LIST)) | expand -t 10

setup: $(STAMP)  ## make .venv and install the project with its locked dependencies

$(STAMP):
	@python=""; \
	for candidate in $(or $(PYTHON),python3.13 python3.12 python3.11 python3); do \
	  if "$$candidate" -c 'import ensurepip, sys, venv; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; \
	  then python="$$candidate"; break; fi; \
	done; \
	if [ -z "$$python" ]; then \
	  echo "error: $(if $(PYTHON),PYTHON=$(PYTHON) does not run as,PATH has no) Python 3.11 or newer with venv;" \
	    "install one (Debian, Ubuntu: apt-get install python3 python3-venv)" \
	    "or name it with PYTHON=/path/to/python3.12" >&2; exit 2; \
	fi; \
	"$(PY)" -c 'import pip' >/dev/null 2>&1 || { echo "$(VENV): $$("$$python" --version)"; "$$python" -m venv --clear "$(VENV)"; }
	@echo "$(VENV): installing $$(grep -c == constraints.txt) packages at most, torch among them: 2 to 5 minutes"
	@if "$(PY)" -c 'import sys; sys.exit(sys.version_info >= (3, 12))'; then \
	  echo "megatron-core: its sources run on Python 3.11, its metadata ask for 3.12; built here with --ignore-requires-python"; \
	  "$(PY)" $(PIP_INSTALL) --quiet --no-deps --ignore-requires-python "$$(grep '^megatron-core==' constraints.txt)"; fi
	@for attempt in 1 2 3; do \
	  if PYTHONUNBUFFERED=1 "$(PY)" $(PIP_INSTALL) --progress-bar off -e '.[dev]' -c constraints.txt | { $(SHOW_PIP); }; \
	  then break; fi; \
	  if [ $$attempt = 3 ]; then echo "error: pip could not install the dependencies; see its message above" >&2; exit 1; fi; \
	  echo "pip failed (attempt $$attempt of 3); trying again in 10 s" >&2; sleep 10; \
	done
	@rm -f "$(VENV)"/.installed-*; touch "$@"

lint: style types  ## ruff and mypy

style: setup
	"$(PY)" -m ruff check .
	"$(PY)" -m isort --check --quiet $(PACKAGES:/__init__.py=) tests benchmarks docs *.py

types: setup
	"$(PY)" -m mypy
	MYPYPATH=.:benchmarks:benchmarks/gpu "$(PY)" -m mypy --cache-dir .mypy_cache/benchmarks \
	  --explicit-package-bases --follow-imports silent --ignore-missing-imports --no-warn-unused-ignores \
	  $$(git ls-files 'benchmarks/*.py')

check: style  ## two minutes: lint, types of what changed, the rules of the house, the pages, every command's help and examples
	changed=$$(git diff --name-only --diff-filter=d HEAD -- 'megatron_sov/*.py' 'tokenizer/*.py' 'data_prep/*.py' 'layout_proof/*.py' 2>/dev/null); \
	[ -z "$$changed" ] || "$(PY)" -m mypy $$changed
	OMP_NUM_THREADS=1 "$(PY)" -m pytest -q tests/test_architecture.py tests/test_docs.py tests/test_help.py

slurm:  ## install Slurm's daemons for tests/operate/slurm, where root can do it on Debian or Ubuntu
	@tests/operate/slurm/install.sh

browser:  ## install Chromium for the tests that open pages in a browser, where root can do it on Debian
	@tests/base/pages/install.sh

test: style  ## lint, and beside mypy the tests of tier 1 (tests/tiers.py); installs nothing, asks no index
	$(MAKE) -j 2 types suite
	@"$(PY)" tests/releases.py

# What takes longest comes first, and what takes shortest last: then no fork of pytest waits long for the others.
LONGEST := $(addprefix tests/,operate/slurm e2e benchmarks layouts te_double commands engine post infer train \
  convert proof eval serve bench publish model operate checkpoint judge test_readme.py test_own_code.py test_wheel.py \
  tokenizer data_prep layout_proof)
# What is freed goes back to the system at once: a tenth of a process's memory.
FREED_AT_ONCE := MALLOC_ARENA_MAX=1 MALLOC_TRIM_THRESHOLD_=131072 MALLOC_MMAP_THRESHOLD_=131072
# On two cores four tests at a time, since many wait for what they have killed, or for a server.  A plugin that no test asks for is an
# import more, and that of logging a third of what a small test takes.
PYTEST = "$(PY)" -m pytest -p tests.forks --forks 4 -p no:anyio -p no:logging --durations 25

# Hundreds of processes import the packages: they are compiled once, not by each where the environment forbids to keep what is compiled.
compiled: setup
	"$(PY)" -m compileall -q $(PACKAGES:/__init__.py=)
	"$(PY)" tests/rewrite_asserts.py

suite: compiled
	$(FREED_AT_ONCE) OMP_NUM_THREADS=1 "$(PY)" tests/made_once.py $(PYTEST) $(LONGEST) tests

deep: slurm browser compiled  ## tier 2: real Slurm, browser, every layout, kills, larger models; PART=N/COUNT: some of the files
	$(FREED_AT_ONCE) OMP_NUM_THREADS=1 "$(PY)" tests/made_once.py $(PYTEST) -m deep $(if $(PART),--part $(PART))

demo: setup  ## raw text to a trained, converted and judged model on this machine, minutes on two cores
	"$(PY)" demo.py $${CORPUS:+--corpus "$$CORPUS"}

docs: setup  ## renew the pages that are made from the code, and build the site: site/index.html
	"$(PY)" docs/generate_config.py
	"$(PY)" docs/generate_options.py
	"$(PY)" docs/generate_recipes.py
	"$(PY)" docs/generate_results.py
	"$(PY)" docs/generate_house.py
	"$(PY)" docs/generate_index.py
	NO_MKDOCS_2_WARNING=1 "$(PY)" -m mkdocs build --strict --quiet
	@echo "site/index.html: $$(find site -name '*.html' | wc -l) pages"

scripts: setup  ## renew slurm/scripts from slurm/chains
	rm -rf slurm/scripts
	for chain in slurm/chains/*.yaml; do \
	  name=$$(basename "$$chain" .yaml); "$(PY)" -m megatron_sov submit chain "$$name" --scripts "slurm/scripts/$$name"; \
	done

contract: setup  ## renew megatron_sov/operate/contract.json: signatures of megatron-core, Transformer Engine, vLLM, torch
	"$(PY)" tests/te_double/contract.py

# torch moves by hand (edit its line first): its builds differ per index, and it pins the CUDA libraries that come with it.
# megatron-core moves with its line in setup.py.
lock: setup  ## renew constraints.txt: newest versions that fit setup.py, in a fresh environment; torch stays
	rm -rf build/lock
	"$(PY)" -m venv build/lock
	build/lock/bin/python $(PIP_INSTALL) --quiet --no-deps --ignore-requires-python "$$(grep -o 'megatron-core==[^"]*' setup.py)"
	build/lock/bin/python $(PIP_INSTALL) --quiet '.[dev]' "$$(grep '^torch==' constraints.txt)"
	{ grep '^#' constraints.txt | sed "s/^# Locked on .*/# Locked on $$(date +%F)./"; { build/lock/bin/python -m pip freeze --all --exclude pip \
	  --exclude megatron-sov | sed 's/+[a-z0-9.]*$$//' | grep -v -E '^(nvidia|cuda|triton)'; } | sort -f; } > build/constraints.txt
	mv build/constraints.txt constraints.txt
	rm -rf build/lock

wheel: setup  ## build dist/megatron_sov-*.whl
	"$(PY)" -m pip wheel --quiet --no-deps --no-build-isolation --wheel-dir dist .
	@ls dist/*.whl

clean:  ## delete what was built (.venv stays)
	rm -rf build dist site *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -not -path './$(VENV)/*' -prune -exec rm -rf {} +
