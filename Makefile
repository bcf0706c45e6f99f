# quickstart, test and lint make what they need: a virtual environment in .venv with everything installed.
PYTHON ?= python3
# The build of torch to install. On a machine with a GPU: make quickstart TORCH=torch
TORCH ?= $(shell grep '^torch==' constraints.txt)
BIN := .venv/bin

.PHONY: quickstart demo test lint

quickstart: .venv/.installed
	HF_HUB_OFFLINE=1 $(BIN)/python recipes/quickstart.py --configs recipes/configs/quickstart

# The page on http://127.0.0.1:7860, from what the quickstart left
demo: .venv/.installed
	HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false $(BIN)/python spaces/query_to_ad/app.py

test: .venv/.installed
	$(BIN)/python -m pytest -q -n 2 --dist loadfile

lint: .venv/.installed
	$(BIN)/ruff check .

.venv/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --upgrade pip
	grep -v '^torch==' constraints.txt > .venv/constraints.txt
	$(BIN)/pip install --quiet -c .venv/constraints.txt '$(TORCH)'
	$(BIN)/pip install --quiet -c .venv/constraints.txt -e '.[quickstart,test]'
	touch $@
