"""Inputs of the models: raw frames, states and actions go in, and checked, augmented and normalised ones come out."""
