"""Measurement of what an evaluation costs on this machine or cluster, and the workers and replicas that suit it."""
