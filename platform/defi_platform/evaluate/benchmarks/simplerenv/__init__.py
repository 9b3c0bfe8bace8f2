"""SimplerEnv, Google Robot: real scenes rebuilt in SAPIEN, by visual matching and by variant aggregation."""
