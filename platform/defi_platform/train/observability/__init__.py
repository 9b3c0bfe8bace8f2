"""Records of a run: rows, phases and versions come in, metrics.jsonl, status.json, curves, run card and W&B come out."""
