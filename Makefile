# quickstart, test and lint make what they need: a virtual environment in .venv with everything installed.
PYTHON ?= python3
# The build of torch to install. On a machine with a GPU: make quickstart TORCH=torch
TORCH ?= $(shell grep '^torch==' constraints.txt)
TORCH_LOWEST ?= $(shell grep '^torch==' constraints-lowest.txt)
BIN := .venv/bin

.PHONY: quickstart demo test test-lowest lint

quickstart: .venv/.installed
	HF_HUB_OFFLINE=1 $(BIN)/python recipes/quickstart.py --configs recipes/configs/quickstart

# The page on http://127.0.0.1:7860, from what the quickstart left
demo: .venv/.installed
	HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false $(BIN)/python spaces/query_to_ad/app.py

test: .venv/.installed
	$(BIN)/python -m pytest -q -n 2 --dist worksteal

# With the oldest versions that pyproject.toml allows
test-lowest: .venv-lowest/.installed
	.venv-lowest/bin/python -m pytest -q -n 2 --dist worksteal

lint: .venv/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check --quiet .
	$(BIN)/mypy

# $(1): the environment's folder, $(2): its constraints, $(3): its build of torch
define install
	$(PYTHON) -m venv $(1)
	$(1)/bin/pip install --quiet --upgrade pip
	grep -v '^torch==' $(2) > $(1)/constraints.txt
	$(1)/bin/pip install --quiet -c $(1)/constraints.txt '$(3)'
	$(1)/bin/pip install --quiet -c $(1)/constraints.txt -e '.[quickstart,test]'
	touch $@
endef

.venv/.installed: pyproject.toml constraints.txt
	$(call install,.venv,constraints.txt,$(TORCH))

.venv-lowest/.installed: pyproject.toml constraints-lowest.txt
	$(call install,.venv-lowest,constraints-lowest.txt,$(TORCH_LOWEST))
