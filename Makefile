# make demo    quantize the project's own model and show what became of it
# make test    every test
# make check   what CI runs: tests, lint, format, types

PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
OUT    ?= out

.PHONY: demo test lint types check clean

DEMO := models/digits_repvgg.onnx
DATA := --data models/digits_test.npz
CALIBRATION := --calibration models/digits_calibration.npz

demo: $(VENV)/.run
	@mkdir -p $(OUT)
	@echo; echo "# 1. parallel basis nodes, integer compute: what Netron shows best"
	$(BIN)/onnxq quantize $(DEMO) $(OUT)/digits_parallel.onnx $(DATA) \
	  --terms 2 --activations dynamic \
	  --plan-out $(OUT)/digits_plan.json --report $(OUT)/report.html
	@echo; echo "# 2. one 4-bit term, rounded to samples, float compute: a small file at float speed"
	$(BIN)/onnxq quantize $(DEMO) $(OUT)/digits_4bit.onnx $(CALIBRATION) \
	  --activations none --terms 1 --layout merged --quiet
	$(BIN)/onnxq compare $(DEMO) $(OUT)/digits_4bit.onnx $(DATA)
	@echo; echo "# 3. bits chosen for a tolerance"
	$(BIN)/onnxq quantize $(DEMO) $(OUT)/digits_tolerance.onnx $(CALIBRATION) $(DATA) \
	  --activations none --tolerance error=2%
	@echo; echo "report: $(OUT)/report.html   plan: $(OUT)/digits_plan.json"
	@echo "open $(OUT)/digits_parallel.onnx in Netron to see the basis nodes"

test: $(VENV)/.dev
	$(BIN)/python -m pytest -n auto

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# The package as installed: the tree itself has another layout (see pyproject, package-dir).
types: $(VENV)/.dev
	rm -rf build/site build/lib
	$(BIN)/pip install --quiet --no-deps --target build/site .
	cd build && MYPYPATH=site ../$(BIN)/mypy --config-file ../pyproject.toml -p onnxq

check: test lint types

$(VENV)/.run: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -e .
	@touch $@

$(VENV)/.dev: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -e ".[dev]"
	@touch $@ $(VENV)/.run

clean:
	rm -rf $(VENV) $(OUT) build *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
