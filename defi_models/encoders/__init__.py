"""Frozen encoders, interchangeable within a role: latent codecs, patch features, text.

Each role has one with public weights and one without any, behind the same methods.
"""
