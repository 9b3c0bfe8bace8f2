"""Validation: a model and held-out samples come in, losses, image metrics and pictures come out."""
