"""Decoding in processes that can be killed: a URI and frame numbers go in, frames or the reason why there are none come out."""
