"""Ways to run the part of acting that is on the device alone: as it is, as a CUDA graph, or compiled into a package."""
