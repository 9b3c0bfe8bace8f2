"""Benchmarks, one folder each, which alone imports its simulator; the interface that all of them have."""
