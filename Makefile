# make demo: train, evaluate and draw the digits. make test: the tests. PYTHON chooses the interpreter.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

.PHONY: demo test test-whole test-slow test-tensorflow peers test-peers browser test-browser check format docs clean

$(VENV)/installed: requirements.txt setup.cfg pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(None if (3, 11) <= sys.version_info < (3, 14) else "tcq needs Python 3.11 to 3.13, this is " + sys.version.split()[0] + ": make PYTHON=python3.12 ...")'
	$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --requirement requirements.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --editable .
	touch $@

$(VENV)/installed-test: $(VENV)/installed requirements-test.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --requirement requirements-test.txt
	touch $@

demo: $(VENV)/installed
	$(BIN)/python -m tcq train --config=configs/digits.py --workdir=runs/demo
	$(BIN)/python -m tcq evaluate --workdir=runs/demo --checkpoint=latest --recorded=benchmarks/digits.json

test: $(VENV)/installed-test check
	$(BIN)/python -m pytest -n auto --dist worksteal

# Whole programs (several processes, signals, servers, databases, copies, the notebook, the wheel), and what compiles long.
test-whole: $(VENV)/installed-test
	$(BIN)/python -m pytest -n auto --dist worksteal -m "whole and not slow"

# All tests again with XLA's optimizations, which `make test` turns off, and then the long ones.
test-slow: export JAX_DISABLE_MOST_OPTIMIZATIONS = 0
test-slow: $(VENV)/installed-test
	$(BIN)/python -m pytest -n auto --dist worksteal -m "not slow and not tensorflow and not peers and not browser"
	$(BIN)/python -m pytest -m slow

test-tensorflow: $(VENV)/installed-test
	$(BIN)/python -m pip install --quiet --disable-pip-version-check 'tensorflow-cpu>=2.21' dill
	$(BIN)/python -m pytest -m tensorflow

# Without what they require: torchvision, whose builds need CUDA on some platforms, and what Lance does not need here.
$(VENV)/installed-peers: $(VENV)/installed-test
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --retries 1 --extra-index-url https://download.pytorch.org/whl/cpu 'torch==2.13.0+cpu' transformers==5.23.0
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps timm==1.0.31 open_clip_torch==3.3.0 pylance==14.0.2
	$(BIN)/python -m pip install --quiet --disable-pip-version-check onnx==1.23.2 onnxruntime==1.32.0 ai-edge-litert==2.3.0
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint requirements-test.txt jax2onnx==0.13.0
	touch $@

peers: $(VENV)/installed-peers

test-peers: $(VENV)/installed-peers
	$(BIN)/python -m pytest -m peers

# The search page in headless Chromium: apt install chromium chromium-driver npm.
$(VENV)/installed-browser: $(VENV)/installed-test
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint requirements-test.txt selenium==4.51.0
	npm install --silent --prefix $(VENV)/axe axe-core@4.14.1
	touch $@

browser: $(VENV)/installed-browser

test-browser: $(VENV)/installed-browser
	$(BIN)/python -m pytest -m browser

check: $(VENV)/installed-test
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: $(VENV)/installed-test
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# The API page and the command reference, from the code.
docs: $(VENV)/installed
	$(BIN)/python docs/generate.py

clean:
	rm -rf $(VENV) build dist *.egg-info
