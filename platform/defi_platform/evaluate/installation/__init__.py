"""Installation of a benchmark's simulator: as an extra of this package, or into an interpreter of its own."""
