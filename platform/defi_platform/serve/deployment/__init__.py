"""The deployment of a policy on a cluster: checks, start, scaling, replacement, end."""
