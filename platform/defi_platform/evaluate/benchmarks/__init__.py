"""Simulators: one module each, the only place that imports it."""
