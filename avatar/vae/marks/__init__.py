"""Marks in frames and films which say that a machine made them: metadata for machines, and a label for people."""
