# make transcribe   install into .venv, then transcribe examples/en.flac with the bundled model
# make test         install into .venv with the development tools, then check style, types and behaviour
# make mini         build the small model anew (days on two cores; resumable)

PYTHON ?= $(shell command -v python3.11 || command -v python3)
AUDIO ?= examples/en.flac
VENV := .venv
PIP_INSTALL := $(VENV)/bin/python -m pip install --quiet --quiet --disable-pip-version-check --constraint constraints.txt

.PHONY: help install install-dev transcribe test mini

help:
	@sed -n 's/^# make/make/p' Makefile

install: $(VENV)/.installed
install-dev: $(VENV)/.installed-dev

# A stamp file: repeated makes install nothing until the requirements change.
$(VENV)/.installed: pyproject.toml constraints.txt
	@echo "Installing the package into $(VENV) (once; torch is the largest part, so this takes a few minutes) ..." >&2
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "make needs Python 3.11 or later: make PYTHON=/path/to/python3.11 $(MAKECMDGOALS)" >&2; exit 1; }
	@$(PYTHON) -m venv $(VENV)
	@$(PIP_INSTALL) "$$(grep '^torch==' constraints.txt)"
	@$(PIP_INSTALL) --editable .
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	@echo "Installing the development tools into $(VENV) ..." >&2
	@$(PIP_INSTALL) --editable ".[dev]"
	@touch $@

transcribe: $(VENV)/.installed
	@$(VENV)/bin/diffusion-gemma-asr transcribe $(AUDIO)

test: $(VENV)/.installed-dev
	$(VENV)/bin/ruff check src tests benchmarks
	$(VENV)/bin/ruff format --check --quiet src tests benchmarks
	$(VENV)/bin/mypy
	$(VENV)/bin/python -m pytest -q -m "not slow and not gpu"

mini: $(VENV)/.installed-dev
	PATH="$(CURDIR)/$(VENV)/bin:$$PATH" bash runs/mini.sh
