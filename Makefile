# `make demo` and `make test` set themselves up: they need Python 3.11+ only.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
JOBS ?= 2

.PHONY: demo test test-slow lint clean

demo: $(VENV)/.installed-test
	$(BIN)/mmjax train --config configs/clip.py:size=tiny --workdir runs/demo

test: $(VENV)/.installed-test
	$(BIN)/python -m pytest -n $(JOBS) -m "not slow"

# The long tests: compilations for TPU slices, notebooks; then, one by one, those
# of several processes.
test-slow: $(VENV)/.installed-test $(VENV)/.installed-compile
	$(BIN)/python -m pytest -n $(JOBS) -m "slow and not alone"
	$(BIN)/python -m pytest -m "slow and alone"

lint: $(VENV)/.installed-test
	$(BIN)/ruff check .

$(VENV)/.installed-%: setup.py pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -c 'import sys; assert sys.version_info >= (3, 11), \
	  "mmjax needs Python 3.11 or later; run make PYTHON=python3.11"'
	$(BIN)/pip install --quiet --disable-pip-version-check -e ".[$*]"
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info runs
