"""Simulators, one module each, which alone imports it: actions go in, images, states and success come out."""
