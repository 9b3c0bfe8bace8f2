"""The driver: configs go in, checks and Ray Train runs follow, summaries of complete runs come out."""
