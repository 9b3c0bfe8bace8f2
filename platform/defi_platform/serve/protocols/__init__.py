"""Wire formats, one module each: bytes of a message go in, plain dicts of NumPy arrays come out, and back."""
