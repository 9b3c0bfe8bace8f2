"""Ingest: corpora as their sources list them go in; a committed manifest, and a quarantine with reasons, come out."""
