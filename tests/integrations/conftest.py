"""Pipecat is not in .venv: `make test-pipecat` has an environment of its own."""

from importlib.util import find_spec

collect_ignore = [] if find_spec("pipecat") else ["test_pipecat.py"]
