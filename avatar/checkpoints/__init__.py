"""Checkpoints: their files, the parts that models load from, the two layouts of a folder, and LoRA adapters."""
