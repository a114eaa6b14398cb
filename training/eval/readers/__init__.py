"""Readers of faces in frames: landmarks, curves of motion, blinks, identity."""
