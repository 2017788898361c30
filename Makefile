VENV := .venv
BIN := $(VENV)/bin
PYTHON ?= python3
NATIVE := $(shell find csrc -name '*.cpp' -o -name '*.h') CMakeLists.txt setup.py
JOBS ?= 2

.PHONY: demo test bench gpu lint clean

demo: $(VENV)/.built
	$(BIN)/swag-lora demo

test: $(VENV)/.built
	$(BIN)/pytest -n $(JOBS) --dist worksteal

bench: $(VENV)/.built
	$(BIN)/pytest benchmarks -p no:xdist --benchmark-only --benchmark-disable-gc -s

# On a machine with a GPU, from the source tree and with the packages that PYTHON has: nothing is installed.
gpu:
	$(PYTHON) -c "import swag_kernels._C" 2>/dev/null || $(PYTHON) setup.py --quiet build_ext --inplace
	PYTHONPATH=.:python $(PYTHON) -m pytest tests/swag_kernels/on_triton --ignore tests/swag_kernels/on_triton/test_ahead_of_time.py
	PYTHONPATH=.:python $(PYTHON) benchmarks/gpu.py

lint: $(VENV)/.built
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# torch comes first and pinned, so that no dependency pulls another build of it.
$(VENV)/.built: pyproject.toml constraints.txt $(NATIVE)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet $$(grep '^torch==' constraints.txt)
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[demo,data,dev]'
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info swag_kernels/*.so
