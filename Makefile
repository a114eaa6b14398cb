# The whole interface. Every target prepares what it needs.
.PHONY: install protos check test test-slow test-web demo web bench

VENV := .venv
PYTHON ?= python3
SPEECH ?= assets/speech.wav
PORTRAIT ?= assets/portrait.png
LISTEN ?= 127.0.0.1:8080
TTS ?=
export PATH := $(CURDIR)/$(VENV)/bin:$(PATH)

PROTOS := $(shell find protos -name '*.proto')

install: $(VENV)/installed

$(VENV)/installed: requirements.lock pyproject.toml $(PROTOS)
	test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	python -m pip install --quiet --requirement requirements.lock
	python -m pip install --quiet --no-build-isolation --no-deps --editable .
	touch $@

# What reads lips and faces in training.evaluate: 117 MB that running the suite does without.
$(VENV)/evaluation: training/requirements-evaluate.txt | $(VENV)/installed
	python -m pip install --quiet --no-deps --requirement training/requirements-evaluate.txt
	touch $@

# Generates avatar/v1 and avatar/worker/v1 from protos/.
protos: install
	python -m pip install --quiet --no-build-isolation --no-deps --editable .

check: install
	ruff check .
	ruff format --check .
	mypy
	buf lint protos
	buf format --diff --exit-code protos
	buf breaking protos --against protos/baseline/v1.binpb
	pytest --quiet tests/test_architecture.py

test: install $(VENV)/evaluation
	pytest

test-slow: install
	pytest -m slow --timeout 1800

# In real Chromium: on Debian `apt-get install -y --no-install-recommends chromium`.
test-web: install
	pytest -m browser tests/web

demo: install
	python -m services.demo --speech "$(SPEECH)" --portrait "$(PORTRAIT)"

# The page in the browser: TTS='flite -t {text} -o {wav}' makes it take text.
web: install
	python -m services.web --listen "$(LISTEN)" --tts "$(TTS)"

bench: install
	python -m benchmarks --compile
