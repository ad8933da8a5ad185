PYTHON ?= $(shell command -v python3.11 || command -v python3)
BIN := .venv/bin
READY := .venv/.ready

.PHONY: demo test lint soak trust clean

SECONDS ?= 600

demo: $(READY)
	$(BIN)/fasp-graph prune --output build/demo

test: $(READY)
	$(BIN)/python -m pytest -n 2 --dist loadgroup

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

soak: $(READY)
	$(BIN)/python -m benchmarks.soak --seconds $(SECONDS)

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[test,dev,docs]'
	touch $@

trust: $(READY)
	$(BIN)/python -m benchmarks.trust --seconds $(SECONDS)

clean:
	rm -rf .venv build
