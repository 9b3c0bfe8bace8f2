"""Corpus formats: one small module each, all yielding the same rows."""
