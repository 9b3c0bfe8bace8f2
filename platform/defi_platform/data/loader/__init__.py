"""Loading: a plan and a range of sample numbers go in, decoded micro-batches in that order come out."""
