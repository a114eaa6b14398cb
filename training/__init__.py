"""Programs that make checkpoints."""
