"""Corpus formats, one small module each: the folder of a corpus goes in, the same records of its videos come out."""
