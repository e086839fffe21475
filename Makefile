# make demo   train four tasks from two starts, merge them, print the table
# make test   everything that a change can break, in five minutes
# make test-all  the sweeps, too: generated cases, kills, full disks
# make docs   the manual as a site, in site/
# make smoke  the workflow of the studies, end to end in minutes
# All set up .venv first. PYTHON=python3.12 make demo takes another interpreter.

PYTHON ?= python3
PY := .venv/bin/python

DEMO := .save_dir/demo
TASKS := mrpc sst2 mnli stsb
RUN := minilm-r8-a16
REST := fixN-qv-wd0.0-seq128
TRAIN := --backbone minilm --tasks $(TASKS) --other-tasks $(TASKS) --epochs 2 --lr 1e-3 \
	--per-device-train-bsz 8 --max-train-samples 1024 --max-eval-samples 100 \
	--max-test-samples 200 --output-dir $(DEMO) --resume
METHODS := average task_arithmetic ties emr

# Each worker begins with half of the files, so that a file's fixtures are made once; who is done
# takes from the other's end.
PYTEST := $(PY) -m pytest -n 2 --dist worksteal

.PHONY: demo test test-all check docs smoke install

demo: install
	$(PY) train_glue.py $(TRAIN) --init gaussian
	$(PY) train_glue.py $(TRAIN) --init contrastive
	$(PY) merge.py --load-model-path $(DEMO)/load_model_path-$(RUN)-gaussian-$(REST).json \
		--methods $(METHODS) --output-dir $(DEMO)/merged-gaussian --overwrite
	$(PY) merge.py --load-model-path $(DEMO)/load_model_path-$(RUN)-contrastive-$(REST)-100.json \
		--methods $(METHODS) --output-dir $(DEMO)/merged-contrastive --overwrite
	$(PY) -m osrm.report $(DEMO)/merged-gaussian/results.json \
		$(DEMO)/merged-contrastive/results.json --output-dir $(DEMO)/report
	@echo "The table is $(DEMO)/report/table.md, the plot $(DEMO)/report/plot.png. Next:" \
		"docs/train.md: all eight tasks, your own data, GLUE."

test: install
	$(PYTEST)

test-all: install
	$(PYTEST) -m ""

check: install
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy
	$(PY) -m pip check

docs: install
	$(PY) -m mkdocs build --strict

smoke: install
	PATH="$(CURDIR)/.venv/bin:$$PATH" snakemake --snakefile reproduce/Snakefile --cores 2 embedded_smoke

install: .venv/installed

.venv/installed: pyproject.toml
	$(PYTHON) -m venv .venv
	$(PY) -m pip install --editable '.[dev]'
	touch $@
