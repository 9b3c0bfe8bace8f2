"""Latent cache: frames of a manifest's videos go in once, what a frozen encoder makes of them comes out at every step."""
