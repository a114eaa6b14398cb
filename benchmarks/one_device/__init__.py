"""Sections of `benchmarks.gpu`."""
