# Two commands from a bare clone: `make test` and `make race`. Both build .venv first and reuse it afterwards.
PYTHON ?= python3
VENV   ?= .venv
BIN     = $(VENV)/bin
PEERS  ?= .venv-peers
STAMP   = $(VENV)/.installed
OUT    ?= runs/race

# A spinning thread pool turns a 0.05 ms product into a 4 ms one on small machines.
export OMP_WAIT_POLICY = PASSIVE

.DEFAULT_GOAL := help
.PHONY: help install race test lint bench docs gpu architectures peers clean

help:  ## list the commands
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-10s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

install: $(STAMP)  ## create .venv and install curvlib in it

$(STAMP): pyproject.toml constraints.txt
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[race,test,lint,bench]'
	@touch $@

race: $(STAMP)  ## train one network with several optimizers for equal time; report in $(OUT)
	$(BIN)/curvlib race --out $(OUT) $(ARGS)

test: $(STAMP)  ## run the test suite with coverage
	$(BIN)/python -m coverage run -m pytest $(ARGS)
	$(BIN)/python -m coverage report --skip-covered --fail-under=95

lint: $(STAMP)  ## check style, types and the direction of imports
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: $(STAMP)  ## run the asv benchmarks on this commit, quick profile
	$(BIN)/asv machine --yes --config benchmarks/asv.conf.json
	$(BIN)/asv run --config benchmarks/asv.conf.json --quick --show-stderr --python=same $(ARGS)

docs: $(STAMP)  ## build the documentation in docs/_build
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[docs]'
	$(BIN)/python -m sphinx -W -b html docs docs/_build/html

architectures: $(STAMP)  ## install transformers and test its architectures (they are skipped where it is missing)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[architectures]'
	$(BIN)/python -m pytest tests/architectures $(ARGS)

$(PEERS)/.installed: pyproject.toml constraints.txt benchmarks/peers/requirements.txt
	@test -x $(PEERS)/bin/python || $(PYTHON) -m venv $(PEERS)
	$(PEERS)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt \
	    -r benchmarks/peers/requirements.txt -e '.[test]'
	@touch $@

peers: $(PEERS)/.installed  ## install peer libraries in .venv-peers and compare with them (KFAC_PYTORCH=checkout adds that one)
	@test -z '$(KFAC_PYTORCH)' || $(PEERS)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps '$(KFAC_PYTORCH)'
	$(PEERS)/bin/python -m pytest tests/peers $(ARGS)

gpu: $(STAMP)  ## run the tests that need a GPU (says so where there is none)
	@if $(BIN)/python -c 'import torch, sys; sys.exit(not torch.cuda.is_available())'; \
	then $(BIN)/python -m pytest -m gpu $(ARGS); \
	else echo 'no CUDA device here: nothing to run'; fi

clean:  ## remove the virtual environments and everything built
	rm -rf $(VENV) $(PEERS) build dist *.egg-info docs/_build .asv .pytest_cache .mypy_cache .ruff_cache .hypothesis
