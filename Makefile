# Everything a new machine needs: `make demo` and `make test`.
PYTHON ?= python3
VENV   ?= .venv
# What the tests were written against. On a GPU machine name yours, e.g. `make demo TORCH="torch==2.11.0"`; torch brings its own
# triton there. The newest release, beside the pinned one: `make test VENV=.venv-newest TORCH="torch==2.15.0 triton==3.9.0"`.
TORCH  ?= torch==2.13.0 triton==3.6.0
BIN    := $(VENV)/bin
PIP    := $(BIN)/python -m pip install --quiet --disable-pip-version-check

.PHONY: demo test test-all check bench docs format clean

demo: $(VENV)/.installed
	@echo 'sglquant demo: importing torch ...'
	@$(BIN)/sglquant demo --html demo.html

test: $(VENV)/.installed
	$(BIN)/python -m pytest -q -n 2 --dist loadfile -m "not slow" --check-repeats --durations=30

test-all: $(VENV)/.installed
	$(BIN)/python -m pytest -q -n 2 --dist loadfile

check: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python

bench: $(VENV)/.installed
	$(BIN)/python benchmarks/quality.py
	$(BIN)/python benchmarks/cpu_decode.py
	$(BIN)/python benchmarks/generate.py --cpu
	@if $(BIN)/python -c 'import torch, sys; sys.exit(not torch.cuda.is_available())'; then \
	  for script in generate gemm attention e2e moe moe_e2e compile_time; do $(BIN)/python benchmarks/$$script.py || exit; done; \
	else echo 'no CUDA GPU: generate, gemm, attention, e2e, moe, moe_e2e and compile_time need one'; fi

# Fills the tables of README.md and docs/*.md from benchmarks/results and from the kernels' own answers, draws the plots, and builds
# the site, in which a broken link is an error.
docs: $(VENV)/.installed
	$(BIN)/python benchmarks/render_readme.py
	@if $(BIN)/python -c 'import matplotlib' 2>/dev/null; then $(BIN)/python benchmarks/plot.py; else echo 'no matplotlib: plots stay as they are'; fi
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

format: $(VENV)/.installed
	$(BIN)/ruff check --fix . ; $(BIN)/ruff format .

# TORCH= keeps the torch that is there.
$(VENV)/.installed: pyproject.toml
	@echo 'making $(VENV)'
	@$(PYTHON) -m venv $(VENV)
	$(if $(TORCH),@echo 'installing $(subst ==, ,$(TORCH)) ... (a large download)'; $(PIP) $(TORCH))
	@echo 'installing sglquant and what its tests need ...'
	@$(PIP) -e ".[test]"
	@touch $@

clean:
	rm -rf $(VENV) demo.html site build dist *.egg-info .pytest_cache .ruff_cache
