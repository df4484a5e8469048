PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
# Python compiles what it imports and keeps it, which is a small part of what is installed, unless
# it was told to keep nothing.
COMPILE = $(if $(PYTHONDONTWRITEBYTECODE),--compile,--no-compile)

.PHONY: demo test lint clean
.PRECIOUS: $(VENV)/installed-%

# Fine-tune a real pretrained model by its biases alone, and compare.
demo: $(VENV)/installed-demo
	$(BIN)/python -m bitfit_fast.demo

# Every test; those that need real data or a GPU say so where they skip.
test: $(VENV)/installed-test
	$(BIN)/python -m pytest -n auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder

lint: $(VENV)/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

$(VENV)/installed-%: setup.py constraints.txt
	$(PYTHON) -c 'import sys; sys.version_info >= (3, 10) or sys.exit("bitfit_fast needs Python 3.10 or newer, and $(PYTHON) is " + sys.version.split()[0])'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check $(COMPILE) -c constraints.txt -e '.[$*]'
	touch $@

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .ruff_cache .mypy_cache
