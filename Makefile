VENV := .venv
BIN := $(VENV)/bin
PYTHON ?= python3
NATIVE := $(shell find csrc -name '*.cpp' -o -name '*.h' -o -name '*.cu') CMakeLists.txt setup.py
JOBS ?= 2
GPU_JOBS ?= 8
DATA ?= ../shared/data
OPS := tests/swag_kernels
NEED_NO_GPU := on_triton/test_ahead_of_time.py on_cuda/test_compiled.py on_cuda/test_sanitized.py on_cuda/test_simt.py
FROM_SOURCE = PYTHONPATH=.:python$(if $(PYTHONPATH),:$(PYTHONPATH)) $(PYTHON)

.PHONY: demo test accuracy reproduce bench gpu gpu-build gpu-test gpu-memcheck gpu-bench lint clean
.NOTPARALLEL:

demo: $(VENV)/.built
	$(BIN)/swag-lora demo

test: $(VENV)/.built
	$(BIN)/pytest -n $(JOBS) --dist worksteal

# What needs thousands of samples of a real fine-tune: that three standard errors cover 20 000 samples' probabilities, and
# that antithetic pairs and orthogonal z lower the variance. Minutes; the fit is kept in build/fits.
accuracy: $(VENV)/.built
	mkdir -p build/fits
	FITS=build/fits OMP_NUM_THREADS=2 $(BIN)/pytest benchmarks/bench_adaptive.py benchmarks/bench_variance.py \
		-k "coverage or variance" -p no:xdist --benchmark-only --benchmark-disable-gc -s

# The paper's experiment on real text: one classification and one multiple-choice task over two seeds, minutes.
reproduce: $(VENV)/.built
	DATA=$(DATA) OMP_NUM_THREADS=1 $(BIN)/pytest benchmarks/bench_reproduce.py -n $(JOBS) -rA

bench: $(VENV)/.built
	$(BIN)/pytest benchmarks -p no:xdist --benchmark-only --benchmark-disable-gc -s

# On a machine with a GPU, from the source tree and with the packages that PYTHON has: nothing is installed. `make -k gpu`
# times the ops even where a test has failed.
gpu: gpu-test gpu-memcheck gpu-bench

gpu-build:
	$(PYTHON) -c "import shutil; from swag_kernels import _C; assert hasattr(_C, 'cuda_collect') or not shutil.which('nvcc')" \
		2>/dev/null || $(PYTHON) setup.py --quiet build_ext --inplace

# In several processes, because Triton takes longer to compile the kernels' variants than the GPU to run them.
gpu-test: gpu-build
	$(FROM_SOURCE) -m pytest -n $(GPU_JOBS) --dist worksteal $(NEED_NO_GPU:%=--ignore $(OPS)/%) \
		$(OPS)/on_gpu $(OPS)/on_triton $(OPS)/on_cuda tests/swag_lora/test_capture.py

gpu-memcheck: gpu-build
	$(FROM_SOURCE) $(OPS)/on_gpu/memcheck.py

gpu-bench: gpu-build
	$(FROM_SOURCE) benchmarks/gpu.py

lint: $(VENV)/.built
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# torch comes first and pinned, so that no dependency pulls another build of it.
$(VENV)/.built: pyproject.toml constraints.txt $(NATIVE)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet $$(grep '^torch==' constraints.txt)
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[demo,data,plots,dev]'
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info swag_kernels/*.so
