"""Data: corpora of video go in, batches of clips, frame pairs and action chunks come out, in an order that a plan fixes."""
