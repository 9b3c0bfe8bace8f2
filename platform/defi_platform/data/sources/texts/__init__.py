"""Texts that lie in tables beside the videos: tables go in, rows come out, each matched to the video that it names."""
