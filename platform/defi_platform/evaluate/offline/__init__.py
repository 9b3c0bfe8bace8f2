"""Offline evaluation: the actions that a policy gives for recorded observations, held against those recorded."""
