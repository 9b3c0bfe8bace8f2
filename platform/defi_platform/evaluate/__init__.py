"""Evaluation: tasks and a served policy go in, recorded demonstrations, scored rollouts and reports come out."""
