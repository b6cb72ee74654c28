# What to run, and how it is set up. `make` alone lists the targets.
#
# Everything goes into .venv. System packages that are missing are installed with apt when
# this runs as root; otherwise the line to run is printed. PYTHON chooses the interpreter.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
ARGS ?=
# The build backend warns that its configuration is young, at every build; errors still show.
PIP := PYTHONWARNINGS=ignore $(BIN)/pip install --quiet --disable-pip-version-check
C_FLAGS := -std=gnu11 -O2 -Wall -Wextra -Wconversion -Werror -fsyntax-only
C_SOURCES := $(wildcard csrc/*.c csrc/*.h csrc/*.S) csrc/build_ext.py

.PHONY: help demo test lint format clean system

help: ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 14

# What the build needs of the system: a compiler, Python's headers and venv.
system:
	@missing=; \
	command -v gcc >/dev/null || missing="$$missing gcc libc6-dev"; \
	[ -e /usr/include/linux/kvm.h ] || missing="$$missing linux-libc-dev"; \
	command -v $(PYTHON) >/dev/null || missing="$$missing python3 python3-venv python3-dev"; \
	if command -v $(PYTHON) >/dev/null; then \
		$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || missing="$$missing python3-venv"; \
		$(PYTHON) -c 'import os, sysconfig; os.stat(sysconfig.get_path("include") + "/Python.h")' \
			2>/dev/null || missing="$$missing python3-dev"; \
	fi; \
	[ -z "$$missing" ] && exit 0; \
	if [ "$$(id -u)" = 0 ]; then \
		apt-get -qq update && DEBIAN_FRONTEND=noninteractive apt-get -qq install -y $$missing; \
	else \
		echo "missing system packages; run: sudo apt-get install$$missing" >&2; exit 1; \
	fi
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "Python 3.11 or newer is needed; name one with PYTHON=" >&2; exit 1; }

$(VENV)/.python: | system
	@$(PYTHON) -m venv $(VENV)
	@$(PIP) --upgrade 'pip>=25.1'
	@touch $@

$(VENV)/.run: pyproject.toml $(C_SOURCES) | $(VENV)/.python
	@$(PIP) --editable .
	@touch $@

$(VENV)/.test $(VENV)/.lint: $(VENV)/.%: pyproject.toml $(VENV)/.run
	@$(PIP) --group $*
	@touch $@

demo: $(VENV)/.run ## set up, then run the main job on this machine's KVM
	@$(BIN)/kvmring demo $(ARGS)

test: $(VENV)/.test ## set up, then run the tests (ARGS= for pytest)
	@$(BIN)/python -m pytest $(ARGS)

lint: $(VENV)/.lint ## ruff, mypy --strict, clang-format, and our C with -Werror
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check --quiet . || { echo "run: make format" >&2; exit 1; }
	@$(BIN)/mypy
	@$(BIN)/clang-format --dry-run --Werror csrc/*.[ch] tests/c/*.[ch]
	@for f in $(filter-out csrc/buffer.c csrc/kvmring.prelude.c,$(wildcard csrc/*.c)); do \
		gcc $(C_FLAGS) $$f || exit 1; done
	@gcc $(C_FLAGS) -I$$($(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("include"))') \
		csrc/buffer.c

format: $(VENV)/.lint ## write Python and C in the project's style
	@$(BIN)/ruff check --fix --quiet . || true
	@$(BIN)/ruff format --quiet .
	@$(BIN)/clang-format -i csrc/*.[ch] tests/c/*.[ch]

clean: ## remove .venv and what was built
	@rm -rf $(VENV) build dist kvmring/*.so *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
