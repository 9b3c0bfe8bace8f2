"""GFDM, GIDM and the fused policy, as the loop trains them."""
