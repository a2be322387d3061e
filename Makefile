# Everything is made below .venv in this checkout, temporary files and caches included; `make clean` removes it.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := $(CURDIR)/.venv
RUN := TMPDIR=$(VENV)/tmp KERAS_HOME=$(VENV)/keras XDG_CACHE_HOME=$(VENV)/cache PIP_CACHE_DIR=$(VENV)/pip \
	PIP_DISABLE_PIP_VERSION_CHECK=1 PYTHONDONTWRITEBYTECODE= TF_CPP_MIN_LOG_LEVEL=3 CUDA_VISIBLE_DEVICES=-1

.PHONY: demo test lint soak clean

demo: $(VENV)/demo
	$(RUN) $(VENV)/bin/python tools/demo.py

test: $(VENV)/test
	$(RUN) $(VENV)/bin/python -m pytest $(ARGS)

soak: $(VENV)/test
	$(RUN) $(VENV)/bin/python -m tools.soak $(ARGS)

lint: $(VENV)/lint
	$(RUN) $(VENV)/bin/ruff format --check .
	$(RUN) $(VENV)/bin/ruff check .
	$(RUN) $(VENV)/bin/mypy --cache-dir $(VENV)/mypy
	$(RUN) $(VENV)/bin/lint-imports --no-cache

$(VENV)/demo $(VENV)/test $(VENV)/lint: pyproject.toml
	test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	mkdir -p $(VENV)/tmp
	$(RUN) $(VENV)/bin/python -m pip install --quiet --editable '.[$(notdir $@)]'
	touch $@

clean:
	rm -rf $(VENV) *.egg-info .pytest_cache .ruff_cache .hypothesis
