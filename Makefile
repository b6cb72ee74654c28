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

# The labs: emulated hosts with a real KVM. CMD runs there; without it, tests/kvm.
ARCH ?= arm64
CMD ?=
LAB_OPTIONS = $(foreach o,machine kernel modules suite flavour cpus memory cpu timeout,\
	$(if $($(call upper,$o)),--$o '$($(call upper,$o))'))
upper = $(shell echo $1 | tr a-z A-Z)
LAB = $(BIN)/python -m tests.lab $(LAB_OPTIONS)
PML_PACKAGES := bochs bochs-term bochsbios vgabios xorriso isolinux syslinux-common
LAB_PACKAGES := qemu-system-arm qemu-system-x86 gcc-aarch64-linux-gnu libc6-dev-arm64-cross

.PHONY: help demo test test-lab soak lint format clean system lab lab-arm64 lab-x86 lab-pml lab-shell \
	lab-system support-table

help: ## list the targets
	@grep -hE '^[a-z0-9-]+:.*## ' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 14

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

# The labs' own packages; without them, and without root, lab tests are skipped with a reason.
lab-system:
	@dpkg-query -W $(LAB_PACKAGES) >/dev/null 2>&1 || [ "$$(id -u)" != 0 ] || \
		{ apt-get -qq update && DEBIAN_FRONTEND=noninteractive apt-get -qq install -y \
			--no-install-recommends $(LAB_PACKAGES) >/dev/null; }

demo: $(VENV)/.run ## set up, then run the main job: here, or where KVM is missing in a lab
	@$(BIN)/kvmring demo $(ARGS); status=$$?; [ $$status = 3 ] || exit $$status; \
	echo "No usable KVM here: running the demo in the arm64 lab, under emulation." >&2; \
	$(MAKE) --no-print-directory lab ARCH=arm64 CMD='kvmring demo $(ARGS)'

test: $(VENV)/.test lab-system ## set up, then run the tests, and of the labs a short selection
	@$(BIN)/python -m pytest -m "not lab or smoke" $(ARGS)

soak: $(VENV)/.test ## random migrations under a signal flood, for SECONDS=60
	@$(BIN)/python -m tests.soak --seconds $(or $(SECONDS),60) $(ARGS)

test-lab: $(VENV)/.test lab-system ## all of tests/kvm in every lab
	@KVMRING_LAB=1 $(BIN)/python -m pytest tests/lab -m "not pml" $(ARGS)

lab: $(VENV)/.test lab-system ## run CMD='...' on an emulated host: ARCH= SUITE= KERNEL= MODULES= ...
	@$(LAB) --arch $(ARCH) -- $(if $(CMD),'$(subst ','\'',$(CMD))')

lab-arm64: ARCH = arm64
lab-arm64: lab ## the same with ARCH=arm64

lab-x86: ARCH = x86_64
lab-x86: lab ## the same with ARCH=x86_64

lab-pml: LAB_PACKAGES += $(PML_PACKAGES)
lab-pml: ARCH = x86_64
lab-pml: MACHINE = bochs
lab-pml: lab ## the same on Intel VMX with PML, under Bochs: slow

lab-shell: $(VENV)/.test lab-system ## a prompt on an emulated host
	@$(LAB) --arch $(ARCH) --shell

support-table: LAB_PACKAGES += $(PML_PACKAGES)
support-table: $(VENV)/.test lab-system ## run tests/kvm everywhere and write README's table
	@$(BIN)/python -m tests.support

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
