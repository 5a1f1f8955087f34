# The Python environment lives in .venv, Blender's own in .venv-blender (bpy wants numpy < 2).
PYTHON ?= python3
BIN := .venv/bin
SLURM_PACKAGES := slurmctld slurmd slurm-client munge
BLENDER_PACKAGES := libegl1 libgl1 libxi6 libxxf86vm1 libxfixes3 libxkbcommon0 libsm6 libxrender1

.PHONY: help install system blender demo test check doctor bench clean
help:
	@grep -hE '^## ' $(MAKEFILE_LIST) | sed 's/^## //'

## make install   torch, accelerate, deepspeed and all else into .venv
install: .venv/.installed
.venv/.installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "error: $$($(PYTHON) --version) is too old; make PYTHON=<3.11 or newer>" >&2; exit 2; }
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

# System packages: a C++ compiler for DeepSpeed's CPU op and the libraries that Blender links to.
## make system    the Debian packages that are missing (apt, as root or through sudo)
system:
	@sh demo/system_packages.sh $(PYTHON) $(BLENDER_PACKAGES)

## make blender   Blender as a Python module in .venv-blender, unless a blender is on the PATH
blender: .venv-blender/.installed
.venv-blender/.installed: constraints-blender.txt
	@sh demo/install_blender.sh $(PYTHON)

## make demo      real objects -> renders -> shards -> stage 1 -> stage 2 -> distill -> GLB and report
demo: system
	@$(MAKE) --no-print-directory -j2 install blender
	$(BIN)/python demo/run.py

## make test      all tests that need no GPU; among them some on a SLURM cluster of this machine alone
test:
	@sh demo/system_packages.sh $(PYTHON) $(BLENDER_PACKAGES) $(SLURM_PACKAGES)
	@$(MAKE) --no-print-directory -j2 install blender
	$(BIN)/python -m pytest -m "not gpu" -n 2 --dist loadfile --no-loadscope-reorder --durations=40

## make check     lint, types and the fast tests
check: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy conf data models train distill monitor demo doctor study
	$(BIN)/shellcheck -x slurm/*.sh slurm/*.sbatch slurm/site.env demo/*.sh
	$(BIN)/python -m pytest -m "not gpu and not slow" -q

## make doctor    what this machine has and lacks, with remedies
doctor: install
	@$(BIN)/python doctor/run.py

## make bench     ratios against named baselines, measured in one run, and the aims on an H100 where there is one
bench: install
	@status=0; for script in tests/benchmarks/bench_*.py; do echo "== $$script"; $(BIN)/python $$script || status=1; done; exit $$status

## make clean     remove runs; keep environments
clean:
	rm -rf runs outputs
