"""Tables: rows of any number go in; files and databases that are read without holding them in memory come out."""
