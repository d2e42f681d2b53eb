# `make profile` and `make test` do everything on a machine with Python 3.11 or newer.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: setup profile test check docs clean

setup: $(READY)

# The mark is written last: after a failure half-way the next call starts over with this step.
$(READY): pyproject.toml constraints.txt scripts/setup
	PYTHON="$(PYTHON)" sh scripts/setup $(VENV)
	touch $(READY)

profile: setup
	$(BIN)/skipcal profile -o runs/smollm2-135m-instruct.json --overwrite
	$(BIN)/skipcal plot runs/smollm2-135m-instruct.json -o runs/smollm2-135m-instruct.png --overwrite

test: setup
	PATH="$(CURDIR)/$(BIN):$$PATH" sh scripts/test

check: setup
	PATH="$(CURDIR)/$(BIN):$$PATH" sh scripts/check
	PATH="$(CURDIR)/$(BIN):$$PATH" sh scripts/typecheck

docs: setup
	$(BIN)/sphinx-build -q -W --keep-going -n docs build/docs
	@echo "wrote build/docs/index.html"

clean:
	rm -rf $(VENV) runs build dist *.egg-info
