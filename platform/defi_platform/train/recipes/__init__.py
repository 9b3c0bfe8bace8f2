"""Recipes: a config goes in, the model, its samples and its evaluation for the training loop come out."""
