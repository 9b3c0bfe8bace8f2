"""CALVIN on disk: language segments as records, and the signals of their frames without the pictures."""
