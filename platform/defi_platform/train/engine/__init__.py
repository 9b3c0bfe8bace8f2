"""DeepSpeed around a model: micro-batches come in, updated weights and training state as fragments come out."""
