"""Training: recipes and configs come in, checkpoints, metrics and an exported model folder come out."""
