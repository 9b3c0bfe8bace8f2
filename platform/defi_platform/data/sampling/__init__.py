"""Sampling: a manifest, weights, a rule and a seed go in; the video, frames and text of any sample number come out."""
