# make run    the quickstart: installs into .venv, trains the digits in runs/digits_mlp
# make test   the test suite            make lint   ruff and mypy
# make docs   the API from the docstrings, into build/docs
# make dist   a source distribution and a wheel, into dist; the wheel learns the digits
# make clean  removes .venv, compiled kernels and caches, never runs/

PYTHONS := $(PYTHON) python3.12 python3.11 python3.13 python3 python
BIN := .venv/bin
PAGES := dst '!dst.network' dst.config dst.layers dst.methods dst.data dst.models
INSTALL := $(BIN)/python -m pip install --disable-pip-version-check -qq --editable

.PHONY: run test lint docs dist clean

run: .venv/.run
	$(BIN)/python -m dst.main --config=configs/digits_mlp.py

test: .venv/.test
	$(BIN)/python -m pytest -q -n 2 --dist loadfile --no-loadscope-reorder $(ARGS)

lint: .venv/.lint
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# What pdoc cannot resolve in annotations only lacks a link.
docs: .venv/.lint
	$(BIN)/python -W error -W 'ignore:Error parsing type annotation' -m pdoc -o build/docs $(PAGES)

# The wheel is built from the source distribution; it lies before the checkout on the path.
dist: .venv/.lint
	rm -rf dist build/wheel build/wheel_run
	$(BIN)/python -m build --no-isolation
	$(BIN)/python -m pip install --disable-pip-version-check -qq --no-deps --target build/wheel dist/*.whl
	cd build/wheel && PYTHONPATH=. ../../$(BIN)/python -m dst.main --config=../../configs/digits_mlp.py --workdir=../wheel_run --config.execution=sparse --config.epochs=10

clean:
	rm -rf .venv build dist dst/connections/backends/native/*.so *.egg-info .hypothesis .mypy_cache .pytest_cache .ruff_cache

# A name on the PATH may be another tool's stub, and Debian's Python may lack venv: try each.
.venv/.python:
	@for python in $(PYTHONS); do \
	  if $$python -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; \
	  then $$python -m venv .venv && touch $@; exit; fi; \
	done; \
	echo 'dst: Python 3.11 or newer (with venv) is needed; name one with make PYTHON=/path/to/python.' >&2; \
	exit 1

.venv/.run: .venv/.python pyproject.toml $(wildcard dst/connections/backends/native/*.cc dst/connections/backends/native/*.h)
	@echo 'Installing into .venv, about a minute ...'
	@$(INSTALL) . && touch $@

.venv/.test: .venv/.run
	@echo 'Installing what the tests need ...'
	@$(INSTALL) '.[test]' && touch $@

# Everything at once: several installations would compile the kernels as often.
.venv/.lint: .venv/.python pyproject.toml $(wildcard dst/connections/backends/native/*.cc dst/connections/backends/native/*.h)
	@echo 'Installing what the tests need, ruff, mypy, pdoc and build ...'
	@$(INSTALL) '.[test,lint,docs,dist]' && touch .venv/.run .venv/.test $@
