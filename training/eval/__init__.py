"""Evaluation: metrics on held-out clips and recorded speech, and previews."""
