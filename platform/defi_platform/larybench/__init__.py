"""Latent actions of GIDM in LARYBench's layout, for its regression and classification tasks."""
