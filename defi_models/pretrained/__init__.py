"""Model folders: a model or a folder goes in, and the folder, or the model with exactly its weights, comes out."""
