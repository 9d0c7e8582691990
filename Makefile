# Every target makes the environment it needs; only Python 3.11+ and make are assumed.
PYTHON ?= python3
SEED ?= 0
WORKDIR ?= runs/quickstart
VENV := .venv
PY := $(VENV)/bin/python
# CPU torch is for parity tests only; without it a dependency might pull CUDA builds.
TORCH ?= torch==2.13.0

.PHONY: quickstart test notebooks slow nightly check perf aot-check gpu-check env dev clean

env: $(VENV)/.run
dev: $(VENV)/.dev

$(VENV)/bin/python:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.12")'
	$(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet --upgrade pip

$(VENV)/.run: pyproject.toml | $(VENV)/bin/python
	$(PY) -m pip install --quiet --editable .
	touch $@

$(VENV)/.dev: pyproject.toml | $(VENV)/bin/python
	$(PY) -m pip install --quiet '$(TORCH)'
	$(PY) -m pip install --quiet --editable '.[dev]'
	$(PY) -m pip install --quiet --no-deps google-jetstream==0.2.2  # what it requires pulls TensorFlow
	touch $@ $(VENV)/.run

# A tiny model learns to add: SFT on flawed demonstrations, then GRPO. 2 to 5 minutes on 2 cores.
quickstart: $(VENV)/.run
	$(PY) launch/main.py --config=configs/quickstart.py --workdir=$(WORKDIR) --config.seed=$(SEED)

# Two processes: much of a test is compiling, on one core.
test: $(VENV)/.dev
	$(PY) -m pytest -n 2 --dist loadfile -m 'not slow and not nightly and not aot'

# The notebooks, executed from top to bottom: in a copy, since they write beside themselves.
notebooks: $(VENV)/.dev
	rm -rf build/notebooks && mkdir -p build && cp -r colab build/notebooks
	$(PY) -m pytest -c /dev/null --rootdir=build/notebooks --nbmake --nbmake-timeout=1800 \
	  --durations=0 build/notebooks

slow: $(VENV)/.dev
	$(PY) -m pytest -n 2 --dist loadfile --no-loadscope-reorder --timeout=2700 \
	  -m 'slow and not nightly and not aot'

nightly: $(VENV)/.dev
	$(PY) -m pytest --timeout=86400

check: $(VENV)/.dev
	$(VENV)/bin/ruff check .
	$(VENV)/bin/pyright

# Speed beside the machine's own ceilings, and beside peers where their environments are named.
perf: $(VENV)/.dev
	$(PY) launch/perf.py step --json=runs/perf_step.json
	$(PY) launch/perf.py sampler --json=runs/perf_sampler.json

# Programs compiled ahead of time for TPUs and an H100 on any machine, and launch/PLAN.md written
# anew. jax's CUDA compiler lies beside the environment, where it is seen by these only: a program
# without a GPU would warn of it.
CUDA := $(VENV)/cuda
aot-check: $(CUDA)/.installed
	$(PY) -m pip install --quiet --editable '.[plan]'
	PYTHONPATH=$(CUDA) $(PY) -m pytest -m aot --timeout=2700 tests
	PYTHONPATH=$(CUDA) $(PY) launch/plan_table.py

$(CUDA)/.installed: $(VENV)/.dev
	version=$$($(PY) -c 'import jax; print(jax.__version__)') && $(PY) -m pip install --quiet \
	  --upgrade --no-deps --target $(CUDA) jax-cuda12-plugin==$$version jax-cuda12-pjrt==$$version
	touch $@

# What a GPU machine can check with the packages it has.
gpu-check:
	$(PYTHON) launch/gpu_check.py

clean:
	rm -rf $(VENV) build *.egg-info runs .pytest_cache .ruff_cache
