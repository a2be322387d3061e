# Everything is made below .venv in this checkout, temporary files and caches included; `make clean` removes it.
# Only Debian's package `chromium`, which `make test` installs where there is no browser, lies elsewhere.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := $(CURDIR)/.venv
export TMPDIR := $(VENV)/tmp
export KERAS_HOME := $(VENV)/keras
export XDG_CACHE_HOME := $(VENV)/cache
export PIP_CACHE_DIR := $(VENV)/pip
export PIP_DISABLE_PIP_VERSION_CHECK := 1
export PYTHONDONTWRITEBYTECODE :=
export TF_CPP_MIN_LOG_LEVEL := 3
export CUDA_VISIBLE_DEVICES := -1

.PHONY: demo test lint soak clean

demo: $(VENV)/demo
	@$(VENV)/bin/python -m tools.quiet -m tools.demo

test: $(VENV)/test
	@$(VENV)/bin/python -m tools.chromium
	@$(VENV)/bin/python -m pytest $(ARGS)

soak: $(VENV)/test
	@$(VENV)/bin/python -m tools.soak $(ARGS)

lint: $(VENV)/lint
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/ruff check .
	$(VENV)/bin/mypy --cache-dir $(VENV)/mypy
	$(VENV)/bin/lint-imports --no-cache

# What pip says is shown, whole, if it fails.
$(VENV)/demo $(VENV)/test $(VENV)/lint: pyproject.toml
	@echo "installing what \`make $(notdir $@)\` needs into .venv, TensorFlow included (about 2 minutes)"
	@mkdir -p $(VENV)/tmp
	@test -x $(VENV)/bin/pip || $(PYTHON) -m venv $(VENV)
	@$(VENV)/bin/python -m pip install --quiet --editable '.[$(notdir $@)]' > $(VENV)/pip.log 2>&1 \
		|| { cat $(VENV)/pip.log >&2; exit 1; }
	@touch $@

clean:
	rm -rf $(VENV) *.egg-info .pytest_cache .ruff_cache .hypothesis
