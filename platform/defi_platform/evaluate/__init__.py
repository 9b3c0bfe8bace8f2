"""Benchmarks, recordings, rollouts, their statistics and the report."""
