"""Layers: features, text states and noisy actions go in, and tokens, predictions and losses come out; only they train."""
