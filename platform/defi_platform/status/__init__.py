"""The state of runs, read from their folders and from a cluster: progress, rate, last checkpoint, failures, cost."""
