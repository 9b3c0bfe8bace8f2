"""The checks of a cluster before work is given to it: on every node, one line each, with the way to put it right."""
