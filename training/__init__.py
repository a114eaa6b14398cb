"""Programs that train and evaluate checkpoints."""
