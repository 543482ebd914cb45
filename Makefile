# make demo   sets everything up and runs the main job on this machine's processors
# make test   sets everything up and passes lint, types and tests
# make quick  lint, types and the tests that start no processes of their own: a few minutes, for the hand that edits
# PYTHON=/path/to/python3.12 chooses the interpreter that .venv is made with; it must be 3.11 or newer.

SHELL := /bin/bash
BIN := .venv/bin
DATA := data/photos.beton
RUN := runs/demo
export PYTHON

.DEFAULT_GOAL := help
.PHONY: help setup demo test quick lint types format clean

help:
	@echo 'make setup    system packages, .venv and pinned versions; a second run installs nothing'
	@echo 'make demo     set-up, then SimCLR on embedded photographs with two ranks: $(RUN)/report.html'
	@echo 'make test     set-up, then lint, types and tests'
	@echo 'make quick    lint, types and the tests that start no processes'
	@echo 'make lint     ruff check and ruff format --check'
	@echo 'make types    mypy'
	@echo 'make format   let ruff rewrite the code'
	@echo 'make clean    delete caches and build leftovers; runs/, data/ and .venv stay'

setup:
	@scripts/setup.sh

demo: setup
	@$(BIN)/python -c 'from pathlib import Path; from dist_contrastive.data.beton import open_dataset; open_dataset(Path("$(DATA)"))' \
		2>/dev/null || $(BIN)/python -m dist_contrastive.pack photos $(DATA)
	$(BIN)/accelerate launch --config_file launch_configs/cpu.yaml -m dist_contrastive.train photos \
		--run-dir $(RUN) --launch.ranks 2 --launch.device cpu --overwrite
	@echo 'The report: $(CURDIR)/$(RUN)/report.html'

# Two at a time, a file's tests one after the other; the longest file first.
test: lint types
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

quick: lint types
	$(BIN)/python -m pytest -m 'not processes' -p no:cacheprovider

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: setup
	$(BIN)/mypy

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	find . -path ./.venv -prune -o -path ./runs -prune -o -name __pycache__ -type d -exec rm -rf {} +
	rm -rf .pytest_cache .ruff_cache .mypy_cache build dist
