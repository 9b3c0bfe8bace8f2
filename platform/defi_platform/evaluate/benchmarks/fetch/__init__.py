"""Fetch: a mobile arm of Farama's gymnasium-robotics that reaches, pushes, slides and lifts (MuJoCo)."""
