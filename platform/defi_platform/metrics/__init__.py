"""Metrics: a value comes in where something happens, a series at Ray's Prometheus endpoint comes out."""
