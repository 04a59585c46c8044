# `make train` and `make test` set up .venv by themselves; nothing else is needed than Python >= 3.11.

PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
EXTRAS := train,wandb,tensorboard,accelerate,lightning,deepspeed,plots,lm-eval,docs,dev

.PHONY: train test test-slow test-all test-transformers4 lint format docs bench bench-gpu chaos soak paper paper-lm race defaults rates setup clean

setup: $(VENV)/.ready

# $(call install,extras,size)
define install
$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed, this is " + sys.version.split()[0])'
$(PYTHON) -m venv $(VENV)
@echo "installing into $(VENV), once: $(2), minutes without further output"
$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[$(1)]'
endef

# What training needs; `.ready` has what tests, pages and integrations need too, in the same environment.
$(VENV)/.train: pyproject.toml constraints.txt
	$(call install,train,1.5 GB)
	touch $@

$(VENV)/.ready: pyproject.toml constraints.txt
	$(call install,$(EXTRAS),2.3 GB)
	touch $(VENV)/.train $@

# Pre-trains a small Qwen2.5-style model on the Python standard library: one process per GPU, two on a CPU.
train: $(VENV)/.train
	$(BIN)/python launch/quickstart.py

test: setup
	$(BIN)/python -m pytest -m "not slow and not gpu"

test-slow: setup
	$(BIN)/python -m pytest -m "slow and not gpu"

# Exports load in Transformers 4.57 too: that version lies in an environment of its own, before the packages of this one.
test-transformers4: setup
	$(PYTHON) -m venv --without-pip $(VENV)/transformers4
	site=$$($(VENV)/transformers4/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))') && \
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --upgrade --target "$$site" \
	  'transformers==4.57.*' 'tokenizers>=0.22,<=0.23' 'huggingface-hub>=0.34,<1.0' && \
	$(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))' > "$$site/packages.pth"
	POLARGRAD_TRANSFORMERS4=$(CURDIR)/$(VENV)/transformers4/bin/python $(BIN)/python -m pytest -m slow tests/tools/test_export.py

test-all: setup
	$(BIN)/python -m pytest -m "not gpu"

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# The documentation site in site/, every link checked; `.venv/bin/mkdocs serve` shows it while one writes.
docs: setup
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build

bench: setup
	$(BIN)/python -m benchmarks

# One GPU, ten minutes, with any Python that has torch, transformers and numpy (docs/gpu.md); no set-up.
bench-gpu:
	$(PYTHON) -m benchmarks.gpu

# Kills runs 25 times at random moments, on two ranks and on four; they must end with the bits of an undisturbed one.
chaos: setup
	$(BIN)/python -m tests.chaos --kills 25
	$(BIN)/python -m tests.chaos --kills 25 --asynchronous
	$(BIN)/python -m tests.chaos --kills 25 --strategy fsdp
	$(BIN)/python -m tests.chaos --kills 25 --strategy hsdp

# Half an hour of training, validating, saving, leaving and reporting; fails when anything grows.
soak: setup
	$(BIN)/python -m tests.soak --minutes 30

# The paper's matrix problems with every optimizer of its tables, three seeds: figures and curves in runs/paper.
paper: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m experiments all

# Its language-model experiments scaled down, three seeds: figures and curves in runs/paper-lm.
paper-lm: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m experiments.language paper

# Nine optimizers on equal terms at two widths and two lengths: hours; the same command continues after an interruption.
race: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m experiments.language race

# Every role's default rate against a sweep around it, both model families, three widths: hours; continues as the race does.
defaults: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m experiments.language defaults

# How the best rates move with width, length, batch and vocabulary: about half an hour on two idle cores.
rates: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m experiments.language rates --seeds 0

clean:
	rm -rf $(VENV) build dist site *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis .import_linter_cache
