"""The other side of benchmarks/exact_resume.py."""
