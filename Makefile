# make demo   set up, then tokenize the bundled speech file, decode it, plot both; your own: make demo AUDIO=voice.wav
# make test   set up, then run the tests
# make lint   set up, then check style
# make setup  set up only
# Everything goes into .venv; `rm -r .venv` undoes it. Another interpreter: make test PYTHON=python3.12

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
TRANSFORMERS_TESTS := $(VENV)/transformers_tests

.PHONY: setup demo test test-slow lint clean

setup: $(VENV)/installed

demo: $(VENV)/installed
	$(BIN)/python examples/demo.py --output demo_output $(if $(AUDIO),--audio $(AUDIO))

# two files at a time, on one thread each: threads that wait for each other take longer than the small models of the tests;
# a test that hangs for ten minutes ends the run, and says where
test: $(VENV)/installed $(TRANSFORMERS_TESTS)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses 2 --dist loadfile --max-worker-restart 0 \
		-o faulthandler_timeout=600 -o faulthandler_exit_on_timeout=true

test-slow: $(VENV)/installed $(TRANSFORMERS_TESTS)
	$(BIN)/python -m pytest -m slow

lint: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

$(VENV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	@# pesq comes as source: without a C compiler that one metric is left out, and its tests are skipped
	$(BIN)/python -m pip install --quiet --constraint constraints.txt pesq || echo "pesq could not be built"
	touch $@

# transformers' own common tests for models are in its source archive only, not in the package that pip installs
$(TRANSFORMERS_TESTS): $(VENV)/installed
	rm -rf $@ $(VENV)/sdist
	$(BIN)/python -m pip download --quiet --no-deps --no-binary transformers --dest $(VENV)/sdist \
		transformers==$$($(BIN)/python -c 'from importlib.metadata import version; print(version("transformers"))')
	$(BIN)/python tests/fixtures/unpack_transformers_tests.py $(VENV)/sdist $@

clean:
	rm -rf $(VENV) demo_output
