# Every target does its own set-up. `make demo` shows the whole platform once; `make test` proves it.

PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/.installed

.DEFAULT_GOAL := help
.PHONY: help setup demo demo-cluster test lint docs bench bench-data bench-frames bench-train bench-failures bench-identical bench-serve bench-eval clean

help:
	@echo "make demo   pretrain, fine-tune, serve and evaluate a small policy on this machine (about 20 minutes)"
	@echo "make demo-cluster  the platform on an autoscaling cluster of this machine that loses nodes and its head (about 10 minutes)"
	@echo "make test   all tests"
	@echo "make lint   ruff and mypy"
	@echo "make docs   the API reference, in build/docs"
	@echo "make bench  the measured comparisons in benchmarks/"
	@echo "make bench-data  the data engine next to raw decord and Ray's own readers (about 15 minutes)"
	@echo "make bench-frames  wrong frames of every kind of video file, ours and other readers' (about 3 minutes)"
	@echo "make bench-train  our training loop next to bare PyTorch, and what the paper's runs need on many GPUs"
	@echo "make bench-failures  what each failure costs a run on several raylets (about 5 minutes)"
	@echo "make bench-serve  our server next to openpi's and vla-eval's, turn by turn (about 15 minutes; PEER_OPENPI=checkout)"
	@echo "make bench-eval  an evaluation's episodes with one worker, two, killed drivers and two drivers, bit for bit (about 15 minutes)"
	@echo "make bench-identical  losses of this checkout and of AGAINST=folder or revision, bit for bit (about 10 minutes)"
	@echo "make setup  only install: .venv and the system libraries for rendering"
	@echo "make clean  remove .venv (runs/ is kept)"

setup: $(INSTALLED)
	@cluster/system_libraries.sh

# One pip call for everything: only then does the resolver see moto and aiobotocore together.
# openpi-client asks for numpy < 2 but runs on 2, so it comes without its dependencies.
$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	  || { echo "Python 3.11 or newer is needed; choose one with: make setup PYTHON=python3.11"; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[sim,fetch,pusht,dev]'
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt --no-deps openpi-client
	@touch $@

demo: setup
	$(BIN)/python jobs/demo.py --config configs/demo/demo.yaml

demo-cluster: setup
	$(BIN)/python cluster/demo.py

# Two processes: most of the time goes into starting Ray, its workers and jobs, which leaves a core idle; a third one
# only makes everything slower. The tests of a file share fixtures and stay together.
test: setup
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder $(PYTEST_ARGS)

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: $(INSTALLED)
	$(BIN)/python docs/build_reference.py build/docs
	@echo "build/docs/index.html"

bench: setup
	@for script in $(filter-out benchmarks/identical_losses.py benchmarks/serving_soak.py,$(wildcard benchmarks/*.py)); do echo "== $$script"; $(BIN)/python $$script || exit 1; done

bench-data: setup
	$(BIN)/python benchmarks/data.py

bench-frames: setup
	$(BIN)/python benchmarks/exact_frames.py

bench-train: setup
	$(BIN)/python benchmarks/train.py
	$(BIN)/python benchmarks/scaling.py

bench-failures: setup
	$(BIN)/python benchmarks/failures.py

PEER_OPENPI ?=
bench-serve: setup
	$(BIN)/python benchmarks/serving.py $(if $(PEER_OPENPI),peer_openpi=$(PEER_OPENPI))

bench-eval: setup
	$(BIN)/python benchmarks/evaluation.py

AGAINST ?= HEAD
bench-identical: setup
	$(BIN)/python benchmarks/identical_losses.py --against $(AGAINST)

clean:
	rm -rf .venv
