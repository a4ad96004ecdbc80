# Two commands do it all, on a machine with Python >= 3.11, make and git:
#
#   make quickstart   the main job on the embedded default, environment included
#   make test         the suite, environment included
#
# Both may be run again at any time: the environment is installed once for each state of
# requirements.lock and pyproject.toml. To choose a Python: make PYTHON=python3.12 ...

PYTHON ?= python3
ARGS ?=
BENCH ?= curate

BIN := .venv/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check
STAMP := .venv/.installed-$(shell cat requirements.lock pyproject.toml | cksum | cut -d ' ' -f 1)

.DEFAULT_GOAL := help
.PHONY: help venv quickstart test soak check lint format bench lock clean

help:
	@sed -n 's/^#   make/  make/p' Makefile
	@echo "  make venv | check | soak | lint | format | bench | lock | clean"

venv:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
		echo "sae-ray needs Python 3.11 or newer and '$(PYTHON)' is not: make PYTHON=python3.12 $(MAKECMDGOALS)" >&2; exit 1; }
	@if [ -e $(STAMP) ]; then echo "environment is up to date, nothing to install"; \
	else $(MAKE) --no-print-directory $(STAMP); fi

# The lock is whole, so pip need not look for more (half a minute). torch is pinned by its release
# alone, so pip takes the build that the machine's package index offers: the CPU's or CUDA's, which
# then brings what it needs beside. DeepSpeed comes as source; its kernels are built when first used.
# Compiling the bytecode of all packages would double the time: what is imported here will do.
$(STAMP):
	[ -x $(BIN)/python ] || $(PYTHON) -m venv .venv
	DS_BUILD_OPS=0 $(PIP) --no-compile --no-deps -r requirements.lock
	$(PIP) --no-compile "$$(grep '^torch==' requirements.lock)"
	$(PIP) --no-deps --no-build-isolation -e .
	DS_ACCELERATOR=cpu PYTHONDONTWRITEBYTECODE= $(BIN)/python -c 'import datasets, importlib.util, peft, ray.data, ray.serve, ray.train.torch, ray.tune, sae_lens, scipy.sparse, scipy.stats, sklearn.cluster; from transformers import LlamaForCausalLM, Trainer; from trl import DPOTrainer, SFTTrainer; importlib.util.find_spec("deepspeed") and __import__("deepspeed")'
	@rm -f .venv/.installed-*
	@touch $@

quickstart: venv
	$(BIN)/python jobs/quickstart.py $(ARGS)

test: venv
	$(BIN)/python -m pytest $(ARGS)

# Minutes each: experts of every kind over two workers, and workers and drivers that are killed.
soak: venv
	$(BIN)/python -m pytest -m soak $(ARGS)

bench: venv
	$(BIN)/python jobs/bench.py $(BENCH) $(ARGS)

check: venv lint
	$(BIN)/python -m pyright
	$(BIN)/lint-imports --no-cache
	@! git grep -nIE '(^|[^A-Za-z0-9_.])/(root|home|work|opt|Users)/[A-Za-z]|(index-url|find-links)[ =]|://(pypi|files)\.' \
		-- ':!Makefile' ':!cluster' || { echo "files may not name paths or package hosts of one machine" >&2; exit 1; }

lint: venv
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: venv
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# What torch's CUDA build needs is left out: pip adds it where that build is the one installed.
lock: venv
	echo 'torch==2.13.0' | $(BIN)/uv pip compile pyproject.toml --quiet --extra dev --universal \
		--python-version 3.11 --no-annotate --no-header --constraint - \
		| sed -E "/^(nvidia-|cuda-|triton)/d; s/\+cpu//; s/ ; sys_platform == 'darwin' or sys_platform == 'linux'$$//" \
		> requirements.lock.new
	{ echo "# Every package of the environment: made by 'make lock', installed by 'make venv'."; \
		cat requirements.lock.new; } > requirements.lock
	@rm requirements.lock.new

clean:
	rm -rf .venv build *.egg-info .hypothesis .pytest_cache .ruff_cache
