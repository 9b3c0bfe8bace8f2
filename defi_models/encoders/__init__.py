"""Frozen encoders: images and texts go in, and latents, patch features and text states come out.

Each role has one encoder with public weights and one without any, behind the same methods.
"""
