"""Checkpoints: from an id or a folder to validated tensors, and back to a folder that transformers loads."""
