"""The training loop of one rank: a recipe comes in, a trained run folder, or the reason why the run ended, comes out."""
