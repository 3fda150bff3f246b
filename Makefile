PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: setup search test long machines fuzz lint bench gpu

setup: $(READY)

$(READY): pyproject.toml constraints.txt
	@echo 'installing into $(VENV): about 2 to 3 minutes with a fast network, about 7 GB; nothing is said meanwhile'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev,dashboard]'
	touch $@

# The main job on the built-in sample of generated faces.
search: setup
	$(BIN)/python -m raytune_emotion.search --space demo --trials 16 --epochs 6

# Bytecode is kept, also where the environment forbids it: else every process compiles the package anew.
PYTEST := env -u PYTHONDONTWRITEBYTECODE $(BIN)/python -m pytest
IN_PARALLEL := --numprocesses 2 --dist loadscope --no-loadscope-reorder --max-worker-restart 0

test: setup
	$(PYTEST) $(IN_PARALLEL) -m "not long"

# Servers that fail, two machines, whole processes: the tests that take longest.
long: setup
	$(PYTEST) $(IN_PARALLEL) -m long

# Kills and freezes parts of Ray, and sends signals: too long for `make test`. Some: make machines ONLY=train
machines: setup
	$(PYTEST) tests/machines $(if $(ONLY),-k '$(ONLY)')

# Damaged files of every kind: each ends in a result or a sentence. Fewer: make fuzz COUNT=1000
fuzz: setup
	$(BIN)/python -m tests.fuzz $(or $(COUNT),10000)

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: setup
	$(BIN)/python -m benchmarks

# The checks of a GPU, and a study there: make gpu DATA=faces [WEIGHTS=folder]
gpu: setup
	$(BIN)/python -m benchmarks.gpu
	$(BIN)/python -m raytune_emotion.search --space gpu --trials 32 --gpus-per-worker auto \
	  --data $(or $(DATA),$(error name the faces to search on: make gpu DATA=folder)) \
	  $(if $(WEIGHTS),--weights-dir $(WEIGHTS))
