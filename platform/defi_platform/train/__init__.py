"""Ray Train + DeepSpeed: one loop, three recipes, checkpoints that outlive anything."""
