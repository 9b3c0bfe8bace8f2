"""Checkpoints: fragments of the training state go in, the same state for any world size, or a model folder, comes out."""
