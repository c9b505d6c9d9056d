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
.PHONY: help install race test nightly lint reproduce bench bench-compare bench-peers history figures quality docs docs-check gpu architectures integrations peers clean

help:  ## list the commands
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-13s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

install: $(STAMP)  ## create .venv and install curvlib in it

$(STAMP): pyproject.toml constraints.txt
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[race,test,lint,bench]'
	@touch $@

race: $(STAMP)  ## train one network with several optimizers for equal time; report in $(OUT)
	$(BIN)/curvlib race --out $(OUT) $(ARGS)

reproduce: $(STAMP)  ## the paper's ConvNet on Fashion-MNIST at reduced size (minutes; ARGS=--resume goes on); results and page
	$(BIN)/python -m benchmarks.reproduce --out benchmarks/results/reproduce-fashion-mnist $(MARK) $(ARGS)
	$(BIN)/python docs/generate_reproduce.py

test: $(STAMP)  ## run the test suite with coverage
	$(BIN)/python -m coverage run -m pytest $(ARGS)
	$(BIN)/python -m coverage report --skip-covered --fail-under=95

nightly: $(STAMP)  ## run the tests that take minutes: long random sequences, many kills, ten thousand bad inputs
	$(BIN)/python -m pytest -m nightly $(ARGS)

lint: $(STAMP)  ## check style, types and the direction of imports
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

ASV = $(BIN)/asv
ASV_CONFIG = --config benchmarks/asv.conf.json

bench: $(STAMP)  ## run the asv benchmarks on what is checked out, once each, and print tables
	$(ASV) machine --yes $(ASV_CONFIG)
	$(ASV) run $(ASV_CONFIG) --quick --show-stderr --python=same --launch-method forkserver $(ARGS)

THRESHOLD ?= 1.3
BENCH     ?= ^inversion\.(Linear|Shared|Network)\.time_(factorize|solve|inversion)
HEAD      ?= HEAD

bench-compare: $(STAMP)  ## compare inversion times with those of commit BASE; fails if one became THRESHOLD times slower
	@test -n '$(BASE)' || { echo 'name a commit: make bench-compare BASE=main~1'; exit 2; }
	$(ASV) machine --yes $(ASV_CONFIG)
	$(BIN)/python -m benchmarks.compare --factor $(THRESHOLD) --bench '$(BENCH)' --show-stderr $(ARGS) $(BASE) $(HEAD)

bench-peers: $(PEERS)/.installed  ## time the steps of curvlib and its peers (KFAC_PYTORCH=, ASDL=: checkouts of those not on the index)
	@$(LOCAL_PEERS)
	$(PEERS)/bin/python -m benchmarks.peers.run --out benchmarks/results/peers $(ARGS)

MARK = $(if $(PROVISIONAL),--provisional)

history: $(STAMP)  ## asv results over some of this repository's commits, in benchmarks/results/asv
	$(BIN)/python -m benchmarks.history $(ARGS)

figures: $(STAMP) $(PEERS)/.installed  ## measure all committed figures again, rewrite the tables; PROVISIONAL=1 on a busy machine
	@$(LOCAL_PEERS)
	$(PEERS)/bin/python -m benchmarks.peers.run --out benchmarks/results/peers $(MARK)
	$(BIN)/python -m benchmarks.growth --out benchmarks/results/growth $(MARK)
	$(BIN)/python -m benchmarks.floors --out benchmarks/results/floors $(MARK)
	$(BIN)/python -m benchmarks.history
	$(BIN)/python -m benchmarks.peers.report
	$(BIN)/python docs/generate_performance.py

quality: $(STAMP)  ## time to a target of all methods on four tasks, on one core (about 80 minutes, goes on where it stopped); page
	taskset -c $(or $(CORE),1) $(BIN)/python -m benchmarks.quality run $(MARK) $(ARGS)

docs: $(STAMP)  ## build the documentation in docs/_build, with asv's pages
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[docs]'
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[encoder]' \
	    || echo 'the weights of the pretrained encoder could not be installed: its page in the gallery has the code alone'
	$(BIN)/python -m sphinx -W --keep-going -E -b html docs docs/_build/html
	$(BIN)/python -m benchmarks.history --publish docs/_build/html/asv

docs-check: docs  ## run the site's doctests, follow its links, look at it in a browser (BROWSER=path of a Chromium)
	$(BIN)/python -m sphinx -W -q -b doctest docs docs/_build/doctest
	$(BIN)/python -m sphinx -W -q -b linkcheck docs docs/_build/linkcheck
	@if $(BIN)/python -c 'import playwright' 2>/dev/null; \
	then $(BIN)/python docs/check_site.py --shots docs/_build/shots $(if $(BROWSER),--browser $(BROWSER)); \
	else echo 'playwright is not installed: the site was not looked at in a browser'; fi

architectures: $(STAMP)  ## install transformers and test its architectures (they are skipped where it is missing)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[architectures]'
	$(BIN)/python -m pytest tests/architectures $(ARGS)

integrations: $(STAMP)  ## install accelerate, Lightning and transformers and train inside them
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[integrations]'
	$(BIN)/python -m pytest tests/integrations $(ARGS)

# Peers that are not on the index: checkouts, or anything else that pip takes.
LOCAL_PEERS = for peer in '$(KFAC_PYTORCH)' '$(ASDL)'; do test -z "$$peer" || \
    $(PEERS)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps "$$peer" || exit 1; done

$(PEERS)/.installed: pyproject.toml constraints.txt benchmarks/peers/requirements.txt
	@test -x $(PEERS)/bin/python || $(PYTHON) -m venv $(PEERS)
	$(PEERS)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt \
	    -r benchmarks/peers/requirements.txt -e '.[test]'
	@touch $@

peers: $(PEERS)/.installed  ## install peer libraries in .venv-peers and compare with them (KFAC_PYTORCH=checkout adds that one)
	@$(LOCAL_PEERS)
	$(PEERS)/bin/python -m pytest tests/peers $(ARGS)

gpu: $(STAMP)  ## run the tests and benchmarks that need a GPU (says so where there is none)
	@if $(BIN)/python -c 'import torch, sys; sys.exit(not torch.cuda.is_available())'; \
	then \
	    extra=$$($(BIN)/python -m benchmarks.gpu --missing) && \
	    { test -z "$$extra" || $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[$$extra]"; } && \
	    $(BIN)/python -m pytest -m gpu && \
	    $(BIN)/python -m benchmarks.gpu $(ARGS); \
	else echo 'no CUDA device here: nothing to run'; fi

clean:  ## remove the virtual environments and everything built
	rm -rf $(VENV) $(PEERS) build dist *.egg-info docs/_build docs/generated .asv .pytest_cache .mypy_cache .ruff_cache .hypothesis
