# `make demo`, `make downstream`, `make test` and `make docs` do all of their own set-up in .venv; PYTHON picks the interpreter (3.11 or newer),
# CUDA the extra that brings DALI: cuda12 where nvidia-smi tells of a driver before 580, else cuda13.
PYTHON ?= python3
DRIVER := $(shell nvidia-smi --query-gpu=driver_version --format=csv,noheader 2> /dev/null | head -n 1 | cut -d . -f 1)
CUDA ?= $(if $(filter $(shell seq 1 579),$(DRIVER)),cuda12,cuda13)
VENV := .venv
BIN := $(VENV)/bin
LOWEST := .venv-lowest
# As many processes as cores, at most four: each takes 1 to 2 GB, for moments 5, with the processes that its tests start.
PYTEST := python -m pytest --numprocesses logical --maxprocesses 4 --dist loadfile

.PHONY: demo downstream test test-long test-lowest lint types docs clean

# PyPI's torch is built for CUDA 13. uv finds the builds for other versions.
$(VENV)/.installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
ifeq ($(CUDA),cuda12)
	$(BIN)/python -m pip install --quiet uv
	$(BIN)/uv pip install --quiet --python $(BIN)/python --torch-backend cu126 torch torchvision
endif
	$(BIN)/python -m pip install --quiet --editable '.[dev,$(CUDA)]'
	touch $@

# The oldest version of every package that pyproject.toml allows.
$(LOWEST)/.installed: pyproject.toml
	$(PYTHON) -m venv $(LOWEST)
	$(LOWEST)/bin/python -m pip install --quiet uv
	$(LOWEST)/bin/uv pip install --quiet --python $(LOWEST)/bin/python --resolution lowest-direct --editable '.[dev,$(CUDA)]'
	touch $@

demo: $(VENV)/.installed
	$(BIN)/python tools/demo.py

downstream: $(VENV)/.installed
	$(BIN)/python tools/demo.py --until-trained
	$(BIN)/python tools/demo_downstream.py

test: lint types
	$(BIN)/$(PYTEST)

# The tests that take minutes, which `make test` leaves out.
test-long: $(VENV)/.installed
	$(BIN)/$(PYTEST) -m long

# The suite with the oldest packages, then every check of the checklist, in the small and compiled. Shapes are not checked at
# run time: torch 2.11 cannot compile what jaxtyping does for that.
test-lowest: $(LOWEST)/.installed
	$(LOWEST)/bin/$(PYTEST) -o addopts="-ra --strict-markers -m 'not long'"
	$(LOWEST)/bin/python benchmarks/checklist.py $(LOWEST)/checklist --tiny

lint: $(VENV)/.installed
	$(BIN)/ruff check
	$(BIN)/ruff format --check

types: $(VENV)/.installed
	$(BIN)/mypy

# The site is site/index.html. The variable silences a notice of the theme.
docs: $(VENV)/.installed-docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

$(VENV)/.installed-docs: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --editable '.[docs]'
	touch $@

clean:
	rm -rf $(VENV) $(LOWEST) runs/demo data/demo site
