"""The workers of an evaluation: which units they get, what becomes of lost ones, and when there are enough."""
