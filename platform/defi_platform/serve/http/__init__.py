"""Plain HTTP: one observation a request, health, metadata, and pages for people."""
