"""Rehearsals of a deployment of the published checkpoint, at small width on a CPU: `python -m tests.rehearsal`."""
