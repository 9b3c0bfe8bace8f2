"""One set of values rendered for KubeRay, `ray up`, SkyPilot and Slurm."""
