"""Wire formats, one module each: bytes on one side, plain dicts of NumPy arrays on the other."""
