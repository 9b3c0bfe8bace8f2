"""Statistics of evaluations: intervals, pooled rates, chains of tasks, comparison of paired episodes."""
