"""The store of an evaluation: one policy's episodes, which any number of drivers add to and none changes."""
