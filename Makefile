# make demo   set up, then tokenize the bundled speech file, decode it, plot both; your own: make demo AUDIO=voice.wav
# make test   set up, then run the tests
# make test-versions  run the tests of the core with the oldest and the newest transformers that pyproject.toml allows
# make lint   set up, then check style and types
# make package  set up, then build source archive and wheel into dist/, and use the wheel in an environment of its own
# make docs   set up, then build the documentation into site/; make docs-serve shows it on http://localhost:8000
# make setup  set up only
# Everything goes into .venv; `rm -r .venv` undoes it. Another interpreter: make test PYTHON=python3.12

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
TRANSFORMERS_TESTS := $(VENV)/transformers_tests

# what changes with transformers: the core, the Auto classes, the feature extractor, transformers' own common tests
VERSION_TESTS := $(addprefix tests/test_, modeling.py auto_classes.py native.py upgrade.py feature_extraction.py \
	transformers_common.py package.py)
# the lower bounds of pyproject.toml
PACKAGES_oldest := $(shell sed -nE 's/^ *"(transformers|huggingface_hub)>=([0-9.]+)".*/\1==\2/p' pyproject.toml)
PACKAGES_newest := --upgrade transformers huggingface_hub

.PHONY: setup demo test test-versions test-oldest test-newest test-slow lint package docs docs-serve clean

setup: $(VENV)/installed

demo: $(VENV)/installed
	$(BIN)/python examples/demo.py --output demo_output $(if $(AUDIO),--audio $(AUDIO))

# two files at a time, on one thread each: threads that wait for each other take longer than the small models of the tests;
# a test that hangs for ten minutes ends the run, and says where
test: $(VENV)/installed $(TRANSFORMERS_TESTS)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses 2 --dist loadfile --max-worker-restart 0 \
		-o faulthandler_timeout=600 -o faulthandler_exit_on_timeout=true

test-versions: test-oldest test-newest

test-oldest test-newest: test-%: $(VENV)/versions/%/installed
	OMP_NUM_THREADS=1 $(<D)/bin/python -m pytest --numprocesses 2 --dist loadfile --max-worker-restart 0 $(VERSION_TESTS)

# an environment with these packages only; it borrows all others from .venv
$(VENV)/versions/%/installed: $(VENV)/installed
	rm -rf $(@D)
	$(BIN)/python -m venv --without-pip $(@D)
	echo "import site; site.addsitedir('$$($(BIN)/python -c 'import site; print(site.getsitepackages()[0])')')" > \
		$$($(@D)/bin/python -c 'import site; print(site.getsitepackages()[0])')/borrowed.pth
	$(BIN)/python -m pip --python $(@D)/bin/python install --quiet $(PACKAGES_$*)
	$(call unpack_transformers_tests,$(@D)/bin/python,$(@D)/sdist,$(@D)/transformers_tests)
	touch $@

test-slow: $(VENV)/installed $(TRANSFORMERS_TESTS)
	$(BIN)/python -m pytest -m slow

lint: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# the wheel is made from the source archive, so this checks both
package: $(VENV)/installed
	rm -rf dist
	$(BIN)/python -m build --quiet
	$(BIN)/python tests/check_wheel.py dist/*.whl \
		--borrow $$($(BIN)/python -c 'import site; print(site.getsitepackages()[0])')

# a warning is an error: a broken link, a page that is not in the navigation, an unknown name in the API reference
docs: $(VENV)/installed
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

docs-serve: $(VENV)/installed
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs serve

$(VENV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	@# setuptools warns at every editable install that a folder of the same name could hide the package; here it is the package
	PYTHONWARNINGS='ignore:Editable installation' \
		$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	@# pesq and webrtcvad come as source: without a C compiler their metrics are left out, and the tests of these are skipped;
	@# without dependencies: torchcrepe asks for torchaudio, of which it needs nothing here
	$(BIN)/python -m pip install --quiet --constraint constraints.txt pesq || echo "pesq could not be built"
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --no-deps torchcrepe
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --no-deps resemblyzer webrtcvad || \
		echo "webrtcvad could not be built"
	touch $@

# transformers' own common tests for models are in its source archive only, not in the package that pip installs
define unpack_transformers_tests
	rm -rf $(3) $(2)
	$(BIN)/python -m pip download --quiet --no-deps --no-binary transformers --dest $(2) \
		transformers==$$($(1) -c 'from importlib.metadata import version; print(version("transformers"))')
	$(BIN)/python tests/fixtures/unpack_transformers_tests.py $(2) $(3)
endef

$(TRANSFORMERS_TESTS): $(VENV)/installed
	$(call unpack_transformers_tests,$(BIN)/python,$(VENV)/sdist,$@)

clean:
	rm -rf $(VENV) demo_output dist site
