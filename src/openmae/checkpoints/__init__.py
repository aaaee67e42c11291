"""Checkpoints: their format, other programs' files, and the folder that a run writes."""
