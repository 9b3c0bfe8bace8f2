"""HTML pages: results of a run or a manifest go in, one self-contained file comes out."""
