"""What benchmarks/serving.py and benchmarks/serving_soak.py start as processes of their own."""
