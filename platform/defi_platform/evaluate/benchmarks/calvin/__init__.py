"""CALVIN ABC-D: 1000 sequences of five tasks each."""
