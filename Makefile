# Two commands do everything on a machine with Python 3.11, 3.12 or 3.13 (PYTHON=python3.12 names it), pip and make:
#   make simulate              set up, then run dynamics of ethanol (INPUT=my.pdb for your own molecule)
#   make test                  set up, then pass the tests
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
INPUT ?= examples/ethanol.sdf
OUTPUT ?= $(basename $(notdir $(INPUT)))-md
# cpu, cuda12 or cuda13: which build of openmm-torch to install. Two in one environment would overwrite each other, so another build begins anew.
BUILD ?= cpu
ARGS ?=

.PHONY: simulate test test-runtime lint docs wheel dist clean

SIMULATE = $(VENV)/simulate-$(BUILD).stamp

$(SIMULATE): pyproject.toml
	$(PYTHON) -m venv $(if $(filter-out $@,$(wildcard $(VENV)/simulate*.stamp)),--clear) $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet -e '.[$(BUILD)]'
	touch $@

$(VENV)/test.stamp: $(SIMULATE)
	$(BIN)/python -m pip install --quiet -e '.[$(BUILD),training,test]'
	touch $@

simulate: $(SIMULATE)
	$(BIN)/openmm-se3 simulate $(INPUT) --output $(OUTPUT) $(ARGS)

test: $(VENV)/test.stamp lint docs
	$(BIN)/python -m pytest tests

lint: $(VENV)/test.stamp
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# The wall: the tests of the runtime package where training's dependencies do not exist. With the OpenMM that the wheels of openmm-torch were
# built for, so that a System's XML is read where only these two are importable; pip says that openmm-ml asks for a newer one.
$(VENV)-runtime/test.stamp: pyproject.toml
	$(PYTHON) -m venv $(VENV)-runtime
	$(VENV)-runtime/bin/python -m pip install --quiet --upgrade pip
	$(VENV)-runtime/bin/python -m pip install --quiet -e '.[$(BUILD),test-runtime]'
	$(VENV)-runtime/bin/python -m pip install --quiet 'openmm$(if $(filter cuda%,$(BUILD)),[$(BUILD)])>=8.5.2,<8.6'
	touch $@

test-runtime: $(VENV)-runtime/test.stamp
	$(VENV)-runtime/bin/python -m pytest tests/openmm_se3 tests/test_wall.py tests/test_released_models.py

# The documentation, warnings as errors, into build/site.
$(VENV)/docs.stamp: $(SIMULATE)
	$(BIN)/python -m pip install --quiet -e '.[$(BUILD),docs]'
	touch $@

docs: $(VENV)/docs.stamp
	$(BIN)/mkdocs build --strict --quiet

dist: $(VENV)/test.stamp
	$(BIN)/python -m build

wheel: $(VENV)/test.stamp
	$(BIN)/python -m build --wheel

clean:
	rm -rf $(VENV) $(VENV)-runtime build dist *.egg-info
