"""A policy under test as an evaluation meets it: what it is sent, whether it fits, what it was trained on."""
