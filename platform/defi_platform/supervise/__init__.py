"""Supervision of a run: submits its job, follows it, and submits it again until the run is complete."""
