"""A simulator in a process of its own, with its own Python: calls go in, states, outcomes and images come out."""
