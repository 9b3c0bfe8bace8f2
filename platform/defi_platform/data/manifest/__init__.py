"""The manifest: the committed tables of each corpus go in; typed columns and rows, found fast, come out."""
