# make demo   sets everything up and runs the main job on this machine's processors
# make serve  exports the run of make demo, indexes its data and answers over HTTP, with a page to try it
# make test   sets everything up and passes lint, types and tests
# make quick  lint, types and the tests that start no processes of their own: a few minutes, for the hand that edits
# PYTHON=/path/to/python3.12 chooses the interpreter that .venv is made with; it must be 3.11 or newer.

SHELL := /bin/bash
BIN := .venv/bin
DATA := data/photos.beton
RUN := runs/demo
PORT := 8000
export PYTHON

.DEFAULT_GOAL := help
.PHONY: help setup demo serve test quick lint types format clean

help:
	@echo 'make setup    system packages, .venv and pinned versions; a second run installs nothing'
	@echo 'make demo     set-up, then SimCLR on embedded photographs with two ranks: $(RUN)/report.html'
	@echo 'make serve    after make demo: its run exported, its data indexed, and a page at http://127.0.0.1:$(PORT)'
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

serve: setup
	@test -e $(RUN)/DONE || { echo 'make demo first: $(RUN) is not there, or not done' >&2; exit 2; }
	@test $(RUN)/export/export.json -nt $(RUN)/DONE || $(BIN)/python -m dist_contrastive.export $(RUN)
	@test $(RUN)_index/index.json -nt $(RUN)/DONE || { rm -rf $(RUN)_index && \
		$(BIN)/python -m dist_contrastive.index $(RUN) $(DATA) $(RUN)_index; }
	$(BIN)/python -m dist_contrastive.serve $(RUN) --index $(RUN)_index --port $(PORT)

# Two at a time, a file's tests one after the other; the longest file first.
test: lint types
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder --max-worker-restart 0

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
