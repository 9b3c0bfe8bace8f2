"""Conversion: released checkpoints or recorded tensors go in, model folders (and the way back) or a comparison come out."""
