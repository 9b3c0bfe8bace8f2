"""Meta-World (MuJoCo): fifty tasks of one robot arm at a table; actions go in, states, success and images come out."""
