# `make profile` and `make test` do everything on a machine with Python 3.11 or newer.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

VLLM := .venv-vllm
# The other tests of serving need no vLLM: they are a part of `make test`.
INSIDE_VLLM := $(wildcard tests/serving/test_*in_vllm.py) tests/serving/test_for_gpus.py tests/serving/test_served.py

.PHONY: setup profile test check docs vllm test-vllm clean

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

vllm: $(VLLM)/.ready

$(VLLM)/.ready: pyproject.toml constraints.txt scripts/vllm
	PYTHON="$(PYTHON)" sh scripts/vllm $(VLLM)
	touch $@

test-vllm: vllm
	HF_HUB_OFFLINE=1 $(VLLM)/bin/python -m pytest -q $(INSIDE_VLLM)

docs: setup
	$(BIN)/sphinx-build -q -W --keep-going -n docs build/docs
	@echo "wrote build/docs/index.html"

clean:
	rm -rf $(VENV) $(VLLM) runs build dist *.egg-info
